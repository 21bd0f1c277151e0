"""A micro-batch through one policy or several of one architecture, to numbers per response token and to the loss.

`forward_stage` runs this pipeline stage of every policy; on the last stage `PolicyHead` takes the place of the
language-model head (Megatron's `output_processor`). No head makes the logits of a whole micro-batch: they are computed
a chunk of response tokens at a time, where they are used (`vocab_parallel.token_terms`), and prompt and padding tokens
get none at all. `loss_of` makes Megatron's loss of the result.

*Several policies.* Live teachers and the offline scoring need the hidden states of several policies on the same
tokens. They travel between stages side by side, concatenated on the hidden dimension, so that a schedule of Megatron's
moves all of them with its own sends and receives. (Stages tell each other their shapes: `variable_seq_lengths`.)

*Packs and context parallelism.* What the model reads is the loader's business (`data.batch.Batch`): rollouts side by
side or one after another, and of each sequence this rank's part, two of 2 * CP equal pieces, one from the front and one
from the back, so that causal attention costs all ranks the same. The head's results (a few numbers per response token)
go back to the losses' grid `[b, s]` of whole rollouts; there the context-parallel ranks' are added up, and every rank
computes the whole loss, so that no loss knows of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_erpd.data.batch import Batch
from megatron_erpd.errors import LayoutError, StageError, TokenError
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import (
    LiveTarget,
    OutputLayer,
    Target,
    TopKTarget,
    VocabShard,
    fused_token_terms,
    gathered_divergence,
    logits_of,
    output_logits,
    token_terms,
)


def forward_stage(models: Sequence[Any], batch: Batch, processors: Sequence[Any], context: Any = None) -> list[Any]:
    """This pipeline stage of every model on one micro-batch.

    Args:
        models: the policies, the trained one (if any) first. Those after the first run without gradients.
        batch: its tokens are this context-parallel rank's.
        processors: one output processor per model. A processor after the first is run first, so that the first
            one's can use what the others gave (as `context["outputs"]`).
        context: handed to the first model's processor.

    Returns:
        On the last stage each processor's result; elsewhere hidden states `[s, b, h]` (see `join`).
    """
    cores = [unwrap(m) for m in models]
    if len(cores) > 1 and not cores[0].pre_process:
        received = cores[0].decoder.input_tensor
        for core, part in zip(cores, received.chunk(len(cores), dim=-1), strict=True):
            core.set_input_tensor(part if core is cores[0] else part.detach())
    outputs: list[Any] = [None] * len(models)
    with torch.no_grad():
        for i in range(1, len(models)):
            outputs[i] = _forward(models[i], batch, processors[i], None)
    if isinstance(context, dict):
        context["outputs"] = outputs[1:]
    outputs[0] = _forward(models[0], batch, processors[0], context)
    return outputs


def join(outputs: list[Any], model: Any) -> torch.Tensor:
    """What a stage hands to the schedule: the first processor's result, or all policies' hidden states side by side."""
    if unwrap(model).post_process or len(outputs) == 1:
        return outputs[0].rows if isinstance(outputs[0], HiddenStates) else outputs[0]
    return torch.cat(outputs, dim=-1)


def _forward(model: Any, batch: Batch, processor: Any, context: Any) -> Any:
    return model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None,
        packed_seq_params=_packed_params(batch, unwrap(model)),
        output_processor=processor,
        output_processor_context=context,
    )


def _packed_params(batch: Batch, core: Any) -> Any:
    """What Megatron's attention is told of a pack; None for a padded micro-batch.

    Transformer Engine's kernels read the segments' ends on the device; without them Megatron's rotary embedding reads
    them on the host, as `CausalAttention` does.
    """
    if batch.segments is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = batch.segment_ends
    if core.config.transformer_impl != "transformer_engine":
        ends = torch.tensor([0, *accumulate(batch.segments)], dtype=torch.int32)
        if not isinstance(core.rotary_pos_emb, SegmentPositions):
            core.rotary_pos_emb = SegmentPositions(core.rotary_pos_emb)
        core.rotary_pos_emb.segments = batch.segments
    longest = max(batch.segments)
    # Padding at the end of a segment counts as its own tokens, which no other token sees.
    sizes = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    return PackedSeqParams("thd", ends, ends, **sizes, pad_between_seqs=False)


class SegmentPositions(torch.nn.Module):
    """Megatron's rotary embedding, whose angles for a pack are those of all its tokens, each segment's from position 0.

    Given angles for as many tokens as the pack has, Megatron (without Transformer Engine) takes each token's and turns
    all at once. Given those of the longest segment it turns segment by segment, with a backward pass that copies the
    whole pack for each of them.

    Attributes:
        segments: tokens of each segment, on all context-parallel ranks; set before each forward pass of a pack.
    """

    segments: Sequence[int]

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return int(self.rotary.get_rotary_seq_len(*args, **kwargs))

    def forward(self, longest: int, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """`[longest, 1, 1, d]` (of this context-parallel rank), of a pack `[sum(segments), 1, 1, d]`."""
        angles: Tensor = self.rotary(longest, packed_seq=packed_seq, cp_group=cp_group)
        return torch.cat([angles[:length] for length in self.segments]) if packed_seq else angles


@dataclass(frozen=True)
class HiddenStates:
    """A frozen policy's final hidden states `[s * b, h]`, whole on every rank, and its output layer's shard
    `[v/tp, h]`."""

    rows: Tensor
    weight: Tensor

    def logits(self, positions: Tensor) -> Tensor:
        """`[n, v/tp]` of these rows, float32 (float64 for float64)."""
        return logits_of(self.rows[positions], self.weight)


class Hidden:
    """An output processor of policies without gradient: their hidden states, before the output layer."""

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Any, config: Any = None, **unused: Any
    ) -> HiddenStates:
        layer, weight = _output_layer(output_layer, output_weight, config)
        return HiddenStates(layer.gather(hidden_states).flatten(0, 1), weight)


TargetOf = Callable[[Batch, Tensor, Sequence[HiddenStates], VocabShard], Target]
"""Given a batch, its `response_positions`, the frozen policies' hidden states and the vocabulary shard: a distribution
for each of these tokens."""


def to_grid(values: Tensor, batch: Batch) -> Tensor:
    """Values of this rank's response tokens, `[n]`, on the losses' grid, `[b, s]`; 0 elsewhere. Gradients flow back."""
    shape = batch.loss_mask.shape
    return values.new_zeros(shape.numel()).index_put((batch.response_places,), values).view(shape)


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

    Called by Megatron with hidden states `[s, b, h]` (`[s/tp, b, h]` under sequence parallelism; of a pack b is 1).
    Returns fp32 `[n, b, s]` on the losses' grid with n = 2 or 3 rows: `log_probs`, `entropy` (without gradient), the
    divergence; 0 outside of the responses, and where another context-parallel rank predicts. Every tensor-parallel rank
    returns the same values. Collectives: see `fused_token_terms`. Its context is a `HeadContext`.

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
        context: HeadContext,
        config: Any = None,
        **unused: Any,
    ) -> Tensor:
        batch, checks = context["batch"], context["checks"]
        positions = batch.response_positions
        later = partial(checks.add_tokens, batch)
        labels = batch.labels
        layer, weight = _output_layer(output_layer, output_weight, config)
        target = None
        if self.target is not None:
            with torch.no_grad():
                target = self.target(batch, positions, context["outputs"], self.shard)
        if self.gather and target is not None and not isinstance(target, TopKTarget):
            assert self.kind is not None
            logits = output_logits(hidden_states, weight, positions, layer)
            whole = LiveTarget(target.rows(slice(0, len(positions))), target.temperature)
            log_probs, entropy, _ = token_terms(logits, self.shard, labels, later=later)
            rows = [log_probs, entropy.detach(), gathered_divergence(self.kind, logits, whole, self.shard)]
        else:
            log_probs, entropy, divergence = fused_token_terms(
                hidden_states,
                weight,
                self.shard,
                labels,
                self.kind,
                target,
                positions=positions,
                layer=layer,
                later=later,
            )
            rows = [log_probs, entropy.detach(), *([divergence] if target is not None else [])]
        return torch.stack([to_grid(row.float(), batch) for row in rows])


def _output_layer(layer: Any, tied_weight: Tensor | None, config: Any) -> tuple[OutputLayer, Tensor]:
    """Megatron's column-parallel output layer as the fused head sees it, and its weight, once it may be read.

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
    # A call of the layer would do it, which the fused head takes the place of: with `--overlap-param-gather` the hooks
    # wait until this weight has been gathered from the data-parallel ranks, and have the next ones gathered.
    for before_forward in layer._forward_pre_hooks.values():
        before_forward(layer, ())
    shape = OutputLayer(layer.tp_group, layer.sequence_parallel, bool(layer.gradient_accumulation_fusion))
    return shape, layer.weight if tied_weight is None else tied_weight


