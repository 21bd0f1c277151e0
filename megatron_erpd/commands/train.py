"""The commands that train: stage 1's teacher (and the unlearned policy), and stage 2's student."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_erpd.commands.sizes import with_size
from megatron_erpd.data.batch import TokenRow
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError, RecipeError, RolloutError
from megatron_erpd.files import check_output
from megatron_erpd.manifest import read_manifest
from megatron_erpd.model.arguments import launched_layout
from megatron_erpd.model.compatible import check_compatible, load_data
from megatron_erpd.objectives.kl_control import KlController
from megatron_erpd.objectives.signals import parse_signal, policies_of
from megatron_erpd.objectives.types import Aggregation
from megatron_erpd.recipe.command_line import read_request
from megatron_erpd.recipe.requests import Distill, TrainingRequest, TrainTeacher
from megatron_erpd.settings import AUTO_SIGNAL, DistillSettings, ReplaySettings
from megatron_erpd.teacher_cache.reader import CacheReader
from megatron_erpd.teacher_cache.rows import (
    base_topk_rows,
    check_given_policies,
    hidden_rows,
    open_cache,
    shuffled_rows,
    token_row,
    topk_rows,
)
from megatron_erpd.training.advantages import advantages_of
from megatron_erpd.training.early_stop import EarlyStop
from megatron_erpd.training.run import ReplayRun, TrainingRun, with_rates
from megatron_erpd.training.step import (
    DistillStep,
    ForwardStep,
    LossFunction,
    ReplayStep,
    behavior_correction,
    cached_target,
    replay_loss,
    sequence_advantages,
    signal_advantages,
    surrogate_loss,
)


def train_teacher(argv: list[str]) -> None:
    """`megatron-erpd train-teacher`, in every process of its layout."""
    request = training_request(TrainTeacher, argv)
    settings = request.settings
    if request.base_log_probs is None and (settings.loss != "sft" or settings.kl_coefficient > 0):
        raise RecipeError(
            f"--base-log-probs: loss {settings.loss} needs the base policy's log-probs; make them with "
            "`megatron-erpd precompute --kind token` and give the folder"
        )
    rollouts = load_data(request.rollouts, request.base, rewards=request.rewards)
    settings = with_rates(settings, request.base)
    request = with_size(request.model_copy(update={"settings": settings}), rollouts)
    if request.base_log_probs is None and settings.max_kl is not None:
        raise RecipeError(
            "--max-kl: the KL to the base policy is measured from its log-probs; make them with `megatron-erpd "
            "precompute --kind token` and give the folder as --base-log-probs"
        )
    if settings.loss == "ce":
        _check_probabilities(rollouts, request.rollouts)
    imitated = _imitated(rollouts, request.rollouts, settings) if settings.loss == "sft" else None
    advantages = advantages_of(rollouts, settings, request.rollouts)
    rows: dict[str, TokenRow] = {}
    target_rows: dict[str, TokenRow] = {}
    if request.base_log_probs is not None:
        cache = open_cache(request.base_log_probs, rollouts, {"base": request.base}, request.layout.precision)
        rows["old_log_probs"] = token_row(cache, "base", rollouts)
        if settings.has_exact_kl:
            target_rows = base_topk_rows(cache, rollouts, settings.kl_topk)
    if settings.importance_correction != "none":
        rows["behavior_log_probs"] = _behavior_row(rollouts, request.rollouts)
    ReplayRun(
        **training_fields(request),
        prefix="stage1",
        settings=settings,
        rollouts=rollouts,
        make_step=partial(_replay_step, settings, *replay_loss(settings)),
        advantages=advantages,
        token_rows=rows,
        target_rows=target_rows,
        imitated=imitated,
    ).execute()


def distill(argv: list[str]) -> None:
    """`megatron-erpd distill`, in every process of its layout."""
    request = training_request(Distill, argv)
    settings, precision = request.settings, request.layout.precision
    policies = {"base": request.base, **request.policies}
    _check_teacher_flags(request, policies)
    if (base_log_probs := request.base_log_probs) is None:
        raise RecipeError("--base-log-probs: make it with `megatron-erpd precompute --kind token` and give the folder")

    rollouts = load_data(request.rollouts, request.base, rewards=request.rewards)
    settings = with_rates(settings, request.base)
    request = with_size(request.model_copy(update={"settings": settings}), rollouts)
    advantages = advantages_of(rollouts, settings, request.rollouts)
    cache = open_cache(base_log_probs, rollouts, {"base": request.base}, precision)
    rows: dict[str, TokenRow] = {"old_log_probs": token_row(cache, "base", rollouts)}
    target_rows: dict[str, TokenRow] = {}
    resolved = settings
    teacher_cache = None
    if settings.reads_cache:
        assert request.cache is not None, "checked"
        teacher_cache = open_cache(request.cache, rollouts, policies, precision)
        resolved = _with_recorded_signal(settings, teacher_cache)
        found = _cached_rows(resolved, teacher_cache, rollouts)
        if resolved.form == "projection":
            target_rows = found
        else:
            rows |= found
    ReplayRun(
        **training_fields(request),
        prefix="stage2",
        settings=settings,
        rollouts=rollouts,
        make_step=partial(_policy_gradient_step, resolved)
        if settings.form == "policy_gradient"
        else partial(_projection_step, resolved, policies, teacher_cache),
        advantages=advantages,
        token_rows=rows,
        target_rows=target_rows,
    ).execute()


def training_request[R: TrainingRequest](kind: type[R], argv: list[str]) -> R:
    """What a training is asked for, with the layout that was launched.

    Raises:
        RecipeError: its folder can't be written, or its monitoring can't be done here.
    """
    request = read_request(kind, argv)
    check_output(request.output)
    if request.monitoring.problem:
        raise RecipeError("--" + request.monitoring.problem.replace("_", "-", 1))
    return request.model_copy(update={"layout": launched_layout(request.layout)})


def training_fields(request: TrainingRequest) -> dict[str, Any]:
    """What a `TrainingRun` takes over from its request, whose learning rate is chosen."""
    return {
        "stage": request.command,
        "layout": request.layout,
        "monitoring": request.monitoring,
        "verify_inputs": request.verify_inputs,
        "base": request.base,
        "output": request.output,
        "inputs": request.inputs,
        "identity": request.identity,
        "pass_through": list(request.megatron),
    }


def _check_teacher_flags(request: Distill, policies: dict[str, Path]) -> None:
    settings = request.settings
    if not settings.needs_teacher:
        return
    if settings.reads_cache and request.cache is None:
        raise RecipeError(
            f"--cache: --teacher {settings.teacher} needs the folder that `megatron-erpd precompute` wrote"
        )
    if not settings.makes_target:
        return
    check_given_policies(policies_of(parse_signal(settings.signal)), policies)
    for folder in policies.values():
        read_manifest(folder)
    check_compatible(policies)


def _with_recorded_signal(settings: DistillSettings, cache: CacheReader) -> DistillSettings:
    """`signal: auto` as the signal that was chosen when the cache was made."""
    if settings.signal != AUTO_SIGNAL:
        return settings
    if cache.meta.signal is None:
        raise CacheError(
            f"{cache.folder}: records no signal, which --signal auto takes from the cache; precompute with --signal "
            "auto and --selection, or name the signal here"
        )
    return settings.model_copy(update={"signal": cache.meta.signal})


def _policies_of_target(settings: DistillSettings) -> list[str]:
    """The policies that a target which is made beside the student is made of."""
    return sorted(policies_of(parse_signal(settings.signal)) | {"base"})


def _cached_rows(settings: DistillSettings, cache: CacheReader, rollouts: Rollouts) -> dict[str, TokenRow]:
    """What the cache must hold for the form of stage 2: top-k targets, or log-probs of the signal's policies."""
    if settings.makes_target:
        return hidden_rows(cache, _policies_of_target(settings), rollouts)
    if settings.form == "projection":
        return topk_rows(cache, rollouts)
    names = policies_of(parse_signal(settings.signal))
    rows = {name: token_row(cache, name, rollouts) for name in sorted(names)}
    return shuffled_rows(rows, rollouts, settings.seed) if settings.shuffle_signal else rows


