"""The passes over the rollouts that fill a teacher cache, a policy at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_erpd import meeting, platform
from megatron_erpd.data.batch import Batch
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.manifest import METRICS
from megatron_erpd.model.arguments import rank
from megatron_erpd.model.forward import HiddenStates, SequenceShard, unwrap, vocab_shard
from megatron_erpd.objectives.global_eta import eta_grid, kl_curve, solve_global_eta
from megatron_erpd.precompute.forward import (
    Stored,
    batch_groups,
    check_output_layer,
    from_store,
    load_output_layer,
    output_weight,
    run_forward,
    run_stored,
)
from megatron_erpd.precompute.missing import Missing, PolicyPass, missing_rows, portions
from megatron_erpd.precompute.scores import Scores, output_layer_digest, response_states
from megatron_erpd.progress import StepLines
from megatron_erpd.settings import Layout, PrecomputeSettings
from megatron_erpd.teacher_cache.format import TOPK, CacheMeta, hidden_table, log_probs_table
from megatron_erpd.teacher_cache.parts import differences
from megatron_erpd.teacher_cache.reader import CacheReader, UnfinishedHidden
from megatron_erpd.teacher_cache.writer import CacheWriter, prepare_cache
from megatron_erpd.vocab_parallel import signal_law

SCRATCH = ".scratch"
"""The folder in a cache for hidden states that are not kept."""
_SHARE_OF_DISK = 0.5
"""How much of the free disk hidden states may take that are not kept."""


def hidden_dtype(layout: Layout) -> str:
    """The two-byte type of hidden states that are kept: exact for bf16; float16 rounds fp32 less than bfloat16 does."""
    return "bfloat16" if layout.precision == "bf16" else "float16"


class CachePasses:
    """Scores what a cache doesn't have yet. Made and run on every rank.

    Args:
        settings: with the signal that was chosen.
        meta: of the cache.
        policies: name to artifact, `base` first.
        rollouts: what is scored: all, or a slice.
        output: the cache's folder.
        hidden: a finished cache with hidden states to make q of, in place of forward passes.

    Attributes:
        checksums: of the parts that this run has written, on every rank, after `run`.
    """

    def __init__(
        self,
        settings: PrecomputeSettings,
        layout: Layout,
        meta: CacheMeta,
        policies: Mapping[str, Path],
        rollouts: Rollouts,
        output: Path,
        hidden: Path | None = None,
    ) -> None:
        from megatron.core import mpu

        self.settings, self.layout, self.meta = settings, layout, meta
        self.policies, self.rollouts, self.output = policies, rollouts, output
        self.names = list(policies)
        self.checksums: dict[str, str] = {}
        self._given = _open_hidden(hidden, meta, rollouts) if hidden is not None else None
        self._global = settings.has_signal and settings.projection == "global"
        self._model = _build_model()
        # The same whatever is missing: a row's last digits depend on the rows that it shares a batch with.
        self._groups = batch_groups(layout, rollouts, policies["base"] / "hf")
        self._is_last = mpu.is_pipeline_last_stage()
        self._scores: Scores | None = None
        if self._is_last:
            shard = vocab_shard(unwrap(self._model), meta.vocab_size)
            self._scores = Scores(settings, self.names, shard, SequenceShard.here())
        self._layers: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._missing = Missing(
            self.names, settings.kind == "topk", self._global, settings.keep_hidden, self._uses_scratch
        )
        self._writer: CacheWriter | None = None
        self._scratch: CacheWriter | None = None

    def run(self) -> None:
        """All passes; when it returns, every row is on disk."""
        self._missing.rows = self._find_missing(self.output, self.meta)
        if self._given is not None:
            self._take_log_probs(self._given)
        for groups in self._portions():
            self._pass(groups)
        if rank() == 0:  # left by a run that was killed after its last pass
            shutil.rmtree(self.output / SCRATCH, ignore_errors=True)

    def _find_missing(self, folder: Path, meta: CacheMeta) -> dict[str, np.ndarray]:
        """Table -> bool `[N]`: rollouts that it doesn't have. One broadcast per table."""
        done: dict[str, frozenset[str]] = {}
        meeting.first(lambda: done.update(prepare_cache(folder, meta)))
        found = {}
        for table in meta.tables:
            missing = missing_rows(self.rollouts.sample_ids, done.get(table, frozenset()))
            shared = torch.from_numpy(missing.astype(np.uint8)).to(platform.device())
            torch.distributed.broadcast(shared, src=0)
            found[table] = shared.cpu().numpy().astype(bool)
        return found

    def _portions(self) -> list[list[np.ndarray]]:
        """The batches with rollouts that lack anything, in as many passes as the disk asks for."""
        batches = self._missing.batches(self._groups)
        if not batches:
            return []
        if self._global or not self._uses_scratch:
            return [batches]
        tokens = int(self.rollouts.response_lengths[np.concatenate(batches)].sum())
        needed = tokens * self._scratch_meta.columns(hidden_table("base"))["hidden"].bytes_per_token
        free = torch.tensor([shutil.disk_usage(self.output).free], dtype=torch.int64, device=platform.device())
        torch.distributed.broadcast(free, src=0)
        found = portions(batches, needed * (len(self.names) - 1), int(_SHARE_OF_DISK * int(free)))
        if found is None:
            raise CacheError(
                f"{self.output}: {int(free) / 2**30:.1f} GiB are free, not enough for the hidden states of a single "
                "batch; free space there, or lower micro_batch_size or micro_batch_tokens"
            )
        return found

    @property
    def _uses_scratch(self) -> bool:
        """Whether q needs hidden states on disk that are not kept."""
        several = len(self.names) > 1 or self._global
        return self.settings.kind == "topk" and several and not self.settings.keep_hidden and self._given is None

    @property
    def _scratch_meta(self) -> CacheMeta:
        """Hidden states in the model's own type: what q is made of must not depend on where it went through."""
        own = "bfloat16" if self.layout.precision == "bf16" else "float32"
        size = self._model_config.hidden_size
        return replace(
            self.meta, kind="token", k=None, signal=None, projection=None, hidden_size=size, hidden_dtype=own
        )

    @property
    def _model_config(self) -> Any:
        return unwrap(self._model).config

    def _take_log_probs(self, given: CacheReader) -> None:
        """The log-probs of the given cache, which are the same here; the first rank writes them."""
        tables = [log_probs_table(name) for name in self.names]

        def take() -> None:
            with CacheWriter(self.output, self.meta) as writer:
                for name, table in zip(self.names, tables, strict=True):
                    for i in np.flatnonzero(self._missing.rows[table]).tolist():
                        sample = self.rollouts.sample_ids[i]
                        row = given.token_row(name, sample)
                        writer.write_log_probs(name, sample, self.rollouts.token_crc(i), row)
            self.checksums |= writer.checksums

        meeting.first(take)
        for table in tables:
            self._missing.rows[table][:] = False

    def _pass(self, groups: list[np.ndarray]) -> None:
        from megatron.core import mpu

        keep = self.settings.keep_hidden
        store_meta = self.meta if keep else self._scratch_meta
        store_folder = self.output if keep else self.output / SCRATCH
        if self._uses_scratch:
            hidden = {hidden_table(name) for name in self.names}
            found = self._find_missing(store_folder, store_meta)
            self._missing.rows |= {table: rows for table, rows in found.items() if table in hidden}
        first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
        writes, number = self._is_last and first, mpu.get_data_parallel_rank()
        self._writer = CacheWriter(self.output, self.meta, number) if writes else None
        self._scratch = CacheWriter(store_folder, store_meta, number) if writes and self._uses_scratch else self._writer
        try:
            if self._given is None:
                for name in self.names:
                    self._run_policy(name, groups, partial(UnfinishedHidden, store_folder, store_meta))
            if self.settings.kind == "topk" and (self._given is not None or self._global):
                stored = self._given or UnfinishedHidden(store_folder, store_meta)
                self._run_projection(groups, stored)
            self._flush()
        except BaseException:
            for writer in self._writers():
                writer.abort()
            raise
        for writer in self._writers():
            writer.close()
        own = {} if self._writer is None else self._writer.checksums
        gathered: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, own)
        for checksums in gathered:
            self.checksums |= checksums
        meeting.first(lambda: shutil.rmtree(self.output / SCRATCH, ignore_errors=True))

    def _run_policy(self, name: str, groups: list[np.ndarray], store: Callable[[], Stored]) -> None:
        """One policy over the batches that need it."""
        from megatron_erpd.model.model import load_weights

        made = self._missing.policy_pass(name, groups)
        if not made.loads_weights:
            return
        load_weights([self._model], self.policies[name])
        self._note_layer(name, self.settings.keep_hidden or made.stores_hidden)
        if made.batches:
            stored = store() if made.makes_target and len(self.names) > 1 else None
            consume = partial(self._consume, name, made, stored)
            lines = StepLines(self.output / METRICS, f"precompute/{name}")
            run_forward(self._model, self.rollouts, made.batches, self.layout, consume, f"precompute {name}", lines)
        self._flush()
        self._missing.written(name, made)

    def _consume(
        self,
        name: str,
        made: PolicyPass,
        stored: Stored | None,
        batch: Batch,
        hidden: HiddenStates,
    ) -> None:
        """Writes what is missing of a batch of a policy's forward pass."""
        assert self._scores is not None
        states = response_states(batch, hidden, SequenceShard.here()) if made.stores_hidden else []
        target: dict[str, list[np.ndarray]] = {}
        if made.makes_target:
            # As they will be read again, so that the same q follows from what is kept.
            kept = self.meta.hidden_dtype
            live = hidden if kept is None else replace(hidden, rows=_rounded(hidden.rows, kept))
            others = {
                n: from_store(stored, n, batch, self.rollouts, self._layers[n]) for n in self.names[:-1] if stored
            }
            target = self._scores.target(batch, [*others.values(), live], with_log_probs=live is hidden)
        log_probs = target.pop("policy_log_probs", None) or self._scores.log_probs(batch, hidden)
        if self._writer is None or self._scratch is None:
            return
        for b, i in enumerate(batch.row_indices.tolist()):
            key = self.rollouts.sample_ids[i], self.rollouts.token_crc(i)
            if self._missing.rows[log_probs_table(name)][i]:
                self._writer.write_log_probs(name, *key, log_probs[b])
            if made.stores_hidden and self._missing.rows[hidden_table(name)][i]:
                self._scratch.write_hidden(name, *key, states[b], self._digests[name])
            if made.makes_target and self._missing.rows[TOPK][i]:
                self._writer.write_topk(*key, **{column: values[b] for column, values in target.items()})

    def _run_projection(self, groups: list[np.ndarray], stored: Stored) -> None:
        """q from stored hidden states of all policies."""
        for name in self.names:
            if name not in self._digests:  # the same on all ranks: loading is collective
                load_output_layer([self._model], self.policies[name])
                self._note_layer(name, True)
            if self._given is not None and self._is_last:
                check_output_layer(self._given, name, self._digests[name])
        layers = {name: self._layers[name] for name in self.names} if self._is_last else {}
        if self._global:
            self._find_global_eta(stored, layers)
        chosen = self._missing.target_batches(groups)

        def consume(batch: Batch, policies: Sequence[HiddenStates]) -> None:
            assert self._scores is not None
            target = self._scores.target(batch, policies)
            if self._writer is None:
                return
            for b, i in enumerate(batch.row_indices.tolist()):
                if self._missing.rows[TOPK][i]:
                    key = self.rollouts.sample_ids[i], self.rollouts.token_crc(i)
                    self._writer.write_topk(*key, **{column: values[b] for column, values in target.items()})

        if chosen:
            run_stored(stored, layers, self.rollouts, chosen, self.layout, consume, "precompute targets")

    def _find_global_eta(self, stored: Stored, layers: Mapping[str, Tensor]) -> None:
        """One eta with mean KL(q || pi_0) = delta over all response tokens: a pass that keeps sums on a grid."""
        from megatron.core import mpu

        settings, scores = self.settings, self._scores
        etas = eta_grid(settings.eta_max)
        # Rows: the three of `kl_curve`, and the number of tokens.
        sums = torch.zeros(4, len(etas), dtype=torch.float64, device=platform.device())

        def consume(batch: Batch, policies: Sequence[HiddenStates]) -> None:
            assert scores is not None
            for _, logits in scores.chunks(batch.response_positions, policies):
                law = signal_law(*scores.base_and_signal(logits), scores.shard, settings.eta_max)
                sums[:3].add_(kl_curve(*law, etas))
                sums[3].add_(len(law.log_masses))

        run_stored(stored, layers, self.rollouts, self._groups, self.layout, consume, "precompute eta")
        if scores is not None:
            torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
            scores.eta = solve_global_eta(etas, sums[:3] / sums[3], settings.delta, settings.eta_max)

    def _note_layer(self, name: str, needs_digest: bool) -> None:
        """Keeps the output layer of the policy that is in memory."""
        self._digests[name] = ""
        if self._scores is None:
            return
        self._layers[name] = output_weight(self._model).detach().clone()
        if needs_digest:
            self._digests[name] = output_layer_digest(self._layers[name], self._scores.shard)

    def _flush(self) -> None:
        """What was given to the writers is on disk, on all ranks."""
        for writer in self._writers():
            writer.flush()
        torch.distributed.barrier()

    def _writers(self) -> list[CacheWriter]:
        found = [] if self._writer is None else [self._writer]
        return found if self._scratch is None or self._scratch is self._writer else [*found, self._scratch]


def _build_model() -> Any:
    from megatron.training import get_args

    from megatron_erpd.model.model import build_frozen_model, model_config

    (model,) = build_frozen_model(model_config(get_args()))  # virtual pipeline stages are for trainings alone
    return model


def _rounded(rows: Tensor, dtype: str) -> Tensor:
    return rows.to(getattr(torch, dtype)).to(rows.dtype)


def _open_hidden(folder: Path, meta: CacheMeta, rollouts: Rollouts) -> CacheReader:
    """A cache whose hidden states can stand in for forward passes, checked row by row.

    Raises:
        CacheError: it keeps none, was made from other policies or in another precision, or lacks a rollout.
    """
    cache = CacheReader(folder)
    cache.require_policies(meta.fingerprints)
    common = ("vocab_size", "temperature", "precision", "tokenizer_digest", "chat_template_digest")
    differing = differences(*({name: getattr(m, name) for name in common} for m in (cache.meta, meta)))
    if differing:
        raise CacheError(f"{folder}: {'; '.join(differing)}; run the forward passes again, without --hidden")
    cache.check(rollouts, [table(name) for name in meta.policies for table in (hidden_table, log_probs_table)])
    return cache
