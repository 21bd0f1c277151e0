"""A teacher cache made by independent jobs: each scores a slice of the rollouts, and one manifest joins them.

OUTPUT/slice-0003-of-0016/      an artifact of its own, which its job resumes
OUTPUT/cache.json, TABLE/index.arrow, manifest.json     written when all slices are there; the parts stay where they are
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.evaluation.mismatch import MISMATCH, measure_mismatch
from megatron_erpd.manifest import MANIFEST, begin_artifact, finish_artifact, input_digest, verify_manifest
from megatron_erpd.teacher_cache.finalize import finalize
from megatron_erpd.teacher_cache.format import CacheIndex, CacheMeta, read_index
from megatron_erpd.teacher_cache.parts import differences
from megatron_erpd.teacher_cache.reader import CacheReader
from megatron_erpd.training.arguments import rank
from megatron_erpd.training.cache_passes import CachePasses

_BEGIN = ".begin"
"""Locked while a job takes the folder of the whole."""
_FOLDER = re.compile(r"slice-(\d{4})-of-(\d{4})")


@dataclass(frozen=True)
class Slice:
    """The `number`-th, from 1, of `count` slices."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """`3/16`. Raises `argparse.ArgumentTypeError` for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
            raise argparse.ArgumentTypeError(f"{text!r}: write I/N with 1 <= I <= N <= 9999, such as 3/16")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        return f"slice-{self.number:04d}-of-{self.count:04d}"


def begin_whole(output: Path, identity: Mapping[str, Any], inputs: Mapping[str, Path]) -> None:
    """Takes the folder for the cache of all slices; jobs that start at once do it one after the other."""
    if rank() > 0:
        return
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _BEGIN, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin_artifact(output, "precompute", identity, {name: input_digest(path) for name, path in inputs.items()})


def begin_slice(output: Path, part: Slice, identity: Mapping[str, Any], inputs: Mapping[str, Path]) -> Path:
    """The folder of a slice, in the folder of the whole."""
    begin_whole(output, identity, inputs)
    others = {match[2] for path in output.glob("slice-*") if (match := _FOLDER.fullmatch(path.name))}
    if others - {f"{part.count:04d}"}:
        raise CacheError(
            f"{output}: holds slices of {', '.join(sorted(others))}, --slice {part} asks for {part.count}; delete them "
            "or go on with their number"
        )
    return output / part.folder


def close_cache(passes: CachePasses, summary: dict[str, Any]) -> None:
    """`cache.json` and the manifest, on the first rank; the others wait for it."""
    from megatron_erpd.training.model import synchronize

    synchronize()
    if rank() == 0:
        index = finalize(passes.output, passes.meta, passes.rollouts.sample_ids, passes.checksums)
        write_mismatch(passes.output, passes.rollouts)
        finish_artifact(passes.output, _figures(summary, index), _checksums(index))
    synchronize()


def merge_slices(output: Path, meta: CacheMeta, rollouts: Rollouts, summary: dict[str, Any]) -> None:
    """Makes one cache of all slices.

    Raises:
        CacheError, StageError: a slice is missing, unfinished, damaged, or made from something else (names it and what
            differs); or slices together don't have every rollout once.
    """
    if rank() > 0:
        return
    found = {match[0]: int(match[2]) for p in output.glob("slice-*") if (match := _FOLDER.fullmatch(p.name))}
    if not found:
        raise CacheError(f"{output}: holds no slices; run the jobs with --slice 1/N to N/N first")
    count = next(iter(found.values()))
    folders = [output / Slice(number + 1, count).folder for number in range(count)]
    missing = [folder.name for folder in folders if not (folder / MANIFEST).is_file()]
    if missing:
        raise CacheError(
            f"{output}: {len(missing)} of {count} slices aren't finished, the first is {missing[0]}; run its job again"
        )
    checksums: dict[str, str] = {}
    for folder in folders:
        manifest = verify_manifest(folder, checksums=False)
        index = read_index(folder)
        differing = differences(index.meta.to_json(), meta.to_json())
        if differing:
            raise CacheError(f"{folder}: was made from something else: {'; '.join(differing)}; run its job again")
        checksums |= {f"{folder.name}/{name}": str(record["sha256"]) for name, record in manifest.files.items()}
    index = finalize(output, meta, rollouts.sample_ids, checksums, folders)
    write_mismatch(output, rollouts)
    finish_artifact(output, {**_figures(summary, index), "slices": count}, checksums)
    (output / _BEGIN).unlink(missing_ok=True)


def write_mismatch(output: Path, rollouts: Rollouts) -> None:
    """The sampler's log-probs against the base policy's, where the sampler recorded any: said, and written beside the
    cache. Only for a cache of the base policy alone, the one that every round has."""
    cache = CacheReader(output)
    if cache.policies != ("base",) or not rollouts.has_behavior_log_probs.any():
        return
    found = measure_mismatch(
        (name, rollouts.behavior_log_probs(i), cache.token_row("base", name))
        for i, name in enumerate(rollouts.sample_ids)
    )
    print(found.describe(), flush=True)
    (output / MISMATCH).write_text(json.dumps(found.to_json(), indent=1) + "\n")


def _figures(summary: Mapping[str, Any], index: CacheIndex) -> dict[str, Any]:
    return {**summary, "num_rows": index.num_rows, "num_tokens": index.num_tokens, **index.statistics}


def _checksums(index: CacheIndex) -> dict[str, str]:
    return {part["name"]: part["sha256"] for table in index.tables.values() for part in table.parts}