def _check_probabilities(rollouts: Rollouts, path: Path) -> None:
    outside = np.flatnonzero((rollouts.rewards < 0) | (rollouts.rewards > 1))
    if len(outside):
        row = int(outside[0])
        raise RolloutError(
            f"{path}: sample {rollouts.sample_ids[row]} has reward {rollouts.rewards[row]}; loss ce reads rewards as "
            "probabilities of success in [0, 1]: rescale them, or use loss mse, sapo or ppo"
        )


def _imitated(rollouts: Rollouts, path: Path, settings: ReplaySettings) -> np.ndarray:
    """bool `[N]`: the rollouts on which loss sft trains; `RolloutError` where there are none."""
    rewards, threshold = rollouts.rewards, settings.sft_threshold
    chosen = rewards <= threshold if settings.unlearn else rewards > threshold
    if not chosen.any():
        side = "at most" if settings.unlearn else "above"
        raise RolloutError(
            f"{path}: loss sft{' --unlearn' * settings.unlearn} imitates rollouts with a reward {side} --sft-threshold "
            f"{threshold}, and there are none (they go from {np.nanmin(rewards):g} to {np.nanmax(rewards):g}); change "
            "the threshold, or sample more rollouts"
        )
    return chosen


def _behavior_row(rollouts: Rollouts, path: Path) -> TokenRow:
    missing = np.flatnonzero(~np.asarray(rollouts.has_behavior_log_probs))
    if len(missing):
        raise RolloutError(
            f"{path}: sample {rollouts.sample_ids[int(missing[0])]} has no behavior_log_probs; "
            "--importance-correction needs them on every rollout (set it to none)"
        )
    return lambda i: np.asarray(rollouts.behavior_log_probs(i))


