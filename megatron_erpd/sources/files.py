"""The files of a source, whatever it is: a file, a folder, what `datasets` saved, or a data set of a hub or its cache.

`megatron_erpd/sources/names.py` says how sources are written; the rows of the files are read by `rows.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_erpd.errors import RolloutError
from megatron_erpd.manifest import file_digest
from megatron_erpd.sources.names import HOW, SUFFIXES, SourceName, file_format, local_path, parse_source, path_exists

if TYPE_CHECKING:
    import datasets

_SAVED, _SAVED_DICT = "state.json", "dataset_dict.json"
# Beside the data, in JSON: what `datasets`, hub repositories and this project's own artifacts describe themselves with.
_DESCRIPTIONS = {
    *("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"),
    *("manifest.json", "request.json", "report.json", "metrics.jsonl"),
}
_COMMIT = re.compile("[0-9a-f]{40}")
# Words in the names of files and folders, as `datasets` takes them for a split's.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"^(.*)-\d{5}-of-(\d{5})(\..*)$")


@dataclass(frozen=True)
class Source:
    """A source's files.

    Attributes:
        text: as the user wrote it.
        files: those that are read, in this order.
        not_read: the other files of its folder, hidden ones aside.
        fields: what stands behind `?`.
    """

    text: str
    files: tuple[Path, ...]
    not_read: tuple[Path, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (*self.files, *self.not_read):
            try:
                str(path).encode()
            except UnicodeEncodeError:  # it could be neither printed nor written down
                raise RolloutError(f"{str(path)!r}: its name isn't UTF-8; rename it") from None


def open_source(source: str | Path | Sequence[str | Path]) -> Source:
    """The files meant by a source, or by several one after another. Data sets of the hub are downloaded into its cache.

    Raises:
        RolloutError: it doesn't exist, holds no file of a known format, or has several splits and none is named.
    """
    if not isinstance(source, str | Path):
        opened = [open_source(item) for item in source]
        files = tuple(path for one in opened for path in one.files)
        return Source(", ".join(one.text for one in opened), files, tuple(p for one in opened for p in one.not_read))
    text, path = str(source), local_path(source)
    if path is None:
        return _of_hub(text)
    if not path_exists(str(path)):
        raise RolloutError(f"{text}: no such file or folder; {HOW}")
    spec = parse_source(text)
    if spec.revision is not None:
        raise RolloutError(f"{text}: {path} is here and has no revisions; leave @{spec.revision} out")
    if path.is_dir():
        return _of_folder(path, spec, text)
    if spec.split is not None:
        raise RolloutError(f"{text}: {path} is a file and has no splits; leave out what follows its name")
    if not path.is_file():
        raise RolloutError(f"{text}: is no file that can be read again and again (a pipe, a broken link); write a file")
    if file_format(path) is None:
        raise RolloutError(f"{path}: must end in {SUFFIXES}; rename it or convert it")
    return Source(text, (path,), fields=spec.fields)


def source_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of `open_source`."""
    return list(open_source(source).files)


def source_digest(source: Source) -> str:
    """SHA-256 of the names and contents of the files that are read, in their order."""
    contents = [(path.name, file_digest(path)) for path in source.files]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _of_folder(folder: Path, spec: SourceName, text: str) -> Source:
    found, left = _walk(folder)
    if (folder / _SAVED_DICT).is_file():
        splits = sorted(p.name for p in folder.iterdir() if _is_saved(p))
        wanted = _chosen(spec.split, splits, text)
        files = [path for path in found if path.is_relative_to(folder / wanted)]
    elif spec.split is not None and _is_saved(folder):
        raise RolloutError(
            f"{text}: {folder} holds one saved data set, without splits; leave out what follows its name"
        )
    elif spec.split is not None:
        files = list(map(Path, _builder_files(_builder(str(folder), spec, text), spec.split, text)))
    else:
        files = found
        _refuse_splits_together(folder, files, text)
    if not files:
        raise RolloutError(f"{folder}: holds no file ending in {SUFFIXES}{_named(left)}")
    taken = {os.path.abspath(path) for path in files}
    others = [path for path in (*found, *left) if os.path.abspath(path) not in taken]
    return Source(text, tuple(files), tuple(sorted(others)), spec.fields)


def _refuse_splits_together(folder: Path, files: Sequence[Path], text: str) -> None:
    """A data set's test split must not be trained on because it lies in the same folder."""
    splits: dict[str, Path] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if split is not None:
            splits.setdefault(split, path)
    if len(splits) > 1:
        listed = ", ".join(f"{name} ({path.relative_to(folder)})" for name, path in splits.items())
        raise RolloutError(
            f"{text}: holds files of several splits: {listed}; name one, as in {folder}:{next(iter(splits))}, or give "
            "a folder or files of one split"
        )


