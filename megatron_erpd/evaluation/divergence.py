"""Exact divergences between two Hugging Face policies over given sequences, on the full vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_erpd.errors import CheckpointError
from megatron_erpd.objectives.divergences import forward_kl, reverse_kl
from megatron_erpd.progress import OnProgress
from megatron_erpd.sampling.policy import Policy

BATCH_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""
CHUNK_ELEMENTS = 2**24
"""Entries of the float64 tables `[tokens, V]` that are worked on at once: 128 MiB each."""


@dataclass(frozen=True)
class SequenceDivergence:
    """Sums over the response tokens of each of N sequences, float64 `[N]`, in nats.

    Attributes:
        forward_kl: KL(base || policy) at every token, summed.
        reverse_kl: KL(policy || base) at every token, summed. On the policy's own samples its mean over sequences
            estimates the KL divergence of the two distributions of whole responses without bias.
        log_ratio: log policy - log base of the tokens themselves, summed: on the policy's own samples an unbiased
            estimate of the same divergence.
        entropy: of the policy at every token, summed.
        num_tokens: int64 `[N]`, R.
    """

    forward_kl: np.ndarray
    reverse_kl: np.ndarray
    log_ratio: np.ndarray
    entropy: np.ndarray
    num_tokens: np.ndarray

    def per_token(self, name: str) -> float:
        """The mean over all tokens of all sequences of one of the sums."""
        return float(getattr(self, name).sum() / self.num_tokens.sum())


@torch.inference_mode()
def compare_policies(
    policy: Policy,
    base: Policy,
    sequences: Sequence[tuple[np.ndarray | Sequence[int], np.ndarray | Sequence[int]]],
    batch_tokens: int = BATCH_TOKENS,
    progress: OnProgress | None = None,
) -> SequenceDivergence:
    """Runs both policies over the sequences and sums divergences over the response tokens, at temperature 1.

    Logits are the product of the last hidden states and the output embedding in float32, whatever the dtype of the
    models; everything after them is float64. At no time is there a table over all tokens and the whole vocabulary.

    Args:
        policy, base: on the same device; may be the same object.
        sequences: N pairs of prompt ids `[P]` and response ids `[R]`, P >= 1, R >= 1.
        batch_tokens: bound on rows x longest sequence of a forward pass; a longer sequence runs alone.
        progress: called with the number of finished sequences and of all.

    Raises:
        CheckpointError: the vocabularies differ, or a model does more than an output embedding to its hidden states.
    """
    size = policy.model.config.vocab_size
    if size != base.model.config.vocab_size:
        raise CheckpointError(
            f"{policy.path} has a vocabulary of {size} and {base.path} one of {base.model.config.vocab_size}; "
            "only policies of one base can be compared"
        )
    heads = [_OutputLayer(p) for p in (policy, base)]
    names = ("forward_kl", "reverse_kl", "log_ratio", "entropy")
    sums = {name: np.zeros(len(sequences)) for name in names}
    done = 0
    for rows in _batches([len(p) + len(r) - 1 for p, r in sequences], batch_tokens):
        tokens, labels, owner, place = _right_padded([sequences[row] for row in rows], policy)
        hidden = [head.hidden_states(tokens)[place] for head in heads]
        totals = torch.zeros(len(names), len(rows), dtype=torch.float64, device=tokens.device)
        for part in torch.arange(len(labels), device=tokens.device).split(max(1, CHUNK_ELEMENTS // size)):
            log_p, log_q = (head.log_probs(h[part]) for head, h in zip(heads, hidden, strict=True))
            totals.index_add_(1, owner[part], torch.stack(_token_values(log_p, log_q, labels[part])))
        for name, total in zip(names, totals.cpu().numpy(), strict=True):
            sums[name][rows] = total
        done += len(rows)
        if progress is not None:
            progress(done, len(sequences))
    return SequenceDivergence(**sums, num_tokens=np.array([len(r) for _, r in sequences], dtype=np.int64))


def _token_values(log_p: Tensor, log_q: Tensor, labels: Tensor) -> list[Tensor]:
    """Policy and base log-probs `[n, V]`, tokens `[n]` -> forward KL, reverse KL, log-ratio, entropy, each `[n]`."""
    labels = labels.unsqueeze(1)
    return [
        forward_kl(log_q, log_p),
        reverse_kl(log_q, log_p),
        (log_p.gather(1, labels) - log_q.gather(1, labels)).squeeze(1),
        torch.special.entr(log_p.exp()).sum(dim=-1),
    ]


class _OutputLayer:
    """A model cut before its output embedding, so that logits can be made for a few tokens at a time."""

    def __init__(self, policy: Policy) -> None:
        self._body: Any = policy.model.base_model
        head = policy.model.get_output_embeddings()
        if head is None:
            raise CheckpointError(f"{policy.path}: the model has no output embedding; it isn't a causal language model")
        # bf16 logits of 20 are off by 0.06, as much as many a KL divergence.
        self._weight = head.weight.float()
        self._bias = head.bias.float() if head.bias is not None else None
        self._check(policy)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """`[b, s]` -> `[b, s, h]`. No mask: padding stands on the right, and the model is causal."""
        return self._body(input_ids=tokens, use_cache=False).last_hidden_state

    def log_probs(self, hidden: Tensor) -> Tensor:
        """`[n, h]` -> `[n, V]` float64."""
        return torch.log_softmax(self._logits(hidden).double(), dim=-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden.float(), self._weight, self._bias)

    def _check(self, policy: Policy) -> None:
        """Some architectures scale or cap their logits; leaving that out would be silently wrong."""
        tokens = torch.arange(4, device=policy.device).unsqueeze(0) % policy.model.config.vocab_size
        expected = policy.model(input_ids=tokens, use_cache=False).logits.float()
        found = self._logits(self.hidden_states(tokens))
        tolerance = 1e-4 if policy.model.dtype == torch.float32 else 0.05
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            kind = policy.model.config.model_type
            raise CheckpointError(
                f"{policy.path}: architecture {kind!r} changes its logits after the output embedding, which the "
                "evaluation doesn't know; evaluate a Llama, Mistral, Qwen2 or Qwen3 model"
            )


def _right_padded(
    sequences: Sequence[tuple[Any, Any]], policy: Policy
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Inputs `[b, s]`, the response tokens of all rows `[n]`, the row of each `[n]`, and where each is predicted."""
    longest = max(len(prompt) + len(response) - 1 for prompt, response in sequences)
    tokens = torch.full((len(sequences), longest), policy.pad_token_id, dtype=torch.int64)
    labels, owner, position = [], [], []
    for row, (prompt, response) in enumerate(sequences):
        ids = torch.from_numpy(np.concatenate([np.asarray(prompt), np.asarray(response)]).astype(np.int64))
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels.append(ids[len(prompt) :])
        owner.append(torch.full((len(response),), row))
        position.append(torch.arange(len(prompt) - 1, len(ids) - 1))
    flat = [torch.cat(part).to(policy.device) for part in (labels, owner, position)]
    return tokens.to(policy.device), flat[0], flat[1], (flat[1], flat[2])


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows in order of length, the longest first, so that a batch has little padding."""
    batch: list[int] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        if not batch:
            longest = lengths[row]
        batch.append(row)
    if batch:
        yield batch