def _replay_step(
    settings: ReplaySettings, loss: LossFunction, aggregation: Aggregation, run: TrainingRun, args: argparse.Namespace
) -> ForwardStep:
    corrected = settings.importance_correction != "none"
    return ReplayStep(
        prefix=run.prefix,
        loss=loss,
        aggregation=aggregation,
        advantages=sequence_advantages,
        kl_coefficient=settings.kl_coefficient,
        kl_estimator="k3" if settings.kl_estimator == "exact" else settings.kl_estimator,
        vocab_size=args.vocab_size,
        target=cached_target if settings.has_exact_kl else None,
        correction=partial(behavior_correction, settings) if corrected else None,
        watchers=_early_stop(settings, run, args),
    )


def _early_stop(settings: ReplaySettings, run: TrainingRun, args: argparse.Namespace) -> list[EarlyStop]:
    if settings.max_kl is None and settings.min_entropy is None:
        return []
    bounds = (settings.max_kl, settings.min_entropy)
    return [EarlyStop(*bounds, run.output, args.iteration, decides=_decides(), exit_signal=args.exit_signal)]


def _decides() -> bool:
    """Whether this is the one rank that writes down what is measured on the last pipeline stage."""
    from megatron.core import mpu

    first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    return mpu.is_pipeline_last_stage() and first


def _policy_gradient_step(settings: DistillSettings, run: TrainingRun, args: argparse.Namespace) -> ForwardStep:
    from megatron.core import mpu

    from megatron_erpd.training.kl_budget import KlBudget

    budget = KlBudget(
        KlController(settings.kl_budget, settings.kl_coefficient, args.train_iters),
        history=run.output / "kl_control.jsonl",
        writes=_decides(),
    )
    if mpu.is_pipeline_last_stage():
        budget.resume(args.iteration)
    # Without a teacher nobody has resolved `auto`, and nothing reads the signal.
    terms = parse_signal(settings.signal) if settings.needs_teacher else ()
    return ReplayStep(
        prefix=run.prefix,
        loss=surrogate_loss(settings),
        aggregation="token_mean",
        advantages=partial(signal_advantages, settings, terms),
        kl_coefficient=budget,
        kl_estimator="k3",
        vocab_size=args.vocab_size,
        watchers=[budget],
    )


def _projection_step(
    settings: DistillSettings,
    policies: dict[str, Path],
    cache: CacheReader | None,
    run: TrainingRun,
    args: argparse.Namespace,
) -> ForwardStep:
    from megatron_erpd.model.model import build_frozen_model, load_weights, model_config
    from megatron_erpd.model.projected_target import TrustRegion, hidden_target, live_target
    from megatron_erpd.precompute.forward import output_layers

    step = partial(DistillStep, kind=settings.divergence, vocab_size=args.vocab_size, gather=settings.gather_teacher)
    if settings.teacher == "cache":
        return step(target=cached_target)
    region = TrustRegion.of(settings, _policies_of_target(settings))
    if cache is not None:
        assert cache.meta.hidden_dtype is not None
        layers = output_layers(args, {name: policies[name] for name in region.policies}, cache)
        return step(target=partial(hidden_target, region, getattr(torch, cache.meta.hidden_dtype), layers))
    frozen = []
    for name in region.policies:
        frozen.append(build_frozen_model(model_config(args)))
        load_weights(frozen[-1], policies[name])
    return step(target=partial(live_target, region), frozen=frozen)