# Context parallelism


class SequenceShard(NamedTuple):
    """A context-parallel rank's part of every sequence: `rank_positions`. By default the whole sequence."""

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def here(cls) -> SequenceShard:
        """This process's."""
        from megatron.core import mpu

        size = mpu.get_context_parallel_world_size()
        group = mpu.get_context_parallel_group() if size > 1 else None
        return cls(mpu.get_context_parallel_rank(), size, group)

    def whole(self, values: Tensor) -> Tensor:
        """All ranks' values, the same on every rank.

        Args:
            values: this rank's, and 0 where another rank's belong.

        Returns:
            Their sum. One all-reduce forward, none backward: every rank computes the same loss from the result and
            keeps the gradient of its own values.
        """
        return values if self.size == 1 else _Sum.apply(values, self.group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


# The loss


LossAndMetrics = Callable[[Batch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""A micro-batch and the head's per-token values `[n, b, s]` to Megatron's (sum, count, {name: [sum, count]})."""


class NonFiniteLoss(StageError):
    """The loss of a micro-batch is NaN or infinite, or so are the logits that it is made of.

    Attributes:
        what: which of them, and its value.
        rows: the rollouts whose own values are NaN or infinite, by their number in the data; all of the micro-batch's
            where none is (the sum over them overflows, say).
    """

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(f"{what} (rollouts number {', '.join(map(str, rows))})")
        self.what, self.rows = what, list(dict.fromkeys(rows))


class StepChecks:
    """Whether all of a step's micro-batches is finite: flags that stay on the device until the step's last backward.

    Read for each micro-batch, they would have the host wait for the device, and then the device for the host's next
    kernels. What is kept for an error's text is a few numbers per token.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Callable[[], NonFiniteLoss]]] = []

    def add_tokens(self, batch: Batch, is_bad: Tensor, error: Callable[[], TokenError]) -> None:
        """Keeps whether something of a micro-batch's response tokens is NaN or infinite (`later` of `token_terms`)."""
        where = batch.row_indices, batch.response_places, batch.loss_mask.shape[1]
        self._kept.append((is_bad, partial(_error_of_tokens, error, *where)))

    def add_loss(self, batch: Batch, loss: Tensor, output: Tensor) -> None:
        """Keeps whether a micro-batch's loss is NaN or infinite, and whose values make it so."""
        is_bad = ~torch.isfinite(loss)
        self._kept.append((is_bad, partial(_error_of_loss, loss, output, batch.loss_mask, batch.row_indices)))

    def first(self) -> NonFiniteLoss | None:
        """The first error that was found since the last call, which names the rollouts. One device-to-host copy."""
        kept, self._kept = self._kept, []
        flags = torch.stack([is_bad for is_bad, _ in kept]).tolist() if kept else []
        return next((error() for is_bad, (_, error) in zip(flags, kept, strict=True) if is_bad), None)


def _error_of_tokens(
    error: Callable[[], TokenError], row_indices: Tensor, places: Tensor, length: int
) -> NonFiniteLoss:
    found = error()
    wrong = places[torch.tensor(found.tokens, device=places.device)] // length
    return NonFiniteLoss(str(found), row_indices[wrong].tolist())


def _error_of_loss(loss: Tensor, output: Tensor, loss_mask: Tensor, row_indices: Tensor) -> NonFiniteLoss:
    wrong = (~torch.isfinite(output) & (loss_mask > 0)).flatten(2).any(dim=2).any(dim=0)
    rows = row_indices[wrong] if wrong.any() else row_indices
    return NonFiniteLoss(f"the loss is {float(loss)}", rows.tolist())


class HeadContext(TypedDict):
    """What a `PolicyHead` gets with a micro-batch.

    Attributes:
        batch: the micro-batch.
        checks: get what the head finds.
        outputs: of the frozen policies; put there by `forward_stage`.
    """

    batch: Batch
    checks: StepChecks
    outputs: NotRequired[Sequence[HiddenStates]]


def loss_of(
    loss: LossAndMetrics, batch: Batch, checks: StepChecks, output: Tensor, shard: SequenceShard | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron gets for a micro-batch, from the head's `[n, b, s]`, which holds this rank's values.

    Megatron sums gradients, counts and reports over DP x CP. Each rank's gradient holds its own positions' part only,
    so the gradients' sum is right as it is; counts and reports would come out CP times too large, and are those of the
    first context-parallel rank alone.

    Args:
        loss: computed on whole sequences.
        batch: the micro-batch.
        checks: keep whether the sum of the loss is finite.
        shard: by default this process's.
    """
    shard = SequenceShard.here() if shard is None else shard
    output = shard.whole(output)
    total, count, report = loss(batch, output)
    checks.add_loss(batch, total.detach(), output.detach())
    if shard.rank > 0:
        count = torch.zeros_like(count)
        report = {name: torch.zeros_like(value) for name, value in report.items()}
    return total, count, report


def has_finite_gradients(models: Iterable[Any]) -> bool:
    """Whether this rank's gradients are finite, as Megatron checks them before the collective over data-parallel ranks
    (`--check-for-nan-in-loss-and-grad`, on by default).

    Args:
        models: model chunks in Megatron's `DistributedDataParallel`.
    """
    groups = [group for model in models for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups)]
    return all(math.isfinite(bucket.grad_data.norm(p=2)) for group in groups for bucket in group.buckets)


# Megatron's model


def unwrap(model: Any) -> Any:
    """The GPTModel under DDP and mixed-precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def vocab_shard(model: Any, vocab_size: int) -> VocabShard:
    """The vocabulary range that this tensor-parallel rank's output layer holds.

    Args:
        model: a GPTModel of a last pipeline stage, wrapped or not.
        vocab_size: true size of the vocabulary, without padding rows.
    """
    from megatron.core import mpu

    width = unwrap(model).output_layer.output_size_per_partition
    start = mpu.get_tensor_model_parallel_rank() * width
    return VocabShard(start, start + width, vocab_size, mpu.get_tensor_model_parallel_group())
