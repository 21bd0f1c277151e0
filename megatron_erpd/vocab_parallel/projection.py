"""The trust-region projection of a base policy along a signal, over a split vocabulary.

The mathematics, and what the names mean, are those of `megatron_erpd.objectives.projection`: per token the base pi_0 is
tilted, q(v) ~ pi_0(v) exp(eta s(v)), as far as KL(q || pi_0) <= delta and eta <= eta_max allow. Finding that eta takes
many evaluations of K(eta) = log E_{pi_0}[exp(eta s)], and over a split vocabulary each would cost collectives. Here the
ranks add up the moments of the signal's law (`objectives.signal_law`), in one collective, and each finds the root by
itself, on equal sums with equal results.

Everything is computed without gradient: base and signal are fixed in stage 2. Where the base's log-probability is
-inf, q is 0 and the signal is ignored; elsewhere the signal must be finite. Temporaries with a vocabulary
dimension are made for one chunk of tokens at a time (`shard.CHUNK_BYTES`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.objectives.projection import Projection, check_region, log_partition, solve_eta
from megatron_erpd.objectives.signal_law import (
    LAW_BYTES,
    MOMENT_BYTES,
    NUM_BINS,
    NUM_MOMENTS,
    SignalLaw,
    law_of_moments,
    signal_moments,
)
from megatron_erpd.vocab_parallel.shard import (
    VocabShard,
    accumulation_dtype,
    local_blocks,
    log_softmax_of,
    normalizer,
    token_chunks,
)


@torch.no_grad()
def signal_law(base_log_probs: Tensor, signal: Tensor, shard: VocabShard, eta_max: float) -> SignalLaw:
    """The law of the signal under the base over the whole vocabulary, good for K at any eta in [0, eta_max].

    Args:
        base_log_probs, signal: [n, v/tp] nats; padding columns don't matter.

    Returns:
        Atoms per token, the same on every rank. Collectives: one SUM of `[n, NUM_MOMENTS, NUM_BINS]`.

    Raises:
        ErpdError: NaN or an infinity where the base allows a token.
    """
    return law_of_moments(_summed_moments(base_log_probs, signal, shard, eta_max), eta_max)


@torch.no_grad()
def apply_eta(base_log_probs: Tensor, signal: Tensor, eta: Tensor | float, shard: VocabShard) -> Tensor:
    """log q_eta of this rank's columns, `[..., v/tp]`, normalised over the whole vocabulary; padding columns are -inf.

    Args:
        base_log_probs, signal: [..., v/tp] nats.
        eta: [...] per token, or one number for all.

    Returns:
        float32 (float64 for a float64 base). Collectives: one all-gather of two numbers per token.
    """
    base = shard.values(base_log_probs)
    values = shard.values(signal).to(base.dtype).masked_fill(base == -torch.inf, 0.0)
    step = eta.to(base.dtype).unsqueeze(-1) if isinstance(eta, Tensor) and eta.dim() else eta
    exponents = base + step * values
    log_probs = log_softmax_of(exponents, *normalizer(exponents, shard))
    return shard.with_padding(log_probs, like=log_probs, fill=-torch.inf)


@torch.no_grad()
def kl_from_base(log_probs: Tensor, base_log_probs: Tensor, shard: VocabShard) -> Tensor:
    """KL(q || pi_0) in nats, `[...]`, of a normalised q given as `log_probs [..., v/tp]`; one SUM of `[...]`."""
    log_q, base = shard.values(log_probs), shard.values(base_log_probs)
    probs = log_q.exp()
    return shard.all_reduce_sum((log_q - base).mul_(probs).masked_fill_(probs == 0, 0.0).sum(dim=-1))


@torch.no_grad()
def project_shard(
    base_log_probs: Tensor, signal: Tensor, shard: VocabShard, delta: float, eta_max: float
) -> Projection:
    """The `per_token` projection of this rank's columns.

    KL, normalisation of q and the KL returned are as exact as the law of the signal: see `objectives.projection`.

    Args:
        base_log_probs, signal: [..., v/tp] nats; padding columns don't matter.
        delta: the trust region in nats per token.
        eta_max: the largest step.

    Returns:
        eta `[...]` and KL(q || pi_0) `[...]`, the same on every rank, and log q `[..., v/tp]`, -inf in padding columns;
        float32 (float64 for a float64 base). Collectives: one SUM of `[..., NUM_MOMENTS, NUM_BINS]`, whatever the data.

    Raises:
        RecipeError: delta or eta_max out of range.
        ErpdError: NaN or an infinity where the base allows a token.
    """
    check_region(delta, eta_max)
    tokens = base_log_probs.shape[:-1]
    base_rows, signal_rows = (x.reshape(-1, shard.width) for x in (base_log_probs, signal))
    moments = _summed_moments(base_rows, signal_rows, shard, eta_max)
    dtype = accumulation_dtype(base_log_probs)
    log_probs = base_log_probs.new_empty(base_rows.shape, dtype=dtype)
    log_probs[:, shard.valid_columns :] = -torch.inf
    eta, kl = (torch.empty(len(base_rows), dtype=dtype, device=base_rows.device) for _ in range(2))
    for rows in token_chunks(len(base_rows), LAW_BYTES + TILT_BYTES * shard.width):
        law = law_of_moments(moments[rows], eta_max)
        eta[rows] = solve_eta(*law, delta, eta_max)
        # K at eta as it is returned: in float32 its rounding alone could move K by more than that of the sums.
        step = eta[rows].double()
        partition = log_partition(*law, step)
        kl[rows] = partition.kl(step, law.log_masses.logsumexp(dim=-1))
        shift = partition.log_partition.to(dtype)
        _tilt(log_probs[rows], base_rows[rows], signal_rows[rows], eta[rows], shift, shard)
    return Projection(eta.reshape(tokens), log_probs.reshape(*tokens, shard.width), kl.reshape(tokens))


TILT_BYTES = 24
"""Bytes per entry that the tilt of a chunk has in use at most: base, signal and log q in float64."""


def _tilt(out: Tensor, base: Tensor, signal: Tensor, eta: Tensor, log_partition: Tensor, shard: VocabShard) -> None:
    """Writes log q of a chunk's valid columns."""
    for rows in local_blocks(base, TILT_BYTES * shard.width):
        own, values = shard.values(base[rows]), shard.values(signal[rows]).to(eta.dtype)
        log_q = (eta[rows].unsqueeze(-1) * values).add_(own)
        if bool(log_q.sum().isnan()):  # looking at the sum costs less than masking every entry
            log_q.masked_fill_(own == -torch.inf, -torch.inf)
        out[rows, : shard.valid_columns] = log_q.sub_(log_partition[rows].unsqueeze(-1))


def _summed_moments(base_log_probs: Tensor, signal: Tensor, shard: VocabShard, eta_max: float) -> Tensor:
    """`signal_moments` of all ranks' columns, `[n, NUM_MOMENTS, NUM_BINS]`; one SUM."""
    num_tokens = len(base_log_probs)
    shape = (num_tokens, NUM_MOMENTS, NUM_BINS)
    moments = torch.empty(shape, dtype=torch.float64, device=base_log_probs.device)
    for rows in local_blocks(base_log_probs, MOMENT_BYTES * shard.width):
        moments[rows] = signal_moments(shard.values(base_log_probs[rows]), shard.values(signal[rows]), eta_max)
    return shard.all_reduce_sum(moments)
