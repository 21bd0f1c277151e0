"""The training signal on the rollouts' tokens, read from a round's teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_erpd.data.rewards import is_of, with_rewards
from megatron_erpd.data.rollouts import Rollouts, read_rollouts
from megatron_erpd.objectives.signals import SIGNAL_SHORTHANDS, SignalTerm, combine, parse_signal, policies_of
from megatron_erpd.settings import NO_SIGNAL
from megatron_erpd.teacher_cache.format import CACHE_FILE
from megatron_erpd.teacher_cache.reader import CacheReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ROLLOUTS = 1000
"""Rollouts read for the histogram, evenly spaced over the set."""
MAX_TOKENS_SHOWN = 400


@dataclass(frozen=True)
class ColouredRollout:
    """One rollout as its tokens' texts beside their signal, in nats."""

    prompt: str
    reward: float
    tokens: list[tuple[str, float]]
    num_hidden: int
    """Tokens at the end that are left out for length."""


@dataclass(frozen=True)
class SignalSample:
    """The signal on a part of a round's rollouts."""

    definition: str
    """As `log teacher - log base`."""
    threshold: float
    """Halfway between the smallest and the largest reward."""
    above: np.ndarray
    """float32: the signal on the tokens of rollouts whose reward is above the threshold."""
    below: np.ndarray
    rollouts: list[ColouredRollout]


def read_signal(
    rollouts_path: Path,
    cache_paths: Sequence[Path],
    tokenizer_path: Path | None,
    rewards_path: Path | None = None,
    num_groups: int = 3,
) -> SignalSample | None:
    """The signal on the response tokens, or None where the caches hold no rows of the policies that it needs.

    The rollouts shown are not picked by eye: of the first `num_groups` groups whose rewards differ, one rollout of the
    highest and one of the lowest reward.

    Args:
        rollouts_path: the round's rollouts.
        cache_paths: folders that may be caches (or hold some); the first names the signal, all give token rows.
        tokenizer_path: a Hugging Face folder; None shows token ids.
        rewards_path: their rewards, where they are apart from them; those of other rollouts are not taken.

    Raises:
        RolloutError, CacheError: files that are damaged or don't belong together.
    """
    caches = [
        CacheReader(folder) for path in cache_paths for folder in (path, *sorted(path.glob("*"))) if _is_cache(folder)
    ]
    rows = {policy: cache for cache in reversed(caches) for policy in cache.meta.policies}
    terms = _terms([c.meta.signal for c in caches if c.meta.signal not in (None, NO_SIGNAL)], set(rows))
    if terms is None:
        return None
    rollouts = read_rollouts(rollouts_path)
    if rewards_path is not None and is_of(rewards_path, rollouts_path):
        rollouts = with_rewards(rollouts, rollouts_path, rewards_path)
    scored = np.flatnonzero(np.isfinite(rollouts.rewards))
    if not scored.size:
        return None

    def signal_of(i: int) -> np.ndarray:
        ours = {name: rows[name].token_row(name, rollouts.sample_ids[i]) for name in policies_of(terms)}
        return combine(terms, {name: torch.from_numpy(np.array(row)) for name, row in ours.items()}).numpy()

    rewards = rollouts.rewards[scored]
    threshold = float(rewards.min() + rewards.max()) / 2
    pieces: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for i in scored[:: max(1, -(-scored.size // MAX_ROLLOUTS))]:
        pieces[bool(rollouts.rewards[i] > threshold)].append(signal_of(int(i)))
    empty = [np.zeros(0, np.float32)]
    return SignalSample(
        definition=" + ".join(_describe(term) for term in terms),
        threshold=threshold,
        above=np.concatenate(pieces[True] or empty),
        below=np.concatenate(pieces[False] or empty),
        rollouts=_coloured(rollouts, _pairs(rollouts, num_groups), signal_of, _tokenizer(tokenizer_path)),
    )


def _is_cache(folder: Path) -> bool:
    return (folder / CACHE_FILE).is_file()


def _terms(asked: list[str], policies: set[str]) -> tuple[SignalTerm, ...] | None:
    """The signal that a cache was made for, else the first usual one that these policies allow."""
    for text in asked + list(SIGNAL_SHORTHANDS):
        terms = parse_signal(text)
        if policies_of(terms) <= policies:
            return terms
    return None


def _describe(term: SignalTerm) -> str:
    weight = "" if term.weight == 1 else f"{term.weight:g} × "
    return f"{weight}(log {term.teacher} − log {term.reference})"


def _pairs(rollouts: Rollouts, num_groups: int) -> list[int]:
    """Of the first groups whose rewards differ: the first rollout with the highest reward, then with the lowest."""
    chosen: list[int] = []
    _, first_rows = np.unique(rollouts.group_ids, return_index=True)
    for group in rollouts.group_ids[np.sort(first_rows)]:
        rows = np.flatnonzero((rollouts.group_ids == group) & np.isfinite(rollouts.rewards))
        rewards = rollouts.rewards[rows]
        if rows.size and rewards.max() > rewards.min():
            chosen += [int(rows[rewards.argmax()]), int(rows[rewards.argmin()])]
        if len(chosen) >= 2 * num_groups:
            break
    return chosen


def _coloured(
    rollouts: Rollouts,
    rows: list[int],
    signal_of: Callable[[int], np.ndarray],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[ColouredRollout]:
    shown = []
    for i in rows:
        tokens = rollouts.response_tokens(i)
        texts = token_texts(tokenizer, tokens[:MAX_TOKENS_SHOWN].tolist())
        prompt = rollouts.prompt_text(i) or "".join(token_texts(tokenizer, rollouts.prompt_tokens(i).tolist()))
        pairs = [(text, float(value)) for text, value in zip(texts, signal_of(i), strict=False)]
        hidden = max(0, tokens.size - MAX_TOKENS_SHOWN)
        shown.append(ColouredRollout(prompt, float(rollouts.rewards[i]), pairs, hidden))
    return shown


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text; token ids as `[17]` without a tokenizer.

    Decoding a token alone would lose the space that sentencepiece puts before a word, so each text is what the
    decoded prefix grew by. Tokens that end inside of a character show it with the token that completes it.
    """
    if tokenizer is None:
        return [f"[{i}]" for i in ids]
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now: Any = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if now.endswith("\ufffd"):
            texts.append("")
            continue
        texts.append(now[len(before) :] if now.startswith(before) else str(tokenizer.decode(ids[end - 1 : end])))
        before = now
    return texts


def _tokenizer(folder: Path | None) -> PreTrainedTokenizerBase | None:
    if folder is None:
        return None
    from transformers import AutoTokenizer  # slow to import, and only needed here

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
