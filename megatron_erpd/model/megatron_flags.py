"""Megatron's own flags, read by its own parser, without starting it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

from megatron_erpd import platform
from megatron_erpd.settings.megatron_flags import refused_flags


class _Refused(Exception):
    """What argparse would print before it ends the process."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


@cache
def _parser() -> _Parser:
    platform.enable_cpu()
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    return parser


def flag_problems(flags: Sequence[str]) -> list[str]:
    """What is wrong with Megatron flags as they stand on a command line, each line beginning with the flag.

    A flag that doesn't work here, with the reason; one that Megatron doesn't know, with the one that was probably
    meant; a value that it doesn't take.
    """
    if not flags:
        return []
    if refused := refused_flags(flags):
        return [f"{name}: {reason}" for name, reason in refused.items()]
    parser = _parser()
    known = [name for action in parser._actions for name in action.option_strings]
    problems = []
    for word in flags:
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            problems.append(f"{name}: Megatron has no such flag; {hint}")
    if problems:
        return problems
    try:
        _, unread = parser.parse_known_args(list(flags))
    except _Refused as error:
        return [str(error).removeprefix("argument ")]
    return [f"{word}: is no flag, and no value of the flag before it; remove it" for word in unread]
