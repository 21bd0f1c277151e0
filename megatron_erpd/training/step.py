"""The steps of a training: the forward step of replay and of the projection, and what is measured over a whole step.

A forward step runs a micro-batch through the policy (and frozen ones beside it) and makes Megatron's loss of the
result: a sum, a count and a report, which Megatron adds up over micro-batches and DP x CP and divides once. What is
decided once per optimizer step (the KL controller, an early stop) follows in `after_step`, when all micro-batches have
gone backward.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.batch import Batch
from megatron_erpd.errors import RecipeError
from megatron_erpd.model.forward import (
    HeadContext,
    Hidden,
    HiddenStates,
    PolicyHead,
    StepChecks,
    TargetOf,
    forward_stage,
    join,
    loss_of,
    policy_head,
    unwrap,
)
from megatron_erpd.objectives.per_token import aggregate, importance_correction, kl_penalty
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.objectives.signals import SignalTerm, combine, token_advantages
from megatron_erpd.objectives.types import (
    Aggregation,
    DivergenceKind,
    KlEstimator,
    LossOutput,
    Metrics,
    ReplayInputs,
)
from megatron_erpd.settings import DistillSettings, ReplaySettings
from megatron_erpd.teacher_cache.packing import unpack_ids, unpack_log_probs
from megatron_erpd.training.early_stop import EarlyStop
from megatron_erpd.training.kl_budget import KlBudget
from megatron_erpd.vocab_parallel import TopKTarget, VocabShard

LossFunction = Callable[[ReplayInputs], LossOutput]

WATCHED = ("entropy", "policy_base_kl")
"""The metrics of which watchers get the means; the second only where the base policy's log-probs are at hand."""


@dataclass(kw_only=True)
class ForwardStep:
    """Megatron's `forward_step_func`: subclasses say what the loss of a micro-batch is.

    Args:
        vocab_size: true size of the vocabulary, without padding.
        kind, target: a divergence that the policy's head computes per response token; both or neither.
        frozen: policies that run beside, whose hidden states `target` gets, each as this rank's chunks of it; empty
            where it reads the batch.
        gather: compute the divergence on vocabularies gathered over the tensor-parallel shards.
        watchers: get the means of `WATCHED` after every step.
    """

    vocab_size: int
    kind: DivergenceKind | None = None
    target: TargetOf | None = None
    frozen: Sequence[Sequence[Any]] = ()
    gather: bool = False
    watchers: Sequence[KlBudget | EarlyStop] = ()

    def __post_init__(self) -> None:
        self._head: PolicyHead | None = None
        self._measured: list[Tensor] = []
        self.checks = StepChecks()

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data_iterator)
        if self._head is None:  # until the model's last chunk comes; the others have no use for it
            self._head = policy_head(model, self.vocab_size, self.kind, self.target, self.gather)
        number = unwrap(model).vp_stage or 0
        models = [model, *(chunks[number] for chunks in self.frozen)]
        processors = [self._head, *(Hidden() for _ in self.frozen)]
        context = HeadContext(batch=batch, checks=self.checks)
        outputs = forward_stage(models, batch, processors, context)
        return join(outputs, model), partial(loss_of, self.loss_and_metrics, batch, self.checks)

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss contract: (sum, count, {name: [sum, count]}), from the head's `[n, b, s]`."""
        raise NotImplementedError

    def measure(self, metrics: Metrics) -> None:
        """Keeps of a micro-batch what the watchers want to know."""
        if self.watchers:
            pairs = [metrics[name] for name in WATCHED if name in metrics]
            self._measured.append(torch.stack([value.detach().double() for pair in pairs for value in pair]))

    def after_step(self) -> None:
        """Gives the watchers the step's means; called on all ranks when its micro-batches have gone backward.

        On last pipeline stages one all-reduce over the data-parallel group. (Under context parallelism every rank holds
        whole sequences: sums and counts grow alike.)
        """
        if not self._measured:
            return
        from megatron.core import mpu

        means = step_means(self._measured, mpu.get_data_parallel_group(with_context_parallel=True))
        self._measured = []
        for watcher in self.watchers:
            watcher.after_step(dict(zip(WATCHED, means, strict=False)))


