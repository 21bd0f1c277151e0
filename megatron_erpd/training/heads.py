"""What takes the place of the language-model head on the last pipeline stage (Megatron's `output_processor`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.training.model import unwrap, vocab_shard
from megatron_erpd.vocab_parallel import VocabShard, token_log_probs_and_entropy

DivergenceTerm = Callable[[Tensor, Batch, Any], Tensor]
"""Given the logits shard `[b, s, v/tp]`, the batch and the processor's context: a divergence per token `[b, s]`."""


def policy_head(model: Any, vocab_size: int, divergence: DivergenceTerm | None = None) -> PolicyHead | None:
    """This rank's head; None before the last pipeline stage, where Megatron calls no processor."""
    if not unwrap(model).post_process:
        return None
    return PolicyHead(vocab_shard(model, vocab_size), divergence)


class PolicyHead:
    """Log-probs of the labels, entropy and, where asked, a divergence per token, from the policy's hidden states.

    Called by Megatron with hidden states `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism). Returns fp32
    `[n, b, s]` with n = 2 or 3 rows: `log_probs`, `entropy` (without gradient), the divergence. Every tensor-parallel
    rank returns the same values; gradients reach the local logits shard without a collective. Collectives forward:
    those of the output layer, one MAX and one packed SUM (and the divergence's).
    """

    def __init__(self, shard: VocabShard, divergence: DivergenceTerm | None = None) -> None:
        self.shard = shard
        self.divergence = divergence

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Any, context: dict[str, Any], **unused: Any
    ) -> Tensor:
        batch: Batch = context["batch"]
        # A view: the operations below take any leading dimensions.
        logits = output_layer(hidden_states, weight=output_weight)[0].transpose(0, 1)
        log_probs, entropy = token_log_probs_and_entropy(logits, batch.labels, self.shard)
        rows = [log_probs.float(), entropy.detach().float()]
        if self.divergence is not None:
            rows.append(self.divergence(logits, batch, context).float())
        return torch.stack(rows)
