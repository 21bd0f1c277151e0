"""The forward step of stage 2's projection: a divergence between the student and the target distribution q.

q comes from the cache (top-k entries and one exact tail mass per token), or is computed beside the student from live
teachers, the base policy and the signal between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.model.context_parallel import context_parallel_rank, slice_batch, whole_sequence_loss
from megatron_erpd.model.heads import Hidden, HiddenStates, PolicyHead, TargetOf, at_positions, policy_head
from megatron_erpd.model.loss_guard import finite_loss
from megatron_erpd.model.policies import forward_stage, join
from megatron_erpd.model.projected_target import ProjectedTarget
from megatron_erpd.objectives.off_policy import kl_penalty
from megatron_erpd.objectives.reduction import aggregate
from megatron_erpd.objectives.signals import SignalTerm
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.teacher_cache.format import hidden_table
from megatron_erpd.teacher_cache.rows import unpack_target
from megatron_erpd.training.metrics import report, token_mean
from megatron_erpd.vocab_parallel import (
    HiddenTarget,
    TopKTarget,
    VocabShard,
)


class DistillStep:
    """Megatron's `forward_step_func` for the projection.

    Per response token the divergence between q and the student over the full vocabulary (or over top-k and tail),
    averaged over tokens. Metrics: the divergence under its own name, the student's entropy and log-ratios.

    Args:
        kind: `forward_kl` KL(q || student), `reverse_kl` KL(student || q) or `js`.
        frozen: policies that run beside the student, in the order that `target` expects; empty for a cache.
        target: gives q.
        vocab_size: true size of the vocabulary, without padding.
        gather: compare against q gathered over the tensor-parallel shards (live targets only).
    """

    def __init__(
        self,
        kind: DivergenceKind,
        frozen: Sequence[Any],
        target: TargetOf,
        vocab_size: int,
        gather: bool = False,
    ) -> None:
        self.kind = kind
        self.frozen = frozen
        self.target = target
        self.vocab_size = vocab_size
        self.gather = gather
        self._head: PolicyHead | None = None

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data_iterator)
        if self._head is None:
            self._head = policy_head(model, self.vocab_size, self.kind, self.target, self.gather)
        models = [model, *self.frozen]
        processors = [self._head, *(Hidden() for _ in self.frozen)]
        local = slice_batch(batch, *context_parallel_rank())
        outputs = forward_stage(models, local, processors, {"batch": local})
        return join(outputs, model), partial(whole_sequence_loss, partial(finite_loss, self.loss_and_metrics, batch))

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss contract: (sum, count, {name: [sum, count]}), counted in tokens."""
        policy_log_probs, entropy, per_token = output[0], output[1], output[2]
        loss_sum, count = aggregate(per_token, batch.loss_mask, "token_mean")
        old = batch.token_rows["old_log_probs"]
        kl = kl_penalty(policy_log_probs.detach(), old, batch.loss_mask, "k3", "token_mean")
        metrics = {
            "loss": (loss_sum, count),
            self.kind: (loss_sum, count),
            "entropy": token_mean(entropy, batch.loss_mask),
            "log_ratio": token_mean(policy_log_probs.detach() - old, batch.loss_mask),
            "policy_base_kl": kl,
        }
        return loss_sum, count.to(torch.int32), report("stage2", metrics)


def cached_target(batch: Batch, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard) -> TopKTarget:
    """q as the cache holds it."""
    names = ("topk_scores", "topk_ids_low", "topk_ids_high", "log_normalizer", "tail_log_prob")
    columns = {name: at_positions(batch.token_rows[name], positions) for name in names if name in batch.token_rows}
    return unpack_target(columns, shard.vocab_size)


def live_base(batch: Batch, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard) -> HiddenTarget:
    """The one frozen policy itself, over the whole vocabulary."""
    return HiddenTarget(outputs[0].rows[positions], outputs[0].weight)


def live_target(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    delta: float,
    eta_max: float,
    clip: float | None,
    batch: Batch,
    positions: Tensor,
    outputs: Sequence[HiddenStates],
    shard: VocabShard,
) -> ProjectedTarget:
    """q from policies that run beside the student: the base policy moved along the signal until KL = delta.

    Args:
        names: the frozen policies' names, `base` among them, in the order of `outputs`.
        clip: bound of the signal, see `base_and_signal`.
    """
    return ProjectedTarget(names, terms, delta, eta_max, clip, positions, outputs, shard)


def hidden_target(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    delta: float,
    eta_max: float,
    clip: float | None,
    dtype: torch.dtype,
    layers: Sequence[Tensor],
    batch: Batch,
    positions: Tensor,
    outputs: Sequence[HiddenStates],
    shard: VocabShard,
) -> ProjectedTarget:
    """As `live_target`, from cached hidden states.

    Args:
        dtype: of the hidden states, 16 bits per element.
        layers: each policy's output layer, `[v/tp, h]`, in the order of `names`.
    """
    rows = [at_positions(batch.token_rows[hidden_table(name)], positions).view(dtype) for name in names]
    states = [HiddenStates(row.to(layer.dtype), layer) for row, layer in zip(rows, layers, strict=True)]
    own = torch.arange(len(positions), device=positions.device)
    return ProjectedTarget(names, terms, delta, eta_max, clip, own, states, shard)