class StepHooks:
    """What Megatron calls of a `ForwardStep` that is made later, when models and process groups exist.

    Attributes:
        step: the forward step.
        models: the model chunks that were trained, in Megatron's wrappers.
    """

    step: ForwardStep

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}

    def forward(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Megatron's `forward_step_func`."""
        self.models[id(model)] = model
        return self.step(data_iterator, model)

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's `finalize_model_grads_func`, called once per step after the last backward, on all ranks.

        Raises:
            NonFiniteLoss: a micro-batch's loss or logits were NaN or infinite. (Megatron looks at the gradients next.)
        """
        from megatron.core.distributed import finalize_model_grads

        if error := self.step.checks.first():
            raise error
        finalize_model_grads(*args, **kwargs)
        self.step.after_step()


def step_means(measured: Sequence[Tensor], group: torch.distributed.ProcessGroup | None = None) -> list[float]:
    """Means over a step's micro-batches and ranks, weighted by their counts; 0 where nothing was counted.

    Args:
        measured: of each micro-batch `[sum, count, sum, count, ...]`.
        group: one all-reduce over it; None for a single rank.
    """
    total = torch.stack(list(measured)).sum(dim=0)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    sums, counts = total.reshape(-1, 2).unbind(dim=1)
    return (sums / counts.clamp(min=1)).tolist()


def report(prefix: str, metrics: Metrics) -> dict[str, Tensor]:
    """Megatron's report of a micro-batch: name to `[sum, count]`, which it adds up over DP x CP and divides once."""
    return {
        f"{prefix}/{name}": torch.stack([total.detach().float(), count.detach().to(total.device).float()])
        for name, (total, count) in metrics.items()
    }


# Stage 2: the projection


@dataclass(kw_only=True)
class DistillStep(ForwardStep):
    """A divergence between the target distribution q and the student.

    Per response token over the full vocabulary (or over top-k and tail), averaged over tokens. q is `target`: read from
    the cache (`cached_target`), or made beside the student (`model.projected_target`). Metrics: the divergence under
    its own name, the student's entropy and log-ratios.
    """

    kind: DivergenceKind
    target: TargetOf

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Counted in tokens."""
        policy_log_probs, entropy, per_token = output[0], output[1], output[2]
        loss_sum, count = aggregate(per_token, batch.loss_mask, "token_mean")
        old = batch.token_rows["old_log_probs"]
        metrics = {
            "loss": (loss_sum, count),
            self.kind: (loss_sum, count),
            "entropy": aggregate(entropy, batch.loss_mask, "token_mean"),
            "log_ratio": aggregate(policy_log_probs.detach() - old, batch.loss_mask, "token_mean"),
            "policy_base_kl": kl_penalty(policy_log_probs.detach(), old, batch.loss_mask, "k3", "token_mean"),
        }
        return loss_sum, count.to(torch.int32), report("stage2", metrics)


def cached_target(batch: Batch, positions: Tensor, outputs: Sequence[HiddenStates], shard: VocabShard) -> TopKTarget:
    """q as the cache holds it, unpacked on the device."""
    columns = batch.target_rows
    ids = unpack_ids(columns["topk_ids_low"], columns.get("topk_ids_high"), shard.vocab_size)
    log_probs = unpack_log_probs(columns["topk_scores"], columns["log_normalizer"])
    return TopKTarget(ids, log_probs, columns["tail_log_prob"])


# Replay: stage 1, and stage 2's policy gradient


@dataclass(kw_only=True)
class ReplayStep(ForwardStep):
    """A replay loss and a KL penalty. Stage 1 takes one advantage per rollout and at most a fixed KL coefficient; stage
    2 takes token advantages from the teacher's signal and a coefficient that a controller moves to hold a KL budget.

    The KL term is aggregated as the loss is, so that both share the loss's count.

    Args:
        prefix: `stage1` or `stage2`, of the metrics' names.
        loss: the loss with its parameters bound.
        aggregation: how the KL term is aggregated; the loss's own.
        advantages: what the loss gets, `[b]` or `[b, s]`.
        kl_coefficient: fixed weight of the KL term, or the controller that moves it.
        kl_estimator: `k1`, `k2` or `k3`; not used with a `target`.
        correction: given a batch with behaviour log-probs, the importance weights; None for none.
        target: gives the base policy's rows, for the exact KL(policy || base) over the vocabulary in place of an
            estimate. A `TopKTarget` coarse-grains both policies to its K tokens and one for all others: the value is
            then a lower bound (see `vocab_parallel.divergence`), exact where K is the vocabulary or the base's tail has
            no mass to move.
    """

    prefix: str
    loss: LossFunction
    aggregation: Aggregation
    advantages: Callable[[Batch], Tensor]
    kl_coefficient: float | KlBudget
    kl_estimator: KlEstimator
    correction: Callable[[Batch], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            self.kind = "reverse_kl"

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Counted as the loss counts."""
        policy_log_probs, entropy = output[0], output[1]
        old_log_probs = batch.token_rows.get("old_log_probs")
        inputs = ReplayInputs(
            policy_log_probs=policy_log_probs,
            # Without recorded log-probs (imitation of demonstrations) there is no ratio: it is 1 by definition.
            old_log_probs=policy_log_probs.detach() if old_log_probs is None else old_log_probs,
            loss_mask=batch.loss_mask,
            advantages=self.advantages(batch),
            rewards=batch.seq_rows["rewards"],
            importance_weights=None if self.correction is None else self.correction(batch),
        )
        result = self.loss(inputs)
        metrics = {
            "loss": (result.loss_sum, result.count),
            "entropy": aggregate(entropy, batch.loss_mask, "token_mean"),
        }
        loss_sum = result.loss_sum
        if old_log_probs is not None:
            metrics.update(result.metrics)
            exact = None if self.target is None else output[2]
            mask = inputs.loss_mask if result.loss_mask is None else result.loss_mask
            loss_sum = loss_sum + self._kl_term(inputs, mask, exact, metrics)
        self.measure(metrics)
        return loss_sum, result.count.to(torch.int32), report(self.prefix, metrics)

    def _kl_term(self, inputs: ReplayInputs, mask: Tensor, exact: Tensor | None, metrics: Metrics) -> Tensor:
        """The weighted KL to the base policy, over the tokens of the loss, and its measurement over all."""
        policy, old = inputs.policy_log_probs, inputs.old_log_probs
        per_token = kl_penalty(policy.detach(), old, inputs.loss_mask, "k3", "token_mean")
        metrics["policy_base_kl"] = per_token
        one = torch.ones((), device=per_token[0].device)
        if isinstance(self.kl_coefficient, KlBudget):
            coefficient = self.kl_coefficient.coefficient
            metrics["kl_coefficient"] = (one * coefficient, one)
        else:
            coefficient = self.kl_coefficient
        if coefficient == 0:
            return 0 * one
        if exact is not None:
            metrics["policy_base_kl_exact"] = aggregate(exact.detach(), inputs.loss_mask, "token_mean")
            return coefficient * aggregate(exact, mask, self.aggregation)[0]
        return coefficient * kl_penalty(policy, old, mask, self.kl_estimator, self.aggregation)[0]


def user_loss(spec: str, unlearn: bool = False) -> LossFunction:
    """The loss `python:FILE.py:FUNCTION`: called as those of `objectives.replay` are, with `unlearn=True` for an
    unlearned policy.

    Raises:
        RecipeError: no such file, it can't be imported, or it has no such function. The loss itself raises it where the
            function returns anything but a `LossOutput` of scalars.
    """
    file, _, name = spec.removeprefix("python:").rpartition(":")
    module = _imported(spec, Path(file))
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise RecipeError(f"loss {spec!r}: {file} has no function {name!r}; it has {names or 'none'}")

    def loss(inputs: ReplayInputs) -> LossOutput:
        result = function(inputs, unlearn=True) if unlearn else function(inputs)
        if not isinstance(result, LossOutput):
            raise RecipeError(f"loss {spec!r}: returned {type(result).__name__}; return objectives.types.LossOutput")
        for part, value in {"loss_sum": result.loss_sum, "count": result.count}.items():
            if not isinstance(value, Tensor) or value.dim():
                raise RecipeError(f"loss {spec!r}: {part} is {value!r}; it must be a tensor without dimensions")
        return result

    return loss


def _imported(spec: str, file: Path) -> ModuleType:
    """The program of a `user_loss`. (The worker of verifiers has its own way, as its code identifies rewards.)"""
    if not file.is_file():
        raise RecipeError(f"loss {spec!r}: no such file {file.absolute()}; paths start from the working directory")
    # A name of its own: a file called like a library must not take the library's place.
    found = importlib.util.spec_from_file_location(f"erpd_loss_{file.stem}", file)
    assert found is not None and found.loader is not None, "a .py file always has a loader"
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # dataclasses look it up there
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"loss {spec!r}: {file} can't be imported: {type(error).__name__}: {error}") from error
    return module


