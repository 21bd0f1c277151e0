"""The forward step of stage 2's projection: a divergence between the student and the target distribution q.

q comes from the cache (top-k entries and one exact tail mass per token), or is computed beside the student from live
teachers, the base policy and the signal between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.objectives.off_policy import kl_penalty
from megatron_erpd.objectives.reduction import aggregate
from megatron_erpd.objectives.signals import SignalTerm, combine
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.teacher_cache.format import hidden_table
from megatron_erpd.training.cache_rows import unpack_target
from megatron_erpd.training.context_parallel import context_parallel_rank, slice_batch, whole_sequence_loss
from megatron_erpd.training.heads import Hidden, HiddenStates, PolicyHead, TargetOf, at_positions, policy_head
from megatron_erpd.training.loss_guard import finite_loss
from megatron_erpd.training.metrics import report, token_mean
from megatron_erpd.training.policies import forward_stage, join
from megatron_erpd.vocab_parallel import (
    HiddenTarget,
    TopKTarget,
    VocabShard,
    local_blocks,
    log_softmax_of,
    normalizer,
    project_shard,
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


class _Step(NamedTuple):
    """Of a chunk: each policy's normaliser in two parts, and the step eta; [c] each."""

    normalizers: list[tuple[Tensor, Tensor]]
    eta: Tensor


class ProjectedTarget:
    """The base policy moved along a signal between policies, made a chunk of tokens at a time (a `FullTarget`).

    Normalisers and steps, a few numbers per token, are found when a chunk is asked for the first time, in forward, with
    one collective per policy and one for the step; they are kept, and backward needs none.
    """

    temperature = 1.0

    def __init__(
        self,
        names: Sequence[str],
        terms: tuple[SignalTerm, ...],
        delta: float,
        eta_max: float,
        clip: float | None,
        positions: Tensor,
        outputs: Sequence[HiddenStates],
        shard: VocabShard,
    ) -> None:
        self.names, self.terms = names, terms
        self.delta, self.eta_max, self.clip = delta, eta_max, clip
        self.positions, self.outputs, self.shard = positions, outputs, shard
        self._steps: dict[int, _Step] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def bytes_per_token(self) -> int:
        return signal_bytes(len(self.names), self.shard)

    @torch.no_grad()
    def rows(self, part: slice) -> Tensor:
        """log q up to a constant per token, `[c, v/tp]` fp32."""
        logits = [policy.logits(self.positions[part]) for policy in self.outputs]
        known = self._steps.get(part.start)
        normalizers = None if known is None else known.normalizers
        if normalizers is None:
            normalizers = [normalizer(self.shard.values(x), self.shard) for x in logits]
        base, signal = base_and_signal_of(self.names, self.terms, self.clip, logits, normalizers, self.shard)
        if known is None:
            eta = project_shard(base, signal, self.shard, delta=self.delta, eta_max=self.eta_max).eta
            known = self._steps[part.start] = _Step(normalizers, eta)
        # Where the base excludes a token the signal says nothing: 0 * inf must not become NaN.
        signal.masked_fill_(base == -torch.inf, 0.0)
        return base.addcmul_(signal, known.eta.to(base.dtype).unsqueeze(-1))


def base_and_signal(
    names: Sequence[str], terms: tuple[SignalTerm, ...], clip: float | None, log_probs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Shards of log pi_0 and of the signal, `[n, v/tp]`, from each policy's log-probs.

    Args:
        names: the policies in the order of `log_probs`, `base` among them.
        clip: bound of the combined signal in nats, +-, or None.
    """
    by_name = dict(zip(names, log_probs, strict=True))
    signal = combine(terms, by_name)
    return by_name["base"], signal if clip is None else signal.clamp_(-clip, clip)


def base_and_signal_of(
    names: Sequence[str],
    terms: tuple[SignalTerm, ...],
    clip: float | None,
    logits: Sequence[Tensor],
    normalizers: Sequence[tuple[Tensor, Tensor]],
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """`base_and_signal` from each policy's logits `[n, v/tp]` and their `normalizer`, a block of tokens at a time;
    log pi_0 is -inf and the signal 0 in padding columns. No collective."""
    columns = shard.valid_columns
    base, signal = (torch.empty_like(logits[0], dtype=normalizers[0][0].dtype) for _ in range(2))
    base[:, columns:], signal[:, columns:] = -torch.inf, 0.0
    for rows in local_blocks(base, signal_bytes(len(names), shard)):
        log_probs = [
            log_softmax_of(shard.values(x[rows]), maximum[rows], remainder[rows])
            for x, (maximum, remainder) in zip(logits, normalizers, strict=True)
        ]
        base[rows, :columns], signal[rows, :columns] = base_and_signal(names, terms, clip, log_probs)
    return base, signal


def signal_bytes(num_policies: int, shard: VocabShard) -> int:
    """Bytes per token of a chunk: logits and fp32 log-probs of each policy, the signal in the making (3) and log q."""
    return 4 * shard.width * (2 * num_policies + 4)
