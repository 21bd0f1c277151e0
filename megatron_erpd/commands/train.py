"""The commands that train: stage 1's teacher (and the unlearned policy), and stage 2's student."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_erpd.data.batch import TokenRow
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CacheError, RecipeError, RolloutError
from megatron_erpd.files import check_output
from megatron_erpd.manifest import read_manifest
from megatron_erpd.model.arguments import (
    add_layout_arguments,
    add_monitoring_arguments,
    layout_from_namespace,
    monitoring_from_namespace,
    split_pass_through,
)
from megatron_erpd.model.compatible import check_compatible, load_data
from megatron_erpd.objectives.kl_control import KlController
from megatron_erpd.objectives.signals import parse_signal, policies_of
from megatron_erpd.settings import AUTO_SIGNAL, DistillSettings, ReplaySettings
from megatron_erpd.settings.arguments import add_settings_arguments, add_verify_inputs, settings_from_namespace
from megatron_erpd.teacher_cache.reader import CacheReader
from megatron_erpd.teacher_cache.rows import (
    base_topk_rows,
    check_policies,
    hidden_rows,
    open_cache,
    parse_policies,
    shuffled_rows,
    token_row,
    topk_rows,
)
from megatron_erpd.training.advantages import advantages_of
from megatron_erpd.training.early_stop import EarlyStop
from megatron_erpd.training.run import ReplayRun, TrainingRun, with_rates
from megatron_erpd.training.step import ForwardStep


def train_teacher(argv: list[str]) -> None:
    """Stage 1: optimises a replay loss on fixed, scored rollouts, from the base policy, for many epochs.

    The same command trains a teacher, the unlearned policy (--unlearn), and policies on demonstrations (--loss sft).
    """
    parser = argparse.ArgumentParser(
        prog="megatron-erpd train-teacher",
        description=train_teacher.__doc__,
        epilog="example: megatron-erpd train-teacher --base runs/a/base --rollouts runs/a/rollouts "
        "--base-log-probs runs/a/base-log-probs --output runs/a/teacher --loss ce --epochs 16",
    )
    _add_paths(parser, log_probs_help="cache with the base policy's log-probs; only --loss sft can do without")
    add_settings_arguments(parser, ReplaySettings, "training")
    add_layout_arguments(parser)
    add_monitoring_arguments(parser)
    add_verify_inputs(parser)
    own, pass_through = split_pass_through(argv)
    namespace = parser.parse_args(own)
    check_output(namespace.output)
    settings = settings_from_namespace(namespace, ReplaySettings)
    layout = layout_from_namespace(namespace)
    monitoring = monitoring_from_namespace(namespace)
    if namespace.base_log_probs is None and (settings.loss != "sft" or settings.kl_coefficient > 0):
        raise RecipeError(
            f"--base-log-probs: loss {settings.loss} needs the base policy's log-probs; make them with "
            "`megatron-erpd precompute --kind token` and give the folder"
        )
    rollouts = load_data(namespace.rollouts, namespace.base, rewards=namespace.rewards)
    settings = with_rates(settings, namespace.base)
    if namespace.base_log_probs is None and settings.max_kl is not None:
        raise RecipeError(
            "--max-kl: the KL to the base policy is measured from its log-probs; make them with `megatron-erpd "
            "precompute --kind token` and give the folder as --base-log-probs"
        )
    if settings.loss == "ce":
        _check_probabilities(rollouts, namespace.rollouts)
    imitated = _imitated(rollouts, namespace.rollouts, settings) if settings.loss == "sft" else None
    advantages = advantages_of(rollouts, settings, namespace.rollouts)
    inputs = {"base": namespace.base, "rollouts": namespace.rollouts, **_rewards(namespace)}
    rows: dict[str, TokenRow] = {}
    if namespace.base_log_probs is not None:
        inputs["base-log-probs"] = namespace.base_log_probs
        cache = open_cache(namespace.base_log_probs, rollouts, {"base": namespace.base}, layout.precision)
        rows["old_log_probs"] = token_row(cache, "base", rollouts)
        if settings.has_exact_kl:
            rows |= base_topk_rows(cache, rollouts, settings.kl_topk)
    if settings.importance_correction != "none":
        rows["behavior_log_probs"] = _behavior_row(rollouts, namespace.rollouts)
    ReplayRun(
        stage="train-teacher",
        prefix="stage1",
        settings=settings,
        layout=layout,
        monitoring=monitoring,
        verify_inputs=namespace.verify_inputs,
        base=namespace.base,
        output=namespace.output,
        inputs=inputs,
        pass_through=pass_through,
        rollouts=rollouts,
        make_step=partial(_replay_step, settings),
        advantages=advantages,
        token_rows=rows,
        imitated=imitated,
    ).execute()


def distill(argv: list[str]) -> None:
    """Stage 2: from the base policy to the student, along the teacher's token-level signal, under a trust region."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd distill",
        description=distill.__doc__,
        epilog="example: megatron-erpd distill --base runs/a/base --rollouts runs/a/rollouts "
        "--base-log-probs runs/a/base-log-probs --cache runs/a/cache --output runs/a/student --divergence reverse_kl",
    )
    _add_paths(parser, log_probs_help="cache with the base policy's log-probs")
    parser.add_argument("--cache", type=Path, help="teacher cache (--teacher cache)")
    parser.add_argument(
        "--policy", action="append", default=[], metavar="NAME=DIR", help="teacher=DIR, unlearned=DIR (--teacher live)"
    )
    add_settings_arguments(parser, DistillSettings, "distillation")
    add_layout_arguments(parser)
    add_monitoring_arguments(parser)
    add_verify_inputs(parser)
    own, pass_through = split_pass_through(argv)
    namespace = parser.parse_args(own)
    check_output(namespace.output)
    settings = settings_from_namespace(namespace, DistillSettings)
    layout = layout_from_namespace(namespace)
    monitoring = monitoring_from_namespace(namespace)
    policies = {"base": namespace.base, **parse_policies(namespace.policy)}
    _check_teacher_flags(settings, namespace, policies)
    if namespace.base_log_probs is None:
        raise RecipeError("--base-log-probs: make it with `megatron-erpd precompute --kind token` and give the folder")

    rollouts = load_data(namespace.rollouts, namespace.base, rewards=namespace.rewards)
    settings = with_rates(settings, namespace.base)
    advantages = advantages_of(rollouts, settings, namespace.rollouts)
    inputs = {"base": namespace.base, "rollouts": namespace.rollouts, "base-log-probs": namespace.base_log_probs}
    inputs |= _rewards(namespace)
    cache = open_cache(namespace.base_log_probs, rollouts, {"base": namespace.base}, layout.precision)
    rows: dict[str, TokenRow] = {"old_log_probs": token_row(cache, "base", rollouts)}
    resolved = settings
    teacher_cache = None
    if settings.reads_cache:
        inputs["cache"] = namespace.cache
        teacher_cache = open_cache(namespace.cache, rollouts, policies, layout.precision)
        resolved = _with_recorded_signal(settings, teacher_cache)
        rows |= _cached_rows(resolved, teacher_cache, rollouts)
    if settings.makes_target:
        inputs |= {f"policy-{name}": folder for name, folder in policies.items() if name != "base"}
    ReplayRun(
        stage="distill",
        prefix="stage2",
        settings=settings,
        layout=layout,
        monitoring=monitoring,
        verify_inputs=namespace.verify_inputs,
        base=namespace.base,
        output=namespace.output,
        inputs=inputs,
        pass_through=pass_through,
        rollouts=rollouts,
        make_step=partial(_policy_gradient_step, resolved)
        if settings.form == "policy_gradient"
        else partial(_projection_step, resolved, policies, teacher_cache),
        advantages=advantages,
        token_rows=rows,
    ).execute()


