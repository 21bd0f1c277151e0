"""The law of a signal under the base policy, compressed to a few numbers per token that add over vocabulary shards.

K(eta) = log sum_v pi_0(v) exp(eta s(v)) depends on pi_0 and s only through one measure on a line: how much mass pi_0
puts on which value of s. That measure is kept in `NUM_BINS` bins of x = eta_max s, whose edges are fixed in advance,
each with `NUM_MOMENTS` moments. Moments of shards add: one SUM of [..., NUM_MOMENTS, NUM_BINS] is all that a
vocabulary-parallel projection has to communicate. No maximum is needed: pi_0 is normalised, so nothing overflows.

From the moments 0 .. 2n - 1 of a bin comes its Gauss quadrature: n masses at n values with the same 2n moments (this
project's use of Golub and Welsch, "Calculation of Gauss Quadrature Rules", 1969). So the law becomes one of
n NUM_BINS atoms, and K, K' and K'' are sums over atoms as they were over the vocabulary: convex, monotone, never a
negative mass. Up to n distinct values in a bin are kept exactly, spikes among them. Otherwise the relative error of a
bin's exp(eta s) is about 4 (w/2)^2n / (2n)! for a half-width w: 4e-8 for n = 5 and w = 1.5.

*Bins.* Equal steps of u = x / (BIN_SCALE + |x|): half-width BIN_SCALE / NUM_BINS = 1.5 at 0, 2.5 at |x| = 30, 6 at 100.
They may widen because a budget that binds at a large x leaves little spread there, and because few entries lie there.

*Accuracy*: see `projection`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError

NUM_BINS = 65
"""Odd, so that the values around 0, where most of the vocabulary is, share a bin."""

NUM_MOMENTS = 10
"""Even: twice the atoms of a bin. As many numbers in 81 bins of 8 moments are ten times less accurate."""

MIDDLE = NUM_BINS // 2
"""The bin around 0."""

BIN_SCALE = 96.0
"""Nats of eta_max s at which bins are four times as wide as at 0. Measured against 64 and 128."""

RESOLUTION = 1e-11
"""Squared norm of an orthogonal polynomial on [-1, 1] below which the spread within a bin is taken for rounding."""


class SignalLaw(NamedTuple):
    """A measure on the line with N atoms per token, whose exponential integral is that of s under pi_0.

    Attributes:
        log_masses: [..., N] float64, -inf for an atom that isn't there.
        values: [..., N] float64 nats of signal, finite.

    The two stand in for base log-probs and signal wherever only K is asked for: `projection.log_partition(*law, eta)`.
    """

    log_masses: Tensor
    values: Tensor


def signal_moments(base_log_probs: Tensor, signal: Tensor, eta_max: float) -> Tensor:
    """This shard's part of the moments.

    Args:
        base_log_probs: [..., V] nats (or a shard of it); -inf allowed.
        signal: [..., V] nats, finite where base_log_probs is.
        eta_max: > 0, the largest eta at which the law will be asked for.

    Returns:
        [..., NUM_MOMENTS, NUM_BINS] float64: sums over the entries of a bin of pi_0(v) t^k, where t in [-1, 1] is the
        place of eta_max s(v) in its bin. No collectives. Temporaries: about `MOMENT_BYTES` per entry.
    """
    centres, half_widths = _bins(base_log_probs.device)
    masses = base_log_probs.to(torch.float64, copy=True).exp_()
    x = signal.to(torch.float64, copy=True).mul_(eta_max)
    if not bool(x.sum().isfinite()):  # looking at the sum costs less than masking every entry
        x = torch.where(masses > 0, x, 0.0)
    moments = masses.new_zeros(*masses.shape[:-1], NUM_MOMENTS, NUM_BINS)
    # Most entries are in the middle bin, whose sums need no indices. The entries outside are scattered into their bins,
    # and their mass is set to 0 for the middle bin. An entry at the edge is in either, by rounding, but only in one.
    far = torch.nn.functional.hardshrink(x, float(half_widths[MIDDLE]))
    outside = far.flatten().nonzero().squeeze(-1)
    if len(outside):
        _add_outside(moments, masses, x, outside, centres, half_widths)
        masses.view(-1).index_fill_(0, outside, 0.0)
    place = x.sub_(far).div_(half_widths[MIDDLE])
    middle = [masses.sum(dim=-1)]
    for _ in range(1, NUM_MOMENTS):
        middle.append(masses.mul_(place).sum(dim=-1))
    moments[..., MIDDLE] += torch.stack(middle, dim=-1)
    return moments


def _add_outside(
    moments: Tensor, masses: Tensor, x: Tensor, entries: Tensor, centres: Tensor, half_widths: Tensor
) -> None:
    """Adds to `moments` those of some of the entries of `masses` and `x`, by their places in the flat tensors."""
    mass, x_there = (values.view(-1).index_select(0, entries) for values in (masses, x))
    bins = x_there.div(x_there.abs().add_(BIN_SCALE)).add_(1).mul_(NUM_BINS / 2).long().clamp_(0, NUM_BINS - 1)
    place = x_there.sub_(centres.index_select(0, bins)).div_(half_widths.index_select(0, bins))
    flat = moments.view(-1)
    target = torch.div(entries, masses.shape[-1], rounding_mode="floor").mul_(NUM_MOMENTS * NUM_BINS).add_(bins)
    for _ in range(NUM_MOMENTS):
        flat.scatter_add_(0, target, mass)
        mass.mul_(place)
        target.add_(NUM_BINS)


MOMENT_BYTES = 80
"""Bytes per entry that `signal_moments` has in use at most, when all entries are outside of the middle bin: masses, x,
x outside, places, and of each entry mass, x, bin, target and two temporaries, 8 bytes each."""

LAW_BYTES = 20 * 8 * NUM_BINS * NUM_MOMENTS
"""Bytes per token that `law_of_moments` and a root find on it have in use at most."""


def law_of_moments(moments: Tensor, eta_max: float) -> SignalLaw:
    """The Gauss quadrature of every bin.

    Args:
        moments: [..., NUM_MOMENTS, NUM_BINS], sums of `signal_moments` over all shards.
        eta_max: the one they were made with.

    Returns:
        N atoms per token, at most NUM_BINS NUM_MOMENTS / 2; atoms that no token uses are dropped. No collectives: equal
        moments give equal laws on every rank.

    Raises:
        ErpdError: a moment isn't finite.
    """
    if not bool(moments.sum().isfinite()):
        raise ErpdError(
            "the signal or the base policy's log-probs hold NaN or infinity on a token in use; a policy has diverged, "
            "or its checkpoint is damaged"
        )
    in_use = (moments[..., 0, :] > 0).reshape(-1, NUM_BINS).any(dim=0)
    moments = moments[..., in_use]
    centres, half_widths = (x[in_use] for x in _bins(moments.device))
    occupied = moments[..., 0, :] > 0
    inside = moments.movedim(-2, -1)[occupied]  # [bins in use of all tokens, NUM_MOMENTS]
    masses = inside[:, :1]
    scaled = (inside / masses).unbind(dim=-1)
    diagonal, off_diagonal = _jacobi(scaled)
    # A bin with one value has it as its mean; only the others need an eigenvalue problem.
    places = scaled[1].unsqueeze(-1).repeat(1, NUM_MOMENTS // 2)
    weights = torch.zeros_like(places)
    weights[:, 0] = 1.0
    spread = off_diagonal[:, 0] > 0
    if bool(spread.any()):
        matrices = torch.diag_embed(diagonal[spread])
        matrices += torch.diag_embed(off_diagonal[spread], 1) + torch.diag_embed(off_diagonal[spread], -1)
        eigenvalues, eigenvectors = torch.linalg.eigh(matrices)
        places[spread], weights[spread] = eigenvalues, eigenvectors[:, 0, :].square()
    bins = occupied.nonzero()[:, -1]
    atoms = moments.new_zeros(*occupied.shape, NUM_MOMENTS // 2)
    values = torch.zeros_like(atoms)
    atoms[occupied] = weights * masses
    values[occupied] = (centres[bins].unsqueeze(-1) + half_widths[bins].unsqueeze(-1) * places) / eta_max
    atoms, values = atoms.flatten(-2), values.flatten(-2)
    used = (atoms > 0).flatten(0, -2).any(dim=0) if atoms.dim() > 1 else atoms > 0
    return SignalLaw(atoms[..., used].log(), values[..., used])


def _jacobi(moments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The Jacobi matrix of each measure from its normalised moments (Chebyshev's algorithm; Gautschi, 2004, 2.1.7).

    Returns:
        Diagonal [..., n] and off-diagonal [..., n - 1]. Where the measure has fewer than n points as far as
        `RESOLUTION` can tell, the off-diagonal is 0 from there on: what follows gets no weight.
    """
    size = NUM_MOMENTS // 2
    previous = [torch.zeros_like(moments[0])] * NUM_MOMENTS
    # current[l] is the integral of p_k t^l, p_k the monic orthogonal polynomials.
    current = list(moments)
    alive = moments[0] > 0
    norm, ratio, square = torch.ones_like(moments[0]), moments[1], torch.zeros_like(moments[0])
    diagonal, off_diagonal = [moments[1]], []
    for k in range(1, size):
        following = current.copy()
        for power in range(k, NUM_MOMENTS - k):
            following[power] = current[power + 1] - diagonal[-1] * current[power] - square * previous[power]
        alive = alive & (following[k] > RESOLUTION)
        next_norm = torch.where(alive, following[k], 1.0)
        square = torch.where(alive, next_norm / norm, 0.0)
        next_ratio = following[k + 1] / next_norm
        diagonal.append(torch.where(alive, next_ratio - ratio, moments[1]))
        off_diagonal.append(square.sqrt())
        norm, ratio = next_norm, next_ratio
        previous, current = current, following
    return torch.stack(diagonal, dim=-1), torch.stack(off_diagonal, dim=-1)


def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres and half-widths [NUM_BINS] in x; the outermost bins, which are open, as if they were twice as far out."""
    u = torch.linspace(-1, 1, NUM_BINS + 1, dtype=torch.float64, device=device)
    edges = BIN_SCALE * u / (1 - u.abs()).clamp_min(torch.finfo(torch.float64).eps)
    edges[0], edges[-1] = 2 * edges[1], 2 * edges[-2]
    return (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