def _named(left: Sequence[Path]) -> str:
    return f" (it holds {', '.join(path.name for path in left[:5])})" if left else ""


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of known formats below a folder, in name order, and the others; hidden ones are neither."""
    found: list[Path] = []
    left: list[Path] = []
    seen: set[str] = set()

    def visit(place: Path) -> None:
        real = os.path.realpath(place)
        if real in seen:
            return  # a link to a folder above or beside, whose files are there once
        seen.add(real)
        try:
            entries = sorted(p for p in place.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise RolloutError(f"{place}: can't be read ({error.strerror})") from error
        saved = set(_saved_files(place)) if _is_saved(place) else None
        for entry in entries:
            if entry.is_dir():
                visit(entry)
            elif not entry.is_file() or entry.name in _DESCRIPTIONS or file_format(entry) is None:
                left.append(entry)
            elif saved is not None and entry.suffix == ".arrow" and entry.name not in saved:
                left.append(entry)  # `datasets` caches results of its own beside what was saved
            else:
                found.append(entry)

    visit(folder)
    return sorted(found), sorted(left)


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() and (folder / "dataset_info.json").is_file()


def _saved_files(folder: Path) -> list[str]:
    """Names of the Arrow files that `save_to_disk` wrote into a folder."""
    with _QuietDatasets(str(folder)) as datasets:
        return [Path(file["filename"]).name for file in datasets.load_from_disk(str(folder)).cache_files]


@functools.cache
def _of_hub(text: str) -> Source:
    """Files of a data set of the hub: from the hub, or where it can't be reached from the cache of its files, or from
    the one of `datasets`. The same for as long as the process lives, whatever becomes of a branch."""
    spec = parse_source(text)
    assert spec.split is not None
    with _QuietDatasets(text) as datasets:
        is_commit = spec.revision is not None and _COMMIT.fullmatch(spec.revision) is not None
        snapshot = _snapshot(spec) if is_commit or datasets.config.HF_HUB_OFFLINE else None
        if snapshot is None:
            try:
                builder = _builder(spec.place, spec, text)
            except RolloutError as error:
                snapshot = _snapshot(spec) if isinstance(error.__cause__, ConnectionError) else None
                if snapshot is None:
                    raise
                warnings.warn(f"{text}: the hub can't be reached; what its cache holds is read", stacklevel=2)
        files: Iterable[Path]
        if snapshot is not None:
            places = _builder_files(_builder(str(snapshot), spec, text), spec.split, text)
            _check_shards(places, text)
            files = map(Path, places)
        elif builder.name != "cache":
            files = _downloaded(datasets, _builder_files(builder, spec.split, text))
        else:
            files = _prepared(builder, spec, text)
        return Source(text, tuple(files), fields=spec.fields)


def _prepared(builder: datasets.DatasetBuilder, spec: SourceName, text: str) -> Iterator[Path]:
    """Files of the cache of `datasets`, which gives the revision that was used last."""
    if spec.revision is not None and spec.revision != builder.hash:
        raise RolloutError(
            f"{text}: revision {spec.revision} is not in the cache (which has {builder.hash}), and the hub can't be "
            "reached; leave @REVISION out or download it"
        )
    split = _chosen(spec.split, list(builder.info.splits or {}), text)
    yield from (Path(file["filename"]) for file in builder.as_dataset(split).cache_files)


def _builder(place: str, spec: SourceName, text: str) -> datasets.DatasetBuilder:
    with _QuietDatasets(text) as datasets:
        revision = None if os.path.isdir(place) else spec.revision
        return datasets.load_dataset_builder(place, spec.config, revision=revision)


def _builder_files(builder: datasets.DatasetBuilder, split: str, text: str) -> list[str]:
    """Paths or addresses of a split's files."""
    data_files: dict[Any, Any] = builder.config.data_files or {}
    by_split = {str(name): [str(file) for file in files] for name, files in data_files.items()}
    files = by_split[_chosen(split, list(by_split), text)]
    unknown = [file for file in files if file_format(Path(file)) is None]
    if unknown:
        raise RolloutError(f"{text}: {unknown[0]}: must end in {SUFFIXES}; convert it")
    return files


def _chosen(split: str | None, splits: Sequence[str], text: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is not None and split in splits:
        return split
    what = f"has no split {split!r}" if split is not None else "has several splits"
    example = f"{text.partition(':')[0]}:{splits[0] if splits else 'train'}"
    raise RolloutError(f"{text}: {what}; its splits are {', '.join(splits)}; name one, as in {example}")


def _downloaded(datasets: Any, urls: Sequence[str]) -> Iterator[Path]:
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(disable_tqdm=True))
    yield from map(Path, manager.download(list(urls)))


def _snapshot(spec: SourceName) -> Path | None:
    """The folder in the hub's cache that holds the files of a revision; None where it isn't there."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            spec.place, repo_type="dataset", revision=spec.revision, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return Path(folder)


def _check_shards(files: Sequence[str], text: str) -> None:
    """A cache may hold some files of a split only. Their names say how many there are."""
    shards: dict[tuple[str, str, str], int] = {}
    for path in files:
        match = _SHARD.match(path)
        if match:
            key = (match[1], match[2], match[3])
            shards[key] = shards.get(key, 0) + 1
    for (stem, total, _), count in shards.items():
        if count != int(total):
            raise RolloutError(
                f"{text}: the cache holds {count} of the {int(total)} files {Path(stem).name}-*; download the others"
            )


class _QuietDatasets:
    """`datasets` without progress bars, imported when a source needs it (2 seconds); its errors name the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> Any:
        import datasets

        self.had_bars = datasets.are_progress_bars_disabled() is False
        datasets.disable_progress_bars()
        return datasets

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.had_bars:
            import datasets

            datasets.enable_progress_bars()
        if isinstance(error, Exception) and not isinstance(error, RolloutError):
            said = " ".join(str(error).split())[:400] or type(error).__name__
            raise RolloutError(f"{self.text}: `datasets` can't open it ({said}); {HOW}") from error