def _add_paths(parser: argparse.ArgumentParser, log_probs_help: str) -> None:
    parser.add_argument("--base", type=Path, required=True, help="artifact with the base policy's checkpoint")
    parser.add_argument("--rollouts", type=Path, required=True, help="artifact, folder or Parquet file")
    parser.add_argument(
        "--rewards",
        type=Path,
        help="rewards of these rollouts that `megatron-erpd score` wrote (default: those that the rollouts brought)",
    )
    parser.add_argument("--base-log-probs", type=Path, help=log_probs_help)
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifact")


def _rewards(namespace: argparse.Namespace) -> dict[str, Path]:
    return {} if namespace.rewards is None else {"rewards": namespace.rewards}


def _check_teacher_flags(settings: DistillSettings, namespace: argparse.Namespace, policies: dict[str, Path]) -> None:
    if not settings.needs_teacher:
        return
    if settings.reads_cache and namespace.cache is None:
        raise RecipeError(
            f"--cache: --teacher {settings.teacher} needs the folder that `megatron-erpd precompute` wrote"
        )
    if not settings.makes_target:
        return
    check_policies(policies_of(parse_signal(settings.signal)), policies)
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


def _replay_step(settings: ReplaySettings, run: TrainingRun, args: argparse.Namespace) -> ForwardStep:
    from megatron_erpd.training.step import (
        ReplayStep,
        behavior_correction,
        cached_target,
        replay_loss,
        sequence_advantages,
    )

    loss, aggregation = replay_loss(settings)
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
    from megatron_erpd.training.step import ReplayStep, signal_advantages, surrogate_loss

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
    from megatron_erpd.training.step import DistillStep, cached_target

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
