"""The precompute stage: what the policies say about the fixed rollouts, computed once on any layout.

Kind `token` keeps each policy's log-probs of the response tokens. Kind `topk` keeps these and the target distribution
q: the base policy moved along the signal as far as the trust region allows, as its top-k entries and one exact tail
mass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_erpd import platform
from megatron_erpd.data.collate import Batch, gather_response_rows
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import LayoutError, RecipeError
from megatron_erpd.evaluation.strength import Selection, read_selection
from megatron_erpd.manifest import finish_artifact, input_digest, read_manifest, settings_identity
from megatron_erpd.objectives.global_eta import eta_grid, kl_curve, solve_global_eta
from megatron_erpd.objectives.signals import SignalTerm, parse_signal, policies_of
from megatron_erpd.settings import AUTO_SIGNAL, Layout, PrecomputeSettings
from megatron_erpd.settings_arguments import add_settings_arguments, settings_from_namespace
from megatron_erpd.teacher_cache.format import CacheMeta
from megatron_erpd.teacher_cache.writer import CacheWriter, finalize, prepare_cache
from megatron_erpd.training.arguments import add_layout_arguments, layout_from_namespace, rank, split_pass_through
from megatron_erpd.training.batch import BatchSource
from megatron_erpd.training.cache_rows import check_policies, parse_policies
from megatron_erpd.training.compatible import check_compatible
from megatron_erpd.training.distill_step import base_and_signal, signal_bytes
from megatron_erpd.training.heads import Hidden, HiddenStates, at_positions, response_positions, to_grid
from megatron_erpd.training.run import load_data, pad_multiple
from megatron_erpd.training.runtime import initialize, prepare_output, stage_process
from megatron_erpd.vocab_parallel import (
    Projection,
    VocabShard,
    apply_eta,
    kl_from_base,
    project_shard,
    signal_law,
    token_chunks,
    token_log_probs,
    vocab_parallel_log_softmax,
    vocab_parallel_topk,
)

Consumer = Callable[[Batch, Sequence[HiddenStates]], None]
"""Takes a batch and every policy's hidden states; runs on last pipeline stages."""


