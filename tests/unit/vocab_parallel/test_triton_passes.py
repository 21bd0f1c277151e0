"""The Triton kernels against the plain passes and against autograd in float64.

Without a CUDA device they run in Triton's interpreter (tests/conftest.py asks for it): blocks are made small there, so
that rows of 150 columns are read in several. Rows are views of wider ones whose other columns hold NaN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_erpd.errors import ErpdError
from megatron_erpd.objectives.types import DivergenceKind
from megatron_erpd.vocab_parallel import passes, triton_passes
from megatron_erpd.vocab_parallel.passes import DivergenceGradient, RowGradient, Softmax
from tests.tolerances import BF16_ROUNDING, FLOAT64, FP32, Tolerance
from tests.unit.vocab_parallel.oracles import policy_probs, probs_divergence

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on what a mask leaves out afterwards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, WIDTH = 64, 150
SCALE, TARGET_SCALE = 1 / 0.7, 1 / 1.3
LOWEST = torch.finfo(torch.float32).min
KINDS: list[DivergenceKind] = ["forward_kl", "reverse_kl", "js"]
TYPES = [torch.float32, torch.bfloat16, torch.float64]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_kind_or_none = pytest.mark.parametrize("kind", [None, *KINDS])
each_dtype = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_passes, "BLOCK", BLOCK)


def padded(values: Tensor, padding: int = 26) -> Tensor:
    """A view of a wider tensor, NaN beyond."""
    storage = values.new_full((len(values), values.shape[-1] + padding), torch.nan).to(DEVICE)
    view = storage[:, : values.shape[-1]]
    view.copy_(values)
    return view


def make_rows(seed: int, num_rows: int = 3, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return padded((3.0 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)).to(dtype))


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    return FLOAT64 if dtype == torch.float64 else FP32


def gradient_tolerance_of(dtype: torch.dtype) -> Tolerance:
    return BF16_ROUNDING if dtype in (torch.bfloat16, torch.float16) else tolerance_of(dtype)


def assert_same_statistics(policy: Softmax, *arguments: Any) -> Tensor:
    """Of both implementations; column for column, so that a large one doesn't cover a small one."""
    logits = policy.logits
    ours, expected = triton_passes.statistics(policy, *arguments), passes.statistics(policy, *arguments)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape == (len(logits), passes.NUM_STATISTICS)
    for index, name in enumerate("msuntc"):
        tolerance_of(logits.dtype).assert_close(ours[:, index], expected[:, index], name)
    return ours


def normalized(logits: Tensor, target: Tensor) -> tuple[Softmax, Softmax]:
    policy, other = Softmax(logits, SCALE), Softmax(target, TARGET_SCALE)
    m, s, _, n, t, _ = passes.statistics(policy, other).unbind(-1)
    return policy._replace(normalizer=(m, s.log())), other._replace(normalizer=(n, t.log()))


def row_numbers(like: Tensor, seed: int, num_rows: int) -> Tensor:
    values = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(like.device, like.dtype)


Arguments = tuple[Softmax, RowGradient, DivergenceGradient | None]
"""Of `gradient`, after `out`."""


def gradient_arguments(
    logits: Tensor, target: Tensor, kind: DivergenceKind | None, slope: bool = True, token: bool = True
) -> Arguments:
    """The tokens at the ends of blocks and outside of the columns."""
    policy, other = normalized(logits, target)
    constant, slopes, on_token, weight = (row_numbers(policy.normalizer[0], seed, len(logits)) for seed in range(4))
    ids = torch.tensor([BLOCK - 1, BLOCK, logits.shape[-1] - 1, logits.shape[-1], -1, 0, 2**32 + 3])
    ids = ids[: len(logits)].to(logits.device)
    rows = RowGradient(constant, slopes if slope else None, ids, on_token if token else torch.zeros_like(on_token))
    return policy, rows, None if kind is None else DivergenceGradient(kind, weight, other)


