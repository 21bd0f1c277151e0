"""One training stage through `megatron.training.pretrain`: data, flags, resuming, and the artifact at its end."""

from __future__ import annotations

import argparse
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd import platform
from megatron_erpd.checkpoint import copy_sidecar
from megatron_erpd.checkpoint.mapping.config import read_model_shape
from megatron_erpd.checkpoint.mapping.parallel_layout import read_schedule
from megatron_erpd.checkpoint.mapping.parameter_count import attention_length, parameters_of
from megatron_erpd.checkpoint.torch_dist.iterations import (
    TRACKER,
    SaveIntervals,
    latest_iteration,
    prune,
    save_intervals,
    saved_iterations,
)
from megatron_erpd.checkpoint.torch_dist.recovery import recover
from megatron_erpd.data.batch import Batch, BatchSource, TokenRow, packer, repeated
from megatron_erpd.data.pack_figures import PackFigures, training_packs
from megatron_erpd.data.packs import Packer
from megatron_erpd.data.replay_dataset import BatchOrder
from megatron_erpd.data.rollout_warnings import groups_warning
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import NoRoom, StageError, StageInterrupted, has_no_room
from megatron_erpd.manifest import METRICS
from megatron_erpd.meeting import finish_together, first
from megatron_erpd.model.arguments import check_arguments, parse_megatron_arguments, rank
from megatron_erpd.model.forward import NonFiniteLoss, SequenceShard, has_finite_gradients
from megatron_erpd.model.runtime import (
    check_same_layout,
    common_flags,
    configure_head,
    prepare_output,
    stage_process,
)
from megatron_erpd.settings import DistillSettings, Layout, Monitoring, ReplaySettings, TrainingSettings
from megatron_erpd.settings.learning_rates import describe_rates
from megatron_erpd.training.advantages import Advantages
from megatron_erpd.training.early_stop import Stop, read_stop
from megatron_erpd.training.step import ForwardStep, StepHooks

_NAMES_SHOWN = 4


