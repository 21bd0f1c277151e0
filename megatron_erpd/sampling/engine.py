"""Engines that draw responses: what each takes and gives, and the one of transformers (left-padded batches over a
key-value cache, exact log-probs, reproducible noise)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.errors import RecipeError
from megatron_erpd.progress import OnProgress
from megatron_erpd.sampling.policy import Policy, load_policy

FinishReason = Literal["stop", "length"]
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(logits `[n, V]`, rows `[n]` of the batch, step) -> tokens `[n]` int64 and their log-probs `[n]` float32."""


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """One response of a policy.

    Attributes:
        response_token_ids: int64 `[R]`, R >= 1; the stop token is the last one where there is one.
        log_probs: float32 `[R]`, nats, of those tokens under the distribution that they were drawn from.
        finish_reason: `stop` (a stop token was drawn) or `length` (`max_new_tokens` were drawn without one).
    """

    response_token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: FinishReason


class SamplingEngine(Protocol):
    """Draws responses from one policy.

    Prompts are token ids, so no engine decides how text is encoded. The result for a prompt depends on `seed`, on the
    prompt's index and on the sampling settings, not on the other prompts nor on how many are decoded at once.
    """

    def sample(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 512,
        prompt_indices: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[list[SampledResponse]]:
        """`num_samples` responses to every prompt, in the order of the prompts.

        Args:
            prompt_token_ids: N prompts of any lengths >= 1.
            num_samples: G >= 1.
            max_new_tokens: the longest response.
            temperature: > 0; logits are divided by it.
            top_p: in (0, 1]; below 1, draws come from the smallest set of most likely tokens that holds this mass,
                and the log-probs are those of that truncated, renormalised distribution. The trainer's own log-probs
                are not truncated, so with `top_p` < 1 the two differ by more than engine noise.
            seed: >= 0.
            batch_size: sequences decoded at once.
            prompt_indices: N numbers that stand for the prompts in the noise; default 0..N-1. Give a prompt's place
                in the whole set when sampling a part of it.
            progress: told the number of finished responses.

        Returns:
            N lists of G `SampledResponse`s.
        """
        ...


class TransformersEngine:
    """A `SamplingEngine` over a transformers model on one device.

    Every distinct prompt of a batch is prefilled once and its cache shared out to its samples. Finished rows leave the
    batch when they are half of it. One uniform number per (seed, prompt, sample, step) decides a token by the inverse
    of the distribution function, so a response is the same in any batch, up to rounding of the logits.

    Args:
        policy: a Hugging Face folder, or a policy that is loaded already.
        device, dtype: as in `load_policy`; for a folder only.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy, device, dtype)

    def sample(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 512,
        prompt_indices: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[list[SampledResponse]]:
        """See `SamplingEngine.sample`. The log-probs are computed in float32 from the model's logits.

        Raises:
            RecipeError: a setting is out of range, or a prompt with its response doesn't fit the model's positions.
        """
        if temperature <= 0 or not 0 < top_p <= 1 or num_samples < 1:
            raise RecipeError(
                f"temperature {temperature}, top_p {top_p}, num_samples {num_samples}: need temperature > 0, "
                "0 < top_p <= 1 and num_samples >= 1 (for the most likely response use greedy())"
            )
        indices = range(len(prompt_token_ids)) if prompt_indices is None else prompt_indices

        def chooser(rows: Sequence[tuple[int, int]]) -> Choose:
            keys = [(seed, indices[prompt], sample) for prompt, sample in rows]
            uniforms = torch.from_numpy(uniform_noise(keys, max_new_tokens)).to(self.policy.device)

            def choose(logits: Tensor, alive: Tensor, step: int) -> tuple[Tensor, Tensor]:
                return draw_tokens(logits, uniforms[alive, step], temperature, top_p)

            return choose

        return self._run(prompt_token_ids, num_samples, max_new_tokens, batch_size, chooser, progress)

    def greedy(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int = 512,
        progress: OnProgress | None = None,
    ) -> list[SampledResponse]:
        """The most likely token at every step; its log-probs are those at temperature 1.

        Returns:
            N `SampledResponse`s, in the order of the prompts.
        """

        def choose(logits: Tensor, alive: Tensor, step: int) -> tuple[Tensor, Tensor]:
            log_probs = torch.log_softmax(logits.float(), dim=-1)
            best = log_probs.max(dim=-1)
            return best.indices, best.values

        groups = self._run(prompt_token_ids, 1, max_new_tokens, batch_size, lambda rows: choose, progress)
        return [group[0] for group in groups]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        max_new_tokens: int,
        batch_size: int,
        chooser: Callable[[Sequence[tuple[int, int]]], Choose],
        progress: OnProgress | None,
    ) -> list[list[SampledResponse]]:
        _check_lengths(prompts, max_new_tokens, self.policy.max_positions)
        results: list[list[SampledResponse]] = [[] for _ in prompts]
        finished, total = 0, len(prompts) * num_samples
        lengths = [len(prompt) for prompt in prompts]
        for rows in plan_batches(lengths, num_samples, batch_size):
            samples = self._decode([prompts[prompt] for prompt, _ in rows], max_new_tokens, chooser(rows))
            # plan_batches keeps a prompt's samples in order, so appending does too.
            for (prompt, _), sample in zip(rows, samples, strict=True):
                results[prompt].append(sample)
            finished += len(rows)
            if progress is not None:
                progress(finished, total)
        return results

    @torch.inference_mode()
    def _decode(self, prompts: list[Sequence[int]], max_new_tokens: int, choose: Choose) -> list[SampledResponse]:
        """Decode one batch of rows, all steps."""
        batch = self._prefill(prompts)
        size, device = len(prompts), self.policy.device
        stop = torch.tensor(self.policy.stop_token_ids, device=device)
        tokens = torch.zeros(size, max_new_tokens, dtype=torch.int64, device=device)
        log_probs = torch.zeros(size, max_new_tokens, dtype=torch.float32, device=device)
        lengths = torch.full((size,), max_new_tokens, dtype=torch.int64, device=device)
        stopped = torch.zeros(size, dtype=torch.bool, device=device)
        rows = torch.arange(size, device=device)
        for step in range(max_new_tokens):
            tokens[rows, step], log_probs[rows, step] = choose(batch.logits, rows, step)
            ended = torch.isin(tokens[rows, step], stop) & ~stopped[rows]
            lengths[rows[ended]] = step + 1
            stopped[rows[ended]] = True
            running = (~stopped[rows]).nonzero().squeeze(1)
            if running.numel() == 0 or step + 1 == max_new_tokens:
                break
            if 2 * running.numel() <= rows.numel():
                rows = rows[running]
                batch.keep(running)
            batch.advance(self.policy.model, tokens[rows, step])
        return _collect(tokens, log_probs, lengths, stopped)

    def _prefill(self, prompts: list[Sequence[int]]) -> _Batch:
        """Run the distinct prompts once and give every row its prompt's cache and last logits."""
        from transformers import DynamicCache

        model, device = self.policy.model, self.policy.device
        place: dict[tuple[int, ...], int] = {}
        owner = torch.tensor([place.setdefault(tuple(prompt), len(place)) for prompt in prompts], device=device)
        longest = max(len(prompt) for prompt in place)
        tokens = torch.full((len(place), longest), self.policy.pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(place), longest, dtype=torch.int64)
        for prompt, row in place.items():
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # Without padding the model needs no mask at all, which spares building one in every step.
        padded = bool((mask == 0).any())
        mask = mask.to(device)
        cache = DynamicCache(config=model.config)
        output = model(
            input_ids=tokens.to(device),
            attention_mask=mask if padded else None,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch = _Batch(output.logits[:, -1], cache, mask if padded else None, mask.sum(-1))
        if len(place) < len(prompts):
            batch.keep(owner)
        return batch


@dataclass
class _Batch:
    """The rows in flight: `logits` `[n, V]` for the next token, cache, mask `[n, s]` (None: no padding), positions."""

    logits: Tensor
    cache: Any
    mask: Tensor | None
    positions: Tensor

    def keep(self, rows: Tensor) -> None:
        """Become the given rows, which may repeat."""
        self.cache.batch_select_indices(rows)
        self.logits = self.logits[rows]
        self.positions = self.positions[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def advance(self, model: Any, tokens: Tensor) -> None:
        """Feed one token `[n]` per row."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        output = model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=self.positions.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: `[n, V]`.
        uniforms: `[n]` float64 in [0, 1).
        temperature: > 0.
        top_p: in (0, 1]; the token that crosses this mass is still in.

    Returns:
        tokens `[n]` int64 and their log-probs `[n]` float32 (of the truncated distribution if `top_p` < 1).
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        log_probs = _truncate(log_probs, top_p)
    # Summed in float64: over a large vocabulary float32 would lose the tail.
    cumulative = log_probs.exp().double().cumsum(dim=-1)
    total = cumulative[:, -1]
    # Strictly below the total, so the first entry above it exists and has a probability above zero.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target.unsqueeze(1), right=True)
    return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1)


def _truncate(log_probs: Tensor, top_p: float) -> Tensor:
    ordered = log_probs.sort(dim=-1, descending=True)
    probs = ordered.values.exp().double()
    outside = torch.zeros_like(log_probs, dtype=torch.bool)
    outside.scatter_(1, ordered.indices, probs.cumsum(dim=-1) - probs >= top_p)
    return torch.log_softmax(log_probs.masked_fill(outside, -torch.inf), dim=-1)


def uniform_noise(keys: Sequence[tuple[int, ...]], num: int) -> np.ndarray:
    """float64 `[len(keys), num]` in [0, 1): a row depends on its key alone, and longer rows begin with shorter ones."""
    noise = np.empty((len(keys), num))
    for row, key in zip(noise, keys, strict=True):
        np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(out=row)
    return noise


def plan_batches(
    prompt_lengths: Sequence[int], num_samples: int, batch_size: int
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Batches of at most `batch_size` pairs (prompt, sample), the longest prompts first so that memory runs out at once
    or never. A prompt's samples stay in order."""
    order = sorted(range(len(prompt_lengths)), key=lambda prompt: -prompt_lengths[prompt])
    return batched(((prompt, sample) for prompt in order for sample in range(num_samples)), batch_size)


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int | None) -> None:
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise RecipeError(f"prompt {index} has no tokens; a prompt needs at least one (a BOS token)")
        if max_positions is not None and len(prompt) + max_new_tokens > max_positions:
            raise RecipeError(
                f"prompt {index} has {len(prompt)} tokens: with max_new_tokens {max_new_tokens} that passes the "
                f"model's {max_positions} positions; lower max_new_tokens or drop the prompt"
            )


def _collect(tokens: Tensor, log_probs: Tensor, lengths: Tensor, stopped: Tensor) -> list[SampledResponse]:
    all_tokens, all_log_probs = tokens.cpu().numpy(), log_probs.cpu().numpy()
    return [
        SampledResponse(
            all_tokens[row, :length].copy(), all_log_probs[row, :length].copy(), "stop" if stop else "length"
        )
        for row, (length, stop) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
    ]
