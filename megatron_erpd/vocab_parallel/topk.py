"""The largest log-probabilities over a split vocabulary, with the exact mass of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.objectives.divergences import TopKTarget
from megatron_erpd.vocab_parallel.shard import VocabShard, joined, local_blocks, local_sums

NO_TOKEN = -1
"""The index of an entry that is empty (its log-probability is -inf)."""


@torch.no_grad()
def vocab_parallel_topk(log_probs: Tensor, k: int, shard: VocabShard) -> TopKTarget:
    """The `k` largest of `log_probs [..., v/tp]` over the whole vocabulary, largest first, and the tail.

    The tail is the logsumexp of the columns that aren't selected, not 1 minus the sum of those that are: it keeps
    its relative precision down to tails of any smallness. Which of several equal log-probabilities are selected
    is unspecified, but the same on every rank. Padding columns are never selected.

    Args:
        log_probs: normalised log-probabilities; they aren't normalised again, so selected and tail mass add up to the
            mass of `log_probs`, as exactly as that is 1.

    Returns:
        `indices` int64, `log_probs` and `tail_log_prob` float32 (float64 for float64). No gradient.
        Collectives: one all-gather of `[..., 2k]` in float64 and one of two numbers per token.

    Raises:
        RecipeError: `k` isn't in 1 ... vocab_size.
    """
    if not 1 <= k <= shard.vocab_size:
        raise RecipeError(f"top-k needs 1 <= k <= {shard.vocab_size} (the vocabulary), not k = {k}")
    values = shard.values(log_probs)
    own_values, own_columns = values.topk(min(k, shard.valid_columns), dim=-1)
    missing = k - own_values.shape[-1]
    own_values = torch.nn.functional.pad(own_values, (0, missing), value=-torch.inf)
    own_indices = torch.nn.functional.pad(own_columns + shard.start, (0, missing), value=NO_TOKEN)
    # float64 holds both log-probabilities and indices without loss, so one collective carries them.
    gathered = shard.all_gather(torch.stack([own_values.double(), own_indices.double()], dim=-2))
    best, place = gathered[..., 0, :].topk(k, dim=-1)
    indices = gathered[..., 1, :].gather(-1, place).long()
    maximum, remainder = joined(_sums_of_others(values, indices, shard), shard)
    return TopKTarget(indices, best.to(values.dtype), maximum + remainder)


def _sums_of_others(values: Tensor, indices: Tensor, shard: VocabShard) -> Tensor:
    """`local_sums` of the columns that aren't selected, a block of tokens at a time."""
    flat, selected = values.reshape(values.shape[:-1].numel(), values.shape[-1]), indices.reshape(-1, indices.shape[-1])
    blocks = local_blocks(flat, 2 * flat.element_size() * flat.shape[-1])
    sums = [local_sums(_exclude(flat[rows], selected[rows], shard), shard) for rows in blocks]
    return torch.cat([values.new_empty(0, 2), *sums]).reshape(*values.shape[:-1], 2)


def _exclude(values: Tensor, indices: Tensor, shard: VocabShard) -> Tensor:
    """A copy of `values [..., valid_columns]` with the columns of the global ids `indices [..., K]` set to -inf."""
    owned, local = shard.locate(indices)
    # One column more than there are takes what belongs to other ranks.
    copy = values.new_empty((*values.shape[:-1], values.shape[-1] + 1))
    copy[..., :-1] = values
    copy.scatter_(-1, torch.where(owned, local, values.shape[-1]), -torch.inf)
    return copy[..., :-1]