@dataclass
class TrainingRun(ABC):
    """One training stage, from artifacts to an artifact.

    Args:
        stage: the manifest's stage name.
        prefix: `stage1` or `stage2`, of the metrics' names.
        settings: the stage's settings.
        inputs: name to folder or file of everything that the result depends on.
        make_step: called on every rank once models and process groups are there; returns the forward step.
        identity: the settings as the manifest keeps them.
        monitoring: where metrics go besides the artifact's own files.
        verify_inputs: compare the inputs with their manifests first.
    """

    stage: str
    prefix: str
    settings: TrainingSettings
    layout: Layout
    base: Path
    output: Path
    inputs: dict[str, Path]
    pass_through: list[str]
    make_step: Callable[[Any, argparse.Namespace], ForwardStep]
    identity: dict[str, Any] = field(default_factory=dict, kw_only=True)
    monitoring: Monitoring = field(default=Monitoring(), kw_only=True)
    verify_inputs: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def num_iterations(self) -> int:
        """Optimizer steps."""

    @property
    @abstractmethod
    def global_batch_size(self) -> int:
        """Rollouts in one optimizer step."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The longest rollout there may be, in tokens."""

    @abstractmethod
    def packs_of_step(self) -> int:
        """Packs of the next optimizer step on each data-parallel rank, where the layout packs."""

    @abstractmethod
    def batches(self, args: argparse.Namespace) -> Iterator[Batch]:
        """This rank's micro-batches, without end, from where `args` says that the training stands."""

    def after_step(self, model: list[Any]) -> None:
        """Called on every rank after each optimizer step with this rank's model, where `args.do_valid` is set."""
        return None

    def note(self) -> str | None:
        """What people should know of the data; printed before the training."""
        return None

    def figures(self) -> dict[str, float]:
        """What the manifest's summary says of the data."""
        return {}

    def warnings(self) -> list[str]:
        """What people should know of the artifact."""
        return []

    def name_of(self, row: int) -> str:
        """What a rollout is called, by its number in a batch's `row_indices`."""
        return f"rollout number {row}"

    @property
    def attention_length(self) -> float:
        """Tokens of a sequence whose attention costs what the rest of the model does."""
        return attention_length(read_model_shape(self.base / "hf"))

    def packs_for(self, least: int) -> int:
        """At least so many packs, as many as Megatron's schedule of virtual pipeline stages wants."""
        layers, stages = read_model_shape(self.base / "hf").num_layers, self.layout.pipeline_parallel
        return read_schedule(self.pass_through, layers, stages).whole_groups(least)

    @property
    def save_intervals(self) -> SaveIntervals:
        """When checkpoints are saved, and which of them stay."""
        settings = self.settings
        return save_intervals(self.num_iterations, settings.checkpoints, settings.save_interval)

    def execute(self) -> None:
        """Trains to the last iteration or an early stop, resuming what an interrupted run left; writes the artifact.

        Raises:
            StageInterrupted: the run was stopped before its end; its last checkpoint is kept and the same command
                continues.
        """
        check_arguments(self.base / "hf", self.layout, self.megatron_flags(), self.pass_through, self.max_length)
        with stage_process() as store:
            check_same_layout(self.layout)
            prepare_output(self.output, self.stage, self.identity, self.inputs, self.verify_inputs)
            first(self._recover)
            flags = self.megatron_flags()
            args = parse_megatron_arguments(self.base / "hf", self.layout, flags, self.pass_through, self.max_length)
            configure_head(self.layout)
            from megatron_erpd.model.model import check_optimizer_fits, synchronize

            if rank() == 0:  # which has put the checkpoint in order; its error ends the others
                check_optimizer_fits(self.output / "megatron", self.layout.expert_parallel)
            exited = self._train(args, store)
            stop, done = self._early_stop(), self._last_saved()
            if stop is None and (exited or done != self.num_iterations):
                kept = "the checkpoint is kept" if done else "no checkpoint was saved yet"
                raise StageInterrupted(
                    f"{self.output}: stopped at iteration {done} of {self.num_iterations}; {kept}, run the same "
                    "command again to continue"
                )
            synchronize()
            first(self._tidy)
            stopped = {"stopped": str(stop)} if stop else {}
            summary = {"iterations": done, **stopped, **self.figures()}
            finish_together(self.output, summary, warnings=self.warnings())
            synchronize()

    def _recover(self) -> None:
        """Puts the checkpoint in order, before any rank loads it, and says what there is to say."""
        checksums = "--verify-integrity" in self.pass_through
        recovered = recover(self.output / "megatron", self.output / ".damaged", checksums)
        for text in (recovered, self.note()):
            if text:
                print(text, flush=True)

    def _tidy(self) -> None:
        """Leaves of the checkpoints those that are kept, and adds the model's other files."""
        prune(self.output / "megatron", self.save_intervals.retain)
        copy_sidecar(self.base / "hf", self.output / "hf")

    def _early_stop(self) -> Stop | None:
        """The early stop that the latest checkpoint was saved at, if it was."""
        stop = read_stop(self.output)
        return stop if stop is not None and self._last_saved() == stop.iteration else None

    def _last_saved(self) -> int:
        """The step of the last whole checkpoint, 0 where there is none."""
        checkpoint = self.output / "megatron"
        return latest_iteration(checkpoint) if (checkpoint / TRACKER).is_file() else 0

    def _train(self, args: argparse.Namespace, store: Any) -> bool:
        """Trains what is left to train; returns whether Megatron's loop was left early."""
        if self._early_stop() is None:
            return self._pretrain(args, store)
        # Killed after its early stop, before its manifest.
        args.async_save = False
        from megatron.training.initialize import initialize_megatron

        initialize_megatron(allow_no_cuda=platform.is_cpu(), store=store)
        return False

    def _pretrain(self, args: argparse.Namespace, store: Any) -> bool:
        """Runs Megatron's training loop; returns whether it exited early (on a signal, say)."""
        from megatron.core.enums import ModelType
        from megatron.training import get_tensorboard_writer, get_timers, training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from torch.distributed.checkpoint.api import CheckpointException

        from megatron_erpd.model.model import model_config
        from megatron_erpd.training.metrics import JsonLinesWriter

        platform.pretrain_on_cpu(args)
        platform.verify_what_was_recorded()
        if args.async_save:
            platform.save_beside_training()
        platform.save_optimizer_without_padding(args)
        platform.load_into_torch_adam()
        # What a plan takes for the disk's speed; beside the training nobody waits for a save.
        waited = (
            (lambda: 0.0) if args.async_save else (lambda: get_timers()("save-checkpoint", log_level=0).active_time())
        )
        platform.wrap_tensorboard_writer(partial(JsonLinesWriter, self.output / METRICS, save_seconds=waited))
        if self.layout.pack_tokens is not None:
            platform.run_micro_batches(self.packs_of_step)
        hooks = StepHooks()
        of_chunks: list[Iterator[Batch]] = []

        def datasets(num_samples: object, vp_stage: int | None = None) -> tuple[Iterator[Batch], None, None]:
            # Called on every rank when models and process groups exist: the place for collective set-up. With virtual
            # pipeline stages it is called for each, and all read the same micro-batches.
            if not of_chunks:
                hooks.step = self.make_step(self, args)
                of_chunks.extend(repeated(self.batches(args), args.virtual_pipeline_model_parallel_size or 1))
            return of_chunks[vp_stage or 0], None, None

        datasets.is_distributed = True  # type: ignore[attr-defined]

        model = model_config(args)
        model.transformer.finalize_model_grads_func = hooks.finalize
        config = pretrain_cfg_container_from_args(args, model)
        exited = False
        try:
            training.pretrain(
                config,
                datasets,
                ModelType.encoder_or_decoder,
                hooks.forward,
                # Megatron's evaluation is the one place where it hands out the model between two steps.
                non_loss_data_func=self.after_step,
                store=store,
            )
        except SystemExit:
            exited = True
        except CheckpointException as error:  # which is no `Exception`, and keeps no errno
            if not has_no_room(self.output):
                raise
            raise self._no_room(args) from error
        except NonFiniteLoss as error:
            raise self._diverged(self._named(error), args) from None
        except RuntimeError as error:  # Megatron's check of the gradients has no type of its own
            if type(error) is not RuntimeError or has_finite_gradients(hooks.models.values()):
                raise
            # With an overlapped reduction gradients are checked in backward, before the losses that they are of.
            cause = hooks.step.checks.first()
            what = "the gradient is NaN or infinite, though the loss is finite" if cause is None else self._named(cause)
            raise self._diverged(what, args) from error
        finally:
            if args.async_save:
                platform.end_saves_beside_training()
        if writer := get_tensorboard_writer():
            writer.end_step()
        return exited

    def _named(self, error: NonFiniteLoss) -> str:
        names = ", ".join(self.name_of(row) for row in error.rows[:_NAMES_SHOWN])
        names += f" and {len(error.rows) - _NAMES_SHOWN} more" if len(error.rows) > _NAMES_SHOWN else ""
        return f"{error.what}; from {names}"

    def _no_room(self, args: argparse.Namespace) -> NoRoom:
        # Beside the training, the save began some steps ago.
        step = saved_iterations(self.output / "megatron")[-1] if args.async_save else args.curr_iteration + 1
        return NoRoom(
            f"{self.output / 'megatron'}: no room for the checkpoint of step {step} "
            f"({os.strerror(errno.ENOSPC)}); make room and run the same command again, it goes on from the last one"
        )

    def _diverged(self, what: str, args: argparse.Namespace) -> StageError:
        kept = self._last_saved()
        checkpoint = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was saved yet"
        return StageError(
            f"{self.output}: at step {args.curr_iteration + 1} {what}; {checkpoint}. Lower the learning rate, clip "
            "the gradient, or look at the rollouts"
        )

    def megatron_flags(self) -> dict[str, object]:
        """What the training itself tells Megatron, as argument names."""
        settings, total = self.settings, self.num_iterations
        rate, warmup, minimum = settings.learning_rate, settings.warmup_fraction, settings.min_learning_rate
        assert rate is not None and warmup is not None, "the command has chosen both"
        return {
            **common_flags(),
            "train_iters": total,
            "global_batch_size": self.global_batch_size,
            "lr": rate,
            "min_lr": rate if minimum is None else minimum,
            "lr_decay_style": "constant" if minimum is None else "cosine",
            "lr_decay_iters": total,
            "lr_warmup_iters": min(round(warmup * total), total - 1),
            "weight_decay": settings.weight_decay,
            "adam_beta1": settings.adam_beta1,
            "adam_beta2": settings.adam_beta2,
            "clip_grad": settings.clip_gradient,
            "seed": settings.seed,
            "pretrained_checkpoint": str(self.base / "megatron"),
            "load": str(self.output / "megatron"),
            "save": str(self.output / "megatron"),
            "save_interval": self.save_intervals.save,
            "save_retain_interval": self.save_intervals.retain,
            "dist_ckpt_optim_fully_reshardable": True,
            **self._async_flags(),
            "exit_signal_handler": True,
            "eval_interval": total + 1,
            "eval_iters": 0,
            "log_interval": 1,
            "tensorboard_dir": str(self.output / "tensorboard"),
            "tensorboard_log_interval": 1,
            # The seconds of a step and the processes that took them: what a plan measures speed by.
            "log_timers_to_tensorboard": True,
            "log_world_size_to_tensorboard": True,
            **self._wandb_flags(),
        }

    def _async_flags(self) -> dict[str, object]:
        """Of Megatron's two ways to save beside the training, its own: the other needs nvidia-resiliency-ext."""
        if not self.layout.async_save:
            return {}
        return {"async_save": True, "use_persistent_ckpt_worker": True, "async_strategy": "mcore"}

    def _wandb_flags(self) -> dict[str, object]:
        """Megatron logs to Weights & Biases itself, what TensorBoard gets under the same names, in a run for each
        attempt; all attempts of an artifact have its path as their name."""
        chosen = self.monitoring
        if chosen.wandb_project is None:
            return {}
        if chosen.wandb_mode is not None:
            os.environ["WANDB_MODE"] = chosen.wandb_mode
        return {
            "wandb_project": chosen.wandb_project,
            "wandb_entity": chosen.wandb_entity,
            "wandb_exp_name": "/".join(self.output.absolute().parts[-3:]),
            "wandb_save_dir": chosen.wandb_dir or str(self.output.parent / "wandb"),
        }


