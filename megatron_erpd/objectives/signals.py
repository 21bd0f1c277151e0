"""Token-level training signals: weighted sums of log-ratios between policies.

For every token and vocabulary entry v: s(v) = sum_k w_k [log pi_Tk(v) - log pi_Rk(v)] (ERPD, arXiv 2605.25582; the
named constructions are this project's reading of its strong, unlearned and weak-teacher variants).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError, RecipeError
from megatron_erpd.objectives.per_token import cpu_sees

ONE_SIDED_SIGNAL = 100.0
"""Nats that stand for an infinite log-ratio, where just one of two policies gives an entry the probability 0.

exp(-100) vanishes beside any fp32 probability, while products such as eta * s stay finite (0 * inf would be NaN)."""


@dataclass(frozen=True)
class SignalTerm:
    """weight * (log pi_teacher - log pi_reference); policies are called by their names in the round."""

    weight: float
    teacher: str
    reference: str


SIGNAL_SHORTHANDS: dict[str, tuple[str, str]] = {
    "strong": ("teacher", "base"),
    "unlearned": ("teacher", "unlearned"),
    "contrast": ("base", "unlearned"),
}
"""Name -> (teacher, reference). `contrast` needs no good teacher at all."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-])?\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<teacher>{_NAME})\s*(?:/\s*(?P<reference>{_NAME})\s*)?"
)


def parse_signal(text: str) -> tuple[SignalTerm, ...]:
    """Read a signal as a recipe writes it.

    A signal is a sum of terms `[weight *] teacher/reference` or `[weight *] shorthand`, joined by `+` or `-`:
    `strong`, `teacher/base`, `0.7*teacher/base + 0.3*base/unlearned`, `strong - 0.5*contrast`. Names are letters,
    digits, `_` and `.`; the shorthands are those of `SIGNAL_SHORTHANDS`.

    Raises:
        RecipeError: text that isn't of this form (naming the place), a policy over itself, a weight of 0, or terms that
            cancel: a signal that is 0 whatever the policies say.
    """
    terms: list[SignalTerm] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TERM.match(text, position)
        # After the first term a sign must join; without this check "strong strong" would parse.
        if match is None or (terms and match["sign"] is None):
            raise RecipeError(
                f"signal {text!r} can't be read at column {position + 1} ({text[position:].strip()!r}); write terms "
                f"like 0.7*teacher/base + 0.3*base/unlearned, or one of {', '.join(SIGNAL_SHORTHANDS)}"
            )
        terms.append(_term(match, text))
        position = match.end()
    if not terms:
        raise RecipeError(f"signal is empty; write for example strong, or one of {', '.join(SIGNAL_SHORTHANDS)}")
    _refuse_zero(terms, text)
    return tuple(terms)


def _refuse_zero(terms: list[SignalTerm], text: str) -> None:
    """A signal is 0 where each policy's weights, + as a teacher and - as a reference, add up to 0."""
    weights = dict.fromkeys(sorted(policies_of(terms)), 0.0)
    for term in terms:
        weights[term.teacher] += term.weight
        weights[term.reference] -= term.weight
    # Relative to the size of the terms: 0.1 + 0.2 - 0.3 isn't 0 in floating point.
    limit = 1e-9 * sum(abs(term.weight) for term in terms)
    if all(abs(weight) <= limit for weight in weights.values()):
        raise RecipeError(
            f"signal {text!r}: the weights of {', '.join(weights)} each add up to 0, so the signal is 0 everywhere; "
            "change a weight or leave a term out"
        )


def _term(match: re.Match[str], text: str) -> SignalTerm:
    weight = float(match["weight"] or 1.0) * (-1.0 if match["sign"] == "-" else 1.0)
    teacher, reference = match["teacher"], match["reference"]
    if reference is None:
        if teacher not in SIGNAL_SHORTHANDS:
            raise RecipeError(
                f"signal {text!r}: {teacher!r} is neither teacher/reference nor one of {', '.join(SIGNAL_SHORTHANDS)}"
            )
        teacher, reference = SIGNAL_SHORTHANDS[teacher]
    if teacher == reference:
        raise RecipeError(f"signal {text!r}: {teacher}/{reference} compares a policy with itself and is always 0")
    if weight == 0:
        raise RecipeError(f"signal {text!r}: the weight of {teacher}/{reference} is 0; leave the term out")
    return SignalTerm(weight, teacher, reference)


