"""Reading a recipe's file: YAML without repeated keys, values from the command line, and all that is wrong in it."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_erpd.errors import RecipeError
from megatron_erpd.pipeline.recipe import (
    DistillControl,
    Evaluation,
    Imported,
    OnPolicyControl,
    Recipe,
    ReplayControl,
    Sampled,
    Selection,
    StageOverrides,
    Unlearned,
    WarmUp,
)
from megatron_erpd.settings import (
    DistillSettings,
    Layout,
    Monitoring,
    PrecomputeSettings,
    ReplaySettings,
    Settings,
    SlurmSettings,
    error_lines,
)


def load_recipe(path: Path, overrides: Iterable[str] = (), layout: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each, over the file's; the value is YAML (`student.epochs=4`, `unlearned=null`).
        layout: fields of the layout, over the recipe's `layout` section.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or names everything that is wrong in it.
    """
    values = _read_yaml(path)
    for text in overrides:
        _override(values, text)
    if layout:
        values["layout"] = {**(values.get("layout") or {}), **layout}
    try:
        return Recipe(**values)
    except ValidationError as error:
        lines = [_explain(where, what) for where, what in error_lines(error)]
        raise RecipeError(f"{path}: {len(lines)} problem{'s'[: len(lines) > 1]}:\n" + "\n".join(lines)) from None


class _StrictLoader(yaml.SafeLoader):
    """A safe loader which refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "recipe.yaml"
    try:
        values = yaml.load(path.read_text(), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror}); give the path of a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, as `name: mine`")
    return values


def _override(values: dict[str, Any], text: str) -> None:
    place, equals, value = text.partition("=")
    keys = place.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {text}: write SECTION.KEY=VALUE, as student.epochs=4")
    section = values
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise RecipeError(f"--set {text}: {'.'.join(keys[:depth])} is a value, not a section")
    try:
        section[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}: {value!r} is no YAML value; quote it") from None


def _explain(where: str, what: str) -> str:
    """A line for one error: its place as written in the recipe, and a guess at what a mistyped key was meant to be."""
    parts = where.split(".") if where else []
    # Pydantic names the branch of a union too; the recipe doesn't.
    if parts[:1] == ["rollouts"] and parts[1:2] in (["sampled"], ["imported"]):
        del parts[1]
    if parts[:1] == ["controls"] and parts[2:3] in (["replay"], ["distill"], ["on_policy"]):
        del parts[2]
    if what == "Extra inputs are not permitted":
        what = "unknown key"
        known = _known_keys(parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        what += f"; did you mean {close[0]}?" if close else f"; the keys here are {', '.join(known)}" if known else ""
    elif what == "Field required":
        what = "missing; this key is needed"
    return f"  {'.'.join(parts)}: {what}" if parts else f"  {what}"


def _known_keys(section: list[str]) -> list[str]:
    models: dict[str, tuple[type[Settings], ...]] = {
        "warm_up": (WarmUp,),
        "rollouts": (Sampled, Imported),
        "teacher": (ReplaySettings,),
        "unlearned": (Unlearned,),
        "teachers": (ReplaySettings,),
        "selection": (Selection,),
        "cache": (PrecomputeSettings,),
        "student": (DistillSettings,),
        "controls": (ReplayControl, DistillControl, OnPolicyControl),
        "evaluation": (Evaluation,),
        "layout": (Layout,),
        "monitoring": (Monitoring,),
        "slurm": (SlurmSettings,),
        "stages": (StageOverrides,),
    }
    # A stage's own sections are those of the recipe.
    if section[:1] == ["stages"] and section[2:] in (["layout"], ["slurm"]):
        section = section[2:]
    chosen = models.get(section[0], ()) if section else (Recipe,)
    return [key for model in chosen for key in model.model_fields]
