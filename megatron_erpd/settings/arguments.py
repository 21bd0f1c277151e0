"""Settings as command-line flags and back: one flag per field, made from the models in `settings`."""

from __future__ import annotations

import argparse
import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from megatron_erpd.errors import RecipeError
from megatron_erpd.settings import Settings, error_lines


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that has the command line start several processes (`commands.cli`)."""
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="share the work among so many processes of this machine (default: 1; under torchrun, those it started)",
    )


def add_settings_arguments(parser: argparse.ArgumentParser, model: type[Settings], title: str) -> None:
    """Adds one flag per field of `model` to `parser`, with the field's default, choices and description."""
    group = parser.add_argument_group(title, model.__doc__)
    for name, field in model.model_fields.items():
        kind = plain_type(field.annotation)
        default = "" if field.default is None else f" (default: {field.default})"  # the description says what None is
        text = f"{field.description}{default}".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif get_origin(kind) is dict:
            group.add_argument(flag, type=_json_object, default=None, metavar="JSON", help=text)
        elif get_origin(kind) is Literal:
            group.add_argument(flag, choices=get_args(kind), default=None, help=text)
        else:
            group.add_argument(flag, type=kind, default=None, metavar=name.upper(), help=text)


def settings_from_namespace[S: Settings](namespace: argparse.Namespace, model: type[S]) -> S:
    """The settings that flags gave; a flag that was not given takes the field's default.

    Raises:
        RecipeError: a value is out of range; the message names the flag.
    """
    given = {n: getattr(namespace, n) for n in model.model_fields if getattr(namespace, n, None) is not None}
    try:
        return model(**given)
    except ValidationError as error:
        lines = [f"--{where.replace('_', '-')}: {what}" if where else what for where, what in error_lines(error)]
        raise RecipeError("\n  ".join(lines)) from None


def settings_to_argv(settings: Settings) -> list[str]:
    """The flags that give these settings back; fields at their defaults are left out."""
    argv: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value == field.default:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            argv += [f"--{flag}", json.dumps(value)]
        elif str(value).startswith("-"):
            argv.append(f"--{flag}={value}")  # argparse would take a lone -1e-05 for a flag
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text}: isn\'t JSON ({error}); write it as {{"name": true}}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text}: isn\'t a JSON object; write it as {{"name": true}}')
    return value


def plain_type(annotation: Any) -> Any:
    """`float | None` to `float`: None is 'not given' on a command line."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation
