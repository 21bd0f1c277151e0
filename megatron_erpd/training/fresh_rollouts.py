"""Rollouts of the policy in training, as it is now: its weights reach the sampler, all ranks sample and share."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_erpd import platform
from megatron_erpd.checkpoint import export_hf_weights, parameter_group
from megatron_erpd.data.batch import Batch, BatchSource, packer
from megatron_erpd.data.packs import Packer
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.errors import StageError
from megatron_erpd.meeting import gather_objects
from megatron_erpd.objectives.advantages import compute_advantages
from megatron_erpd.sampling.engine import TransformersEngine
from megatron_erpd.sampling.policy import load_policy, reload_weights
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.settings import Layout, OnPolicySettings


@dataclass(frozen=True)
class Response:
    """One scored response: tokens `[R]`, the reward (NaN where there was no verdict), whether it was cut off."""

    tokens: np.ndarray
    reward: float
    truncated: bool


@dataclass(frozen=True)
class FreshRollouts:
    """The rollouts of one update, N = prompts x G rows, those of a prompt together; a `TokenSource`.

    Attributes:
        step: the update that they are for, from 0.
        prompts: token ids of each row's prompt.
        responses: of each row.
        group_ids: int64 `[N]`.
    """

    step: int
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Response]
    group_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def sample_ids(self) -> list[str]:
        return [self.location(i) for i in range(len(self))]

    @property
    def prompt_lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    @property
    def response_lengths(self) -> np.ndarray:
        return np.array([len(response.tokens) for response in self.responses], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.response_lengths

    @property
    def rewards(self) -> np.ndarray:
        """float32 `[N]`, NaN for unverified."""
        return np.array([response.reward for response in self.responses], dtype=np.float32)

    def prompt_tokens(self, i: int) -> np.ndarray:
        return np.asarray(self.prompts[i], dtype=np.int64)

    def response_tokens(self, i: int) -> np.ndarray:
        return self.responses[i].tokens

    def location(self, i: int) -> str:
        return f"update {self.step + 1}, rollout {i}"


class Sampler:
    """Draws each update's rollouts from the model in training.

    The weights go through a Hugging Face folder (`checkpoint.export_hf_weights`, so any TP and PP will do), from which
    every rank loads them into a sampler of its own. A step's prompts are dealt to all ranks, whatever their place in
    the layout; the responses are gathered, so that every rank holds all of them. A response depends on the weights, the
    seed, the step, the prompt's place in it and its own number, and by rounding alone on what is decoded beside it.

    Args:
        settings: how to sample.
        records, token_ids: the prompts.
        verifier: scores the responses.
        hf_folder: configuration and tokenizer of the policy.
        scratch: folder for the weights; a sampler removes and makes it anew.
        dtype: element type of the weights in training.
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        records: Sequence[PromptRecord],
        token_ids: Sequence[Sequence[int]],
        verifier: Verifier,
        hf_folder: Path,
        scratch: Path,
        dtype: str,
    ) -> None:
        self.settings = settings
        self.records = records
        self.token_ids = token_ids
        self.verifier = verifier
        self.hf_folder = hf_folder
        self.scratch = scratch
        self.dtype = dtype
        self._order = BatchOrder([len(ids) for ids in token_ids], settings.prompts_per_update, settings.seed)
        self._engine: TransformersEngine | None = None
        self._group: dist.ProcessGroup | None = None

    def draw(self, model: Sequence[Any], step: int) -> FreshRollouts:
        """The rollouts of update `step` (from 0) by this model. Collective over all ranks.

        Raises:
            StageError: the verifier gave no verdict on any of them.
        """
        engine = self._refreshed(model)
        settings = self.settings
        first = step * settings.prompts_per_update
        chosen = self._order.stream(first, settings.prompts_per_update)
        mine = range(dist.get_rank(), settings.prompts_per_update, dist.get_world_size())
        samples = engine.sample(
            [self.token_ids[chosen[place]] for place in mine],
            num_samples=settings.num_rollouts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            batch_size=settings.batch_size,
            # A prompt that comes again, in a later step or in this one, gets noise of its own.
            prompt_indices=[first + place for place in mine],
        )
        scored = {place: self._scored(int(chosen[place]), group) for place, group in zip(mine, samples, strict=True)}
        groups = {place: group for part in gather_objects(scored) for place, group in part.items()}
        responses = [response for place in sorted(groups) for response in groups[place]]
        rows = np.arange(settings.prompts_per_update).repeat(settings.num_rollouts)
        rollouts = FreshRollouts(step, [self.token_ids[chosen[row]] for row in rows], responses, rows)
        if np.isnan(rollouts.rewards).all():
            raise StageError(
                f"verifier {self.verifier.spec} gave no verdict on any of the {len(rollouts)} responses of update "
                f"{step + 1}; its first error here: {self.verifier.first_error}"
            )
        return rollouts

    def close(self) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _refreshed(self, model: Sequence[Any]) -> TransformersEngine:
        # Every rank has loaded the former weights: it has given its part of the responses since.
        if dist.get_rank() == 0:
            self.close()
        dist.barrier()  # the folder is gone before any rank looks for it
        if self._engine is None:
            self._group = parameter_group()
        export_hf_weights(model, self.hf_folder, self.scratch, self.dtype, group=self._group)
        if self._engine is None:
            self._engine = TransformersEngine(load_policy(self.scratch, platform.device(), self.dtype))
        else:
            reload_weights(self._engine.policy, self.scratch)
        return self._engine

    def _scored(self, prompt: int, group: Sequence[Any]) -> list[Response]:
        assert self._engine is not None
        tokens = [sample.response_token_ids for sample in group]
        texts = self._engine.policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        verdicts = self.verifier.scores([(self.records[prompt], text) for text in texts])
        return [
            Response(sample.response_token_ids, np.nan if reward is None else reward, sample.finish_reason == "length")
            for sample, (reward, _) in zip(group, verdicts, strict=True)
        ]


