"""The page stands alone, shows what is there and says nothing of what is not."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_erpd.commands import report as commands
from megatron_erpd.evaluation.mismatch import measure_mismatch
from megatron_erpd.evaluation.mismatch_verdicts import MISMATCH, mismatch_report
from megatron_erpd.report.render import duration, render_report, shortened, tint
from megatron_erpd.units import size
from tests.unit.report.synthetic_run import evaluations, finish, make_run, selection

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Structure(HTMLParser):
    """Checks that elements are closed in order, and collects sources, alternative texts and headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [given[name] or "" for name in ("src", "href") if name in given]
        if tag == "img":
            self.alternatives.append(given.get("alt") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "synthetic")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    path = render_report(run_folder)
    assert path == run_folder / "report" / "index.html"
    return path.read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not drawn, for what the text of a page says: drawing takes nearly all of its seconds."""

    def save_nothing(figure: Figure, file: Path | io.BytesIO, **_: object) -> None:
        if isinstance(file, Path):
            file.touch()

    monkeypatch.setattr(Figure, "savefig", save_nothing)


def test_page_needs_nothing_but_itself(page: str) -> None:
    structure = Structure(page)
    assert structure.sources and all(s.startswith("data:image/svg+xml;base64,") for s in structure.sources)
    assert "<script" not in page and "url(" not in page
    assert all(structure.alternatives)


def test_page_has_every_section(page: str) -> None:
    headings = Structure(page).headings
    expected = ["Accuracy against KL", "KL efficiency", "Stage 1: replay", "Stage 2: distillation", "The signal"]
    positions = [headings.index(name) for name in [*expected, "Answers", "What each stage took", "How to read this"]]
    assert positions == sorted(positions)
    assert "student: +0.350 at 0.800 nats per sequence, +0.438 per nat" in page
    assert "0.760 ± 0.011" in page
    assert "1 min 01 s" in page and "1 min 35 s" in page
    assert "231 &lt;8" in page and "unverified" not in page
    # The recipe's text is shown, not interpreted.
    assert "# &lt;b&gt;" in page


def test_tokens_are_coloured_by_the_signal(page: str, run_folder: Path) -> None:
    tokens = re.findall(
        r'<span( class="lower")? style="background:rgb\(([\d,]+)\)" title="([+-][\d.]+)">([^<]*)</span>', page
    )
    assert len(tokens) == 6 * 7, "three groups, two rollouts each, seven characters a response"
    lowered = [t for t in tokens if t[2] == "-3.00"]
    raised = [t for t in tokens if t[2] == "+1.50"]
    assert len(lowered) == len(raised) == 3, "the third token of each rollout, by its reward"
    assert all(t[0] and t[3].isdigit() for t in lowered) and not any(t[0] for t in raised)


def test_picture_for_the_readme_is_written(page: str, run_folder: Path) -> None:
    assert (run_folder / "report" / "accuracy_vs_kl.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_again_gives_the_same_page(page: str, run_folder: Path) -> None:
    assert render_report(run_folder).read_text() == page


def test_a_run_that_has_only_begun_is_drawn(tmp_path: Path) -> None:
    finish(tmp_path / "prepare", "prepare", 1.0)
    finish(tmp_path / "round-01" / "base", "import", 1.0)
    page = render_report(tmp_path).read_text()
    assert Structure(page).headings == ["What each stage took", "How to read this"]
    assert not (tmp_path / "report" / "accuracy_vs_kl.png").exists()


@pytest.mark.parametrize("missing", ["cache", "rollouts", "evaluation", "base/hf", "controls", "unlearned"])
@pytest.mark.usefixtures("undrawn")
def test_each_piece_may_be_missing(run_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    shutil.rmtree(folder / "round-01" / missing)
    headings = Structure(render_report(folder).read_text()).headings
    assert ("The signal" in headings) == (missing not in ("cache", "rollouts"))
    assert ("Accuracy against KL" in headings) == (missing != "evaluation")


@pytest.mark.usefixtures("undrawn")
def test_two_rounds_are_shown_together(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    evaluations(folder / "round-02" / "evaluation", before=0.1)
    page = render_report(folder).read_text()
    structure = Structure(page)
    assert [h for h in structure.headings if h in ("All rounds", "Round 1", "Round 2")] == [
        *("All rounds", "Round 1", "Round 2"),
    ]
    told = [text for text in structure.alternatives if "accuracy against KL from the first base" in text]
    assert len(told) == 2 and told[0].endswith("student of round-01 0.76, student of round-02 0.86")
    cells = re.findall(r'<th scope="row">round-02/student</th>((?:<td>[^<]*</td>)+)', page)
    assert re.findall(r"<td>([^<]*)</td>", cells[0])[:4] == ["0.860 ± 0.011", "0.790 ± 0.012", "0.800 ± 0.016", "0.900"]


def test_one_round_is_not_called_all_rounds(page: str) -> None:
    assert "All rounds" not in page and "first base" not in page


def test_figures_for_people() -> None:
    assert [duration(s) for s in (None, 4.21, 185, 7620)] == ["–", "4.2 s", "3 min 05 s", "2 h 07 min"]
    assert shortened(None) == "" and shortened("x" * 600) == "x" * 600
    assert shortened("a" * 500 + "b" * 500) == "a" * 300 + " […] " + "b" * 300
    assert [size(n) for n in (12, 1500, 2_500_000)] == ["12 B", "1.5 kB", "2.5 MB"]


@pytest.mark.parametrize("signal", [-50.0, -4.0, -0.1, 0.0, 0.1, 4.0, 50.0])
def test_text_on_every_tint_is_readable(signal: float) -> None:
    """Contrast of #111 on the tint by WCAG 2, level AA for normal text."""

    def luminance(channels: list[int]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    background = luminance([int(c) for c in re.findall(r"\d+", tint(signal))])
    assert (background + 0.05) / (luminance([17, 17, 17]) + 0.05) >= 4.5


@pytest.mark.usefixtures("undrawn")
def test_selection_of_the_teacher(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "validation prompts" not in render_report(folder).read_text()
    selection(folder / "round-01" / "selection")
    page = render_report(folder).read_text()
    assert any("checkpoints on validation prompts" in heading for heading in Structure(page).headings)
    row = re.search(r'<tr class="chosen"><th scope="row">teacher@16 \(chosen\)</th>(.*?)</tr>', page)
    assert row and "0.620 ± 0.020" in row[1] and "0.210 ± 0.025" in row[1]
    assert page.count('class="chosen"') == 1
    assert "Recommended signal: <b>strong</b>" in page
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["selections"]["round-01"]["iteration"] == 16
    assert summary["stages"]["round-01/selection"]["recommended_signal"] == "strong"


@pytest.mark.usefixtures("undrawn")
def test_the_mismatch_of_sampler_and_training_engine(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    heading = "Sampler against training engine"
    assert heading not in render_report(folder).read_text()
    log_probs = folder / "round-01" / "base-log-probs"
    log_probs.mkdir()
    sampler = -np.arange(1.0, 1001) / 100
    found = measure_mismatch([("a", sampler, sampler - 0.03), ("b", None, sampler)])
    (log_probs / MISMATCH).write_text(json.dumps(mismatch_report(found)))
    page = render_report(folder).read_text()
    assert f"{heading}: look" in Structure(page).headings
    assert "1,000 tokens of 1 rollouts; 1 rollouts have none" in page
    assert "<td>1.03</td><td>look</td>" in page and page.count("What to do: check that the rollouts") == 1
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert summary["mismatches"]["round-01"]["mult_error"] == pytest.approx(np.exp(0.03))


@pytest.mark.usefixtures("undrawn")
def test_verdicts_and_warnings_stand_at_the_top(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    for name in ("rollouts", "teacher"):
        manifest = folder / "round-01" / name / "manifest.json"
        record = json.loads(manifest.read_text())
        record["summary"]["warnings"] = ["18 of 24 groups teach nothing: <b>"]
        manifest.write_text(json.dumps(record))
    commands.report([str(folder)])
    said = capsys.readouterr().out.splitlines()
    text = (folder / "report" / "index.html").read_text()
    assert Structure(text).headings[0] == "In short"
    top = text[text.index("In short") : text.index("</section>")]
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert [finding["policy"] for finding in summary["findings"]] == ["student", "teacher"]
    for finding in summary["findings"]:
        assert f'<li class="{finding["level"]}">' in top and finding["text"].split(":")[0] in top
        assert finding["text"] in said
    assert said[-1].endswith("round-01/rollouts, round-01/teacher: 18 of 24 groups teach nothing: <b>")
    warned = next(line for line in top.splitlines() if "teach nothing" in line)
    assert "round-01/rollouts" in warned and "round-01/teacher" in warned and "&lt;b&gt;" in warned
