"""Megatron-LM's `topk_kl_div`, imported without what its packages print about Apex, Transformer Engine and CUDA.

A module of its own, so that the server that ranks are forked from can import it once.
"""

from __future__ import annotations

import logging
import warnings

_before = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training.distillation.cached_logits_loss import topk_kl_div
finally:
    logging.disable(_before)

__all__ = ["topk_kl_div"]
