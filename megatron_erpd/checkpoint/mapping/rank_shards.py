"""What every rank of a layout holds of every tensor, from the table of parameters alone.

The ranks are Megatron's (`parallel_state.initialize_model_parallel`, order tp-cp-ep-dp-pp): tensor parallelism counts
fastest and pipeline stages slowest, and within a stage every `expert_parallel` ranks in a row share the experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_erpd.checkpoint.mapping.parallel_layout import check_expert_groups, check_layout, stage_layers
from megatron_erpd.checkpoint.mapping.param_map import EMBEDDING_KEY, Split, Unit, units
from megatron_erpd.checkpoint.mapping.parameter_count import VOCABULARY_MULTIPLE
from megatron_erpd.checkpoint.mapping.shape import ModelShape
from megatron_erpd.settings import Layout


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's numbers in a layout."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class RankShard:
    """A rectangle of one unit. A gated projection gives a rank two of them, the others one."""

    unit: Unit
    rows: int
    columns: int | None
    row: int
    column: int
    padded_rows: int
    """Rows of the whole unit in Megatron, where a padded vocabulary has more than the source."""

    @property
    def size(self) -> int:
        return self.rows * (1 if self.columns is None else self.columns)

    @property
    def source_size(self) -> int:
        """Elements that come from source tensors, without padding."""
        rows = min(self.rows, max(0, self.unit.num_rows - self.row))
        return rows * (1 if self.columns is None else self.columns)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor, its layers and experts first."""
        return (*self.unit.axes, self.padded_rows, *self._tail(self.unit.columns))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.rows, *self._tail(self.columns))

    @property
    def offset(self) -> tuple[int, ...]:
        """Where it begins in `global_shape`."""
        return (*self.unit.at, self.row, *self._tail(self.column))

    def _tail(self, value: int | None) -> tuple[int, ...]:
        return () if value is None or self.unit.columns is None else (value,)


@dataclass(frozen=True)
class Sharding:
    """A model under a layout.

    Args:
        virtual_stages: chunks of layers in each pipeline stage (Megatron's interleaved schedule).
        vocabulary_multiple: Megatron pads the vocabulary to a multiple of this times the tensor-parallel size.

    Raises:
        LayoutError: a size doesn't divide what it splits.
    """

    shape: ModelShape
    layout: Layout
    virtual_stages: int = 1
    vocabulary_multiple: int = VOCABULARY_MULTIPLE

    def __post_init__(self) -> None:
        sizes = self.layout
        check_layout(
            self.shape, sizes.tensor_parallel, sizes.pipeline_parallel, sizes.expert_parallel, self.virtual_stages
        )
        check_expert_groups(self.shape, sizes, trains=False)

    def coordinates(self, rank: int) -> RankCoordinates:
        """The numbers of a rank, from 0 to `layout.num_processes` - 1."""
        ranks = self.layout.num_processes // self.layout.pipeline_parallel
        return RankCoordinates(
            rank % self.layout.tensor_parallel, rank // ranks, rank % ranks % self.layout.expert_parallel
        )

    def layers(self, stage: int) -> list[range]:
        """The layers of every chunk of a pipeline stage."""
        return stage_layers(self.shape.num_layers, self.layout.pipeline_parallel, self.virtual_stages)[stage]

    def chunks(self, coordinates: RankCoordinates) -> list[list[RankShard]]:
        """All that a rank holds, by chunk of its pipeline stage.

        The embedding is on the first chunk of all; what follows the layers, and with tied embeddings a copy of the
        embedding, on the last.
        """
        layers = self.layers(coordinates.pipeline)
        found: list[list[RankShard]] = [[] for _ in layers]
        for unit in units(self.shape):
            for number, shards in enumerate(found):
                if self._is_on(unit, coordinates, number, layers[number]):
                    shards += self.shards(unit, coordinates.tensor)
        return found

    def shards(self, unit: Unit, tensor_rank: int) -> list[RankShard]:
        """A tensor-parallel rank's shards of a unit. Experts are not split by tensor parallelism."""
        size, rank = (1, 0) if unit.expert is not None else (self.layout.tensor_parallel, tensor_rank)
        rows, columns = unit.num_rows, unit.columns
        if unit.padded:
            multiple = self.vocabulary_multiple * size
            rows = -(-rows // multiple) * multiple
        if unit.split is Split.REPLICATED:
            return [RankShard(unit, rows, columns, 0, 0, rows)]
        if unit.split is Split.ROWS:
            return [RankShard(unit, rows // size, columns, rank * rows // size, 0, rows)]
        if unit.split is Split.COLUMNS:
            assert columns is not None
            return [RankShard(unit, rows, columns // size, 0, rank * columns // size, rows)]
        parts, start = [], 0
        for segment in unit.segments:
            count = segment.count // size
            parts.append(RankShard(unit, count, columns, start + rank * count, 0, rows))
            start += segment.count
        return parts

    def _is_on(self, unit: Unit, coordinates: RankCoordinates, chunk: int, layers: range) -> bool:
        if unit.layer is not None:
            experts = self.shape.num_experts // self.layout.expert_parallel
            return unit.layer in layers and (unit.expert is None or unit.expert // experts == coordinates.expert)
        is_first = coordinates.pipeline == 0 and chunk == 0
        is_last = coordinates.pipeline == self.layout.pipeline_parallel - 1 and chunk == self.virtual_stages - 1
        if unit.key == EMBEDDING_KEY:
            return is_first or (is_last and self.shape.tied_embeddings)
        return is_last
