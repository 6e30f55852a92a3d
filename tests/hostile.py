"""Hostile inputs for property tests: damaged bytes and damaged JSON.

A property has up to three budgets of examples. The quick tests have a small one, and slow tests a
larger one, both always with the same examples. Soak tests have many new examples in every run.
"""

import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ser_ray.errors import SerRayError

QUICK_EXAMPLES = 100
SOAK_EXAMPLES = 20_000
BIG = [
    struct.pack(layout, number)
    for layout in ("<I", ">I", "<Q", ">Q", "<H", ">H")
    for number in (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    if number < 2 ** (8 * struct.calcsize(layout))
]
"""Numbers that a header may claim: sizes, rates, counts of channels."""


def budgets(examples: int) -> pytest.MarkDecorator:
    """Run a test with `examples`, in a slow test if they are many, and with more in a soak test."""
    quick, slow = min(examples, QUICK_EXAMPLES), pytest.param(examples, marks=pytest.mark.slow)
    ci = [quick, slow] if examples > quick else [quick]
    soak = pytest.param(SOAK_EXAMPLES, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])
    return pytest.mark.parametrize("examples", [*ci, soak])


def hold(examples: int, strategy: st.SearchStrategy[Any], claim: Callable[[Any], None]) -> None:
    """Check that a claim holds for examples of a strategy."""
    settings(
        max_examples=examples,
        derandomize=examples != SOAK_EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(claim))()


def is_answered(call: Callable[[], Any]) -> bool:
    """Whether a call returns; if it does not, it must raise an error for the user, in one line."""
    try:
        call()
    except SerRayError as error:
        message = str(error)
    else:
        return True
    assert message
    assert "\n" not in message
    return False


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """Bytes of one of the originals after one to four edits, half of them near the beginning."""
    data = bytearray(draw(st.sampled_from(originals)))

    def place() -> int:
        end = len(data) if draw(st.booleans()) else min(len(data), 200)
        return draw(st.integers(0, end))

    for _ in range(draw(st.integers(1, 4))):
        edit = draw(st.sampled_from(["flip", "write", "cut", "drop", "repeat", "splice", "noise"]))
        at = place()
        if edit == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "write":
            number = draw(st.sampled_from(BIG))
            data[at : at + len(number)] = number
        elif edit == "cut":
            del data[at:]
        elif edit == "drop":
            del data[at : at + draw(st.integers(1, 4000))]
        elif edit == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 4000))] * draw(st.integers(1, 20))
        elif edit == "splice":
            data[at:] = draw(st.sampled_from(originals))[place() :]
        else:
            noise = draw(st.binary(min_size=1, max_size=64))
            data[at : at + len(noise)] = noise
    return bytes(data)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, 1, -1, 2**31, 2**63, 10**18, 10**400, 1e308, -0.5, "", "1", "../x"]),
        st.floats(),
        st.text(max_size=20),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
"""Any JSON value, also the numbers that only Python's parser reads: NaN and infinity."""


@st.composite
def damaged_json(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value in which one to three places hold something else, or are missing."""
    value = deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = None
        key: Any = None
        inner = value
        while isinstance(inner, dict | list) and inner and (parent is None or draw(st.booleans())):
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            parent, key = inner, draw(st.sampled_from(keys))
            inner = parent[key]
        if parent is None or draw(st.integers(0, 40)) == 0:
            value = draw(JSON)
        elif draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = draw(JSON)
    return value