@dataclass
class ReplayRun(TrainingRun):
    """A training on fixed rollouts, in passes over them.

    Args:
        rollouts: the data, unverified rollouts left out where rewards are needed.
        advantages: of these rollouts.
        token_rows: what else the losses get of each response token.
        target_rows: what else the policy's head gets of it.
        imitated: bool `[N]`, the rollouts that the loss imitates, where it imitates some; None where it takes all.
    """

    settings: ReplaySettings | DistillSettings
    rollouts: Rollouts
    advantages: Advantages
    token_rows: dict[str, TokenRow] = field(default_factory=dict)
    target_rows: dict[str, TokenRow] = field(default_factory=dict)
    imitated: np.ndarray | None = None

    @cached_property
    def num_iterations(self) -> int:  # type: ignore[override]  # counted once
        """Whole batches that hold at least `epochs` passes over the data, without those that hold nothing to train on
        (Adam would step on its momentum)."""
        return max(1, self._order().num_batches(self._num_batches))

    @property
    def _num_batches(self) -> int:
        return self.settings.num_batches(len(self.rollouts))

    def _order(self) -> BatchOrder:
        return BatchOrder(self.rollouts.lengths, self.settings.global_batch_size, self.settings.seed, self.imitated)

    @property
    def global_batch_size(self) -> int:
        return self.settings.global_batch_size

    @property
    def max_length(self) -> int:
        return int(self.rollouts.lengths.max())

    def name_of(self, row: int) -> str:
        return f"rollout {self.rollouts.sample_ids[row]}"

    @property
    def compares_within_groups(self) -> bool:
        """Whether something learns from advantages that are 0 in a group of equal rewards."""
        return self.settings.advantages_for is not None and self.settings.advantage != "raw"

    def note(self) -> str | None:
        lines = [self._note_of_rollouts(), self._packs.describe() if self._packs else None]
        return "\n".join(filter(None, lines)) or None

    def _note_of_rollouts(self) -> str | None:
        groups = self.advantages
        if self.imitated is not None:
            left_out = self._num_batches - self.num_iterations
            text = f"imitates {self.imitated.sum()} of {len(self.rollouts)} rollouts"
            none = f"; {left_out} of {self._num_batches} batches hold none of them, and no step is made of these"
            return text + none * bool(left_out)
        return groups.describe() if self.compares_within_groups and groups.without_signal else None

    def figures(self) -> dict[str, float]:
        packs = self._packs.summary() if self._packs else {}
        if self.imitated is not None:
            left_out = self._num_batches - self.num_iterations
            return {"imitated": int(self.imitated.sum()), "batches_left_out": left_out, **packs}
        return {**(self.advantages.figures() if self.compares_within_groups else {}), **packs}

    def warnings(self) -> list[str]:
        left_out, groups = self._num_batches - self.num_iterations, self.advantages
        if self.imitated is not None and left_out:
            return [
                f"{left_out} of {self._num_batches} batches hold no rollout to imitate, and no step was made of them: "
                f"only {self.imitated.sum()} of {len(self.rollouts)} rollouts are chosen (sft_threshold)"
            ]
        if self.compares_within_groups:
            return groups_warning(groups.groups, groups.without_signal, groups.single)
        return []

    @cached_property
    def _packer(self) -> Packer:
        return packer(self.layout, self.rollouts.lengths, self.attention_length)

    @cached_property
    def _most_packs(self) -> int:
        most = self._order().most_packs(self._packer, self.num_iterations, self.layout.data_parallel)
        return self.packs_for(most)

    @cached_property
    def _packs(self) -> PackFigures | None:
        """What is said of the packs, where there are any."""
        if self.layout.pack_tokens is None:
            return None
        return training_packs(self._order(), self._packer, self.layout, self._most_packs, self.num_iterations)

    def packs_of_step(self) -> int:
        """One number for the whole training: the largest that any step needs."""
        return self._most_packs

    def batches(self, args: argparse.Namespace) -> Iterator[Batch]:
        from megatron.core import mpu

        sequence_rows = {"rewards": self.rollouts.rewards, "advantages": self.advantages.values}
        # Losses are computed on the last stage: no other reads the cached rows.
        token_rows, target_rows = (self.token_rows, self.target_rows) if mpu.is_pipeline_last_stage() else ({}, {})
        source = BatchSource(
            self.rollouts, self.layout, SequenceShard.here()[:2], token_rows, target_rows, sequence_rows
        )
        place = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        order, consumed = self._order(), args.consumed_train_samples
        if self.layout.pack_tokens is not None:
            return source.replay(order.packs(consumed, self._packer, self._most_packs, *place))
        return source.replay(order.micro_batches(consumed, self.layout.rows, *place))


def with_rates[S: TrainingSettings](settings: S, base: Path) -> S:
    """The settings with numbers for the learning rate and its warm-up, by the size of the model in the artifact `base`;
    rank 0 says which and why.

    Raises:
        CheckpointError: the size can't be told.
    """
    size = parameters_of(base / "hf")
    if rank() == 0:
        print(f"learning rate {describe_rates(settings.learning_rate, settings.warmup_fraction, size)}", flush=True)
    return settings.with_rates(lambda: size)
