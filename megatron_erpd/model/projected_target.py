"""The target distribution of the projection, from policies whose hidden states are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.model.heads import HiddenStates
from megatron_erpd.objectives.signals import SignalTerm, combine
from megatron_erpd.vocab_parallel import VocabShard, local_blocks, log_softmax_of, normalizer, project_shard


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
