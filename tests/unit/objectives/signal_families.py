"""Base log-probs and signals [R, V] in float64 of every kind that the projection should survive."""

from __future__ import annotations

import math

import torch
from torch import Tensor

V, R = 300, 4


def families() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (base, signal); names that start with `offset` have their whole mass far from 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    base = (3 * normal(R, V)).log_softmax(-1)
    rows, rarest = torch.arange(R), base.argmin(-1)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for scale in (0.01, 0.1, 1.0, 5.0, 15.0):
        found[f"gaussian {scale}"] = (base, scale * normal(R, V))
    for height in (1.0, 15.0, 50.0, 100.0, -50.0, -100.0):
        spike = torch.zeros(R, V, dtype=torch.float64)
        spike[:, 0] = height
        found[f"one spike {height}"] = (base, spike)
        rare = 0.3 * normal(R, V)
        rare[rows, rarest] = height
        found[f"rare spike {height}"] = (base, rare)
        far = base.clone()
        far[:, 0] = -80.0
        found[f"very rare spike {height}"] = (far.log_softmax(-1), spike + 0.3 * normal(R, V))
    multi = 0.3 * normal(R, V)
    multi[:, :20] = -40 + 80 * uniform(R, 20)
    found["many spikes"] = (base, multi)
    for centre in (3.0, 20.0, 45.0, -10.0, -30.0):
        cluster = 0.2 * normal(R, V)
        cluster[:, :20] = centre + uniform(R, 20)
        rare_base, likely_base = base.clone(), base.clone()
        rare_base[:, :20] -= 0.8 * abs(centre)
        likely_base[:, 20:] -= 30
        found[f"cluster at {centre}"] = (base, cluster)
        found[f"rare cluster at {centre}"] = (rare_base.log_softmax(-1), cluster)
        found[f"likely cluster at {centre}"] = (likely_base.log_softmax(-1), cluster)
    found["heavy tails"] = (base, (normal(R, V) / uniform(R, V).clamp_min(1e-3)).clamp(-80, 80))
    found["tiny variance"] = (base, 1e-3 * normal(R, V))
    found["constant"] = (base, torch.full((R, V), 7.3, dtype=torch.float64))
    found["a teacher that moved"] = ((logits := 4 * normal(R, V)).log_softmax(-1), 5 * normal(R, V))
    unlearned = (logits - 18 * (torch.arange(V) < 3)).log_softmax(-1)
    peaked = torch.where(torch.arange(V) < 3, 0.0, -15.0) + 0.5 * normal(R, V)
    found["contrast with a degenerate policy"] = (peaked.log_softmax(-1), peaked.log_softmax(-1) - unlearned)
    for offset in (-100.0, -30.0, 5.0, 30.0):
        found[f"offset {offset}"] = (base, offset + normal(R, V))
    excluded, broken = base.clone(), 3 * normal(R, V)
    excluded[:, -50:] = -math.inf
    broken[:, -50:] = math.nan
    found["excluded entries"] = (excluded.log_softmax(-1), broken)
    return found
