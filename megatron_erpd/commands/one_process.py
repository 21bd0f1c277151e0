"""The commands that run in one process: their flags, and what they write beside the artifact's content.

Each takes the argument list without the program's name, as the training commands do. What is heavy is imported when it
is needed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_erpd.errors import RecipeError, StageError
from megatron_erpd.files import check_output, write_json
from megatron_erpd.launcher import refuse_several
from megatron_erpd.manifest import (
    METRICS,
    begin_artifact,
    finish_artifact,
    input_digest,
    read_manifest,
    verify_inputs,
)
from megatron_erpd.progress import say_progress
from megatron_erpd.recipe.identity import (
    Request,
    evaluate_request,
    import_request,
    sample_request,
    score_request,
    select_request,
)
from megatron_erpd.sampling.inputs import input_digests
from megatron_erpd.settings import (
    EvaluateSettings,
    HeldOutSettings,
    ImportSettings,
    SampleSettings,
    SelectSettings,
)
from megatron_erpd.settings.arguments import add_settings_arguments, add_verify_inputs, settings_from_namespace
from megatron_erpd.slices import add_slice_arguments, slice_folders

if TYPE_CHECKING:
    from megatron_erpd.progress import StepLines
    from megatron_erpd.sampling.prompts import PromptRecord

_SOURCE_HELP = (
    "a file or folder (JSON lines, JSON, CSV, Parquet, Arrow), or a data set of the hub, "
    + "NAME[:CONFIGURATION]:SPLIT[@REVISION]"
)
_PROMPTS_HELP = (
    f"rows with prompt and answer: {_SOURCE_HELP}, with ?prompt=NAME&answer=NAME where they are called otherwise; or "
    "reasoning-gym:TASK?size=100&seed=1"
)
_VERIFIER_HELP = (
    "math-verify, reasoning-gym:TASK, python:FILE.py:FUNCTION or python:MODULE:FUNCTION; without one nothing is scored"
)
_PROGRESS_SECONDS = 5.0


def sample(argv: list[str]) -> None:
    """Samples rollouts from a policy and scores them. An interrupted run goes on with the part files (of 128 prompts
    each) that it has not written."""
    given = _sample_parser().parse_args(argv)
    _check_start("sample", given.output)
    settings = settings_from_namespace(given, SampleSettings)
    request = sample_request(settings, given.model, given.prompts, given.num_prompts, given.first_prompt)
    begun: tuple[Path, dict[str, Any]] | None = (given.output, {})
    if given.slice is not None or given.merge_slices:
        begun = _begin_slices(given, request)
    else:
        _begin("sample", given.output, request, given.verify_inputs)
    if begun is None:
        return
    output, summary = begun

    from megatron_erpd.data.rollout_warnings import length_warnings, scoring_warnings
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.evaluation.held_out import too_few
    from megatron_erpd.progress import StepLines
    from megatron_erpd.sampling.parts import remove_slices
    from megatron_erpd.sampling.prompts import load_prompts
    from megatron_erpd.sampling.sample import sample_rollouts

    prompts = load_prompts(given.prompts, given.num_prompts, given.first_prompt, given.verifier)
    _say_not_read(given.prompts)
    lines = StepLines(output / METRICS, "sample")
    report = sample_rollouts(
        given.model,
        prompts,
        output,
        settings,
        verifier=given.verifier,
        only=given.slice,
        elsewhere=slice_folders(output) if given.slice is None else [given.output],
        progress=_progress("sampled", lines),
    )
    lines.add(_figures(report))
    warnings = [
        *too_few(given.num_prompts, len(prompts), "rollouts.num_prompts"),
        *length_warnings(read_rollouts(output)),
    ]
    for warning in scoring_warnings(read_rollouts(output)) if given.verifier else ():
        print(f"warning: {warning}")  # and not kept: `score` gives the rewards that a run trains on
    finish_artifact(output, {**_figures(report), **summary}, warnings=warnings)
    if given.slice is None:
        remove_slices(output)


def _sample_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "sample",
        sample.__doc__,
        "--model Qwen3-4B --prompts train.jsonl --verifier math-verify --num-rollouts 16 --output runs/mine/rollouts",
    )
    parser.add_argument("--model", type=Path, required=True, help="the policy: a Hugging Face folder")
    parser.add_argument("--prompts", required=True, help=_PROMPTS_HELP)
    parser.add_argument("--verifier", help=_VERIFIER_HELP)
    parser.add_argument("--num-prompts", type=_positive, help="use so many of the prompts (default: all)")
    parser.add_argument(
        "--first-prompt",
        type=_count,
        default=0,
        help="where they begin, counted from 0; after the last prompt comes the first again (default: 0)",
    )
    _add_output(parser)
    add_slice_arguments(parser, "sample", "the part files")
    add_settings_arguments(parser, SampleSettings, "sampling")
    return parser


def _begin_slices(given: argparse.Namespace, request: Request) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a slice, or of the merge of all, and what its manifest tells besides; None when they were merged
    already."""
    from megatron_erpd.sampling import parts
    from megatron_erpd.sampling.prompts import load_prompts

    num_prompts = len(load_prompts(given.prompts, given.num_prompts, given.first_prompt))
    digests = input_digests("sample", request.inputs)
    if given.slice is not None:
        if given.verify_inputs:
            _verify("sample", request)
        parts.refuse_empty_slices(f"--slice {given.slice}", given.slice.count, num_prompts)
        return parts.begin_slice(given.output, given.slice, request.settings, digests), {}
    if parts.is_merged(given.output, request.settings, digests):
        parts.remove_slices(given.output)
        print(f"{given.output}: is complete; removed what was left of its slices")
        return None
    manifests = parts.begin_merge(given.output, request.settings, digests, num_prompts)
    return given.output, {"slices": len(manifests), "slice_seconds": sum(m.summary["seconds"] for m in manifests)}


