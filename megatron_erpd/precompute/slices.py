"""A teacher cache made by independent jobs: each scores a slice of the rollouts, and one manifest joins them.

OUTPUT/slice-0003-of-0016/      an artifact of its own, which its job resumes
OUTPUT/cache.json, TABLE/index.arrow, manifest.json     written when all slices are there; the parts stay where they are
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.evaluation.mismatch import measure_mismatch
from megatron_erpd.evaluation.mismatch_verdicts import MISMATCH, describe_mismatch, mismatch_report
from megatron_erpd.files import write_json
from megatron_erpd.manifest import finish_artifact, input_digest, verify_manifest
from megatron_erpd.meeting import checksums_of, first
from megatron_erpd.model.arguments import rank
from megatron_erpd.precompute.passes import CachePasses
from megatron_erpd.slices import Slice, end_whole, finished_slices, refuse_other_counts
from megatron_erpd.slices import begin_whole as begin_whole_artifact
from megatron_erpd.teacher_cache.finalize import finalize
from megatron_erpd.teacher_cache.format import CacheIndex, CacheMeta, read_index
from megatron_erpd.teacher_cache.parts import differences
from megatron_erpd.teacher_cache.reader import CacheReader


def begin_whole(output: Path, identity: Mapping[str, Any], inputs: Mapping[str, Path]) -> None:
    """Takes the folder for the cache of all slices; jobs that start at once do it one after the other."""
    if rank() == 0:
        digests = {name: input_digest(path) for name, path in inputs.items()}
        begin_whole_artifact(output, "precompute", identity, digests)


def begin_slice(output: Path, part: Slice, identity: Mapping[str, Any], inputs: Mapping[str, Path]) -> Path:
    """The folder of a slice, in the folder of the whole."""
    begin_whole(output, identity, inputs)
    refuse_other_counts(output, part)
    return output / part.folder


def rows_of_slice(part: Slice, lengths: np.ndarray) -> np.ndarray:
    """A slice's rollouts, ascending: slices have about equal numbers of tokens, and lengths of every kind."""
    by_length = np.argsort(-lengths, kind="stable")
    return np.sort(by_length[part.number - 1 :: part.count])


def close_cache(passes: CachePasses, summary: dict[str, Any]) -> None:
    """`cache.json` and the manifest, on the first rank; the others wait for it."""
    from megatron_erpd.model.model import synchronize

    synchronize()
    # Parts that an interrupted run left are not known yet; there may be much of them.
    known = checksums_of(passes.output, passes.checksums)

    def close() -> None:
        index = finalize(passes.output, passes.meta, passes.rollouts.sample_ids, known)
        write_mismatch(passes.output, passes.rollouts)
        finish_artifact(passes.output, _figures(summary, index), _checksums(index))

    first(close)
    synchronize()


def merge_slices(output: Path, meta: CacheMeta, rollouts: Rollouts, summary: dict[str, Any]) -> None:
    """Makes one cache of all slices.

    Raises:
        CacheError, StageError: a slice is missing, unfinished, damaged, or made from something else (names it and what
            differs); or slices together don't have every rollout once.
    """
    if rank() > 0:
        return
    folders = finished_slices(output)
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
    finish_artifact(output, {**_figures(summary, index), "slices": len(folders)}, checksums)
    end_whole(output)


def write_mismatch(output: Path, rollouts: Rollouts) -> None:
    """The sampler's log-probs against the base policy's, where the sampler recorded any: said, and written beside the
    cache. Only for a cache of the base policy alone, the one that every round has."""
    cache = CacheReader(output)
    if cache.meta.policies != ("base",) or not rollouts.has_behavior_log_probs.any():
        return
    found = measure_mismatch(
        (name, rollouts.behavior_log_probs(i), cache.token_row("base", name))
        for i, name in enumerate(rollouts.sample_ids)
    )
    print(describe_mismatch(found), flush=True)
    write_json(output / MISMATCH, mismatch_report(found))


def _figures(summary: Mapping[str, Any], index: CacheIndex) -> dict[str, Any]:
    return {**summary, "num_rows": index.num_rows, "num_tokens": index.num_tokens, **index.statistics}


def _checksums(index: CacheIndex) -> dict[str, str]:
    return {part["name"]: part["sha256"] for table in index.tables.values() for part in table.parts}
