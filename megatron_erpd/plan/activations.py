"""What a process keeps of a forward pass until its backward pass: bytes of activations, tensor by tensor.

The formulas are those of Korthikanti et al., 2022 (Reducing Activation Recomputation in Large Transformer Models,
arXiv 2205.05198, section 4 and table 2), which Megatron's own estimate uses too
(`megatron.training.theoretical_memory_usage`), counted anew for the layers that are built here: RMSNorm, grouped
queries, SwiGLU, no dropout, attention whose scores are not kept (flash attention), mixtures of experts. The tests
reconcile the two to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.data.batch import Padding
from megatron_erpd.errors import RecipeError
from megatron_erpd.recipe.recipe import MegatronFlags
from megatron_erpd.settings import Layout
from megatron_erpd.settings.megatron_flags import value_of

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Recompute:
    """What of a layer is computed again in the backward pass instead of kept (Megatron's `--recompute-*`).

    Attributes:
        method: of `full`: `uniform` recomputes groups of `num_layers`, `block` the first `num_layers` of a stage.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1

    def flags(self) -> MegatronFlags:
        """As a recipe's `megatron` section has it."""
        if self.granularity != "full":
            return {"recompute-granularity": self.granularity} if self.granularity == "selective" else {}
        how: MegatronFlags = {"recompute-granularity": "full", "recompute-method": self.method}
        return how | {"recompute-num-layers": self.num_layers}


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a stage, before context parallelism splits it.

    Attributes:
        tokens: that the model reads, padding among them.
        longest: of them in one sequence.
    """

    tokens: int
    longest: int

    @classmethod
    def largest(cls, layout: Layout, longest: int) -> MicroBatch:
        """Of rollouts of at most `longest` tokens: so many of these as it holds, or a full pack, or the pack of the one
        that is longer."""
        padding = Padding.of(layout)
        if layout.pack_tokens is None:
            each = -(-longest // padding.total) * padding.total
            return cls(layout.rows * each, each)
        return cls(-(-max(layout.pack_tokens, longest) // padding.total) * padding.total, longest)


def recompute_of(megatron: tuple[str, ...]) -> Recompute:
    """What Megatron's flags ask for, as a stage's command line has them.

    Raises:
        RecipeError: a full recomputation without its method, or a value that Megatron doesn't know.
    """
    given = {flag: value_of(megatron, f"--recompute-{flag}") for flag in ("granularity", "method", "num-layers")}
    granularity = "selective" if "--recompute-activations" in megatron else given["granularity"]
    if granularity is None:
        return Recompute()
    if granularity == "selective":
        return Recompute("selective")
    methods, layers = ("uniform", "block"), given["num-layers"] or ""
    if granularity != "full" or given["method"] not in methods or not layers.isdigit() or int(layers) < 1:
        raise RecipeError(
            f"--recompute-granularity {granularity}: Megatron takes selective, or full with --recompute-method uniform "
            "or block and --recompute-num-layers N; give them"
        )
    method: Literal["uniform", "block"] = "block" if given["method"] == "block" else "uniform"
    return Recompute("full", method, int(layers))


def layer_bytes(
    shape: ModelShape, layout: Layout, batch: MicroBatch, recompute: Recompute | None = None, on_gpu: bool = True
) -> int:
    """What one layer keeps of one micro-batch in one process.

    Without sequence parallelism, the activations between the layers are replicated over the tensor-parallel ranks.
    Experts are taken to get equal numbers of tokens.

    Attention is fused but for fp32 on a GPU: there Transformer Engine has no fused kernel, and PyTorch none for grouped
    heads. Its probabilities are then kept unless they are recomputed (`selective`); of a pack those of each segment,
    counted as if all were as long as the longest.
    """
    size, tokens, shards = ELEMENT_BYTES[layout.precision], _tokens(layout, batch), layout.tensor_parallel
    own = -(-tokens // _sequence_shards(layout))  # tokens of this rank between the layers
    key_value = max(shape.key_value_size // shards, shape.head_dim)
    query, heads = shape.query_size // shards, shape.num_heads // shards
    # Inputs of the two norms, and what these give to the projections.
    kept = 4 * size * own * shape.hidden_size
    # Query, key and value as attention reads them, its output, and the fp32 logarithm of each row's sum.
    kept += tokens * (size * (2 * query + 2 * key_value) + 4 * heads)
    if shape.family.qk_norm:
        kept += size * tokens * (query + key_value)
    recomputed = recompute is not None and recompute.granularity == "selective"
    if layout.precision == "fp32" and on_gpu and not recomputed:
        kept += size * heads * tokens * batch.longest
    if not shape.num_experts:
        return kept + size * tokens * 3 * (shape.ffn_hidden_size // shards)  # gate, up, and their product
    # Logits and probabilities of the router in fp32; of each token's experts the input, gate, up and product, output.
    routed = own * shape.experts_per_token
    return (
        kept
        + 2 * 4 * own * shape.num_experts
        + size * routed * (2 * shape.hidden_size + 3 * shape.expert_ffn_hidden_size)
    )


def training_bytes(
    shape: ModelShape,
    layout: Layout,
    batch: MicroBatch,
    recompute: Recompute,
    num_layers: int,
    in_flight: int,
    on_gpu: bool = True,
) -> int:
    """What the layers of a pipeline stage keep of the micro-batches whose backward pass is still to come.

    Args:
        num_layers: of this pipeline stage; with virtual stages, of a chunk.
        in_flight: micro-batches between their forward and backward pass; with virtual stages, of all chunks together.
            See `in_flight`.
    """
    layer = layer_bytes(shape, layout, batch, recompute, on_gpu)
    if recompute.granularity != "full":
        return in_flight * num_layers * layer
    entry = ELEMENT_BYTES[layout.precision] * -(-_tokens(layout, batch) // _sequence_shards(layout)) * shape.hidden_size
    again = min(recompute.num_layers, num_layers)
    # While a micro-batch goes backward, what it recomputes is there once: a group of layers, or one after another.
    if recompute.method == "uniform":
        return in_flight * -(-num_layers // again) * entry + again * layer
    return in_flight * (again * entry + (num_layers - again) * layer) + layer


def in_flight(
    pipeline_parallel: int, stage: int, num_micro_batches: int, virtual_stages: int = 1, group: int | None = None
) -> int:
    """Micro-batches that a pipeline stage has run forward and not yet backward, at the most (one forward, one
    backward).

    With virtual stages those of all chunks together. Megatron's interleaved schedule runs one more than
    `(chunks - 1) * group + 2 * (stages behind)` forward before the first goes backward (Narayanan et al., 2021, arXiv
    2104.04473, section 2.2; `get_pp_rank_microbatches`).

    Args:
        group: micro-batches that run through a chunk before the next chunk; by default one for each pipeline stage.
    """
    if virtual_stages == 1:
        return max(1, min(pipeline_parallel - stage, num_micro_batches))
    ahead = (virtual_stages - 1) * (group or pipeline_parallel) + 2 * (pipeline_parallel - stage - 1)
    return max(1, min(ahead + 1, num_micro_batches * virtual_stages))


def head_bytes(shape: ModelShape, layout: Layout, batch: MicroBatch, trains: bool, num_frozen: int) -> int:
    """Hidden states around the output layer, but for its logits.

    In training the input and output of the last norm, and at the output layer the hidden states of the whole sequence
    and their gradient; the hidden states of frozen policies, whole as well.
    """
    rows = ELEMENT_BYTES[layout.precision] * _tokens(layout, batch) * shape.hidden_size
    own = -(-rows // _sequence_shards(layout))
    return num_frozen * rows + (2 * own + 2 * rows if trains else 0)


def _tokens(layout: Layout, batch: MicroBatch) -> int:
    """Of a micro-batch in one process."""
    return -(-batch.tokens // layout.context_parallel)


def _sequence_shards(layout: Layout) -> int:
    return layout.tensor_parallel if layout.sequence_parallel else 1