def replay_loss(settings: ReplaySettings) -> tuple[LossFunction, Aggregation]:
    """The stage-1 loss that the settings name, with its parameters bound, and its aggregation (of a loss of the
    user's: that of the KL term beside it)."""
    aggregation: Aggregation
    if settings.loss_file is not None:
        return user_loss(settings.loss, settings.unlearn), settings.aggregation or "token_mean"
    if settings.loss in ("ce", "mse"):
        aggregation = "seq_mean_token_sum"
        parameters: dict[str, Any] = {"beta": settings.beta, "agg": settings.sequence_log_ratio}
    else:
        default: Aggregation = "seq_mean_token_mean" if settings.loss == "gspo" else "token_mean"
        aggregation = settings.aggregation or default
        parameters = {"aggregation": aggregation}
    if settings.loss in ("ppo", "gspo") and settings.clip_low is not None:
        parameters["clip_low"] = settings.clip_low
    if settings.loss in ("ppo", "gspo", "cispo") and settings.clip_high is not None:
        parameters["clip_high"] = settings.clip_high
    if settings.loss == "ppo":
        parameters["dual_clip"] = settings.dual_clip
    if settings.loss == "sapo":
        parameters |= {"tau_positive": settings.tau_positive, "tau_negative": settings.tau_negative}
    if settings.loss == "sft":
        parameters["threshold"] = settings.sft_threshold
    return partial(REPLAY_LOSSES[settings.loss], unlearn=settings.unlearn, **parameters), aggregation


