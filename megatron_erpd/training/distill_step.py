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
    token_chunks,
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


def live_base(batch: Batch, outputs: Sequence[Tensor], shard: VocabShard) -> LiveTarget:
    """The one frozen policy itself, over the whole vocabulary."""
    return LiveTarget(vocab_parallel_log_softmax(outputs[0].transpose(0, 1), shard))


def live_target(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    delta: float,
    eta_max: float,
    clip: float | None,
    batch: Batch,
    outputs: Sequence[Tensor],
    shard: VocabShard,
) -> LiveTarget:
    """q from policies that run beside the student: the base policy moved along the signal until KL = delta.

    Args:
        names: the frozen policies' names, `base` among them, in the order of `outputs`.
        clip: bound of the signal, see `base_and_signal`.
        outputs: their logits `[s, b, v/tp]`.

    Returns:
        log q `[b, s, v/tp]`, fp32: all that is kept, log-probs and signal are made for a chunk of tokens at a time.
    """
    rows = [x.flatten(0, 1) for x in outputs]
    log_q = rows[0].new_empty(rows[0].shape, dtype=torch.float32)

    def fill(part: slice) -> None:
        base, signal = base_and_signal(names, terms, clip, [x[part] for x in rows], shard)
        log_q[part] = project_shard(base, signal, shard, delta=delta, eta_max=eta_max).log_probs

    for part in token_chunks(len(log_q), signal_bytes(len(names), shard)):
        fill(part)
    return LiveTarget(log_q.unflatten(0, outputs[0].shape[:2]).transpose(0, 1))


def base_and_signal(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    clip: float | None,
    logits: Sequence[Tensor],
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Shards of log pi_0 and of the signal, `[n, v/tp]` fp32, from each policy's logits `[n, v/tp]`.

    Args:
        names: the policies in the order of `logits`, `base` among them.
        clip: bound of the combined signal in nats, +-, or None.

    Collectives: one MAX and one SUM of `[n]` per policy.
    """
    log_probs = {
        name: vocab_parallel_log_softmax(rows, shard).float() for name, rows in zip(names, logits, strict=True)
    }
    signal = combine(terms, log_probs)
    return log_probs["base"], signal if clip is None else signal.clamp_(-clip, clip)


def signal_bytes(num_policies: int, shard: VocabShard) -> int:
    """Bytes per token of a chunk: fp32 rows of each policy, the signal in the making (3) and log q."""
    return 4 * shard.width * (num_policies + 4)
