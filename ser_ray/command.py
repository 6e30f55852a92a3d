"""Builds the command that a verb suggests as the next step, with the settings of the verb."""

import dataclasses
import shlex
from collections.abc import Collection, Iterator
from typing import Any


def next_command(verb: str, *arguments: str, **settings: Any) -> str:
    """Return a `ser-ray` command as text.

    Args:
        verb: name of the verb.
        arguments: positional arguments.
        settings: {field name: value}. If a value is a dataclass, each of its fields that
            differs from its default becomes a flag. Empty values are left out.
    """
    words = ["ser-ray", verb, *arguments]
    for name, value in settings.items():
        words += flags_of(value) if dataclasses.is_dataclass(value) else _flag(name, value)
    return shlex.join(words)


def flags_of(settings: Any, without: Collection[str] = ()) -> list[str]:
    """Return flags for all fields that differ from their defaults, except those in `without`."""
    return [
        word
        for name, value in _changed_fields(settings, type(settings)())
        if name not in without
        for word in _flag(name, value)
    ]


def _changed_fields(settings: Any, defaults: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            yield from _changed_fields(value, default)
        elif value != default:
            yield field.name, value


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if value in ("", ()):
        return []
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    if isinstance(value, float) and float(f"{value:g}") == value:
        return [f"--{flag}", f"{value:g}"]  # 0 instead of 0.0
    return [f"--{flag}", str(value)]
