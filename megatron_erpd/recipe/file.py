"""Reading a recipe's file: YAML without repeated keys, values from the command line, and all that is wrong in it."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.recipe import (
    RECIPE,
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
    over_layout,
)

_OF_A_RUN = (".lock", "slurm/jobs.json", "round-00", "round-01")
"""What lies beside the recipe in the folder of a run that has begun."""


def load_recipe(
    path: Path,
    overrides: Iterable[str] = (),
    layout: Mapping[str, Any] | None = None,
    output: str | None = None,
) -> Recipe:
    """Reads and validates a recipe.

    A run's folder that is given, or the recipe in it, is the run, whatever its recipe says of name and output. Its
    relative paths begin where the run was first started: `directory` of what is returned.

    Args:
        path: the YAML file, or the folder of a run.
        overrides: `section.key=value` each, over the file's; the value is YAML (`student.epochs=4`, `unlearned=null`).
        layout: fields of the layout, over the recipe's `layout` section.
        output: the run's folder, over all others, relative to the current directory.

    Raises:
        RecipeError: the file is missing or no YAML mapping, the folder is not that of a run, or names everything that
            is wrong in the recipe.
    """
    overrides = list(overrides)
    values = _read_yaml(path)
    run = _run_given(path, values)
    recorded = values.get("directory")
    places = {text.partition("=")[0] for text in overrides}
    for text in overrides:
        _override(values, text, places)
    if layout:
        values["layout"] = {**(values.get("layout") or {}), **over_layout(layout)}
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        lines = [_explain(where, what) for where, what in error_lines(error)]
        raise RecipeError(f"{path}: {len(lines)} problem{'s'[: len(lines) > 1]}:\n" + "\n".join(lines)) from None
    if run and recipe.directory == recorded:
        directory = _where_paths_begin(recipe, Path(os.path.abspath(run)))
    else:
        directory = Path(os.path.abspath(recipe.directory or ""))
    if not directory.is_dir():
        raise RecipeError(f"{path}: directory {directory}: no such folder; give the one where relative paths begin")
    if run and not any(text.startswith("output=") for text in overrides):
        output = output or str(run)
    folder = Path(os.path.abspath(output or directory / recipe.folder))
    elsewhere = directory != Path.cwd() or recorded is not None
    return recipe.model_copy(
        update={
            "directory": str(directory) if elsewhere else None,
            "output": _seen_from(directory, folder, recipe) if elsewhere or output else recipe.output,
        }
    )


def _run_given(path: Path, values: Mapping[str, Any]) -> Path | None:
    """The folder of the run that `path` names by itself or by the recipe in it; None for a recipe of the user's."""
    folder = path if path.is_dir() else path.parent
    begun = any((folder / name).exists() for name in _OF_A_RUN)
    if path.is_dir():
        # A copy may have lost what is hidden; the recipe of a run says where its paths begin.
        if not begun and "directory" not in values:
            raise RecipeError(
                f"{path}: holds a recipe and no run; `{path / RECIPE}` starts one from it, with its folder as the "
                "recipe says or --output"
            )
        return path
    return folder if path.name == RECIPE and begun else None


def _where_paths_begin(recipe: Recipe, run: Path) -> Path:
    """The directory where the relative paths of a run's recipe begin.

    It is the recorded one, also of a run that was renamed or copied. Of a run that was moved or copied together with
    that directory, it is the new one: it holds the run in the same place, and all that the recipe names.
    """
    recorded, own = Path(recipe.directory or Path.cwd()), recipe.folder
    if recipe.directory and recorded.is_dir() and _same(recorded / own, run):
        return recorded
    depth = len(own.parts)
    if not own.is_absolute() and ".." not in own.parts and run.parts[-depth:] == own.parts:
        moved = run.parents[depth - 1]
        if all((moved / name).exists() for name in _names(recipe) if (recorded / name).exists()):
            return moved
    if recorded.is_dir():
        return recorded
    print(
        f"{run / RECIPE}: the directory {recorded}, where its relative paths began, is gone: they begin at "
        f"{Path.cwd()}",
        file=sys.stderr,
    )
    return Path.cwd()


def _names(recipe: Recipe) -> Iterator[str]:
    """Whatever in a recipe may be a relative path."""
    left: list[Any] = [recipe.model_dump(mode="json", exclude={"name", "output", "directory"})]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield from (word for word in re.split(r"[\s:]+", value) if word and not Path(word).is_absolute())
        elif isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value


def _seen_from(directory: Path, folder: Path, recipe: Recipe) -> str | None:
    """How the run's folder is called: as in the recipe where that is the same, or else relative where it lies inside of
    the directory; absolute when that is not the current one, where the user would look for it."""
    if directory != Path.cwd():
        return str(folder)
    if _same(directory / recipe.folder, folder):
        return recipe.output
    return str(folder.relative_to(directory) if folder.is_relative_to(directory) else folder)


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


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
        path = path / RECIPE
    try:
        values = yaml.load(path.read_text(), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror}); give the path of a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, as `name: mine`")
    return values


def _override(values: dict[str, Any], text: str, places: Collection[str]) -> None:
    """Puts one value over the file's.

    Args:
        places: of all that are given so, of which a layout's two sizes may not both be.
    """
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
    if keys[-2:-1] == ["layout"] and section[keys[-1]] is not None:
        for other in over_layout({keys[-1]: section[keys[-1]]}):
            if ".".join([*keys[:-1], other]) not in places:
                section.pop(other, None)


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