def policies_of(terms: Iterable[SignalTerm]) -> set[str]:
    """The names of all policies that a signal needs log-probs of."""
    return {policy for term in terms for policy in (term.teacher, term.reference)}


def combine(terms: Iterable[SignalTerm], log_probs: Mapping[str, Tensor]) -> Tensor:
    """s = sum_k w_k (log pi_Tk - log pi_Rk).

    Args:
        terms: of `parse_signal`; at least one.
        log_probs: policy name -> log-probs in nats, all of one shape: [..., v] rows of the vocabulary (or of a shard of
            it), or [b, s] of the sampled tokens.

    Returns:
        The signal, of that shape, always finite for log-probs in [-inf, 0]: an entry to which both policies of a term
        give the probability 0 (padding of the vocabulary) contributes 0, one to which only one does contributes
        weight * +-`ONE_SIDED_SIGNAL`. A NaN in the log-probs stays NaN. Elementwise, no collectives.

    Raises:
        ErpdError: no terms, or a policy without log-probs.
    """
    terms = tuple(terms)
    if not terms:
        raise ErpdError("a signal needs at least one term")
    missing = sorted(policies_of(terms) - set(log_probs))
    if missing:
        raise ErpdError(f"the signal needs log-probs of {', '.join(missing)}; there are {', '.join(sorted(log_probs))}")
    signal = _log_ratio(terms[0], log_probs)
    for term in terms[1:]:
        signal = signal + _log_ratio(term, log_probs)
    return signal


def _log_ratio(term: SignalTerm, log_probs: Mapping[str, Tensor]) -> Tensor:
    teacher, reference = log_probs[term.teacher], log_probs[term.reference]
    difference = teacher - reference
    if not cpu_sees(difference, lambda: difference.sum().isfinite()):
        neither = torch.isneginf(teacher) & torch.isneginf(reference)
        difference.nan_to_num_(nan=torch.nan, posinf=ONE_SIDED_SIGNAL, neginf=-ONE_SIDED_SIGNAL)
        difference.masked_fill_(neither, 0.0)
    return difference.mul_(term.weight)


def token_advantages(
    signal: Tensor,
    scale: float = 1.0,
    clip: float = 5.0,
    alpha: float = 0.0,
    sequence_advantages: Tensor | None = None,
    sign_agreement: bool = False,
) -> Tensor:
    """Turn the signal on the sampled tokens into token advantages for `ppo` or `sapo` (this project's choice).

    a_t = clip(s_t / scale, -clip, clip) + alpha A; with `sign_agreement`, a_t is set to 0 where its sign (that of the
    whole sum) is not the sign of A. So rows with A = 0 are then without signal.

    Args:
        signal: [b, s] nats, s_t(y_t). Padding may hold anything: it stays at its position.
        scale: nats of signal that make an advantage of 1, > 0.
        clip: bound of the signal's part, > 0.
        alpha: weight of the sequence advantage.
        sequence_advantages: [b]; needed when alpha is not 0 or with `sign_agreement`.
        sign_agreement: keep only what agrees with the outcome.

    Returns:
        [b, s], without gradient.

    Raises:
        RecipeError: scale or clip not above 0, or sequence advantages missing.
    """
    if not scale > 0 or not clip > 0:
        raise RecipeError(f"scale and clip of token advantages must be above 0, not {scale} and {clip}")
    advantages = (signal.detach() / scale).clamp(-clip, clip)
    if alpha == 0 and not sign_agreement:
        return advantages
    if sequence_advantages is None:
        raise RecipeError("alpha and sign_agreement need sequence advantages, and there are none")
    outcome = sequence_advantages.detach().to(advantages.dtype).unsqueeze(-1)
    advantages = advantages + alpha * outcome
    if sign_agreement:
        advantages = torch.where(advantages * outcome > 0, advantages, 0.0)
    return advantages
