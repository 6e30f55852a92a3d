"""Parses a command line into a verb: fields become flags, and docstrings become help texts.

tyro's own rule for dataclasses keeps the line breaks of docstrings in the help, and lists inherited
fields first. The rule here joins the lines, and lists a verb's own flags first.
"""

import dataclasses
import difflib
import inspect
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from textwrap import fill
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

To list the options of a verb, run `ser-ray VERB --help`. `ser-ray --version` prints the version. To
complete words with the Tab key, run `ser-ray --tyro-write-completion bash FILE` (or zsh) once, and
`source FILE` in every shell."""


def parse_verb(verbs: Mapping[str, type[Verb]], arguments: Sequence[str]) -> Verb:
    """Parse `VERB --flag value ...`.

    Raises:
        ConfigError: there is no such verb.
        SystemExit: help was requested, or a flag cannot be parsed; tyro has printed the text.
    """
    name, *flags = arguments or ["--help"]
    if name in verbs:
        return _parse(verbs[name], flags, f"ser-ray {name}").resolved(flags)
    if not name.startswith("-"):
        similar = difflib.get_close_matches(name, verbs, n=1)
        hint = f"{similar[0]} is the most similar verb" if similar else "--help lists the verbs"
        raise ConfigError(f"there is no verb {name!r}: ser-ray {hint}")
    verb: Verb = tyro.extras.subcommand_cli_from_dict(
        dict(verbs),
        args=[name, *flags],
        prog="ser-ray",
        description=_wrapped(DESCRIPTION),
        registry=_registry(),
    )
    return verb


def parse_over(flags: Sequence[str], defaults: V) -> V:
    """Parse a verb's flags with other defaults, which apply only to flags that are not given."""
    return _parse(type(defaults), flags, "ser-ray", defaults)


def _parse(verb: type[V], flags: Sequence[str], prog: str, defaults: V | None = None) -> V:
    config = [tyro.conf.OmitArgPrefixes]
    if {"-h", "--help"} & set(flags):  # the help shows only the form that changes the default
        config.append(tyro.conf.FlagCreatePairsOff)
    return tyro.cli(
        verb,
        args=flags,
        prog=prog,
        description=_wrapped(verb.__doc__ or ""),
        default=MISSING_NONPROP if defaults is None else defaults,
        config=config,
        registry=_registry(),
    )


def _wrapped(description: str) -> str:
    """Break the paragraphs of a description at the width of the terminal, which tyro does not do.

    tyro joins lines unless they begin with a space or another character that is no letter.
    """
    width = shutil.get_terminal_size().columns
    paragraphs = inspect.cleandoc(description).split("\n\n")
    return "\n\n".join(
        fill(text, width, subsequent_indent=" ", break_on_hyphens=False) for text in paragraphs
    )


@cache
def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.struct_rule(_dataclass_rule)
    return registry


def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    kind = info.type
    if not dataclasses.is_dataclass(kind) or not kind.__module__.startswith("ser_ray."):
        return None  # tyro's own dataclass of all verbs
    help_texts = {
        item.arg_name: " ".join((item.description or "").split())
        for base in reversed(kind.__mro__[:-1])
        for item in parse_from_object(base).params
    }
    hints = get_type_hints(kind, include_extras=True)

    def position(field: dataclasses.Field[Any]) -> tuple[bool, bool, bool]:
        hint = hints[field.name]
        is_inherited = field.name not in kind.__annotations__
        return hint is Common, dataclasses.is_dataclass(hint), is_inherited

    fields = []
    for field in sorted(dataclasses.fields(kind), key=position):
        default, hint = _default_of(field, info.default), hints[field.name]
        if default is None or default in ("", ()) or isinstance(default, bool):
            # These defaults are not shown, because the docstring explains them.
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        text = help_texts.get(field.name, "")
        if default is True:  # the flag turns the field off, and its text ends the docstring
            text = text.rpartition(f"`--no-{field.name.replace('_', '-')}` ")[2]
            text = text[:1].upper() + text[1:]
        fields.append(StructFieldSpec(field.name, hint, default, text))
    return StructConstructorSpec(kind, tuple(fields))


def _default_of(field: dataclasses.Field[Any], parent: Any) -> Any:
    if dataclasses.is_dataclass(parent):
        return getattr(parent, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_NONPROP
