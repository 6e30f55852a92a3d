"""The JSON text of results that other programs read."""

import json
from typing import Any


def to_json(value: Any) -> str:
    """Write a value as indented JSON; a number that is not finite becomes null.

    Python's own encoder writes `NaN`, which RFC 8259 does not allow and other parsers refuse.
    """
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(strict, indent=2, allow_nan=False)
