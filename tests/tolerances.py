"""The one table of tolerances. A test that needs another number adds it here, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Tensor | float | Sequence[float] | Sequence[Sequence[float]]


def _as_float64(values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= atol + rtol * scale, where scale is |expected|, or its maximum with `relative_to_max`.

    `relative_to_max` is for tensors whose small entries are differences of large ones (logits, gradients of a layer):
    the error of an entry then follows the tensor's scale, not the entry's.
    """

    rtol: float
    atol: float = 0.0
    relative_to_max: bool = False

    def assert_close(self, actual: Values, expected: Values, what: str = "") -> None:
        """Compare values of one shape, whatever their dtypes; NaN equals NaN and an infinity equals itself."""
        left, right = _as_float64(actual), _as_float64(expected)
        rtol, atol = self.rtol, self.atol
        if self.relative_to_max and right.numel():
            rtol, atol = 0.0, atol + rtol * float(right.abs().nan_to_num(0, 0, 0).max())
        torch.testing.assert_close(
            left, right, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}" if what else text
        )


# The same formula in float64, written or summed in another order.
FLOAT64 = Tolerance(1e-9, 1e-12)
# Central differences in float64 with a step of 1e-5: the error of the method, not of the code.
FINITE_DIFFERENCE = Tolerance(1e-5, 1e-7)
# The same formula in fp32: some tens of roundings of 6e-8.
FP32 = Tolerance(1e-5, 1e-6)
# fp32 with partial sums over ranks in another order, or against float64.
FP32_PARALLEL = Tolerance(2e-5, 2e-6)
# Values and gradients of the vocabulary-parallel operations in fp32 against a dense float64 computation.
VOCAB_PARALLEL = Tolerance(1e-6, relative_to_max=True)
# The same in float64.
VOCAB_PARALLEL_FLOAT64 = Tolerance(1e-10, relative_to_max=True)
# fp32 results that differ in their last bits, rounded to bf16 or (by Triton's interpreter) cut to it: neighbours.
BF16_ROUNDING = Tolerance(2**-7, 1e-6)
# fp32 results that differ in their last bits, rounded to float16, and what is computed from them.
HALF_PRECISION = Tolerance(2**-9, 1e-3, relative_to_max=True)
# Entries of a teacher cache as they are read, and the tail: the normaliser is an fp32 number, rounded once.
STORED_MASS = Tolerance(0.0, 1e-6)
# bf16 keeps 8 bits.
BF16 = Tolerance(2e-2, 2e-2)
# Gradients of a bf16 output layer from a logits' gradient rounded to bf16, themselves rounded, and once for each rank.
BF16_GRADIENT = Tolerance(2**-7, relative_to_max=True)
# Losses of 20 steps with fp32 master weights and bf16 forward and backward, against the same by another implementation.
BF16_LOSS = Tolerance(1e-2)
# The same against fp32 throughout: weights of 0.3 that change by 1e-4 in a step move in bf16 some ten steps later.
FP32_LOSS = Tolerance(2e-2)
# Losses, gradients and weights under another TP, PP, DP or micro-batch size, fp32.
LAYOUT = Tolerance(1e-5, relative_to_max=True)
# The same after a step: Adam makes of a gradient near 0, which is rounding, as large an update as of any other.
SECOND_STEP = Tolerance(3e-4, relative_to_max=True)
# fp32 logits of a converted model against transformers: other kernels, every layer.
LOGITS_VS_TRANSFORMERS = Tolerance(1e-4, relative_to_max=True)
# KL reached by the projection, relative to delta, and what follows from it (see objectives/projection.py).
PROJECTION_KL = Tolerance(1e-5)
# The same for inputs and eta in fp32.
PROJECTION_KL_FP32 = Tolerance(1e-4)
# The mean KL at a global eta, from a curve on a grid.
GLOBAL_KL = Tolerance(1e-4)
# Absolute errors of the law of a signal: of K and of the KL, in nats, and so of log q and its normalisation.
SIGNAL_LAW = Tolerance(0.0, 1e-6)
# Norm of a parameter's gradient in bf16, of other roundings: the noise of a direction that is off by a cosine of .996.
BF16_NORM = Tolerance(8e-2)
# A KL to the base of a policy that is trained in bf16, over some steps under other roundings: at the
# first step it is rounding alone.
BF16_KL = Tolerance(3e-2, 1e-5)
# Logarithm of the coefficient that is controlled by it: 14 times the noise of a speed, that of a distance in a step.
BF16_LOG_COEFFICIENT = Tolerance(0.0, 0.3)
# Percentiles from a histogram with 1,000 bins per decade: half a bin.
HISTOGRAM = Tolerance(1.2e-3)
# Bytes of weights, gradients and optimizer against Megatron's own estimate, which leaves small tensors out.
MEMORY_REPORT = Tolerance(1e-3)

# Cosine of a parameter's gradient in bf16 with that of another implementation or in fp32: a direction, no entry.
MIN_BF16_COSINE = 0.998
# The same of a mixture, for the router: a token between two experts may go to the other.
MIN_BF16_COSINE_EXPERTS = 0.99
# The same of stage 2, whose gradient is a difference of two policies that are close.
MIN_BF16_COSINE_STUDENT = 0.995
# Cosine of what ten steps of Adam changed with the same under other layouts: small gradients change their sign.
MIN_BF16_COSINE_UPDATE = 0.95

TOLERANCES: dict[str, Tolerance] = {name: value for name, value in vars().items() if isinstance(value, Tolerance)}
