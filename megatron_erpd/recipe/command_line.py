"""Requests as command lines and back: `argv_of` makes the words of a command, `read_request` reads them."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.requests import ModelRequest, Repeated, Request, SlicedRequest
from megatron_erpd.settings import Settings, error_lines
from megatron_erpd.settings.arguments import (
    add_settings_arguments,
    plain_type,
    settings_from_namespace,
    settings_to_argv,
)
from megatron_erpd.settings.megatron_flags import refused_flags
from megatron_erpd.slices import add_slice_arguments

_LAST = ("monitoring", "output", "verify_inputs", "slice", "merge_slices", "layout", "megatron")
"""The fields that come after a command's own, in this order."""


def argv_of(request: Request) -> list[str]:
    """The command line that asks for the same, without the command's name; what is at its default is left out."""
    argv: list[str] = []
    for name, field in _fields(type(request)):
        value, flag = getattr(request, name), _flag(name)
        if isinstance(value, Settings):
            argv += settings_to_argv(value)
        elif name == "megatron":
            argv += ["--", *value] if value else []
        elif repeated := _repeated(field):
            argv += [word for text in repeated.write(value) for word in (f"--{repeated.flag}", text)]
        elif value is True:
            argv.append(flag)
        elif value != field.default:
            # argparse takes a word that begins with - for a flag.
            argv += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return argv


def request_parser(kind: type[Request], optional: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command's own flags.

    Args:
        optional: fields that may be left out although the request needs them.
    """
    parser = argparse.ArgumentParser(
        prog=f"megatron-erpd {kind.command}",
        description=inspect.getdoc(kind),
        epilog=f"example: megatron-erpd {kind.command} {kind.example}",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, field in _fields(kind):
        type_ = plain_type(field.annotation)
        required = field.is_required() and name not in optional
        text = (field.description or "").replace("%", "%%")
        if name in ("megatron", "merge_slices"):
            continue
        if name == "slice":
            assert issubclass(kind, SlicedRequest)
            add_slice_arguments(parser, *kind.shares)
        elif isinstance(type_, type) and issubclass(type_, Settings):
            add_settings_arguments(parser, type_, field.title or name)
        elif repeated := _repeated(field):
            parser.add_argument(
                f"--{repeated.flag}", action="append", required=required, metavar=repeated.metavar, help=text
            )
        elif type_ is bool:
            parser.add_argument(_flag(name), action="store_true", default=None, help=text)
        elif get_origin(type_) is Literal:
            parser.add_argument(_flag(name), choices=get_args(type_), help=text)
        else:
            text += f" (default: {field.default})" if isinstance(field.default, int) else ""
            parser.add_argument(_flag(name), type=type_, required=required, help=text)
    return parser


def read_request[R: Request](kind: type[R], argv: Sequence[str]) -> R:
    """What a command line asks for: the inverse of `argv_of`.

    Raises:
        RecipeError: a value is out of range, or one of Megatron's flags doesn't work here; the message names the flag.
    """
    own, megatron = split_pass_through(argv)
    if refused := refused_flags(megatron):
        raise RecipeError("\n  ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return request_from(kind, request_parser(kind).parse_args(own), megatron)


def request_from[R: Request](kind: type[R], given: argparse.Namespace, megatron: Sequence[str] = ()) -> R:
    """The request of parsed flags (of `request_parser`), and of Megatron's."""
    values: dict[str, Any] = {"megatron": kind.taken_flags(megatron)} if issubclass(kind, ModelRequest) else {}
    for name, field in kind.model_fields.items():
        type_, repeated = plain_type(field.annotation), _repeated(field)
        value = getattr(given, repeated.flag if repeated else name, None)
        if isinstance(type_, type) and issubclass(type_, Settings):
            values[name] = settings_from_namespace(given, type_)
        elif value is not None:
            values[name] = repeated.read(value) if repeated else value
    try:
        return kind(**values)
    except ValidationError as error:
        lines = [f"{_flag(where)}: {what}" if where else what for where, what in error_lines(error)]
        raise RecipeError("\n  ".join(lines)) from None


def split_pass_through(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A stage's own flags, and the Megatron flags that the user gave after `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _fields(kind: type[Request]) -> Iterator[tuple[str, FieldInfo]]:
    """In the order of a command line."""
    fields, own = kind.model_fields, kind.__annotations__
    names = [*(name for name in fields if name not in own), *own]
    names = [*(name for name in names if name not in _LAST), *(name for name in _LAST if name in fields)]
    yield from ((name, fields[name]) for name in names if name in fields)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _repeated(field: FieldInfo) -> Repeated | None:
    return next((item for item in field.metadata if isinstance(item, Repeated)), None)
