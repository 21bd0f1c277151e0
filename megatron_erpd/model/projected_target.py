"""Targets that are made beside the student, from policies whose hidden states are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.model.forward import HiddenStates
from megatron_erpd.objectives.signals import SignalTerm, combine, parse_signal
from megatron_erpd.settings import DistillSettings, PrecomputeSettings
from megatron_erpd.teacher_cache.format import hidden_table
from megatron_erpd.vocab_parallel import (
    HiddenTarget,
    VocabShard,
    local_blocks,
    log_softmax_of,
    normalizer,
    project_shard,
)


@dataclass(frozen=True)
class TrustRegion:
    """What q is: the base policy moved along a signal between policies until KL(q || base) = delta.

    Attributes:
        policies: names, `base` among them; logits and log-probs of several policies come in this order.
        terms: the signal; none where q is the base itself.
        delta: nats per response token.
        eta_max: the largest step along the signal.
        clip: bound of the combined signal in nats, +-, or None.
    """

    policies: tuple[str, ...]
    terms: tuple[SignalTerm, ...]
    delta: float
    eta_max: float
    clip: float | None = None

    @classmethod
    def of(
        cls, settings: DistillSettings | PrecomputeSettings, policies: Sequence[str], has_signal: bool = True
    ) -> TrustRegion:
        terms = parse_signal(settings.signal) if has_signal else ()
        return cls(tuple(policies), terms, settings.delta, settings.eta_max, settings.projection_clip)

    def base_and_signal(
        self, logits: Sequence[Tensor], normalizers: Sequence[tuple[Tensor, Tensor]], shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Shards of log pi_0 and of the signal, `[n, v/tp]`, a block of tokens at a time; log pi_0 is -inf and the
        signal 0 in padding columns. No collective.

        Args:
            logits: each policy's `[n, v/tp]`.
            normalizers: of `normalizer`, for each policy.
        """
        columns = shard.valid_columns
        base, signal = (torch.empty_like(logits[0], dtype=normalizers[0][0].dtype) for _ in range(2))
        base[:, columns:], signal[:, columns:] = -torch.inf, 0.0
        for rows in local_blocks(base, self.bytes_per_token(shard)):
            log_probs = {
                name: log_softmax_of(shard.values(x[rows]), maximum[rows], remainder[rows])
                for name, x, (maximum, remainder) in zip(self.policies, logits, normalizers, strict=True)
            }
            block = combine(self.terms, log_probs)
            base[rows, :columns] = log_probs["base"]
            signal[rows, :columns] = block if self.clip is None else block.clamp_(-self.clip, self.clip)
        return base, signal

    def bytes_per_token(self, shard: VocabShard) -> int:
        """Of a chunk: logits and fp32 log-probs of each policy, the signal in the making (3) and log q."""
        return 4 * shard.width * (2 * len(self.policies) + 4)


class _Step(NamedTuple):
    """Of a chunk: each policy's normaliser in two parts, and the step eta; [c] each."""

    normalizers: list[tuple[Tensor, Tensor]]
    eta: Tensor


class ProjectedTarget:
    """q of a trust region, made a chunk of tokens at a time (a `FullTarget`).

    Normalisers and steps, a few numbers per token, are found when a chunk is asked for the first time, in forward, with
    one collective per policy and one for the step; they are kept, and backward needs none.

    Args:
        outputs: each policy's hidden states, of whose rows `positions` are wanted.
    """

    temperature = 1.0

    def __init__(
        self, region: TrustRegion, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard
    ) -> None:
        self.region, self.positions, self.outputs, self.shard = region, positions, outputs, shard
        self._steps: dict[int, _Step] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def bytes_per_token(self) -> int:
        return self.region.bytes_per_token(self.shard)

    @torch.no_grad()
    def rows(self, part: slice) -> Tensor:
        """log q up to a constant per token, `[c, v/tp]` fp32."""
        logits = [policy.logits(self.positions[part]) for policy in self.outputs]
        known = self._steps.get(part.start)
        normalizers = None if known is None else known.normalizers
        if normalizers is None:
            normalizers = [normalizer(self.shard.values(x), self.shard) for x in logits]
        base, signal = self.region.base_and_signal(logits, normalizers, self.shard)
        if known is None:
            eta = project_shard(base, signal, self.shard, delta=self.region.delta, eta_max=self.region.eta_max).eta
            known = self._steps[part.start] = _Step(normalizers, eta)
        # Where the base excludes a token the signal says nothing: 0 * inf must not become NaN.
        signal.masked_fill_(base == -torch.inf, 0.0)
        return base.addcmul_(signal, known.eta.to(base.dtype).unsqueeze(-1))


def live_base(batch: Batch, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard) -> HiddenTarget:
    """The one frozen policy itself, over the whole vocabulary."""
    return HiddenTarget(outputs[0].rows[positions], outputs[0].weight)


def live_target(
    region: TrustRegion, batch: Batch, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard
) -> ProjectedTarget:
    """q from policies that run beside the student, in the region's order."""
    return ProjectedTarget(region, positions, outputs, shard)


def hidden_target(
    region: TrustRegion,
    dtype: torch.dtype,
    layers: Sequence[Tensor],
    batch: Batch,
    positions: Tensor,
    outputs: Sequence[HiddenStates],
    shard: VocabShard,
) -> ProjectedTarget:
    """q from cached hidden states.

    Args:
        dtype: of the hidden states, 16 bits per element.
        layers: each policy's output layer, `[v/tp, h]`, in the region's order.
    """
    rows = [batch.target_rows[hidden_table(name)].view(dtype) for name in region.policies]
    states = [HiddenStates(row.to(layer.dtype), layer) for row, layer in zip(rows, layers, strict=True)]
    own = torch.arange(len(positions), device=positions.device)
    return ProjectedTarget(region, own, states, shard)
