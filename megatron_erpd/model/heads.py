"""What takes the place of the language-model head on the last pipeline stage (Megatron's `output_processor`).

No head makes the logits of a whole micro-batch: they are computed a chunk of response tokens at a time, where they are
used (`vocab_parallel.fused`), and prompt and padding tokens get none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.errors import LayoutError
from megatron_erpd.model.loss_guard import naming_rollouts
from megatron_erpd.model.model import unwrap, vocab_shard
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import (
    LiveTarget,
    OutputLayer,
    Target,
    TopKTarget,
    VocabShard,
    fused_token_terms,
    gathered_divergence,
    token_terms,
)


@dataclass(frozen=True)
class HiddenStates:
    """A frozen policy's final hidden states `[s * b, h]`, whole on every rank, and its output layer's shard
    `[v/tp, h]`."""

    rows: Tensor
    weight: Tensor

    def logits(self, positions: Tensor) -> Tensor:
        """`[n, v/tp]` of these rows."""
        return self.rows[positions] @ self.weight.t()


class Hidden:
    """An output processor of policies without gradient: their hidden states, before the output layer."""

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Any, config: Any = None, **unused: Any
    ) -> HiddenStates:
        layer, weight = _output_layer(output_layer, output_weight, config)
        return HiddenStates(layer.gather(hidden_states).flatten(0, 1), weight)


TargetOf = Callable[[Batch, Tensor, Sequence[HiddenStates], VocabShard], Target]
"""Given a batch, the response tokens' `positions` in it (`response_positions`), the frozen policies' hidden states and
the vocabulary shard: a distribution for each of these tokens."""


def response_positions(batch: Batch) -> Tensor:
    """int64 `[n]`, where the labels are response tokens, in the order `[s, b]` of Megatron's hidden states, flat."""
    return (batch.loss_mask.transpose(0, 1) > 0).flatten().nonzero().squeeze(-1)


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """`[b, s, ...]` of a batch at `positions`, `[n, ...]`."""
    return values.transpose(0, 1).flatten(0, 1)[positions]


def to_grid(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """`[n, ...]` as `[b, s, ...]`, 0 elsewhere; the inverse of `at_positions`. Gradients flow back."""
    b, s = batch.loss_mask.shape
    flat = values.new_zeros((s * b, *values.shape[1:])).index_put((positions,), values)
    return flat.unflatten(0, (s, b)).transpose(0, 1)


def policy_head(
    model: Any,
    vocab_size: int,
    kind: DivergenceKind | None = None,
    target: TargetOf | None = None,
    gather: bool = False,
) -> PolicyHead | None:
    """This rank's head; None before the last pipeline stage, where Megatron calls no processor."""
    if not unwrap(model).post_process:
        return None
    return PolicyHead(vocab_shard(model, vocab_size), kind, target, gather)


class PolicyHead:
    """Log-probs of the labels, entropy and, where asked, a divergence per token, from the policy's hidden states.

    Called by Megatron with hidden states `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism). Returns fp32
    `[n, b, s]` with n = 2 or 3 rows: `log_probs`, `entropy` (without gradient), the divergence; 0 outside of the
    responses. Every tensor-parallel rank returns the same values. Collectives: see `fused_token_terms`.

    Args:
        kind, target: of the divergence; both or neither.
        gather: compute the divergence on vocabularies gathered from all ranks, with logits of all response tokens.
    """

    def __init__(
        self,
        shard: VocabShard,
        kind: DivergenceKind | None = None,
        target: TargetOf | None = None,
        gather: bool = False,
    ) -> None:
        self.shard = shard
        self.kind = kind
        self.target = target
        self.gather = gather

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Any,
        context: dict[str, Any],
        config: Any = None,
        **unused: Any,
    ) -> Tensor:
        batch: Batch = context["batch"]
        positions = response_positions(batch)
        labels = at_positions(batch.labels, positions)
        target = None
        if self.target is not None:
            with torch.no_grad():
                target = self.target(batch, positions, context["outputs"], self.shard)
        if self.gather and target is not None and not isinstance(target, TopKTarget):
            assert self.kind is not None
            logits = output_layer(hidden_states, weight=output_weight)[0].flatten(0, 1)[positions]
            whole = LiveTarget(target.rows(slice(0, len(positions))), target.temperature)
            with naming_rollouts(batch, positions):
                log_probs, entropy, _ = token_terms(logits, self.shard, labels)
            rows = [log_probs, entropy.detach(), gathered_divergence(self.kind, logits, whole, self.shard)]
        else:
            layer, weight = _output_layer(output_layer, output_weight, config)
            with naming_rollouts(batch, positions):
                log_probs, entropy, divergence = fused_token_terms(
                    hidden_states, weight, self.shard, labels, self.kind, target, positions=positions, layer=layer
                )
            rows = [log_probs, entropy.detach(), *([divergence] if target is not None else [])]
        return torch.stack([to_grid(row.float(), positions, batch) for row in rows])


def _output_layer(layer: Any, tied_weight: Tensor | None, config: Any) -> tuple[OutputLayer, Tensor]:
    """Megatron's column-parallel output layer as the fused head sees it, and its weight.

    Raises:
        LayoutError: the layer does something that isn't a plain matrix product.
    """
    unsupported = {
        "a bias": getattr(layer, "bias", None) is not None,
        "--defer-embedding-wgrad-compute": getattr(config, "defer_embedding_wgrad_compute", False),
        "MuP's scaled logits": getattr(config, "use_mup", False),
        "a weight gathered from data-parallel ranks": getattr(layer, "gtp_remat_size", 1) > 1,
    }
    for name, found in unsupported.items():
        if found:
            raise LayoutError(f"the output layer has {name}, which the fused head doesn't compute; leave it out")
    shape = OutputLayer(layer.tp_group, layer.sequence_parallel, bool(layer.gradient_accumulation_fusion))
    return shape, layer.weight if tied_weight is None else tied_weight