def score(argv: list[str]) -> None:
    """Scores sampled rollouts: rewards apart from them, for the trainings' --rewards. What the same verifier has scored
    already, for the same answers, is taken over; tokens and log-probs stay as they are."""
    parser = _parser(
        "score",
        score.__doc__,
        "--rollouts runs/mine/rollouts --prompts train.jsonl --verifier math-verify --output runs/mine/rewards",
    )
    parser.add_argument("--rollouts", type=Path, required=True, help="artifact that `megatron-erpd sample` wrote")
    parser.add_argument("--prompts", required=True, help=f"those that they were sampled from: {_PROMPTS_HELP}")
    parser.add_argument("--verifier", required=True, help="math-verify, reasoning-gym:TASK or python:FILE.py:FUNCTION")
    _add_output(parser)
    given = parser.parse_args(argv)
    _check_start("score", given.output)
    from megatron_erpd.data.rewards import read_rewards, reward_files
    from megatron_erpd.data.rollout_warnings import scoring_warnings
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.sampling.score import prompts_of_rollouts, score_rollouts

    prompts = prompts_of_rollouts(given.rollouts, given.prompts, given.verifier)
    request = score_request(given.rollouts, given.prompts, given.verifier)
    _begin("score", given.output, request, given.verify_inputs)
    report = score_rollouts(given.rollouts, prompts, given.output, given.verifier, _progress("scored"))
    print(
        f"rescored: {report['changed']} of {report['num_rollouts']} rewards changed; the verifier was asked about "
        f"{report['asked']} responses"
    )
    scored = read_rollouts(given.rollouts).rescored(read_rewards(reward_files(given.output))[1])
    finish_artifact(given.output, _figures(report), warnings=scoring_warnings(scored))


