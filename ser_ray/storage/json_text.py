"""Writes JSON that every program can read, and reads JSON from untrusted files."""

import json
from typing import Any


def to_json(value: Any) -> str:
    """Return a value as indented JSON; numbers that are not finite become null.

    By default, Python writes `NaN`, which RFC 8259 does not allow and other parsers refuse.
    """
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2)


def read_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or is not an object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"the JSON is a {type(value).__name__} instead of an object")
    return value
