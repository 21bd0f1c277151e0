"""Running fixed rollouts through a frozen policy, and reading what an earlier pass left."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parameter_count import attention_length
from megatron_erpd.data.batch import Batch, BatchSource, Padding, length_groups, packer
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError
from megatron_erpd.model.forward import Hidden, HiddenStates, SequenceShard, forward_stage, join, unwrap, vocab_shard
from megatron_erpd.precompute.scores import hidden_states, output_layer_digest
from megatron_erpd.progress import StepLines, say_progress
from megatron_erpd.settings import Layout
from megatron_erpd.teacher_cache.format import hidden_table
from megatron_erpd.teacher_cache.reader import CacheReader

_REPORT_SECONDS = 10.0


class Stored(Protocol):
    """Hidden states on disk: a finished cache's, or those of a cache in the making."""

    def hidden_row(self, policy: str, sample_id: str) -> Tensor: ...


def batch_groups(layout: Layout, rollouts: Rollouts, hf_folder: Path) -> list[np.ndarray]:
    """Rows of a batch each, the most work first.

    Padded batches hold rows of similar length. None has more tokens with padding than a micro-batch of the longest
    rollouts, which a training has to hold as well.

    Args:
        hf_folder: with the model's `config.json`.
    """
    if layout.pack_tokens is not None:
        pack = packer(layout, rollouts.lengths, attention_length(read_model_shape(hf_folder)))
        return pack.fill(np.arange(len(rollouts)))
    multiple = Padding.of(layout).total
    longest = -(-(int(rollouts.lengths.max()) - 1) // multiple) * multiple
    return length_groups(rollouts.lengths, layout.rows * longest, multiple)


def run_forward(
    model: Any,
    rollouts: Rollouts,
    groups: Sequence[np.ndarray],
    layout: Layout,
    consume: Callable[[Batch, HiddenStates], None],
    what: str,
    lines: StepLines | None = None,
) -> None:
    """Rollouts once through a policy; on last pipeline stages `consume` gets each batch and its hidden states.

    Args:
        groups: rows of the rollouts for a batch each.
        what: is done, for the lines that tell how far it is.
    """
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size, index = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    source = BatchSource(rollouts, layout, SequenceShard.here()[:2])
    progress = Progress(what, sum(len(group) for group in groups[index::size]), lines)

    def forward_step(data_iterator: Iterator[Batch], model: Any) -> Any:
        batch = next(data_iterator)
        outputs = forward_stage([model], batch, [Hidden()])

        def collect(output: Tensor, non_loss_data: bool = True) -> None:
            if not is_filler(batch):
                consume(batch, outputs[0])
                progress.add(rollouts.lengths[batch.row_indices.cpu().numpy()])

        return join(outputs, model), collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=source.once(groups, index, size),
            model=model,
            num_microbatches=-(-len(groups) // size),
            seq_length=int(rollouts.lengths.max()),
            micro_batch_size=1,  # of no effect: stages tell each other their shapes
            forward_only=True,
            collect_non_loss_data=True,
        )
    progress.close()


def run_stored(
    stored: Stored,
    layers: Mapping[str, Tensor],
    rollouts: Rollouts,
    groups: Sequence[np.ndarray],
    layout: Layout,
    consume: Callable[[Batch, Sequence[HiddenStates]], None],
    what: str,
) -> None:
    """The same from stored hidden states, without a forward pass; other than last pipeline stages have nothing to do.

    Args:
        layers: policy to its output layer, in the order in which `consume` gets the hidden states.
    """
    from megatron.core import mpu

    if not mpu.is_pipeline_last_stage():
        return
    source = BatchSource(rollouts, layout, SequenceShard.here()[:2])
    size, index = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    progress = Progress(what, sum(len(group) for group in groups[index::size]))
    with torch.no_grad():
        for batch in source.once(groups, index, size):
            if not is_filler(batch):
                consume(batch, [from_store(stored, name, batch, rollouts, layers[name]) for name in layers])
                progress.add(rollouts.lengths[batch.row_indices.cpu().numpy()])


def from_store(stored: Stored, policy: str, batch: Batch, rollouts: Rollouts, weight: Tensor) -> HiddenStates:
    """A policy's hidden states of a batch, this context-parallel rank's."""
    ids = rollouts.sample_ids
    rows = [stored.hidden_row(policy, ids[i]) for i in batch.row_indices.tolist()]
    return hidden_states(batch, rows, weight)


def is_filler(batch: Batch) -> bool:
    """Whether the batch only fills up a rank's number of batches (see `BatchSource.once`); the same on all ranks that
    work on it together."""
    return not bool(batch.loss_mask.any())


class Progress:
    """Lines on how far the first data-parallel rank is, every ten seconds, from the one process that knows.

    Args:
        lines: where the figures are kept too, and once more at the end: this rank's rollouts and tokens, and tokens per
            second of all ranks.
    """

    def __init__(self, what: str, num_rows: int, lines: StepLines | None = None) -> None:
        from megatron.core import mpu

        self._speaks = (
            mpu.is_pipeline_last_stage()
            and mpu.get_tensor_model_parallel_rank() == 0
            and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        )
        self._ranks = mpu.get_data_parallel_world_size()
        self._what, self._total, self._lines = what, num_rows, lines
        self._rows = self._tokens = 0
        self._start = self._latest = time.monotonic()

    def add(self, lengths: np.ndarray) -> None:
        """Counts rollouts that are done, by their lengths in tokens."""
        self._rows += len(lengths)
        self._tokens += int(lengths.sum())
        now = time.monotonic()
        if self._speaks and now - self._latest > _REPORT_SECONDS:
            self._latest = now
            say_progress(f"{self._what}:", str(self._rows), f"{self._total} rollouts", f"{self._rate():,.0f} tokens/s")
            self._keep()

    def close(self) -> None:
        """Keeps the last figures."""
        if self._speaks:
            self._keep()

    def _keep(self) -> None:
        if self._lines:
            figures = {"rollouts": self._rows, "tokens": self._tokens, "tokens_per_second": self._rate()}
            self._lines.add({name: round(value, 1) for name, value in figures.items()})

    def _rate(self) -> float:
        """Tokens per second of all data-parallel ranks."""
        return self._ranks * self._tokens / max(time.monotonic() - self._start, 1e-9)


def output_weight(model: Any) -> Tensor:
    """This rank's part of the output layer, `[v/tp, h]`, of a model of the last pipeline stage."""
    core = unwrap(model)
    shared = core.share_embeddings_and_output_weights
    return core.shared_embedding_or_output_weight() if shared else core.output_layer.weight


def load_output_layer(chunks: Sequence[Any], artifact: Path) -> None:
    """Loads of a policy's weights the output layer alone into all chunks of a model on this rank; collective."""
    from megatron.core import dist_checkpointing

    from megatron_erpd.checkpoint.torch_dist.iterations import iteration_folder, latest_iteration

    cores = {f"chunk{number}": unwrap(chunk) for number, chunk in enumerate(chunks)}
    checkpoint, names = artifact / "megatron", ("output_layer.", "embedding.word_embeddings.")
    wanted = {
        chunk: {name: value for name, value in core.sharded_state_dict().items() if name.startswith(names)}
        for chunk, core in cores.items()
    }
    folder = iteration_folder(checkpoint, latest_iteration(checkpoint))
    loaded = dist_checkpointing.load(wanted, str(folder))
    for chunk, core in cores.items():
        found = loaded.get(chunk, {})  # a chunk without either isn't there
        core.load_state_dict({name: value for name, value in found.items() if value is not None}, strict=False)


def output_layers(args: argparse.Namespace, policies: Mapping[str, Path], cache: CacheReader) -> list[Tensor]:
    """Each policy's output layer, `[v/tp, h]`, for a cache's hidden states; none before the last pipeline stage.

    Raises:
        CacheError: the hidden states belong to another output layer.
    """
    from megatron.core import mpu

    from megatron_erpd.model.model import build_frozen_model, model_config

    chunks, layers = build_frozen_model(model_config(args)), []
    for name, folder in policies.items():
        load_output_layer(chunks, folder)
        if mpu.is_pipeline_last_stage():
            layers.append(output_weight(chunks[-1]).detach().clone())
            check_output_layer(cache, name, output_layer_digest(layers[-1], vocab_shard(chunks[-1], args.vocab_size)))
    return layers


def check_output_layer(cache: CacheReader, policy: str, digest: str) -> None:
    """Raises `CacheError` unless a cache's hidden states of a policy belong to this output layer."""
    found = cache.table(hidden_table(policy)).facts.get("output_layer")
    if found != digest:
        raise CacheError(
            f"{cache.folder}: output_layer of policy {policy!r} is {found}, the checkpoint's is {digest}: the hidden "
            "states are of another policy; precompute again with --keep-hidden"
        )
