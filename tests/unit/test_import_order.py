"""The packages form a chain: a later one may import an earlier one, never the reverse. Read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_erpd"

ORDER = [
    *("__init__", "errors", "settings", "files", "locks", "progress", "units", "content", "manifest"),
    *("model_folder", "slices", "launcher", "meeting", "platform", "objectives", "vocab_parallel", "data", "sources"),
    *("teacher_cache", "sampling", "checkpoint", "evaluation", "model", "precompute", "training", "report"),
    *("recipe", "plan", "launch", "slurm", "commands"),
]

ONLY_IN = {
    "megatron.training": {"platform", "model", "precompute", "training", "launch", "commands"},
    "megatron": {"platform", "model", "precompute", "training", "launch", "checkpoint", "commands"},
    "transformers": {"sources", "sampling", "evaluation", "checkpoint", "model", "commands", "report"},
}
"""Packages that may import a heavy library at all, at the top of a module or inside a function."""

LIGHT = [
    *("errors", "settings", "settings/arguments", "files", "locks", "progress", "content", "manifest", "model_folder"),
    *("units", "slices", "launcher", "sources/names", "commands/cli", "commands/rollouts"),
    "commands/held_out",
    *("launch/program", "recipe/recipe", "recipe/file", "slurm/job"),
]
"""Modules that a command line, or a job, loads before it knows what to do."""

MOST_MODULES = 16
"""In a folder, `__init__` counted: more is a heap, not a room."""


def imports(path: Path) -> set[str]:
    """Full names of everything that a module imports, also inside functions, but for typing alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: imports are written with full names"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_folder_is_a_room():
    folders = {path.parent for path in modules()}
    assert {folder: n for folder in folders if (n := len(list(folder.glob("*.py")))) > MOST_MODULES} == {}


def test_every_package_has_its_place():
    assert {layer(path) for path in modules()} <= set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_to_earlier_packages(name):
    for path in modules():
        if layer(path) != name:
            continue
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in ORDER:
                assert ORDER.index(parts[1]) <= ORDER.index(name), f"{path} imports {imported}"


def test_no_modules_import_one_another():
    """... also inside functions, and by way of others."""
    known = {module(path) for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        found = set()
        for name in imports(path):
            while name and name not in known:  # a name in a module
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module(path)] = found - {module(path), ""}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_heavy_libraries_stay_where_they_are_needed():
    for path in modules():
        for imported in imports(path):
            for library, allowed in ONLY_IN.items():
                if imported == library or imported.startswith(library + "."):
                    assert layer(path) in allowed, f"{path} imports {imported}"


def test_the_command_line_starts_light():
    names = [f"megatron_erpd.{path.replace('/', '.')}" for path in LIGHT]
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "megatron"} & set(result.stdout.split())


def replaced(path: Path) -> list[str]:
    """What a module sets in other libraries: attributes of what it imports that is not the package's own."""
    tree = ast.parse(path.read_text())
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (getattr(node, "module", None) or node.names[0].name).split(".")[0] in ("megatron", "torch", "transformers")
        for alias in node.names
    }
    targets = [
        target
        for node in ast.walk(tree)
        for target in (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign | ast.AugAssign)
            else node.args[:1]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
            else []
        )
        if isinstance(target, ast.Attribute) or isinstance(node, ast.Call)
    ]
    return [text for text in map(ast.unparse, targets) if text.split(".")[0] in foreign]


def test_libraries_are_patched_in_platform_alone():
    found = {layer(path): names for path in modules() if (names := replaced(path))}
    assert "platform" in found and found.keys() == {"platform"}, found