def import_rollouts(argv: list[str]) -> None:
    """Turns rollouts that another program wrote into this project's format; every row that can't be used is named."""
    parser = _parser(
        "import-rollouts",
        import_rollouts.__doc__,
        "--source dump.jsonl --format verl --field reward=score --tokenizer Qwen3-4B --output runs/mine/rollouts",
    )
    parser.add_argument("--source", required=True, help=f"the rollouts: {_SOURCE_HELP}")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="read our field OURS from THEIRS, over the format's own; repeatable",
    )
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder; needed for sources without token ids")
    _add_output(parser)
    add_settings_arguments(parser, ImportSettings, "reading")
    given = parser.parse_args(argv)
    _check_start("import-rollouts", given.output)
    settings = settings_from_namespace(given, ImportSettings)
    fields = _pairs(given.field, "--field")
    request = import_request(settings, given.source, fields, given.tokenizer)
    _begin("import-rollouts", given.output, request, given.verify_inputs)

    from rich.console import Console

    from megatron_erpd.data.rollout_warnings import rollout_warnings
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.sources import import_report, importers

    file, tokenizer = given.output / "rollouts.parquet", _load_tokenizer(given.tokenizer)
    report = importers.import_rollouts(given.source, file, settings, fields=fields, tokenizer=tokenizer)
    write_json(given.output / "report.json", report.as_dict())
    Console().print(import_report.render(report))
    warnings = rollout_warnings(read_rollouts(given.output))
    finish_artifact(given.output, _figures(report.as_dict()), warnings=warnings)


def select(argv: list[str]) -> None:
    """Makes one of a teacher's checkpoints the teacher, by validation prompts; says whether it is strong or weak."""
    parser = _parser(
        "select",
        select.__doc__,
        "--model Qwen3-4B --teacher runs/mine/round-01/teacher --candidates runs/mine/round-01/candidates "
        "--prompts validation.jsonl --verifier math-verify --output runs/mine/round-01/selection",
    )
    parser.add_argument("--model", type=Path, required=True, help="the base policy: a Hugging Face folder")
    parser.add_argument("--teacher", type=Path, required=True, help="artifact with the checkpoints to choose from")
    parser.add_argument("--candidates", type=Path, required=True, help="their export (`export --checkpoint ...@all`)")
    parser.add_argument("--prompts", required=True, help=f"validation prompts: {_PROMPTS_HELP}")
    parser.add_argument("--verifier", required=True, help="math-verify, reasoning-gym:TASK or python:FILE.py:FUNCTION")
    parser.add_argument(
        "--rollouts", type=Path, help="what the teacher was trained on: warns of prompts that are there"
    )
    parser.add_argument(
        "--unlearned", action="store_true", help="there will be an unlearned policy: signals with it may be recommended"
    )
    _add_output(parser)
    add_settings_arguments(parser, SelectSettings, "selection")
    given = parser.parse_args(argv)
    _check_start("select", given.output)
    settings = settings_from_namespace(given, SelectSettings)
    request = select_request(
        *(settings, given.model, given.teacher, given.candidates, given.prompts, given.verifier, given.unlearned)
    )
    _begin("select", given.output, request, given.verify_inputs)

    from megatron_erpd.checkpoint.torch_dist.iterations import take_iteration
    from megatron_erpd.evaluation.selection import candidate_folders, select_checkpoint
    from megatron_erpd.evaluation.strength import SELECTION
    from megatron_erpd.sampling.prompts import load_prompts

    _check_candidates(given.candidates, given.teacher)
    _say_not_read(given.prompts)
    prompts = load_prompts(given.prompts, settings.num_prompts, verifier=given.verifier)
    selection = select_checkpoint(
        given.model,
        candidate_folders(given.candidates),
        prompts,
        given.output,
        settings,
        verifier=given.verifier,
        has_unlearned=given.unlearned,
        status=_status(),
    )
    print(selection.describe())
    take_iteration(given.teacher / "megatron", selection.iteration, given.output / "megatron")
    shutil.copytree(given.teacher / "hf", given.output / "hf", dirs_exist_ok=True)
    write_json(given.output / SELECTION, asdict(selection))
    warnings = _prompt_warnings("selection", prompts, settings, given.model, given.rollouts)
    finish_artifact(given.output, selection.figures(), warnings=warnings)