def assert_same_gradient(arguments: Arguments, out_dtype: torch.dtype | None = None) -> Tensor:
    logits = arguments[0].logits
    out = padded(torch.zeros(logits.shape, dtype=out_dtype or logits.dtype), 9)
    expected = torch.empty_like(out)
    triton_passes.gradient(out, *arguments)
    passes.gradient(expected, *arguments)
    gradient_tolerance_of(out.dtype).assert_close(out, expected)
    return out


# Against autograd


@each_kind_or_none
@each_dtype
@pytest.mark.parametrize("temperature", [0.7])
def test_a_loss_and_its_gradient(kind: DivergenceKind | None, dtype: torch.dtype, temperature: float) -> None:
    """A loss of the token's log-prob, the entropy and the divergence, all that the three passes are for."""
    logits, target = make_rows(1, dtype=dtype), make_rows(2, dtype=dtype)
    scale, tokens = 1 / temperature, torch.tensor([0, BLOCK, WIDTH - 1], device=DEVICE)
    leaf = logits.double().requires_grad_()
    p, q = policy_probs(leaf, temperature), policy_probs(target.double(), 1 / TARGET_SCALE)
    log_prob, entropy = p.gather(-1, tokens[:, None])[:, 0].log(), -(p * p.log()).sum(-1)
    value = torch.zeros_like(entropy) if kind is None else probs_divergence(kind, q, p)
    on_log_prob, on_entropy, on_value = (row_numbers(leaf, seed, 3) for seed in (5, 6, 7))
    (expected,) = torch.autograd.grad((on_log_prob * log_prob + on_entropy * entropy + on_value * value).sum(), leaf)

    policy, other = Softmax(logits, scale), Softmax(target, TARGET_SCALE)
    found = triton_passes.statistics(policy, None if kind is None else other, kind, with_entropy=True)
    m, s, u, n, t, c = found.unbind(-1)
    tolerance = tolerance_of(dtype)
    tolerance.assert_close(s.log() - u / s, entropy, "entropy")
    policy, other = policy._replace(normalizer=(m, s.log())), other._replace(normalizer=(n, t.log()))
    constant = -on_log_prob - on_entropy * entropy.detach()
    if kind == "forward_kl":
        tolerance.assert_close(c / t + s.log() - t.log(), value, "forward_kl")
        constant += on_value
    elif kind == "reverse_kl":
        tolerance.assert_close(c / s + t.log() - s.log(), value, "reverse_kl")
        constant -= on_value * value.detach()
    elif kind == "js":
        terms = triton_passes.js_terms(policy, other)
        tolerance.assert_close(terms.sum(-1), value, "js")
        constant -= on_value * terms[:, 0]
    on_rows, slopes, on_tokens, weight = (
        (x * scale).to(s.dtype) for x in (constant, -on_entropy, on_log_prob, on_value)
    )
    divergence = None if kind is None else DivergenceGradient(kind, weight, other)
    triton_passes.gradient(logits, policy, RowGradient(on_rows, slopes, tokens, on_tokens), divergence)
    gradient_tolerance_of(dtype).assert_close(logits, expected, "gradient")


# Against the plain passes


