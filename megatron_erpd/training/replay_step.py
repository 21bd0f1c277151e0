"""The forward step of replay: stage 1's losses, and stage 2's policy gradient on token advantages.

Both are the same step. Stage 1 takes one advantage per rollout and at most a fixed KL coefficient; stage 2 takes token
advantages from the teacher's signal and a coefficient that a controller moves to hold a KL budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_erpd.data.collate import Batch
from megatron_erpd.model.context_parallel import context_parallel_rank, slice_batch, whole_sequence_loss
from megatron_erpd.model.heads import Hidden, PolicyHead, TargetOf, policy_head
from megatron_erpd.model.loss_guard import finite_loss
from megatron_erpd.model.policies import forward_stage, join
from megatron_erpd.objectives.off_policy import importance_correction, kl_penalty
from megatron_erpd.objectives.reduction import aggregate
from megatron_erpd.objectives.replay import REPLAY_LOSSES
from megatron_erpd.objectives.signals import SignalTerm, combine, token_advantages
from megatron_erpd.objectives.types import Aggregation, DivergenceKind, KlEstimator, LossOutput, ReplayInputs
from megatron_erpd.settings import DistillSettings, ReplaySettings
from megatron_erpd.training.early_stop import EarlyStop
from megatron_erpd.training.kl_budget import KlBudget
from megatron_erpd.training.metrics import report, token_mean

LossFunction = Callable[[ReplayInputs], LossOutput]
Advantages = Callable[[Batch], Tensor]


class ReplayStep:
    """Megatron's `forward_step_func` for a replay loss.

    The loss's sum and count go back to Megatron, which divides once, over all micro-batches and DP x CP; the KL
    term is aggregated as the loss is, so that both share that count.

    Args:
        prefix: `stage1` or `stage2`, of the metrics' names.
        loss: the loss with its parameters bound.
        aggregation: how the KL term is aggregated; the loss's own.
        advantages: what the loss gets, `[b]` or `[b, s]`.
        kl_coefficient: fixed weight of the KL term, or the controller that moves it.
        kl_estimator: `k1`, `k2` or `k3`; not used with a `kl_target`.
        vocab_size: true size of the vocabulary, without padding.
        kl_target: gives the base policy's rows, for the exact KL(policy || base) over the vocabulary in place of an
            estimate. A `TopKTarget` coarse-grains both policies to its K tokens and one for all others: the value is
            then a lower bound (see `vocab_parallel.divergence`), exact where K is the vocabulary or the base's tail has
            no mass to move.
        correction: given a batch with behaviour log-probs, the importance weights; None for none.
        early_stop: watches KL and entropy; None where nothing ends the training early.
        frozen: policies that run beside, whose hidden states `kl_target` gets; empty where it reads the batch.
    """

    def __init__(
        self,
        prefix: str,
        loss: LossFunction,
        aggregation: Aggregation,
        advantages: Advantages,
        kl_coefficient: float | KlBudget,
        kl_estimator: KlEstimator,
        vocab_size: int,
        kl_target: TargetOf | None = None,
        correction: Callable[[Batch], Tensor] | None = None,
        early_stop: EarlyStop | None = None,
        frozen: Sequence[Any] = (),
    ) -> None:
        self.prefix = prefix
        self.loss = loss
        self.aggregation = aggregation
        self.advantages = advantages
        self.kl_coefficient = kl_coefficient
        self.kl_estimator = kl_estimator
        self.vocab_size = vocab_size
        self.kl_target = kl_target
        self.correction = correction
        self.early_stop = early_stop
        self.frozen = frozen
        self._head: PolicyHead | None = None

    def __call__(self, data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data_iterator)
        if self._head is None:
            kind: DivergenceKind | None = None if self.kl_target is None else "reverse_kl"
            self._head = policy_head(model, self.vocab_size, kind, self.kl_target)
        local = slice_batch(batch, *context_parallel_rank())
        processors = [self._head, *(Hidden() for _ in self.frozen)]
        outputs = forward_stage([model, *self.frozen], local, processors, {"batch": local})
        return join(outputs, model), partial(whole_sequence_loss, partial(finite_loss, self.loss_and_metrics, batch))

    def loss_and_metrics(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss contract: (sum, count, {name: [sum, count]})."""
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
        metrics = {"loss": (result.loss_sum, result.count), "entropy": token_mean(entropy, batch.loss_mask)}
        loss_sum = result.loss_sum
        if old_log_probs is not None:
            metrics.update(result.metrics)
            exact = None if self.kl_target is None else output[2]
            mask = inputs.loss_mask if result.loss_mask is None else result.loss_mask
            loss_sum = loss_sum + self._kl_term(inputs, mask, exact, metrics)
        if self.early_stop is not None:
            self.early_stop.measure(metrics.get("policy_base_kl"), metrics["entropy"])
        return loss_sum, result.count.to(torch.int32), report(self.prefix, metrics)

    def _kl_term(
        self, inputs: ReplayInputs, mask: Tensor, exact: Tensor | None, metrics: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The weighted KL to the base policy, over the tokens of the loss, and its measurement over all."""
        policy, old = inputs.policy_log_probs, inputs.old_log_probs
        per_token = kl_penalty(policy.detach(), old, inputs.loss_mask, "k3", "token_mean")
        metrics["policy_base_kl"] = per_token
        one = torch.ones((), device=per_token[0].device)
        if isinstance(self.kl_coefficient, KlBudget):
            coefficient = self.kl_coefficient.coefficient
            self.kl_coefficient.measure(*per_token)
            metrics["kl_coefficient"] = (one * coefficient, one)
        else:
            coefficient = self.kl_coefficient
        if coefficient == 0:
            return 0 * one
        if exact is not None:
            metrics["policy_base_kl_exact"] = token_mean(exact.detach(), inputs.loss_mask)
            return coefficient * aggregate(exact, mask, self.aggregation)[0]
        return coefficient * kl_penalty(policy, old, mask, self.kl_estimator, self.aggregation)[0]


def replay_loss(settings: ReplaySettings) -> tuple[LossFunction, Aggregation]:
    """The stage-1 loss that the settings name, with its parameters bound, and its aggregation."""
    aggregation: Aggregation
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