def evaluate(argv: list[str]) -> None:
    """Measures policies on held-out prompts: accuracy, and how far they are from the base policy."""
    parser = _parser(
        "evaluate",
        evaluate.__doc__,
        "--model base=Qwen3-4B --exported runs/mine/round-01/export --prompts heldout.jsonl "
        "--rollouts runs/mine/round-01/rollouts --verifier math-verify --output runs/mine/round-01/evaluation",
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=HF",
        help="a policy's name and Hugging Face folder; repeatable, `base` must be among them",
    )
    parser.add_argument("--exported", type=Path, help="evaluate every policy of this export too")
    parser.add_argument(
        "--origin",
        type=Path,
        metavar="HF",
        help="the first round's base, in later rounds: how far all rounds together have come (default: the base)",
    )
    parser.add_argument("--prompts", required=True, help=f"held-out prompts: {_PROMPTS_HELP}")
    parser.add_argument("--rollouts", type=Path, required=True, help="the fixed data, for the exact divergences")
    parser.add_argument("--verifier", help=_VERIFIER_HELP)
    _add_output(parser)
    add_settings_arguments(parser, EvaluateSettings, "evaluation")
    given = parser.parse_args(argv)
    _check_start("evaluate", given.output)
    settings = settings_from_namespace(given, EvaluateSettings)
    models = {name: Path(folder) for name, folder in _pairs(given.model, "--model").items()}
    if "base" not in models:
        raise RecipeError("--model: the base policy is missing, and divergences are measured from it; give base=HF")
    request = evaluate_request(
        settings, models, given.exported, given.prompts, given.rollouts, given.verifier, given.origin
    )
    _begin("evaluate", given.output, request, given.verify_inputs)

    from megatron_erpd.evaluation.evaluate import evaluate_policies
    from megatron_erpd.evaluation.held_out import metrics_warnings
    from megatron_erpd.sampling.prompts import load_prompts

    _say_not_read(given.prompts)
    prompts = load_prompts(given.prompts, settings.num_prompts, verifier=given.verifier)
    found = evaluate_policies(
        models | _exported(given.exported, models),
        models["base"],
        prompts,
        given.output,
        settings,
        origin=given.origin,
        verifier=given.verifier,
        rollouts=given.rollouts,
        status=_status(),
    )
    warnings = _prompt_warnings("evaluation", prompts, settings, models["base"], given.rollouts)
    accuracy = {name: metrics.accuracy_sampled for name, metrics in found.items()}
    summary = {"accuracy": accuracy} if given.verifier else None
    finish_artifact(given.output, summary, warnings=[*warnings, *metrics_warnings(found)])


def report(argv: list[str]) -> None:
    """Writes a run's report: one HTML page, its figures as JSON, and the picture of accuracy against divergence."""
    parser = _parser("report", report.__doc__, "runs/quickstart")
    parser.add_argument(
        "run", type=Path, help="the run's folder; a run that is not finished is reported as far as it is"
    )
    given = parser.parse_args(argv)
    from megatron_erpd.launch.display import describe_summary, findings_lines
    from megatron_erpd.report.render import render_report

    if given.run.is_dir():
        check_output(given.run / "report")
    print(f"wrote {render_report(given.run)}")
    summary = given.run / "report" / "summary.json"
    print(f"{given.run}: {describe_summary(summary)}")
    for line in findings_lines(summary):
        print(line)


def _parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"megatron-erpd {name}",
        description=description,
        epilog=f"example: megatron-erpd {name} {example}",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifact")
    add_verify_inputs(parser)


