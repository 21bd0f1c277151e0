"""The benchmark of the divergences: its meters on known patterns, a tiny run from end to end, ratios and verdicts."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, divergences, page, peers, ranks
from benchmarks.cases import Case
from benchmarks.compare import Bench, DisagreementError, Probe, check_agreement
from benchmarks.implementations import (
    FLOOR,
    FUSED_PLAIN,
    FUSED_TRITON,
    MEGATRON,
    PLAIN,
    PRODUCTS_REMADE,
    STRAIGHTFORWARD,
    TRITON,
    straightforward_divergence,
)
from benchmarks.inputs import Context, make_inputs
from benchmarks.measure import MemoryMeter, SavedTensors
from benchmarks.records import Figures, Record, bytes_text, read_json, seconds_text
from benchmarks.tables import rows
from benchmarks.targets import TARGETS
from megatron_erpd.vocab_parallel import LiveTarget, divergence
from tests.tolerances import FP32

CPU = torch.device("cpu")
FIELDS = {
    *("implementation", "pass", "vocab", "tokens", "tp", "dtype", "device", "seconds", "extra_bytes", "saved_bytes"),
    *("collectives_forward", "collectives_backward"),
}
VOCAB, TOKENS = 512, 16
SCALARS = 64
"""Bytes for each token that ours may keep; a row of the vocabulary would be 2048."""


@pytest.fixture(scope="module", autouse=True)
def kineto_is_silent() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINETO_LOG_LEVEL", "9")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Records of a tiny run with one and two ranks, against all kinds of target, and the folder of its page."""
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = ["--vocab", str(VOCAB), "--tokens", str(TOKENS), "--hidden", "32", "--dtype", "fp32", "--repeats", "2"]
    common = [*sizes, "--kind", "forward_kl", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        # Other tests fork their ranks from the same server, and some of them must import Megatron their own way.
        patch.setattr(ranks, "PRELOAD_MEGATRON", [])
        first, second = (["--json", str(folder / f"{n}.json")] for n in (1, 2))
        divergences.main([*common, *first, "--tp", "1", "2", "--target", "full", "hidden", "--docs", str(folder)])
        divergences.main([*common, *second, "--tp", "2", "--target", "topk", "--policy", "logits"])
    return [record for n in (1, 2) for record in json.loads((folder / f"{n}.json").read_text())], folder


def of(records: list[dict[str, Any]], name: str, passed: str = "forward+backward", **wanted: Any) -> dict[str, Any]:
    """The one record of an implementation that has these values."""
    wanted |= {"implementation": name, "pass": passed}
    [found] = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return found


def test_every_record_has_every_field(run: tuple[list[dict[str, Any]], Path]) -> None:
    records, _ = run
    assert all(set(record) >= FIELDS for record in records)
    assert {(r["implementation"], r["tp"]) for r in records} >= {
        *((name, tp) for name in (PLAIN, FUSED_PLAIN, STRAIGHTFORWARD, FLOOR, PRODUCTS_REMADE) for tp in (1, 2)),
        (MEGATRON, 2),
    }
    assert {r["pass"] for r in records} == {"forward", "forward+backward"}
    assert all(r["seconds"] > 0 and r["seconds_low"] <= r["seconds"] <= r["seconds_high"] for r in records)
    assert all(r["device"] == "cpu" and r["vocab"] == VOCAB and r["tokens"] == TOKENS for r in records)


def test_collectives_with_two_ranks(run: tuple[list[dict[str, Any]], Path]) -> None:
    records, _ = run
    for target in ("full", "topk"):
        ours = of(records, PLAIN, policy="logits", target=target, tp=2)
        assert ours["calls_forward"] == ["all_gather", "all_reduce(SUM)"]
        assert (ours["collectives_forward"], ours["collectives_backward"]) == (2, 0)
    fused = of(records, FUSED_PLAIN, target="hidden", tp=2)
    assert fused["calls_forward"] == ["all_gather", "all_reduce(SUM)"]
    assert fused["calls_backward"] == ["all_reduce(SUM)"]  # the output layer's own
    assert of(records, STRAIGHTFORWARD, target="full", tp=2)["collectives_forward"] == 2
    peer = of(records, MEGATRON, tp=2)
    assert peer["calls_forward"] == ["all_reduce(MAX)", "all_reduce(SUM)", "all_reduce(SUM)"]
    assert peer["calls_backward"] == ["all_reduce(SUM)", "all_reduce(SUM)"]
    assert of(records, PLAIN, "forward", target="full", tp=1)["collectives_forward"] == 0


def test_ours_keeps_numbers_per_token(run: tuple[list[dict[str, Any]], Path]) -> None:
    records, _ = run
    for name, policy, target, tp in (
        (PLAIN, "logits", "full", 1),
        (PLAIN, "logits", "full", 2),
        (PLAIN, "logits", "topk", 2),
        (FUSED_PLAIN, "hidden", "hidden", 2),
    ):
        assert 0 < of(records, name, policy=policy, target=target, tp=tp)["saved_bytes"] <= SCALARS * TOKENS
    # Not only by autograd: nothing else of the vocabulary's size is alive after forward.
    inputs = make_inputs(Case("logits", "full", "forward_kl", VOCAB, TOKENS, 1, "fp32"), Context(CPU))
    assert inputs.logits is not None and inputs.target is not None
    meter = MemoryMeter(CPU)
    with meter.watch():
        result = divergence("forward_kl", inputs.logits, LiveTarget(inputs.target), inputs.shard)
    assert result.shape == (TOKENS,)
    assert meter.live <= 2 * SCALARS * TOKENS
    assert of(records, STRAIGHTFORWARD, target="full", tp=1)["saved_bytes"] >= 2 * 4 * VOCAB * TOKENS


def test_the_page_of_the_run(run: tuple[list[dict[str, Any]], Path]) -> None:
    _, folder = run
    text = (folder / "performance.md").read_text()
    device = divergences.cpu_name()
    assert f"<!-- begin: cpu, {device} -->\n## {device}\n" in text
    assert "H100: fused forward+backward" in text and "**open**: no H100 has been measured" in text
    assert "- ours (Triton): needs a CUDA device" in text
    images = [line.rsplit("(", 1)[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(images) == 2
    assert all((folder / image).read_bytes().startswith(b"\x89PNG") for image in images)
    assert text.count(f"| {PLAIN} |") == 4  # two targets, one and two ranks


def test_memory_meter_on_a_known_pattern() -> None:
    meter = MemoryMeter(CPU)
    with meter.watch():
        kept = torch.empty(1000)
        released = torch.empty(3000)
        del released
        other = torch.empty(500)
    assert (meter.peak, meter.live) == (4 * 4000, 4 * 1500)
    with meter.watch():
        del kept
        third = torch.empty(100)
    assert (meter.peak, meter.live) == (4 * 1500, 4 * 600)
    assert len(other) + len(third) == 600


def test_memory_meter_sees_the_temporaries_of_backward() -> None:
    n = 10_000
    leaf = torch.ones(n, requires_grad=True)
    meter = MemoryMeter(CPU)
    with meter.watch():
        result = leaf.exp().square().sum()  # kept: exp and, for square, the same
    assert meter.peak == pytest.approx(4 * 2 * n, abs=64)
    assert meter.live == pytest.approx(4 * n, abs=64)
    with meter.watch():
        (gradient,) = torch.autograd.grad(result, leaf)
    assert gradient.shape == (n,)
    assert meter.live == pytest.approx(4 * n, abs=64)  # the gradient; exp is gone
    assert 4 * 2 * n <= meter.peak <= 4 * 4 * n + 64


def test_saved_tensors_count_each_piece_of_memory_once_and_no_input() -> None:
    leaf = torch.ones(1000, requires_grad=True)
    saved = SavedTensors({leaf.untyped_storage().data_ptr()})
    with saved:
        middle = leaf.exp()  # keeps its result
        _ = middle * leaf  # keeps both, one of them again and the other an input
        _ = middle[:10].square()  # a view of it
    assert saved.total == 4000


def test_what_must_be_moved_and_done() -> None:
    full = Case("logits", "full", "js", 1000, 10, 2, "bf16")
    assert full.moved_bytes("forward") == 2 * 10 * 500 * 2
    assert full.moved_bytes("forward+backward") == 5 * 10 * 500 * 2
    topk = dataclasses.replace(full, target="topk")
    assert topk.moved_bytes("forward+backward") == 3 * 10 * 500 * 2
    hidden = dataclasses.replace(topk, policy="hidden", hidden=64)
    assert (hidden.products("forward+backward"), hidden.products("forward+backward", remade=True)) == (3, 4)
    assert hidden.operations("forward+backward") == 3 * 2 * 10 * 64 * 500
    assert dataclasses.replace(hidden, target="hidden").products("forward+backward", remade=True) == 6


def template(case: Case) -> Record:
    return Record("", case, "forward", "cpu", "a CPU", 1, 1, 0.0, 0.0, 0.0)


def test_a_case_that_does_not_fit_is_named_and_not_run() -> None:
    case = Case("logits", "full", "forward_kl", VOCAB, TOKENS, 1, "fp32")
    bench = Bench.prepare(Context(CPU), [case], template(case), memory=1000)
    records, skipped = bench.measure(case)
    assert records == []
    assert [line.split(":")[0] for line in skipped] == [PLAIN, STRAIGHTFORWARD]


def test_implementations_that_disagree_are_an_error() -> None:
    case = Case("logits", "full", "forward_kl", VOCAB, TOKENS, 1, "fp32")
    right = Probe(0, 0, 0, 0, (), (), divergence=1.5, gradient_norm=0.1)
    check_agreement(case, {PLAIN: right, STRAIGHTFORWARD: right})
    for divergence_, norm in ((1.6, 0.1), (1.5, 0.05), (float("nan"), 0.1)):
        wrong = dataclasses.replace(right, divergence=divergence_, gradient_norm=norm)
        with pytest.raises(DisagreementError, match=r"ours \(plain\)"):
            check_agreement(case, {PLAIN: wrong, STRAIGHTFORWARD: right})


HEADLINE = Case("logits", "full", "forward_kl", 151_936, 2048, 1, "fp32")


def figures(case: Case, seconds: dict[str, float], device: str = "cpu", name: str = "a CPU") -> Figures:
    """Figures of a case, from implementations' names to seconds of forward + backward; half of it forward."""
    found = Figures()
    for implementation, time in seconds.items():
        for passed, share in (("forward", 0.5), ("forward+backward", 1.0)):
            record = Record(implementation, case, passed, device, name, 1, 1, time * share, 0.0, 0.0)  # type: ignore[arg-type]
            found.add([dataclasses.replace(record, extra_bytes=int(time * 1000))])
    return found


def test_ratios_are_those_of_the_records() -> None:
    found = figures(HEADLINE, {PLAIN: 1.2, STRAIGHTFORWARD: 4.0, FLOOR: 0.5})
    ours = found.find(HEADLINE, "forward+backward", PLAIN)
    assert ours is not None
    assert found.time_ratio(ours, STRAIGHTFORWARD) == pytest.approx(0.3)
    assert found.time_ratio(ours, FLOOR) == pytest.approx(2.4)
    assert found.memory_ratio(ours) == pytest.approx(0.3)
    assert found.time_ratio(ours, MEGATRON) is None
    cells = rows(found, [HEADLINE])[0]
    assert cells[1:7] == [PLAIN, "600 ms", "1.20 s", "0.30x", "2.40x", "1.17 KiB"]


@pytest.mark.parametrize(("seconds", "verdict"), [(1.9, "**met**: 0.47x"), (2.2, "**missed**: 0.55x")])
def test_verdict_on_a_cpu(seconds: float, verdict: str) -> None:
    found = figures(HEADLINE, {PLAIN: seconds, STRAIGHTFORWARD: 4.0})
    assert TARGETS[0].verdict(found).startswith(verdict)
    small = figures(dataclasses.replace(HEADLINE, tokens=64), {PLAIN: seconds, STRAIGHTFORWARD: 4.0})
    assert TARGETS[0].verdict(small).startswith("open")


def test_verdicts_on_a_gpu() -> None:
    found = figures(HEADLINE, {TRITON: 1.0, FLOOR: 0.8, STRAIGHTFORWARD: 9.0})
    found.add(figures(dataclasses.replace(HEADLINE, target="topk"), {TRITON: 1.0, MEGATRON: 2.5}).records)
    hidden = dataclasses.replace(HEADLINE, policy="hidden", target="hidden", hidden=64)
    found.add(figures(hidden, {FUSED_TRITON: 1.1, PRODUCTS_REMADE: 1.0}).records)
    verdicts = [target.verdict(found) for target in TARGETS[2:]]
    assert verdicts[0].startswith("**met**: 1.25x")
    assert verdicts[1].startswith("**missed**: 2.50x (Megatron topk_kl_div")
    assert verdicts[2].startswith("**met**: 1.10x")
    assert [t.concerns("cuda", "NVIDIA H100 80GB HBM3") for t in TARGETS] == [False, False, True, True, True]
    assert [t.concerns("cpu", "a CPU") for t in TARGETS] == [True, True, False, False, False]


def test_a_page_keeps_the_sections_of_other_devices(tmp_path: Path) -> None:
    def write(device: str, name: str, seconds: float) -> str:
        run = page.Run(device, name, 2, "2.0", "2026-01-01", "python x", 0.0, 3, {}, [])
        both = figures(HEADLINE, {PLAIN: seconds, TRITON: seconds, STRAIGHTFORWARD: 4.0}, device, name)
        return page.write_page(tmp_path, run, both).read_text()

    write("cpu", "a CPU", 1.0)
    assert "**open**: no H100" not in write("cuda", "NVIDIA H100", 0.5)
    text = write("cpu", "a CPU", 3.0)
    assert text.count("<!-- begin:") == text.count("<!-- end:") == 2
    assert "0.75x" in text and "0.25x" not in text.split("<!-- begin: cuda")[0]  # replaced
    assert "| see NVIDIA H100 |" in text and "0.12x" in text
    assert text == write("cpu", "a CPU", 3.0)


def test_quick_holds_the_headline_and_small_cases() -> None:
    quick = cases.quick(2048)
    assert quick[0] == HEADLINE
    assert {case.tp for case in quick} == {1, 2, 4}
    assert all(case.vocab % case.tp == 0 for case in quick)
    assert len(set(quick)) == len(quick)


def test_desk_holds_the_quick_cases_and_every_vocabulary_at_every_size() -> None:
    desk = cases.desk(2048)
    assert set(cases.quick(2048)) < set(desk)
    assert len(set(desk)) == len(desk)
    assert [case.tp for case in desk] == sorted(case.tp for case in desk)
    sizes = {(case.vocab, case.tp, case.dtype, case.target) for case in desk if case.tokens == 1024}
    assert sizes >= {
        (v, t, d, k) for v in cases.VOCABS for t in cases.TPS for d in cases.DTYPES for k in ("full", "topk")
    }


def test_records_survive_json_and_add_to_a_later_run(tmp_path: Path) -> None:
    run = divergences._describe(divergences._parser().parse_args([]), [])
    case = HEADLINE
    other = dataclasses.replace(case, tokens=7)
    records = [
        Record("ours", c, "forward", run.device, run.device_name, 2, 3, 0.5, 0.4, 0.6, 7, 8, 9, ("sum",), (), 0.25)
        for c in (case, other)
    ]
    Figures(records).write_json(tmp_path / "f.json")
    assert read_json(tmp_path / "f.json") == records
    assert divergences._earlier(tmp_path / "f.json", run, [case]) == records[1:]
    foreign = [dataclasses.replace(records[0], device_name="another")]
    Figures(foreign).write_json(tmp_path / "foreign.json")
    with pytest.raises(SystemExit, match="was measured on another"):
        divergences._earlier(tmp_path / "foreign.json", run, [case])
    (tmp_path / "broken.json").write_text("[{}]")
    with pytest.raises(SystemExit, match="give what --json wrote"):
        divergences._earlier(tmp_path / "broken.json", run, [case])


def test_filters_choose_cases(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(*arguments: str) -> tuple[list[Case], list[str]]:
        return divergences._choose(divergences._parser().parse_args(arguments))

    found, left_out = chosen("--vocab", "1001", "--tp", "1", "2", "--tokens", "8", "--dtype", "bf16", "--kind", "js")
    assert {(case.vocab, case.tp, case.dtype, case.kind) for case in found} == {(1001, 1, "bf16", "js")}
    assert left_out == ["V=1,001 isn't a multiple of TP 2"]
    assert all(case.tokens == 2048 for case in chosen("--quick", "--tokens", "2048")[0])
    with pytest.raises(SystemExit, match="no case is left"):
        chosen("--quick", "--vocab", "7")
    with pytest.raises(SystemExit):
        divergences.main(["--help"])
    assert "--quick --docs docs" in capsys.readouterr().out


def test_liger_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.why_no_liger(CPU) == "liger_kernel is not installed"

    class LigerJSD:
        """Its formula: beta KL(P || M) + (1 - beta) KL(Q || M), the mean over tokens; log_q is the student."""

        def __init__(self, beta: float) -> None:
            assert beta == 0.5

        def __call__(self, log_q: Tensor, log_p: Tensor) -> Tensor:
            assert log_q.requires_grad and not log_p.requires_grad
            return straightforward_divergence("js", log_q, log_p).mean()

    class LigerFusedLinearJSD:
        def __init__(self, jsd_beta: float) -> None:
            self.inner = LigerJSD(jsd_beta)

        def __call__(self, student: Tensor, layer: Tensor, teacher: Tensor, other: Tensor, labels: None) -> Tensor:
            return self.inner((student @ layer.t()).log_softmax(-1), (teacher @ other.t()).log_softmax(-1))

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerJSD, module.LigerFusedLinearJSD = LigerJSD, LigerFusedLinearJSD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    assert peers.why_no_liger(CPU) == "its Triton kernels need a CUDA device"
    for policy, target, call in (("logits", "full", peers.liger_jsd), ("hidden", "hidden", peers.liger_fused_jsd)):
        case = Case(policy, target, "js", VOCAB, TOKENS, 1, "fp32", 32 * (policy == "hidden"))  # type: ignore[arg-type]
        inputs = make_inputs(case, Context(CPU))
        logits = inputs.logits if inputs.logits is not None else inputs.leaves[0] @ inputs.leaves[1].t()
        wanted = inputs.target
        if wanted is None:
            assert inputs.target_hidden is not None and inputs.target_weight is not None
            wanted = inputs.target_hidden @ inputs.target_weight.t()
        expected = divergence("js", logits, LiveTarget(wanted), inputs.shard).mean()
        FP32.assert_close(call(inputs), expected)


def test_units() -> None:
    assert [seconds_text(s) for s in (12.34, 0.01234, 0.0001234)] == ["12.3 s", "12.3 ms", "123 µs"]
    assert [bytes_text(b) for b in (3 * 2**30, 1536, 100)] == ["3.00 GiB", "1.50 KiB", "100 B"]
