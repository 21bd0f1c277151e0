"""What of the folders and programs that users give counts: what is read of them, not every byte that lies beside it.

Notes of a hub's client, a desktop's hidden files, locks and editors' backups are not data. Of a program its code
counts; comments, docstrings and the way it is laid out do not.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath

_JUNK_FOLDERS = {"__pycache__", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_JUNK_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_JUNK_SUFFIXES = {
    *(".lock", ".tmp", ".temp", ".part", ".partial", ".incomplete", ".metadata", ".crdownload", ".aria2"),
    *(".swp", ".swo", ".bak", ".orig", ".rej", ".pyc", ".pyo"),
}
_DOCUMENT = re.compile(
    r"(readme|licen[sc]e|notice|copying|changelog|citation|use_policy|authors)([-_. ].*)?", re.IGNORECASE
)
_DOCUMENT_SUFFIXES = {"", ".txt", ".rst", ".html", ".cff", ".pdf"}
_FOR_PEOPLE = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
"""Suffixes of files that no program of ours reads, whatever their names."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_OTHER_WEIGHTS = (
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx"),
    *(".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
)
_MODEL_FOLDERS = {"additional_chat_templates"}
_OWN_PACKAGE = "megatron_erpd"


def is_junk(name: PurePath) -> bool:
    """Whether a file, by its path in a folder, is one that no program of the user's has put there to be read: hidden,
    in a hidden folder, a lock, an unfinished download, a backup."""
    if any(part.startswith(".") or part in _JUNK_FOLDERS for part in name.parts):
        return True
    last = name.name.lower()
    return last in _JUNK_NAMES or name.suffix.lower() in _JUNK_SUFFIXES or last.endswith("~") or last.startswith("~$")


def identifying_files(names: Iterable[PurePath]) -> list[PurePath]:
    """Those of a folder's files, by their paths in it, that make it what it is as an input.

    Junk and documents for people (README, licence, pictures) are left out. Of a Hugging Face folder only its own files
    count, those of a tokenizer's subfolder and Python code, since nothing reads other subfolders; and where there are
    safetensors, no weights in other formats.
    """
    kept = [name for name in names if not is_junk(name) and not _is_document(name)]
    if PurePath("config.json") not in kept:
        return kept
    kept = [n for n in kept if len(n.parts) == 1 or n.parts[0] in _MODEL_FOLDERS or n.suffix == ".py"]
    if any(name.name in _WEIGHTS for name in kept):
        kept = [name for name in kept if not name.name.endswith(_OTHER_WEIGHTS)]
    return kept


def without_weights(names: Iterable[PurePath]) -> list[PurePath]:
    """Those of `identifying_files` that are no weights: what makes a Hugging Face folder the tokenizer that it is."""
    weights = (*_WEIGHTS, ".safetensors", *_OTHER_WEIGHTS)
    return [name for name in identifying_files(names) if not name.name.endswith(weights)]


def files_below(folder: Path) -> list[PurePath]:
    """Paths, in the folder, of its files that are not junk; hidden folders are not entered."""
    found: list[PurePath] = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not is_junk(PurePath(name))]
        found += [inside / name for name in files if not is_junk(PurePath(name)) and (Path(place) / name).is_file()]
    return found


def _is_document(name: PurePath) -> bool:
    suffix = name.suffix.lower()
    return suffix in _FOR_PEOPLE or (suffix in _DOCUMENT_SUFFIXES and _DOCUMENT.fullmatch(name.name) is not None)


def program_digest(file: Path, with_modules: bool = True) -> str:
    """SHA-256 of a Python program's code: its syntax, without comments, docstrings and layout.

    A file that can't be parsed is identified by its bytes.

    Args:
        with_modules: the modules of its own folder and package that it imports count too, and those that they import.
            Modules from elsewhere don't, nor do data files that the program reads.
    """
    files = [file, *_modules(file)] if with_modules else [file]
    codes = sorted((os.path.relpath(path.resolve(), file.resolve().parent), _code(path)) for path in files[1:])
    # The file itself by its content alone: it may be renamed.
    return hashlib.sha256(json.dumps([_code(file), codes]).encode()).hexdigest()


def module_file(name: str) -> Path | None:
    """The source file of a module, found without importing anything; None for one that has none."""
    found: ModuleSpec | None = None
    path: Sequence[str] | None = None
    parts = name.split(".")
    for depth in range(len(parts)):
        full = ".".join(parts[: depth + 1])
        specs = (finder.find_spec(full, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next((spec for spec in specs if spec is not None), None)
        if found is None:
            return None
        path = found.submodule_search_locations
        if path is None and depth + 1 < len(parts):
            return None
    origin = found.origin if found else None
    return Path(origin) if origin and origin.endswith(".py") else None


def _code(file: Path) -> str:
    content = file.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()


def _plain(value: object) -> object:
    """A syntax tree as JSON, the same for every version of Python that parses it so. (`ast.dump` is not.)"""
    if isinstance(value, ast.AST):
        fields = {name: _plain(field) for name, field in ast.iter_fields(value) if name not in ("kind", "type_comment")}
        return [type(value).__name__, {name: field for name, field in fields.items() if field not in (None, [])}]
    if isinstance(value, list):
        # A constant as a statement, such as a docstring, does nothing.
        return [_plain(v) for v in value if not (isinstance(v, ast.Expr) and isinstance(v.value, ast.Constant))]
    return None if value is None else f"{type(value).__name__} {value!r}"


def _modules(file: Path) -> list[Path]:
    """The modules of the file's folder and package that it imports, directly or through others of them."""
    found: dict[Path, Path] = {}
    waiting = [file]
    start = file.resolve()
    while waiting:
        path = waiting.pop()
        for module in _imported(path):
            resolved = module.resolve()
            if resolved != start and resolved not in found:
                found[resolved] = module
                waiting.append(module)
    return list(found.values())


def _imported(file: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    folder, top = file.parent, _package_root(file.parent)
    roots = [root for root in dict.fromkeys((folder, top)) if not _is_library(root)]
    for node in ast.walk(tree):
        names: list[str]
        place: Path | None = None
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            place = folder
            for _ in range(node.level - 1):
                place = place.parent
            if (place / "__init__.py").is_file():
                yield place / "__init__.py"
            names = [node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = [part for part in name.split(".") if part]
            if place is None and parts[:1] == [_OWN_PACKAGE]:
                continue
            for root in [place] if place is not None else _roots_of(parts, roots, folder, top):
                yield from _files_of(root, parts)


def _roots_of(parts: list[str], roots: list[Path], folder: Path, top: Path) -> list[Path]:
    """Where a module with a full name may lie: in the file's folder, or beside the package that the file is of."""
    if _is_library(top) and folder != top and (top / parts[0]) in (folder, *folder.parents):
        return [top]  # a package that is installed: its own modules, none of its neighbours
    return roots


def _files_of(root: Path, parts: list[str]) -> Iterator[Path]:
    """The files that importing a name below `root` runs, packages' `__init__.py` included, as far as they are there."""
    place = root
    for part in parts:
        if (place / f"{part}.py").is_file():
            yield place / f"{part}.py"
            return
        place = place / part
        if not place.is_dir():
            return
        if (place / "__init__.py").is_file():
            yield place / "__init__.py"


def _package_root(folder: Path) -> Path:
    """The folder that holds the outermost package that `folder` is a part of; itself where it is no package."""
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        folder = folder.parent
    return folder


def _is_library(folder: Path) -> bool:
    """Whether this is where Python keeps modules that are installed."""
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return folder.name in ("site-packages", "dist-packages") or str(folder.resolve()) in installed