def _check_start(command: str, output: Path) -> None:
    """What ends a command before it reads anything: a launcher that started several of it, an unwritable folder."""
    refuse_several(command)
    check_output(output)


def _begin(stage: str, output: Path, request: Request, verify: bool) -> None:
    if verify:
        _verify(stage, request)
    begin_artifact(output, stage, request.settings, input_digests(stage, request.inputs))


def _say_not_read(prompts: str) -> None:
    """Names the files of a folder of prompts that hold none."""
    from megatron_erpd.sampling.inputs import prompts_path
    from megatron_erpd.sources.files import open_source

    path = prompts_path(prompts)
    for other in open_source(prompts).not_read if path is not None and path.is_dir() else ():
        print(f"not read: {other}", flush=True)


def _prompt_warnings(
    section: str, prompts: Sequence[PromptRecord], settings: HeldOutSettings, model: Path, rollouts: Path | None
) -> list[str]:
    """Of held-out prompts, as the base policy in the folder `model` sees them."""
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.evaluation.held_out import prompt_warnings
    from megatron_erpd.sampling.prompts import encode_prompts

    # A number that nobody gave is the most that is wanted.
    asked = settings.num_prompts if "num_prompts" in settings.model_fields_set else None
    ids = encode_prompts(_load_tokenizer(model), prompts, settings)
    trained_on = None if rollouts is None else read_rollouts(rollouts)
    return prompt_warnings(prompts, ids, trained_on, asked, section)


def _verify(stage: str, request: Request) -> None:
    from megatron_erpd.checkpoint.torch_dist.iterations import read_of_latest

    # A selection may take any of the teacher's checkpoints.
    verify_inputs(request.inputs.values(), None if stage == "select" else read_of_latest)


def _pairs(values: list[str], flag: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise RecipeError(f"{flag} {text}: write NAME=VALUE")
        if name in pairs:
            raise RecipeError(f"{flag} {text}: {name} is given twice")
        pairs[name] = value
    return pairs


def _check_candidates(candidates: Path, teacher: Path) -> None:
    """The export must be of this teacher: its checkpoints are told by their iterations alone."""
    if input_digest(teacher) not in read_manifest(candidates).inputs.values():
        raise StageError(f"--candidates {candidates}: was not exported from {teacher}; export its checkpoints again")


def _exported(folder: Path | None, models: Mapping[str, Path]) -> dict[str, Path]:
    """The policies of an export by their folders' names."""
    if folder is None:
        return {}
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}
    if not found:
        raise StageError(f"--exported {folder}: holds no Hugging Face folder; give what `megatron-erpd export` wrote")
    twice = sorted(found.keys() & models.keys())
    if twice:
        raise RecipeError(f"--model {twice[0]}: {folder} holds a policy of this name too; name yours otherwise")
    return found


def _load_tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from megatron_erpd.sampling.policy import load_tokenizer

    return load_tokenizer(folder)


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """What of a report goes into the manifest's summary: its scalars, and the means of what it describes."""
    figures: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and "mean" in value:
            figures[f"{key}_mean"] = value["mean"]
        elif isinstance(value, int | float):
            figures[key] = value
    return figures


def _progress(word: str, lines: StepLines | None = None) -> Callable[[int, int], None]:
    """Says how far it is, at most once in some seconds and at the end, and keeps it in `lines`."""
    said = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal said
        if done >= total or time.monotonic() - said >= _PROGRESS_SECONDS:
            said = time.monotonic()
            say_progress(word, str(done), str(total))
            if lines:
                lines.add({"responses": done, "responses_wanted": total})

    return tell


def _status() -> Callable[..., None]:
    """The same for a command with several kinds of work."""
    tellers: dict[str, Callable[[int, int], None]] = {}

    def tell(*words: Any) -> None:
        *what, done, total = words
        name = " ".join(str(word) for word in what)
        tellers.setdefault(name, _progress(name))(done, total)

    return tell


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value
