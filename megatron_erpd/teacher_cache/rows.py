"""Rows of a teacher cache for the rollouts being trained on, checked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from megatron_erpd.data.batch import TokenRow
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError, RecipeError
from megatron_erpd.manifest import file_digest, input_digest, read_manifest
from megatron_erpd.settings import NO_SIGNAL
from megatron_erpd.sources.tokenizer import chat_template_digest
from megatron_erpd.teacher_cache.format import CACHE_FILE, TOPK, hidden_table
from megatron_erpd.teacher_cache.reader import CacheReader, Table

_SHUFFLE = 1
"""Keeps the noise of a permutation apart from other uses of the seed."""


def open_cache(folder: Path, rollouts: Rollouts, policies: Mapping[str, Path], precision: str) -> CacheReader:
    """A finished cache that has a matching row for every rollout and was made from these policies.

    Args:
        policies: name to artifact, `base` among them.
        precision: of the training that reads it, `fp32` or `bf16`.

    Raises:
        StageError, CacheError: the cache is unfinished or damaged, lacks a rollout, holds other tokens for one, or was
            made from another policy, with another chat template, at another temperature or in another precision (names
            what differs).
    """
    manifest = read_manifest(folder)
    recorded = manifest.files.get(CACHE_FILE)
    if recorded is None or file_digest(folder / CACHE_FILE) != recorded["sha256"]:
        raise CacheError(f"{folder / CACHE_FILE}: differs from what manifest.json recorded; precompute the cache again")
    cache = CacheReader(folder)
    template = chat_template_digest(policies["base"] / "hf")
    if cache.meta.chat_template_digest != template:
        raise CacheError(
            f"{folder}: chat_template_digest is {cache.meta.chat_template_digest}, the base policy's is {template}; "
            "precompute the cache again"
        )
    if cache.meta.temperature != 1.0:
        raise CacheError(f"{folder}: temperature is {cache.meta.temperature}, training compares at 1; precompute again")
    # Caches from before the format had a precision record it in the manifest's settings.
    made_in = manifest.settings.get("precision", cache.meta.precision)
    if made_in != precision:
        raise CacheError(
            f"{folder}: its log-probs were computed in {made_in}, this training computes in {precision}; the two "
            "differ by rounding, which the training would take for a change of the policy: precompute with "
            f"--precision {precision}, or train with --precision {made_in}"
        )
    cache.require_policies({name: input_digest(path) for name, path in policies.items()})
    cache.check(rollouts)
    return cache


def token_row(cache: CacheReader, policy: str, rollouts: Rollouts) -> TokenRow:
    """Log-probs of a rollout's response tokens under one of the cache's policies, `[R]`."""
    cache.require_policy(policy)
    ids = rollouts.sample_ids
    return lambda i: cache.token_row(policy, ids[i])


def shuffled_rows(rows: Mapping[str, TokenRow], rollouts: Rollouts, seed: int) -> dict[str, TokenRow]:
    """The same values at other tokens: one permutation of all response tokens of the data, the same for all `rows`.

    So what is computed of the rows token by token (a signal) is permuted as a whole: its values stay, what they say
    about a token is lost. The permutation follows from the seed and the rollouts alone.

    Args:
        rows: name to a rollout's response-aligned float values, `[R]`. All are read, at once.
    """
    ends = np.cumsum(rollouts.response_lengths)
    # As for the order of the data: numpy promises these bits for ever.
    keys = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_SHUFFLE,))).random_raw(int(ends[-1]))
    order = np.argsort(keys, kind="stable")

    def shuffled(row: TokenRow) -> TokenRow:
        values = np.concatenate([row(i) for i in range(len(rollouts))])[order]
        return lambda i: values[ends[i] - rollouts.response_lengths[i] : ends[i]]

    return {name: shuffled(row) for name, row in rows.items()}


def topk_rows(cache: CacheReader, rollouts: Rollouts) -> dict[str, TokenRow]:
    """The columns of the cached target q as they are stored: `training.step.cached_target` unpacks them."""
    if cache.meta.kind != TOPK:
        raise CacheError(f"{cache.folder}: is of kind {cache.meta.kind!r}; the projection needs --kind topk")
    ids = rollouts.sample_ids
    # A batch asks for the columns of a rollout one after the other: its row is found and checked once.
    latest: list[tuple[int, dict[str, np.ndarray]]] = [(-1, {})]

    def column(name: str, i: int) -> np.ndarray:
        if latest[0][0] != i:
            latest[0] = (i, cache.packed_topk_row(ids[i]))
        return _for_torch(latest[0][1][name])

    return {name: partial(column, name) for name in cache.meta.columns(TOPK)}


def hidden_rows(cache: CacheReader, policies: Iterable[str], rollouts: Rollouts) -> dict[str, TokenRow]:
    """The policies' hidden states `[R, h]` under their tables' names, float16 or the bits of bfloat16 as int16."""
    ids = rollouts.sample_ids

    def row(table: Table, i: int) -> np.ndarray:
        return _for_torch(table.row(ids[i])["hidden"])

    return {hidden_table(name): partial(row, cache.table(hidden_table(name))) for name in policies}


def _for_torch(values: np.ndarray) -> np.ndarray:
    """uint16, with which torch computes little, as int16 of the same bits."""
    return values.view(np.int16) if values.dtype == np.uint16 else values


def base_topk_rows(cache: CacheReader, rollouts: Rollouts, k: int) -> dict[str, TokenRow]:
    """The base policy's own rows, for a KL over the vocabulary: as `topk_rows`.

    Raises:
        RecipeError: the cache holds no such rows, or another number of entries; names the flags.
    """
    meta = cache.meta
    if meta.kind != TOPK or meta.signal != NO_SIGNAL:
        raise RecipeError(
            f"--kl-estimator exact: --base-log-probs {cache.folder} holds no top-k rows of the base policy; make it "
            f"with `megatron-erpd precompute --signal none --k {k}`"
        )
    if meta.k != min(k, meta.vocab_size):
        raise RecipeError(
            f"--kl-topk {k}: --base-log-probs {cache.folder} holds {meta.k} entries per token; give --kl-topk {meta.k} "
            f"or precompute with --k {k}"
        )
    return topk_rows(cache, rollouts)


def check_given_policies(needed: Iterable[str], given: Mapping[str, Path]) -> None:
    """Every policy that a signal names must have a checkpoint."""
    for name in sorted(needed):
        if name not in given:
            raise RecipeError(f"--signal names {name!r}, but no --policy {name}=DIR is given; give it")
