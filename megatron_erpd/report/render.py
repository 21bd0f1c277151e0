"""Draws a run as one static page: no scripts, no network, every picture inside of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from megatron_erpd import units
from megatron_erpd.evaluation.mismatch import Mismatch
from megatron_erpd.evaluation.mismatch_verdicts import MismatchVerdict, verdicts, worst_level
from megatron_erpd.evaluation.strength import SelectionResult
from megatron_erpd.files import write_text
from megatron_erpd.report import plots
from megatron_erpd.report.collect import Curve, PolicyFigures, Round, Run, collect_run, write_summary
from megatron_erpd.report.token_signal import SignalSample, read_signal

SIGNAL_SHOWN_FULL = 4.0
"""Nats at which a token's colour is at its strongest."""

NUM_ANSWERED_PROMPTS = 3
MAX_CHARACTERS_SHOWN = 300

_SHARED_PANELS: list[tuple[tuple[str, ...], str, str]] = [
    (("policy_base_kl",), "KL(policy ‖ base)", "nats per token"),
    (("entropy",), "Entropy", "nats per token"),
    (("reward_weighted_log_ratio",), "Reward-weighted log-ratio", "nats"),
    (("kl_k3",), "KL(base ‖ policy)", "nats per token"),
    (("clip_fraction",), "Clipped tokens", "fraction"),
]
PANELS = {
    1: _SHARED_PANELS,
    2: [
        (("reverse_kl", "forward_kl", "js"), "Divergence to the target", "nats per token"),
        *_SHARED_PANELS,
        (("kl_coefficient",), "Coefficient of the KL controller", "coefficient"),
    ],
}
"""Per stage: names that a metric is logged under (the first found counts), title, unit. The first three matter most."""

