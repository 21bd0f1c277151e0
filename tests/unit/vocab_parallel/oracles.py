"""Dense formulas in probability space, independent of the package: for float64 and moderate logits only."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(logits / temperature, dim=-1).exp()


def probs_divergence(kind: str, q: Tensor, p: Tensor) -> Tensor:
    """Between target q and policy p, `[..., n]` each, where all entries are positive."""
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def buckets(probs: Tensor, indices: Tensor) -> Tensor:
    """[..., V] -> [..., K + 1]: the chosen entries and 1 minus their sum."""
    chosen = probs.gather(-1, indices)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)