@each_kind_or_none
@each_dtype
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("with_excluded", [False, True])
def test_statistics(kind: DivergenceKind | None, dtype: torch.dtype, with_entropy: bool, with_excluded: bool) -> None:
    logits, target = make_rows(1, 2, dtype=dtype), make_rows(2, 2, dtype=dtype)
    excluded = None
    if with_excluded:
        columns = [[0, 31, 32, 33, 63, 64, WIDTH - 1, -1, WIDTH, 2**40], [95, 96, 127, 128, 1, 2, 3, 4, 5, 6]]
        excluded = torch.tensor(columns, device=DEVICE)
        # The target excludes them too in one row, so that the forward cross term is finite in one and not in the other.
        target[1, excluded[1]] = -torch.inf
    found = assert_same_statistics(Softmax(logits, SCALE), Softmax(target, TARGET_SCALE), kind, excluded, with_entropy)
    assert found[1].isfinite().all() and (found[0, 5] == torch.inf) == (with_excluded and kind == "forward_kl")
    assert (found[:, 2] != 0).all() == with_entropy


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("width", [1, BLOCK, BLOCK + 1])
def test_sizes(num_rows: int, width: int) -> None:
    logits, target = make_rows(1, num_rows, width), make_rows(2, num_rows, width, torch.float32)
    excluded = torch.tensor([[0, 31, width - 1]], device=DEVICE).expand(num_rows, 3)
    last_only = torch.where(excluded == width - 1, -1, excluded)
    policy, other = arguments = normalized(logits, target.double())
    assert_same_statistics(policy, other, "reverse_kl", last_only, True)
    ours = triton_passes.statistics(policy)
    assert (ours[:, 2:] == 0).all(), "what wasn't asked for"
    assert_same_gradient(gradient_arguments(logits, target.double(), "js"))
    FLOAT64.assert_close(triton_passes.js_terms(*arguments), passes.js_terms(*arguments))


@each_kind
@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float16),
    ],
)
def test_types_of_their_own(kind: DivergenceKind, policy: torch.dtype, other: torch.dtype) -> None:
    """Policy and target, with rows as far apart as each likes; `out` in a third type."""
    logits, target = make_rows(1, 2, dtype=policy), make_rows(2, 2, dtype=other)
    target = padded(target, 7)
    assert_same_statistics(Softmax(logits, SCALE), Softmax(target, TARGET_SCALE), kind)
    assert_same_gradient(gradient_arguments(logits, target, kind), torch.float32)


@each_kind_or_none
@each_dtype
@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("token", [False, True])
def test_gradient(kind: DivergenceKind | None, dtype: torch.dtype, slope: bool, token: bool) -> None:
    """Also in place, where the columns beyond the view stay as they are."""
    logits, target = make_rows(1, dtype=dtype), make_rows(2, dtype=dtype)
    arguments = gradient_arguments(logits, target, kind, slope, token)
    expected = assert_same_gradient(arguments)
    if slope and token:
        storage = torch.as_strided(logits, (len(logits), logits.stride(0)), logits.stride())
        triton_passes.gradient(logits, *arguments)
        assert torch.equal(logits, expected)
        assert storage[:, WIDTH:].isnan().all()


@each_kind_or_none
def test_gradient_of_float32_logits_in_bf16(kind: DivergenceKind | None) -> None:
    """What an output layer in bf16 asks for: logits and target float32, the gradient beside them."""
    logits, target = make_rows(1, dtype=torch.float32), make_rows(2, dtype=torch.float32)
    assert_same_gradient(gradient_arguments(logits, target, kind, True, True), torch.bfloat16)


def test_token_is_added_before_rounding() -> None:
    """The gradient of a nearly certain token is a small difference, which is lost where its parts are rounded first."""
    logits = torch.zeros(1, 40, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 3] = 12.0
    m, s = passes.statistics(Softmax(logits))[:, :2].unbind(-1)
    one = torch.ones_like(m)
    rows = RowGradient(-one, None, torch.tensor([3], device=DEVICE), one)
    triton_passes.gradient(logits, Softmax(logits, 1.0, (m, s.log())), rows)
    BF16_ROUNDING.assert_close(logits[0, 3], 39 / (39 + torch.tensor(12.0).exp()))


def extreme_rows() -> tuple[Tensor, Tensor]:
    """Policy and target, float64; each row is a case at a border of blocks or of the numbers."""
    policy, target = make_rows(1, 10), make_rows(2, 10)
    policy[0], policy[0, 70], target[0, 71] = -1e4, 1e4, 1e4
    policy[1, ::2], target[1, 1::2] = 1e4, -1e4
    policy[2], target[2] = torch.arange(WIDTH) / 2.0, -torch.arange(WIDTH) / 2.0  # one maximum moves, one doesn't
    policy[3, :BLOCK], target[3, : 2 * BLOCK] = -torch.inf, -torch.inf
    policy[4, BLOCK:] = target[4, BLOCK:] = -torch.inf
    policy[5] = -torch.inf
    target[6] = -torch.inf
    policy[7] = target[7] = -torch.inf
    # In float32 these maxima move by an infinite shift: after columns with weight, and beside a target without any.
    policy[8, :BLOCK], policy[8, BLOCK:] = LOWEST, 3e38
    policy[9, :BLOCK], policy[9, BLOCK:], target[9] = -torch.inf, 3e38, -torch.inf
    return policy, target


