"""How sources of rows are written: files, folders, and data sets of a hub. Nothing is opened here (`sources/files.py`).

    data/rollouts.jsonl.gz           a file
    data/dumps                       a folder: every file of a known format in it and its subfolders, in name order
    data/saved, data/saved:train     what `save_to_disk` of a `Dataset` wrote, or of a `DatasetDict`, with its split
    data/repository:main:train       a folder as `datasets` reads it: configuration (optional) and split
    openai/gsm8k:main:train@REVISION a data set of the hub; the configuration and the revision (a branch, tag or
                                     commit) may be left out

Each may end in `?ours=theirs&...`: where prompts find what they call otherwise (see `sampling/prompts.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from megatron_erpd.errors import RolloutError

FORMATS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = f"{', '.join(FORMATS)} (the first five also with {', '.join(COMPRESSED)} after it)"
HOW = (
    "give a file or a folder, or a data set of the hub with its split: NAME:SPLIT, NAME:CONFIGURATION:SPLIT, either "
    "with @REVISION at its end"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceName:
    """The parts of a source's text; `fields` is what stands behind `?`."""

    place: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


def parse_source(text: str) -> SourceName:
    """The parts of a source. What is an existing path as it stands has no others."""
    if path_exists(text):
        return SourceName(text)
    body, _, query = text.partition("?")
    fields = dict(parse_qsl(query, keep_blank_values=True))
    if path_exists(body):
        return SourceName(body, fields=fields)
    named, at, revision = body.rpartition("@")
    if not at:
        named, revision = body, ""
    place, *parts = named.split(":")
    if len(parts) > 2 or not all(parts) or (at and not revision):
        return SourceName(body, fields=fields)  # no name, and so the path that it looks like
    config, split = parts[0] if len(parts) == 2 else None, parts[-1] if parts else None
    return SourceName(place, config, split, revision or None, fields)


def local_path(source: str | Path) -> Path | None:
    """The file or folder that a source names, whether it exists or not; None for a data set of the hub.

    A source is a data set of the hub when it is written as one, with a split, and no such file or folder exists.
    """
    text = str(source)
    if not text.strip():
        raise RolloutError(f"{text!r}: is empty; {HOW}")
    name = parse_source(text)
    is_named = name.split is not None and _HUB_NAME.fullmatch(name.place) and file_format(Path(name.place)) is None
    return None if is_named and not path_exists(name.place) else Path(name.place)


def is_there(source: str | Path | None) -> bool:
    """Whether a source can be read by now: no path, or one that exists."""
    path = None if source is None else local_path(source)
    return path is None or path.exists()


def file_format(path: Path) -> str | None:
    """How a file is read, by its name (in any case of letters); None for a name that says nothing known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        inner = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if inner in ("parquet", "arrow") else inner
    return FORMATS.get(suffixes[-1]) if suffixes else None


def path_exists(text: str) -> bool:
    """Whether there is a file, a folder or a link of this name."""
    try:
        return os.path.lexists(text)
    except ValueError:  # a zero byte
        return False
