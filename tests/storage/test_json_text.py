"""JSON as its standard defines it, which knows no NaN."""

import json
import math

import numpy as np
import pytest

from ser_ray.storage.json_text import to_json


def refuse(constant: str) -> None:
    raise ValueError(constant)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_number_that_is_not_finite_becomes_null_at_any_depth(value):
    text = to_json({"ua": value, "intervals": {"ua": (0.25, value)}, "rows": [[value], 1]})
    assert json.loads(text, parse_constant=refuse) == {
        "ua": None,
        "intervals": {"ua": [0.25, None]},
        "rows": [[None], 1],
    }


def test_everything_else_is_written_as_the_standard_library_does():
    value = {"share": 0.1 + 0.2, "count": 3, "name": "é NaN", "none": None, "is_own": True}
    assert to_json(value) == json.dumps(value, indent=2)
