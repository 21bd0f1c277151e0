"""Probabilities, divergences, top-k and the projection for logits that are split over the vocabulary.

Every function takes a `VocabShard`: a range of columns, the true size of the vocabulary and the process group that
holds the other ranges (none for one process). Results per token are the same on every rank; the gradient of a rank's
logits is its slice of the dense gradient (see `shard`).
"""

from megatron_erpd.objectives.divergences import TopKTarget
from megatron_erpd.vocab_parallel.divergences import divergence, gather_log_probs, gathered_divergence
from megatron_erpd.vocab_parallel.passes import logits_of
from megatron_erpd.vocab_parallel.projection import (
    Projection,
    apply_eta,
    kl_from_base,
    project_shard,
    signal_law,
)
from megatron_erpd.vocab_parallel.shard import (
    VocabShard,
    local_blocks,
    log_softmax_of,
    normalizer,
    token_chunks,
    vocab_parallel_log_softmax,
)
from megatron_erpd.vocab_parallel.targets import HiddenTarget, LiveTarget, Target
from megatron_erpd.vocab_parallel.token_terms import (
    IGNORED_TOKEN,
    OutputLayer,
    TokenTerms,
    fused_token_terms,
    output_logits,
    token_terms,
)
from megatron_erpd.vocab_parallel.topk import NO_TOKEN, vocab_parallel_topk

__all__ = [
    "IGNORED_TOKEN",
    "NO_TOKEN",
    "HiddenTarget",
    "LiveTarget",
    "OutputLayer",
    "Projection",
    "Target",
    "TokenTerms",
    "TopKTarget",
    "VocabShard",
    "apply_eta",
    "divergence",
    "fused_token_terms",
    "gather_log_probs",
    "gathered_divergence",
    "kl_from_base",
    "local_blocks",
    "log_softmax_of",
    "logits_of",
    "normalizer",
    "output_logits",
    "project_shard",
    "signal_law",
    "token_chunks",
    "token_terms",
    "vocab_parallel_log_softmax",
    "vocab_parallel_topk",
]
