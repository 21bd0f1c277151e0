"""Comparison of two models' logits."""

from __future__ import annotations

import pytest
import torch

from megatron_erpd.model.logits import compare_logits


def test_compare_logits_leaves_padding_out() -> None:
    reference = torch.randn(2, 3, 5)
    padded = torch.nn.functional.pad(reference, (0, 3), value=100.0)
    assert compare_logits(padded, reference).max_difference == 0.0
    padded[0, 0, 0] += 1e-3 * reference.abs().max()
    found = compare_logits(padded, reference)
    assert not found.agrees() and found.relative_difference == pytest.approx(1e-3, rel=1e-2)