def precompute(argv: list[str]) -> None:
    """Writes a teacher cache: log-probs of the rollouts' tokens and, for --kind topk, the target distribution.

    With --kind token and no --policy it holds the base policy's log-probs, which every training stage needs; with
    --signal none the base policy's top-k rows besides, which an exact KL penalty needs.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-erpd precompute",
        description=precompute.__doc__,
        epilog="example: megatron-erpd precompute --base runs/a/base --policy teacher=runs/a/teacher "
        "--rollouts runs/a/rollouts --output runs/a/cache --signal strong --delta 0.5",
    )
    parser.add_argument("--base", type=Path, required=True, help="artifact with the base policy's checkpoint")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=DIR", help="teacher=DIR, unlearned=DIR")
    parser.add_argument("--rollouts", type=Path, required=True, help="artifact, folder or Parquet file")
    parser.add_argument(
        "--selection", type=Path, help="what `megatron-erpd select` wrote: reported here, and read by --signal auto"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifact")
    add_settings_arguments(parser, PrecomputeSettings, "cache")
    add_layout_arguments(parser)
    own, pass_through = split_pass_through(argv)
    namespace = parser.parse_args(own)
    settings = settings_from_namespace(namespace, PrecomputeSettings)
    layout = layout_from_namespace(namespace)
    if layout.context_parallel > 1:
        raise LayoutError("--context-parallel: precompute keeps no activations and needs none; set it to 1")
    policies = {"base": namespace.base, **parse_policies(namespace.policy)}
    selection = read_selection(namespace.selection) if namespace.selection else None
    resolved = resolve_signal(settings, selection)
    if settings.has_signal or settings.signal == AUTO_SIGNAL:
        check_policies(policies_of(parse_signal(resolved.signal)), policies)
    for folder in policies.values():
        read_manifest(folder)
    check_compatible(policies)
    rollouts = load_data(namespace.rollouts, namespace.base, scored=False)

    identity = settings_identity(settings, pass_through, precision=layout.precision)
    inputs = {"rollouts": namespace.rollouts, "base": namespace.base}
    inputs |= {f"policy-{name}": folder for name, folder in policies.items() if name != "base"}
    inputs |= {"selection": namespace.selection} if namespace.selection else {}
    prepare_output(namespace.output, "precompute", identity, inputs)
    if selection is not None and rank() == 0:
        print(f"{selection.describe()}\nsignal of this cache: {resolved.signal}", flush=True)
    with stage_process() as store:
        _compute(settings, selection, layout, policies, rollouts, namespace.output, pass_through, store)


def resolve_signal(settings: PrecomputeSettings, selection: Selection | None) -> PrecomputeSettings:
    """The settings with the selection's recommendation in place of `signal: auto`.

    Raises:
        RecipeError: auto without a selection.
    """
    if settings.signal != AUTO_SIGNAL:
        return settings
    if selection is None:
        raise RecipeError(
            "--signal auto: is decided by the teacher's reward on held-out prompts; give --selection DIR, which "
            "`megatron-erpd select` writes, or name the signal"
        )
    return settings.model_copy(update={"signal": selection.signal})


def _compute(
    asked: PrecomputeSettings,
    selection: Selection | None,
    layout: Layout,
    policies: dict[str, Path],
    rollouts: Rollouts,
    output: Path,
    pass_through: list[str],
    store: torch.distributed.Store | None,
) -> None:
    flags = {"no_load_optim": True, "train_iters": 0}
    args = initialize(policies["base"] / "hf", layout, flags, pass_through, int(rollouts.lengths.max()), store)
    from megatron_erpd.training.model import build_frozen_model, load_weights, model_config, synchronize

    models = []
    for folder in policies.values():
        models.append(build_frozen_model(model_config(args)))
        load_weights(models[-1], folder)

    settings = resolve_signal(asked, selection)
    meta = _cache_meta(settings, asked.signal, policies, rollouts, args.vocab_size)
    written = _broadcast(prepare_cache(output, meta, resume=True) if rank() == 0 else None)
    missing = np.array([i for i, name in enumerate(rollouts.sample_ids) if name not in written], dtype=np.int64)
    scan = partial(_scan, models=models, layout=layout)
    score = Scores(settings, list(policies), models[0], args.vocab_size)
    summary: dict[str, Any] = {} if selection is None else {**selection.figures(), "signal": settings.signal}
    if settings.kind == "topk" and settings.projection == "global":
        # The mean is over all rollouts, also those that an interrupted run has written.
        summary["eta"] = score.eta = _global_eta(settings, score, partial(scan, rollouts))
    if len(missing):
        _write(output, meta, score, partial(scan, rollouts.select(missing)), rollouts.select(missing))
    synchronize()
    if rank() == 0:
        index = finalize(output, set(rollouts.sample_ids))
        summary |= {"num_rows": index.num_rows, "num_tokens": index.num_tokens, **index.statistics}
        finish_artifact(output, summary)
    synchronize()


class Scores:
    """What is kept of a batch, from every policy's hidden states, a chunk of response tokens at a time.

    Args:
        settings: kind, signal, projection.
        names: the policies, in the order of the hidden states; `base` among them.
        model: a model of this rank, for its vocabulary range (on last pipeline stages).
        vocab_size: true size of the vocabulary.
    """

    def __init__(self, settings: PrecomputeSettings, names: list[str], model: Any, vocab_size: int) -> None:
        from megatron_erpd.training.model import unwrap, vocab_shard

        self.settings = settings
        self.names = names
        self.terms: tuple[SignalTerm, ...] = parse_signal(settings.signal) if settings.has_signal else ()
        self.eta: float | None = None
        self.k = min(settings.k, vocab_size)
        self._shard = vocab_shard(model, vocab_size) if unwrap(model).post_process else None

    @property
    def shard(self) -> VocabShard:
        assert self._shard is not None, "only last pipeline stages have logits"
        return self._shard

    def rows(self, batch: Batch, policies: Sequence[HiddenStates]) -> dict[str, list[np.ndarray]]:
        """By name one array per rollout: each policy's log-probs of the response tokens, under the policy's name; for
        kind `topk` q's top-k and tail, eta, and KL(q || pi_0) besides."""
        positions = response_positions(batch)
        labels = at_positions(batch.labels, positions)
        parts = []
        for part, logits in self.chunks(positions, policies):
            pairs = zip(self.names, logits, strict=True)
            found = {name: token_log_probs(x, labels[part], self.shard) for name, x in pairs}
            parts.append(found | (self._target(logits) if self.settings.kind == "topk" else {}))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: gather_response_rows(to_grid(x, positions, batch), batch) for name, x in columns.items()}

    def chunks(self, positions: Tensor, policies: Sequence[HiddenStates]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Each policy's logits `[c, v/tp]` of some of the response tokens, until all have been seen."""
        for part in token_chunks(len(positions), signal_bytes(len(policies), self.shard)):
            yield part, [policy.logits(positions[part]) for policy in policies]

    def base_and_signal(self, chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Shards of log pi_0 and the signal on a chunk, `[n, v/tp]`."""
        log_probs = [vocab_parallel_log_softmax(x, self.shard).float() for x in chunk]
        return base_and_signal(self.names, self.terms, self.settings.projection_clip, log_probs)

    def _target(self, chunk: Sequence[Tensor]) -> dict[str, Tensor]:
        eta, log_q, kl = self._projection(chunk)
        top = vocab_parallel_topk(log_q, self.k, self.shard)
        return {
            "topk_indices": top.indices,
            "topk_log_probs": top.log_probs,
            "tail_log_prob": top.tail_log_prob,
            "eta": eta,
            "target_kl": kl,
        }

    def _projection(self, chunk: Sequence[Tensor]) -> Projection:
        """q on a chunk; without a signal the base policy itself, at eta 0."""
        if not self.settings.has_signal:
            base = vocab_parallel_log_softmax(chunk[self.names.index("base")], self.shard).float()
            return Projection(base.new_zeros(len(base)), base, base.new_zeros(len(base)))
        base, signal = self.base_and_signal(chunk)
        if self.eta is None:
            return project_shard(base, signal, self.shard, self.settings.delta, self.settings.eta_max)
        log_q = apply_eta(base, signal, self.eta, self.shard)
        eta = log_q.new_full(log_q.shape[:1], self.eta)
        return Projection(eta, log_q, kl_from_base(log_q, base, self.shard).clamp(min=0))


def _broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _cache_meta(
    settings: PrecomputeSettings, asked: str, policies: dict[str, Path], rollouts: Rollouts, vocab_size: int
) -> CacheMeta:
    topk = settings.kind == "topk"
    projection: dict[str, Any] = {"mode": settings.projection, "delta": settings.delta, "eta_max": settings.eta_max}
    projection["clip"] = settings.projection_clip
    return CacheMeta(
        kind=settings.kind,
        policies=tuple(policies),
        fingerprints={name: input_digest(folder) for name, folder in policies.items()},
        vocab_size=vocab_size,
        tokenizer_digest=rollouts.tokenizer_digest,
        # Nothing in a token cache depends on a signal; but a student with `auto` asks which one was chosen.
        signal=settings.signal if topk or asked == AUTO_SIGNAL else None,
        signal_requested=asked if asked == AUTO_SIGNAL else None,
        projection=projection if settings.has_signal else None,
        k=min(settings.k, vocab_size) if topk else None,
        rollouts_digest=rollouts.digest(),
    )


def _scan(rollouts: Rollouts, consume: Consumer, *, models: Sequence[Any], layout: Layout) -> None:
    """Runs every policy forward over all rollouts, once, and hands their hidden states to `consume` on last stages."""
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_erpd.training.policies import forward_stage, join

    size, index = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    source = BatchSource(rollouts, pad_multiple(layout), {}, {})
    num_batches = -(-len(rollouts) // (layout.micro_batch_size * size))

    def forward_step(data_iterator: Iterator[Batch], model: Any) -> Any:
        batch = next(data_iterator)
        outputs = forward_stage(models, batch, [Hidden() for _ in models])

        def collect(output: Tensor, non_loss_data: bool = True) -> None:
            consume(batch, outputs)

        return join(outputs, model), collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=source.once(layout.micro_batch_size, index, size),
            model=models[0],
            num_microbatches=num_batches,
            seq_length=int(rollouts.lengths.max()),
            micro_batch_size=layout.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _global_eta(settings: PrecomputeSettings, score: Scores, scan: Callable[[Consumer], None]) -> float:
    """One eta with mean KL(q || pi_0) = delta over all response tokens: a first pass that keeps sums on a grid."""
    from megatron.core import mpu

    etas = eta_grid(settings.eta_max)
    # Rows: the three of `kl_curve`, and the number of tokens.
    sums = torch.zeros(4, len(etas), dtype=torch.float64, device=platform.device())

    def add(batch: Batch, policies: Sequence[HiddenStates]) -> None:
        for _, logits in score.chunks(response_positions(batch), policies):
            add_chunk(logits)

    def add_chunk(logits: Sequence[Tensor]) -> None:
        law = signal_law(*score.base_and_signal(logits), score.shard, settings.eta_max)
        sums[:3] += kl_curve(*law, etas)
        sums[3] += len(law.log_masses)

    scan(add)
    if mpu.is_pipeline_last_stage():
        torch.distributed.all_reduce(sums, group=mpu.get_data_parallel_group())
    last = mpu.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(sums, last, mpu.get_pipeline_model_parallel_group())
    return solve_global_eta(etas, sums[:3] / sums[3], settings.delta, settings.eta_max)


def _write(output: Path, meta: CacheMeta, score: Scores, scan: Callable[[Consumer], None], rollouts: Rollouts) -> None:
    """Scores the rollouts and writes each once: from the last stage's first tensor-parallel rank of its DP rank."""
    from megatron.core import mpu

    writes = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0
    writer = CacheWriter(output, meta, mpu.get_data_parallel_rank(), resume=True) if writes else None

    def keep(batch: Batch, policies: Sequence[HiddenStates]) -> None:
        found = score.rows(batch, policies)
        if writer is None:
            return
        log_probs = {name: found.pop(name) for name in score.names}
        for b, i in enumerate(batch.row_indices.tolist()):
            if len(log_probs["base"][b]) == 0:  # a filler, see `BatchSource.once`
                continue
            writer.write(
                rollouts.sample_ids[i],
                rollouts.token_crc(i),
                log_probs={name: rows[b] for name, rows in log_probs.items()},
                **{name: rows[b] for name, rows in found.items()},
            )

    scan(keep)
    if writer is not None:
        writer.close()
