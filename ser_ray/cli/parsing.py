"""Parses a command line into a verb: a field of the dataclass is a flag, its docstring the help.

tyro's own rule for dataclasses keeps the line breaks of docstrings in the help, and lists inherited
fields first. The rule here joins the lines, and lists the verb's own flags first.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from docstring_parser import parse_from_object
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ser_ray.cli.verb import Common, Verb
from ser_ray.errors import ConfigError

V = TypeVar("V", bound=Verb)
DESCRIPTION = """Speech emotion recognition at scale, on Ray and MLflow.
Options of a verb: `ser-ray VERB --help`. Version: `ser-ray --version`. To complete words with the
Tab key: `ser-ray --tyro-write-completion bash FILE` (or zsh), then `source FILE`."""


def parse_verb(verbs: Mapping[str, type[Verb]], arguments: Sequence[str]) -> Verb:
    """Parse `VERB --flag value ...`.

    Raises:
        ConfigError: there is no such verb.
        SystemExit: help was requested, or a flag cannot be parsed. tyro has printed the text.
    """
    name, flags = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in verbs:
        return _parse(verbs[name], flags, f"ser-ray {name}").resolved(flags)
    if not name.startswith("-"):
        near = difflib.get_close_matches(name, verbs, n=1) or ["--help"]
        hint = "lists the verbs" if near == ["--help"] else "is the most similar verb"
        raise ConfigError(f"there is no verb {name!r}: ser-ray {near[0]} {hint}")
    verb: Verb = tyro.extras.subcommand_cli_from_dict(
        dict(verbs),
        args=[name, *flags],
        prog="ser-ray",
        description=DESCRIPTION,
        registry=_registry(),
    )
    return verb


def parse_over(flags: Sequence[str], defaults: V) -> V:
    """Parse a verb's flags with other defaults. Flags win, even with a usual default."""
    return _parse(type(defaults), flags, "ser-ray", defaults)


def _parse(verb: type[V], flags: Sequence[str], prog: str, defaults: V | None = None) -> V:
    # Other defaults may turn a switch on or off, so both --flag and --no-flag are needed.
    pairs = () if defaults is not None else (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(
        verb,
        args=flags,
        prog=prog,
        default=MISSING_NONPROP if defaults is None else defaults,
        config=(tyro.conf.OmitArgPrefixes, *pairs),
        registry=_registry(),
    )


@cache
def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_dataclass_rule)
    return registry


def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    kind = info.type
    if not dataclasses.is_dataclass(kind) or not kind.__module__.startswith("ser_ray."):
        return None  # such as tyro's dataclass of all verbs
    texts = {
        item.arg_name: " ".join((item.description or "").split())
        for base in reversed(kind.__mro__[:-1])
        for item in parse_from_object(base).params
    }
    hints = get_type_hints(kind, include_extras=True)
    own = kind.__annotations__

    def rank(field: dataclasses.Field[Any]) -> tuple[bool, bool, bool]:
        is_group = dataclasses.is_dataclass(hints[field.name])
        return hints[field.name] is Common, is_group, field.name not in own

    fields = []
    for field in sorted(dataclasses.fields(kind), key=rank):
        default, hint = _default_of(field, info.default), hints[field.name]
        if default is None or default in ("", ()) or isinstance(default, bool):
            # The docstring explains these defaults.
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        fields.append(StructFieldSpec(field.name, hint, default, texts.get(field.name, "")))
    return StructConstructorSpec(kind, tuple(fields))


def _default_of(field: dataclasses.Field[Any], parent: Any) -> Any:
    if dataclasses.is_dataclass(parent):
        return getattr(parent, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_NONPROP
