"""What is kept of a batch, from policies' hidden states, a chunk of response tokens at a time."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.model.forward import HiddenStates, SequenceShard
from megatron_erpd.model.projected_target import TrustRegion
from megatron_erpd.settings import PrecomputeSettings
from megatron_erpd.vocab_parallel import (
    Projection,
    VocabShard,
    apply_eta,
    kl_from_base,
    normalizer,
    project_shard,
    token_chunks,
    token_terms,
    vocab_parallel_log_softmax,
    vocab_parallel_topk,
)

WHOLE = SequenceShard()


class Scores:
    """Rows of a teacher cache from hidden states. Every rank of a last pipeline stage computes the same.

    All methods take whole batches and this context-parallel rank's hidden states, and give whole rows.

    Args:
        settings: signal and projection.
        names: the policies, `base` among them.
        shard: this rank's vocabulary range.
        sequence: its part of every sequence.
    """

    def __init__(
        self, settings: PrecomputeSettings, names: list[str], shard: VocabShard, sequence: SequenceShard = WHOLE
    ) -> None:
        self.region = TrustRegion.of(settings, names, settings.has_signal)
        self.shard = shard
        self.sequence = sequence
        self.eta: float | None = None
        """One for all tokens, where the projection is global."""
        self.k = min(settings.k, shard.vocab_size)

    def log_probs(self, batch: Batch, hidden: HiddenStates) -> list[np.ndarray]:
        """Each rollout's log-probs of its response tokens, `[R]`."""
        parts = [
            token_terms(logits[0], self.shard, batch.labels[part], with_entropy=False).log_probs
            for part, logits in self.chunks(batch.response_positions, [hidden])
        ]
        return _arrays(torch.cat(parts), batch, self.sequence)

    def target(
        self, batch: Batch, policies: Sequence[HiddenStates], with_log_probs: bool = False
    ) -> dict[str, list[np.ndarray]]:
        """By name one array per rollout: q's top-k `indices`, `log_probs` `[R, K]`, `tail_log_prob`, `eta` and
        `target_kl`, KL(q || pi_0), `[R]`.

        Args:
            policies: in the order of the names.
            with_log_probs: `policy_log_probs` too, what `log_probs` gives of the last policy, from the same logits.
        """
        parts = []
        for part, logits in self.chunks(batch.response_positions, policies):
            parts.append(self._target(logits))
            if with_log_probs:
                terms = token_terms(logits[-1], self.shard, batch.labels[part], with_entropy=False)
                parts[-1]["policy_log_probs"] = terms.log_probs
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: _arrays(values, batch, self.sequence) for name, values in columns.items()}

    def chunks(self, positions: Tensor, policies: Sequence[HiddenStates]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Each policy's logits `[c, v/tp]` of some of the response tokens, until all have been seen."""
        for part in token_chunks(len(positions), self.region.bytes_per_token(self.shard)):
            yield part, [policy.logits(positions[part]) for policy in policies]

    def base_and_signal(self, chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Shards of log pi_0 and the signal on a chunk, `[n, v/tp]`."""
        normalizers = [normalizer(self.shard.values(x), self.shard) for x in chunk]
        return self.region.base_and_signal(chunk, normalizers, self.shard)

    def _target(self, chunk: Sequence[Tensor]) -> dict[str, Tensor]:
        eta, log_q, kl = self._projection(chunk)
        top = vocab_parallel_topk(log_q, self.k, self.shard)
        return {
            "indices": top.indices,
            "log_probs": top.log_probs,
            "tail_log_prob": top.tail_log_prob,
            "eta": eta,
            "target_kl": kl,
        }

    def _projection(self, chunk: Sequence[Tensor]) -> Projection:
        """q on a chunk; without a signal the base policy itself, at eta 0."""
        if not self.region.terms:
            base = vocab_parallel_log_softmax(chunk[self.region.policies.index("base")], self.shard).float()
            return Projection(base.new_zeros(len(base)), base, base.new_zeros(len(base)))
        base, signal = self.base_and_signal(chunk)
        if self.eta is None:
            return project_shard(base, signal, self.shard, self.region.delta, self.region.eta_max)
        log_q = apply_eta(base, signal, self.eta, self.shard)
        eta = log_q.new_full(log_q.shape[:1], self.eta)
        return Projection(eta, log_q, kl_from_base(log_q, base, self.shard).clamp(min=0))


def rows_of(values: Tensor, batch: Batch, sequence: SequenceShard = WHOLE) -> list[Tensor]:
    """Values of this context-parallel rank's response tokens, `[n, ...]`, as one tensor `[R, ...]` per rollout, on the
    CPU; the same on all ranks. One all-reduce where sequences are split."""
    counts = (batch.loss_mask > 0).sum(dim=1).tolist()
    whole = values.new_zeros((sum(counts), *values.shape[1:]))
    whole[batch.response_order()] = values
    return list(sequence.whole(whole).cpu().split(counts))


def _arrays(values: Tensor, batch: Batch, sequence: SequenceShard) -> list[np.ndarray]:
    return [row.numpy() for row in rows_of(values, batch, sequence)]


def response_states(batch: Batch, hidden: HiddenStates, sequence: SequenceShard = WHOLE) -> list[Tensor]:
    """Each rollout's hidden states from which its response tokens are predicted, `[R, h]`, on the CPU."""
    return rows_of(hidden.rows[batch.response_positions], batch, sequence)


def hidden_states(batch: Batch, rows: Sequence[Tensor], weight: Tensor) -> HiddenStates:
    """The inverse of `response_states`: this context-parallel rank's `[s * b, h]`, 0 where no response is predicted."""
    found = weight.new_zeros((batch.tokens.numel(), weight.shape[1]))
    found[batch.response_positions] = torch.cat(list(rows)).to(weight.device, weight.dtype)[batch.response_order()]
    return HiddenStates(found, weight)


def output_layer_digest(weight: Tensor, shard: VocabShard) -> str:
    """SHA-256 over the CRC-32 of every row of the whole output layer, as float32; one all-gather.

    Args:
        weight: this rank's `[v/tp, h]`. Padding rows don't count: the digest is the same under any layout.
    """
    rows = weight[: shard.valid_columns].detach().float().cpu().numpy()
    crcs = torch.zeros(shard.vocab_size, dtype=torch.float64)
    own = torch.tensor([float(zlib.crc32(row.tobytes())) for row in rows], dtype=torch.float64)
    crcs[shard.start : shard.start + len(own)] = own  # whole numbers below 2^32, and zeros of the other ranks
    summed = shard.all_reduce_sum(crcs.to(weight.device)).cpu().numpy().astype("<u4")
    return hashlib.sha256(summed.tobytes()).hexdigest()
