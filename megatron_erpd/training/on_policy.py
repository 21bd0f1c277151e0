"""On-policy GRPO: fresh rollouts for every optimizer step. A baseline for what replay and distillation are to save."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.checkpoint.mapping.config import model_flags
from megatron_erpd.data.batch import Batch
from megatron_erpd.errors import RecipeError
from megatron_erpd.evaluation.held_out import too_few
from megatron_erpd.model.arguments import (
    rank,
)
from megatron_erpd.model.forward import SequenceShard
from megatron_erpd.objectives.per_token import aggregate
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.settings import OnPolicySettings
from megatron_erpd.training.fresh_rollouts import FreshBatches, Sampler
from megatron_erpd.training.run import TrainingRun
from megatron_erpd.training.step import ForwardStep, ReplayStep, report, sequence_advantages


@dataclass
class OnPolicyRun(TrainingRun):
    """A training whose data is made as it goes.

    Args:
        num_prompts: how many were asked for; None for all.
        sampler: draws the rollouts.
    """

    settings: OnPolicySettings
    num_prompts: int | None
    sampler: Sampler

    def __post_init__(self) -> None:
        self._fresh: FreshBatches | None = None

    @property
    def num_iterations(self) -> int:
        return self.settings.updates

    @property
    def global_batch_size(self) -> int:
        return self.settings.global_batch_size

    @property
    def max_length(self) -> int:
        return max(len(ids) for ids in self.sampler.token_ids) + self.settings.max_new_tokens

    def warnings(self) -> list[str]:
        """Where there are fewer prompts than were asked for."""
        return too_few(self.num_prompts, len(self.sampler.records), "rollouts.num_prompts")

    def check_lengths(self) -> None:
        """Raises `RecipeError` where a prompt with the longest response has more tokens than the model positions."""
        positions = model_flags(self.base / "hf")["max_position_embeddings"]
        if self.max_length > int(positions):  # type: ignore[call-overload]
            raise RecipeError(
                f"--max-new-tokens {self.settings.max_new_tokens}: with the longest prompt that makes "
                f"{self.max_length} tokens, the model has {positions} positions; lower it or drop long prompts"
            )

    def packs_of_step(self) -> int:
        """As many as this update's rollouts need: how long they are shows when they are drawn."""
        assert self._fresh is not None
        return self._fresh.packs_per_rank()

    def batches(self, args: argparse.Namespace) -> Iterator[Batch]:
        from megatron.core import mpu

        from megatron_erpd.model.model import build_frozen_model, load_weights, model_config

        # The first rollouts are the checkpoint's, as those after a step are the model's that was just updated.
        chunks = build_frozen_model(model_config(args))
        if args.iteration:
            load_weights(chunks, self.output, args.iteration)
        else:
            load_weights(chunks, self.base)
        self._fresh = FreshBatches(
            self.sampler.draw(chunks, args.iteration),
            self.settings,
            self.layout,
            (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
            SequenceShard.here()[:2],
            self.attention_length,
            self.packs_for,
        )
        # With no evaluation steps, an evaluation after every step is `after_step` and nothing else.
        args.do_valid = True
        return iter(self._fresh)

    def after_step(self, model: list[Any]) -> None:
        """Renews the rollouts, from the model as the step has left it; after the last step, clears up."""
        assert self._fresh is not None
        step = self._fresh.rollouts.step + 1
        if step < self.num_iterations:
            self._fresh.rollouts = self.sampler.draw(model, step)
        elif rank() == 0:
            self.sampler.close()

    def megatron_flags(self) -> dict[str, object]:
        return {**super().megatron_flags(), "eval_interval": 1}


@dataclass(kw_only=True)
class OnPolicyStep(ReplayStep):
    """The policy gradient of rollouts that are the policy's own, with rewards and lengths among the metrics."""

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As `ReplayStep.loss_and_metrics`, without `old_log_probs`: they are the policy's, and the ratio is 1."""
        loss_sum, count, metrics = super().loss_and_metrics(batch, output)
        rows = batch.loss_mask.amax(dim=-1) > 0
        seen = {
            "reward": torch.where(rows, batch.seq_rows["rewards"], 0.0).sum(),
            "response_length": batch.loss_mask.sum(),
            "truncated": torch.where(rows, batch.seq_rows["truncated"], 0.0).sum(),
        }
        more = {name: (total, rows.sum()) for name, total in seen.items()}
        if self.target is not None:
            assert isinstance(self.kl_coefficient, float)
            loss_sum = loss_sum + self.kl_coefficient * aggregate(output[2], batch.loss_mask, self.aggregation)[0]
            more["policy_base_kl"] = aggregate(output[2].detach(), batch.loss_mask, "token_mean")
        return loss_sum, count, metrics | report(self.prefix, more)


def on_policy_step(run: OnPolicyRun, args: argparse.Namespace) -> ForwardStep:
    from megatron_erpd.model.model import build_frozen_model, load_weights, model_config
    from megatron_erpd.model.projected_target import live_base

    settings, frozen = run.settings, []
    if settings.kl_coefficient > 0:
        frozen.append(build_frozen_model(model_config(args)))
        load_weights(frozen[0], run.base)
    return OnPolicyStep(
        prefix=run.prefix,
        loss=partial(REPLAY_LOSSES["ppo"], aggregation=settings.aggregation),
        aggregation=settings.aggregation,
        advantages=sequence_advantages,
        kl_coefficient=settings.kl_coefficient,
        kl_estimator="k3",
        vocab_size=args.vocab_size,
        target=live_base if frozen else None,
        frozen=frozen,
    )
