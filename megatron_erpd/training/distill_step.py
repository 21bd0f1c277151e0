"""The forward step of stage 2's projection: a divergence between the student and the target distribution q.

q comes from the cache (top-k entries and one exact tail mass per token), or is computed beside the student from live
teachers, the base policy and the signal between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.objectives.off_policy import kl_penalty
from megatron_erpd.objectives.reduction import aggregate
from megatron_erpd.objectives.signals import SignalTerm, combine
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.training.context_parallel import context_parallel_rank, slice_batch, whole_sequence_loss
from megatron_erpd.training.heads import PolicyHead, policy_head
from megatron_erpd.training.metrics import report, token_mean
from megatron_erpd.training.policies import Logits, forward_stage, join
from megatron_erpd.vocab_parallel import (
    LiveTarget,
    TopKTarget,
    VocabShard,
    divergence,
    gathered_divergence,
    project_shard,
    vocab_parallel_log_softmax,
)

Target = LiveTarget | TopKTarget
TargetOf = Callable[[Batch, Sequence[Tensor], VocabShard], Target]
"""Given a batch, the frozen policies' logits `[s, b, v/tp]` and the vocabulary shard: a distribution per token."""


class DistillStep:
    """Megatron's `forward_step_func` for the projection.

    Per response token the divergence between q and the student over the full vocabulary (or over top-k and tail),
    averaged over tokens. Metrics: the divergence under its own name, the student's entropy and log-ratios.

    Args:
        kind: `forward_kl` KL(q || student), `reverse_kl` KL(student || q) or `js`.
        frozen: policies that run beside the student, in the order of the context's outputs; empty for a cache.
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
            self._head = policy_head(model, self.vocab_size, self._divergence)
        models = [model, *self.frozen]
        processors = [self._head, *(Logits() for _ in self.frozen)]
        local = slice_batch(batch, *context_parallel_rank())
        outputs = forward_stage(models, local, processors, {"batch": local})
        return join(outputs, model), partial(whole_sequence_loss, partial(self.loss_and_metrics, batch))

    def _divergence(self, logits: Tensor, batch: Batch, context: Any) -> Tensor:
        assert self._head is not None
        shard = self._head.shard
        with torch.no_grad():
            target = self.target(batch, context["outputs"], shard)
        if self.gather and isinstance(target, LiveTarget):
            return gathered_divergence(self.kind, logits, target, shard)
        return divergence(self.kind, logits, target, shard)

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


def cached_target(batch: Batch, outputs: Sequence[Tensor], shard: VocabShard) -> TopKTarget:
    """q as the cache holds it."""
    rows = batch.token_rows
    return TopKTarget(rows["topk_indices"], rows["topk_log_probs"], rows["tail_log_prob"])


def live_target(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    delta: float,
    eta_max: float,
    batch: Batch,
    outputs: Sequence[Tensor],
    shard: VocabShard,
) -> LiveTarget:
    """q from policies that run beside the student: the base policy moved along the signal until KL = delta.

    Args:
        names: the frozen policies' names, `base` among them, in the order of `outputs`.
        outputs: their logits `[s, b, v/tp]`.
    """
    log_probs = policy_log_softmax(names, outputs, shard)
    base = log_probs["base"]
    _, log_q, _ = project_shard(base, combine(terms, log_probs), shard, delta=delta, eta_max=eta_max)
    return LiveTarget(log_q)


def policy_log_softmax(names: Sequence[str], outputs: Sequence[Tensor], shard: VocabShard) -> Mapping[str, Tensor]:
    """Each policy's log-probs `[b, s, v/tp]` from its logits `[s, b, v/tp]`, fp32, -inf in padding columns."""
    return {
        name: vocab_parallel_log_softmax(logits.transpose(0, 1), shard)
        for name, logits in zip(names, outputs, strict=True)
    }