class FreshBatches:
    """The micro-batches of one data-parallel rank, update by update; `rollouts` is renewed between two updates.

    Args:
        rollouts: of the first update.
        settings: how rewards become advantages, and the seed.
        place: this rank's number among the data-parallel ranks, and theirs.
        context_parallel: as in `BatchSource`.
        attention_length: as in `data.batch.packer`.
        packs_for: how many packs there are where at least so many are needed.
    """

    def __init__(
        self,
        rollouts: FreshRollouts,
        settings: OnPolicySettings,
        layout: Layout,
        place: tuple[int, int],
        context_parallel: tuple[int, int] = (0, 1),
        attention_length: float = math.inf,
        packs_for: Callable[[int], int] = int,
    ) -> None:
        self.rollouts = rollouts
        self.settings = settings
        self.layout = layout
        self.place = place
        self.context_parallel = context_parallel
        self.attention_length = attention_length
        self._packs_for = packs_for

    def packs_per_rank(self) -> int:
        """Packs that the present rollouts need, where the layout packs."""
        return self._packs_for(self._packer.packs_per_rank(np.arange(len(self.rollouts)), self.place[1]))

    @property
    def _packer(self) -> Packer:
        return packer(self.layout, self.rollouts.lengths, self.attention_length)

    def __iter__(self) -> Iterator[Batch]:
        done: int | None = None
        while True:
            assert self.rollouts.step != done, "an update's rollouts are trained on once"
            done = self.rollouts.step
            yield from self._update(self.rollouts)

    def _update(self, rollouts: FreshRollouts) -> Iterator[Batch]:
        rewards = rollouts.rewards
        advantages = compute_advantages(rewards, rollouts.group_ids, self.settings.advantage)
        verified = ~np.isnan(rewards)
        rows = {
            "rewards": rewards,
            "advantages": np.where(verified, advantages, 0).astype(np.float32),
            "truncated": np.array([response.truncated for response in rollouts.responses], dtype=np.float32),
        }
        # Without a verdict there is nothing to learn from a rollout; the batches stay of one size.
        source = BatchSource(rollouts, self.layout, self.context_parallel, sequence_rows=rows, trained=verified)
        order, size = BatchOrder(rollouts.lengths, self.settings.global_batch_size, self.settings.seed), self.place[1]
        if self.layout.pack_tokens is not None:
            count = self.packs_per_rank()
            micro_batches = order.packs(0, self._packer, count, *self.place)
        else:
            count = self.settings.global_batch_size // (self.layout.rows * size)
            micro_batches = order.micro_batches(0, self.layout.rows, *self.place)
        for indices in itertools.islice(micro_batches, count):
            yield source.batch(indices)