def with_a_zero_elsewhere(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The normaliser over these columns and one more, of another rank, whose logit is 0."""
    larger = maximum.clamp_min(0.0)
    return larger, (total * (maximum - larger).exp() + (-larger).exp()).log()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exchanged", [False, True])
def test_extreme_logits(kind: DivergenceKind, dtype: torch.dtype, exchanged: bool) -> None:
    policy, target = (padded(rows.to(dtype)) for rows in extreme_rows()[:: -1 if exchanged else 1])
    found = assert_same_statistics(Softmax(policy), Softmax(target), kind, None, True)
    assert not found.isnan().any() and found[:, :5].isfinite().all()
    m, s, _, n, t, _ = found.unbind(-1)
    own = Softmax(policy, 1.0, with_a_zero_elsewhere(m, s))
    other = Softmax(target, 1.0, with_a_zero_elsewhere(n, t))
    if kind == "js":
        tolerance_of(dtype).assert_close(triton_passes.js_terms(own, other), passes.js_terms(own, other))
    constant, slope, weight = (row_numbers(m, seed, len(m)) for seed in range(3))
    rows = RowGradient(constant, slope, torch.full_like(m, -1, dtype=torch.int64), torch.zeros_like(m))
    out, expected = torch.empty_like(policy), torch.empty_like(policy)
    for function, result in ((triton_passes.gradient, out), (passes.gradient, expected)):
        function(result, own, rows, DivergenceGradient(kind, weight, other))
    tolerance_of(dtype).assert_close(out, expected)
    vanished = (policy - m[:, None] < -1e3) & ((target - n[:, None] < -1e3) | (kind != "forward_kl"))
    assert vanished.any() and (out[vanished] == 0).all()


@each_kind_or_none
def test_unused_rows_are_zero(kind: DivergenceKind | None) -> None:
    """Whatever they hold, and whatever their normalisers are; a single number makes a row used."""
    logits, target = make_rows(1, 7, dtype=torch.float32), make_rows(2, 7, dtype=torch.float32)
    policy, rows, divergence = arguments = gradient_arguments(logits, target, kind)
    numbers = [rows.constant, rows.slope, rows.on_token, *([divergence.weight] if divergence else [])]
    for number in numbers:
        number[:3] = 0.0
    for row, number in enumerate(numbers, 3):
        for other in numbers:
            if other is not number:
                other[row] = 0.0
    logits[0], target[1], logits[1, 5], target[2, ::2] = torch.nan, torch.nan, torch.inf, torch.inf
    for number in (*policy.normalizer, *(divergence.target.normalizer if divergence else ())):
        number[:2] = torch.nan
    out = assert_same_gradient(arguments)
    assert (out[:3] == 0).all() and (out[3 : 3 + len(numbers)] != 0).any(dim=-1).all()


def test_nan_is_not_hidden() -> None:
    logits, target = make_rows(1, 2, dtype=torch.float32), make_rows(2, 2, dtype=torch.float32)
    logits[0, 70], target[1, 3] = torch.nan, torch.nan
    for kind in KINDS[:2]:
        found = triton_passes.statistics(Softmax(logits, SCALE), Softmax(target, TARGET_SCALE), kind, None, True)
        _, s, u, _, t, c = found.unbind(-1)
        assert s.isnan().tolist() == u.isnan().tolist() == [True, False] and t.isnan().tolist() == [False, True]
        assert c.isnan().all()


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)])
def test_nothing_to_read(shape: tuple[int, int]) -> None:
    logits = torch.empty(shape, device=DEVICE)
    number = torch.ones(len(logits), device=DEVICE)
    excluded = torch.zeros(len(logits), 2, dtype=torch.int64, device=DEVICE)
    for target in (None, logits):
        other = None if target is None else Softmax(target)
        assert_same_statistics(Softmax(logits), other, None if target is None else "forward_kl", excluded, True)
    policy = Softmax(logits, 1.0, (number, number))
    assert torch.equal(triton_passes.js_terms(policy, policy), torch.zeros(len(logits), 2, device=DEVICE))
    triton_passes.gradient(logits, policy, RowGradient(number, number, excluded[:, 0], number))


# What is refused, and what can be imported


def test_layouts_that_are_refused() -> None:
    logits, number = torch.zeros(4, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    pair = (number, number)
    with pytest.raises(ErpdError, match=r"columns of logits next to each other.*not 4 entries apart.*contiguous"):
        triton_passes.statistics(Softmax(logits.t()))
    with pytest.raises(ErpdError, match="columns of target next to each other"):
        triton_passes.js_terms(Softmax(logits, 1.0, pair), Softmax(logits.t(), 1.0, pair))
    with pytest.raises(ErpdError, match="columns of out next to each other"):
        triton_passes.gradient(logits.t(), Softmax(logits, 1.0, pair), RowGradient(number, None, number.long(), number))
    with pytest.raises(ErpdError, match=r"target of shape \[4, 3\].*don't fit logits of shape \[4, 4\]"):
        triton_passes.statistics(Softmax(logits), Softmax(logits[:, :3]))


def test_a_single_column_may_have_any_stride() -> None:
    column = torch.arange(6.0, device=DEVICE).reshape(3, 2).t()[:, :1]
    assert column.stride() == (1, 2)
    assert_same_statistics(Softmax(column, SCALE))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_erpd.vocab_parallel.triton_kernels", None)
    monkeypatch.delattr("megatron_erpd.vocab_parallel.triton_kernels", raising=False)
    with pytest.raises(ErpdError, match="pip install triton"):
        triton_passes.statistics(Softmax(torch.zeros(1, 4)))


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from megatron_erpd.errors import ErpdError
from megatron_erpd.vocab_parallel import triton_kernels, triton_passes
from megatron_erpd.vocab_parallel.passes import DivergenceGradient, RowGradient, Softmax

class Hopper:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

x, y = torch.zeros(2, 50, dtype=torch.bfloat16), torch.zeros(2, 50)
try:
    triton_passes.statistics(Softmax(x))
except ErpdError as error:
    print(error)

driver.set_active(Hopper())
def compile_only(kernel, grid):
    return lambda *arguments, **options: print(kernel.run(*arguments, grid=grid, warmup=True, **options).name)
JITFunction.__getitem__ = compile_only
triton_kernels.INTERPRETED, triton_passes.BLOCK = True, 1024
numbers = torch.ones(2)
pair, ids = (numbers, numbers), torch.zeros(2, 1, dtype=torch.int64)
policy, target = Softmax(x, 0.5, pair), Softmax(y, 0.5, pair)
triton_passes.statistics(policy, target, "forward_kl", ids, True)
triton_passes.js_terms(policy, target)
rows = RowGradient(numbers, numbers, ids[:, 0], numbers)
for kind in ("forward_kl", "js"):
    triton_passes.gradient(x, policy, rows, DivergenceGradient(kind, numbers, target))
triton_passes.gradient(y, target, rows._replace(slope=None))
triton_passes.gradient(x, target, rows)
"""


def test_kernels_compile_for_a_gpu(tmp_path: object) -> None:
    """The interpreter takes what the compiler refuses. Compiling needs no GPU, only a process without interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    first, *kernels = result.stdout.splitlines()
    assert "need a CUDA device and got tensors on cpu" in first
    expected = ["statistics_kernel", "js_terms_kernel"] + ["gradient_kernel"] * 4
    assert kernels == expected