COLUMNS: list[tuple[str, str, str]] = [
    ("accuracy_sampled", "sampled", ".3f"),
    ("accuracy_greedy", "greedy", ".3f"),
    ("majority", "majority", ".3f"),
    ("pass_at_g", "pass@G", ".3f"),
    ("kl_per_sequence", "KL / sequence", ".3f"),
    ("kl_efficiency", "gain / nat", ".3f"),
    ("kl_per_token", "KL / token", ".4f"),
    ("forward_kl_data", "forward KL, data", ".4f"),
    ("reverse_kl_data", "reverse KL, data", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("mean_length", "length", ".1f"),
    ("truncated", "truncated", ".3f"),
    ("unverified", "unverified", ".3f"),
]
"""A round's table: key, heading, format. A column that no policy has is left out, `unverified` also where it is 0."""


ROUNDS_COLUMNS: list[tuple[str, str, str]] = [
    ("accuracy_sampled", "sampled", ".3f"),
    ("accuracy_greedy", "greedy", ".3f"),
    ("kl_per_sequence", "KL / sequence, this round's base", ".3f"),
    ("kl_from_origin_per_sequence", "KL / sequence, first base", ".3f"),
    ("kl_from_origin_per_token", "KL / token, first base", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("mean_length", "length", ".1f"),
]
"""The table over all rounds, where there are several."""


@dataclass(frozen=True)
class Picture:
    """A figure with the text that stands for it."""

    source: str
    alternative: str


@dataclass(frozen=True)
class RoundView:
    """What the page shows of one round."""

    name: str
    has_policies: bool
    accuracy: list[Picture]
    columns: list[str]
    results: list[tuple[str, str, list[str]]]
    """Name, role and cells."""
    checkpoints: list[tuple[str, str, list[str]]]
    efficiency: list[str]
    training: list[tuple[str, list[Picture]]]
    target: dict[str, dict[str, float]]
    selection: SelectionResult | None
    selection_rows: list[tuple[str, bool, list[str]]]
    """Name, whether it was chosen, and cells: reward, greedy, difference from the base."""
    mismatch: Mismatch | None
    verdicts: list[MismatchVerdict]
    """On the mismatch."""
    worst_verdict: str
    signal: SignalSample | None
    histogram: Picture | None
    answers: list[tuple[str, list[dict[str, Any]]]]
    """Prompt, and the policies' answers to it."""


@dataclass(frozen=True)
class RoundsView:
    """What the page shows of all rounds together."""

    columns: list[str]
    rows: list[tuple[str, str, list[str]]]
    """`round-01/NAME`, role and cells."""
    accuracy: list[Picture]


def render_report(run_dir: str | Path) -> Path:
    """Writes `report/index.html`, `report/summary.json` and `report/accuracy_vs_kl.png` of a run.

    Returns:
        The page. `accuracy_vs_kl.png` shows the last evaluated round and is left out while there is none.

    Raises:
        StageError: the folder is no run, or one of its files can't be read.
        RolloutError, CacheError: rollouts or cache are damaged or don't belong together.
    """
    run = collect_run(run_dir)
    folder = run.folder / "report"
    summary = write_summary(run, folder / "summary.json")
    if run.evaluated:
        last = run.evaluated[-1]
        plots.save_accuracy_against_kl(last.policies, _palette(last), folder / "accuracy_vs_kl.png")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": duration,
        "size": units.size,
        "tint": tint,
        "plain": plain,
        "shortened": shortened,
    }
    views = [_view(run, round_) for round_ in run.rounds]
    together = _rounds_view(run.evaluated) if len(run.evaluated) > 1 else None
    page = environment.get_template("report.html.j2").render(run=run, rounds=views, together=together, summary=summary)
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _view(run: Run, round_: Round) -> RoundView:
    palette = _palette(round_)
    columns = [c for c in COLUMNS if any(_is_worth_a_column(c[0], p) for p in round_.policies)]
    signal = _signal(run, round_)
    histogram = plots.signal_histogram(signal.above, signal.below, signal.threshold) if signal else None
    return RoundView(
        name=round_.name,
        has_policies=bool(round_.policies),
        accuracy=_accuracy_pictures(round_, palette),
        columns=[heading for _, heading, _ in columns],
        results=[_table_row(p, columns) for p in round_.results],
        checkpoints=[_table_row(p, columns) for p in round_.policies if p.iteration is not None],
        efficiency=_efficiency_sentences(round_),
        training=_training_pictures(round_, palette),
        target=round_.target,
        selection=round_.selection,
        selection_rows=_selection_rows(round_.selection) if round_.selection else [],
        mismatch=round_.mismatch,
        verdicts=verdicts(round_.mismatch) if round_.mismatch else [],
        worst_verdict=worst_level(round_.mismatch) if round_.mismatch else "",
        signal=signal,
        histogram=_picture(histogram, "Histogram of the signal on the tokens of rewarded and unrewarded rollouts"),
        answers=_answers(round_),
    )


def _rounds_view(rounds: list[Round]) -> RoundsView:
    rows = []
    for round_ in rounds:
        for policy in round_.results:
            _, role, cells = _table_row(policy, ROUNDS_COLUMNS)
            rows.append((f"{round_.name}/{policy.name}", role, cells))
    palette = plots.Palette([p.name for round_ in rounds for p in round_.results])
    pictures = []
    for metric, title in (("accuracy_sampled", "Sampled at temperature 1"), ("accuracy_greedy", "Greedy")):
        figure = plots.accuracy_over_rounds([r.results for r in rounds], palette, metric, title)
        students = [(r.name, s) for r in rounds if (s := r.policy("student")) and metric in s.metrics]
        told = [f"student of {name} {student.metrics[metric]:.2f}" for name, student in students]
        pictures.append(_picture(figure, f"{title}: accuracy against KL from the first base. " + ", ".join(told)))
    return RoundsView([heading for _, heading, _ in ROUNDS_COLUMNS], rows, [p for p in pictures if p])


def _is_worth_a_column(metric: str, policy: PolicyFigures) -> bool:
    value = policy.metrics.get(metric)
    return value is not None and (metric != "unverified" or value > 0)


def _palette(round_: Round) -> plots.Palette:
    return plots.Palette([p.name for p in round_.policies] + [c.name for c in round_.curves])


def _picture(figure: Figure | None, alternative: str) -> Picture | None:
    return Picture(plots.to_data_uri(figure), alternative) if figure else None


def _accuracy_pictures(round_: Round, palette: plots.Palette) -> list[Picture]:
    kinds = (("accuracy_sampled", "Sampled at temperature 1"), ("accuracy_greedy", "Greedy"))
    pictures = []
    for metric, title in kinds:
        figure = plots.accuracy_against_kl(round_.policies, palette, metric, title)
        told = [f"{p.name} {p.metrics[metric]:.2f}" for p in round_.results if metric in p.metrics]
        pictures.append(_picture(figure, f"{title}: accuracy against KL. " + ", ".join(told)))
    return [p for p in pictures if p]


def _training_pictures(round_: Round, palette: plots.Palette) -> list[tuple[str, list[Picture]]]:
    if not round_.policies and all(c.stage == 1 and c.name not in ("teacher", "unlearned") for c in round_.curves):
        loss = plots.curves(round_.curves, palette, ("loss",), "Loss", "nats per token")
        picture = _picture(loss, "Loss over the iterations of the warm-up")
        return [("Warm-up", [picture])] if picture else []
    sections = []
    for stage, title in ((1, "Stage 1: replay"), (2, "Stage 2: distillation")):
        trainings = [c for c in round_.curves if c.stage == stage]
        pictures = [_training_picture(trainings, palette, *panel) for panel in PANELS[stage]]
        found = [p for p in pictures if p]
        if found:
            sections.append((title, found))
    return sections


def _training_picture(
    trainings: list[Curve], palette: plots.Palette, metrics: tuple[str, ...], title: str, unit: str
) -> Picture | None:
    figure = plots.curves(trainings, palette, metrics, title, unit)
    ends = [f"{c.name} {c.series(*metrics)[1][-1]:.3g}" for c in trainings if c.series(*metrics)[0]]
    return _picture(figure, f"{title} over the iterations; at the end: " + ", ".join(ends))


def _table_row(policy: PolicyFigures, columns: list[tuple[str, str, str]]) -> tuple[str, str, list[str]]:
    cells = []
    for key, _, form in columns:
        value, error = policy.metrics.get(key), policy.metrics.get(f"{key}_se")
        text = "–" if value is None else format(value, form)
        cells.append(f"{text} ± {format(error, form)}" if value is not None and error else text)
    return policy.name, policy.role, cells


def _selection_rows(selection: SelectionResult) -> list[tuple[str, bool, list[str]]]:
    def cells(figures: dict[str, Any]) -> list[str]:
        keys = ("reward", "greedy", "difference")
        return [f"{figures[k]:.3f} ± {figures[f'{k}_se']:.3f}" if k in figures else "–" for k in keys]

    rows = [("base", False, cells(selection.base))]
    for figures in selection.candidates:
        iteration = figures["iteration"]
        rows.append((f"teacher@{iteration}", iteration == selection.iteration, cells(figures)))
    return rows


def _efficiency_sentences(round_: Round) -> list[str]:
    """Reward gained per nat, the student and the controls beside the teacher; only what was measured."""
    sentences = []
    for policy in round_.results:
        gained, nats = policy.metrics.get("reward_gained"), policy.metrics.get("kl_per_sequence")
        if policy.role in ("base", "unlearned") or gained is None or nats is None:
            continue
        text = f"{policy.name}: {gained:+.3f} at {nats:.3f} nats per sequence"
        efficiency = policy.metrics.get("kl_efficiency")
        sentences.append(text if efficiency is None else f"{text}, {efficiency:+.3f} per nat")
    return sentences


def _signal(run: Run, round_: Round) -> SignalSample | None:
    # An artifact that isn't finished, or that the recipe has no need of, has no manifest.
    finished = {stage.name.split("/")[1] for stage in round_.stages}
    caches = [round_.folder / name for name in ("cache", "base-log-probs") if name in finished]
    if "rollouts" not in finished or not caches:
        return None
    rewards = round_.folder / "rewards" if "rewards" in finished else None
    return read_signal(round_.folder / "rollouts", caches, _tokenizer_folder(run, round_), rewards)


def _tokenizer_folder(run: Run, round_: Round) -> Path | None:
    """A Hugging Face folder of the round; all of its policies share one tokenizer."""
    places = [
        *sorted(round_.folder.glob("*/hf")),
        *sorted(round_.folder.glob("*")),
        *sorted(run.folder.glob("round-00/*/hf")),
    ]
    return next((p for p in places if (p / "tokenizer_config.json").is_file()), None)


def _answers(round_: Round) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first prompts that were kept as examples, with each policy's greedy response and first sample."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for policy in round_.results:
        for example in policy.examples[:NUM_ANSWERED_PROMPTS]:
            answer = {
                "policy": policy.name,
                "greedy": example["greedy"],
                "sample": next(iter(example["samples"]), None),
            }
            by_prompt.setdefault(example["prompt"], []).append(answer)
    return list(by_prompt.items())


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else units.duration(seconds)


def plain(value: Any) -> str:
    """A figure of a manifest for a table: floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shortened(text: str | None) -> str:
    """A response for a table; of a long one the beginning and the end, where the answer is."""
    text = text or ""
    if len(text) <= 2 * MAX_CHARACTERS_SHOWN:
        return text
    return f"{text[:MAX_CHARACTERS_SHOWN]} […] {text[-MAX_CHARACTERS_SHOWN:]}"


def tint(signal: float) -> str:
    """CSS background of a token: blue where the signal raises it, orange where it lowers it, light behind text."""
    strength = min(abs(signal) / SIGNAL_SHOWN_FULL, 1.0) ** 0.7
    end = (92, 169, 222) if signal > 0 else (245, 150, 84)
    channels = [round(255 + (channel - 255) * strength) for channel in end]
    return f"rgb({channels[0]},{channels[1]},{channels[2]})"