def surrogate_loss(settings: DistillSettings) -> LossFunction:
    """Stage 2's surrogate on token advantages, with its parameters bound."""
    if settings.loss == "sapo":
        return partial(REPLAY_LOSSES["sapo"], tau_positive=settings.tau_positive, tau_negative=settings.tau_negative)
    return partial(REPLAY_LOSSES["ppo"], clip_low=settings.clip_low, clip_high=settings.clip_high)


def sequence_advantages(batch: Batch) -> Tensor:
    """`[b]`: one advantage per rollout."""
    return batch.seq_rows["advantages"]


def signal_advantages(settings: DistillSettings, terms: tuple[SignalTerm, ...], batch: Batch) -> Tensor:
    """`[b, s]`: the teacher's signal on the response tokens, as stage 2's policy gradient uses it."""
    advantages = batch.seq_rows["advantages"]
    if settings.signal_weight == 0:
        return settings.advantage_weight * advantages
    rows = {name: batch.token_rows[name] for term in terms for name in (term.teacher, term.reference)}
    signal = settings.signal_weight * combine(terms, rows)
    return token_advantages(
        signal,
        scale=settings.signal_scale,
        clip=settings.signal_clip,
        alpha=settings.advantage_weight,
        sequence_advantages=advantages,
        sign_agreement=settings.sign_agreement,
    )


def behavior_correction(settings: ReplaySettings, batch: Batch) -> Tensor:
    """`[b, s]`: truncated importance weights for rollouts that another engine sampled."""
    return importance_correction(
        batch.token_rows["old_log_probs"],
        batch.token_rows["behavior_log_probs"],
        batch.loss_mask,
        settings.importance_correction,  # type: ignore[arg-type]  # 'none' never reaches this
        settings.importance_cap,
    )
