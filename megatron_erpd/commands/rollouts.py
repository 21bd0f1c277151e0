"""`sample`, `score` and `import-rollouts`: where rollouts and their rewards come from.

What is heavy is imported when it is needed, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_erpd.commands.common import begin, figures_of, progress, say_not_read, start, tokenizer_of, verify
from megatron_erpd.files import write_json
from megatron_erpd.manifest import METRICS, finish_artifact
from megatron_erpd.recipe.requests import ImportRollouts, Sample, Score
from megatron_erpd.sampling.inputs import input_digests
from megatron_erpd.slices import slice_folders


def sample(argv: list[str]) -> None:
    """`megatron-erpd sample`: rollouts of a policy, all of them, a slice, or the merge of all slices."""
    request = start(Sample, argv)
    begun: tuple[Path, dict[str, Any]] | None = (request.output, {})
    if request.slice is not None or request.merge_slices:
        begun = _begin_slices(request)
    else:
        begin(request)
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

    prompts = load_prompts(request.prompts, request.num_prompts, request.first_prompt, request.verifier)
    say_not_read(request.prompts)
    lines = StepLines(output / METRICS, "sample")
    report = sample_rollouts(
        request.model,
        prompts,
        output,
        request.settings,
        verifier=request.verifier,
        workers=request.workers,
        only=request.slice,
        elsewhere=slice_folders(output) if request.slice is None else [request.output],
        progress=progress("sampled", lines),
    )
    lines.add(figures_of(report))
    warnings = [
        *too_few(request.num_prompts, len(prompts), "rollouts.num_prompts"),
        *length_warnings(read_rollouts(output)),
    ]
    for warning in scoring_warnings(read_rollouts(output)) if request.verifier else ():
        print(f"warning: {warning}")  # and not kept: `score` gives the rewards that a run trains on
    finish_artifact(output, {**figures_of(report), **summary}, warnings=warnings)
    if request.slice is None:
        remove_slices(output)


def _begin_slices(request: Sample) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a slice, or of the merge of all, and what its manifest tells besides; None when they were merged
    already."""
    from megatron_erpd.sampling import parts
    from megatron_erpd.sampling.prompts import load_prompts

    output, own, whole = request.output, request.slice, request.whole.identity
    num_prompts = len(load_prompts(request.prompts, request.num_prompts, request.first_prompt))
    digests = input_digests(request.command, request.inputs)
    if own is not None:
        if request.verify_inputs:
            verify(request)
        parts.refuse_empty_slices(f"--slice {own}", own.count, num_prompts)
        return parts.begin_slice(output, own, whole, digests), {}
    if parts.is_merged(output, whole, digests):
        parts.remove_slices(output)
        print(f"{output}: is complete; removed what was left of its slices")
        return None
    manifests = parts.begin_merge(output, whole, digests, num_prompts)
    return output, {"slices": len(manifests), "slice_seconds": sum(m.summary["seconds"] for m in manifests)}


def score(argv: list[str]) -> None:
    """`megatron-erpd score`: rewards of sampled rollouts."""
    request = start(Score, argv)
    from megatron_erpd.data.rewards import read_rewards, reward_files
    from megatron_erpd.data.rollout_warnings import scoring_warnings
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.sampling.score import prompts_of_rollouts, score_rollouts

    prompts = prompts_of_rollouts(request.rollouts, request.prompts, request.verifier)
    begin(request)
    told = progress("scored")
    report = score_rollouts(request.rollouts, prompts, request.output, request.verifier, told, request.workers)
    print(
        f"rescored: {report['changed']} of {report['num_rollouts']} rewards changed; the verifier was asked about "
        f"{report['asked']} responses"
    )
    scored = read_rollouts(request.rollouts).rescored(read_rewards(reward_files(request.output))[1])
    finish_artifact(request.output, figures_of(report), warnings=scoring_warnings(scored))


def import_rollouts(argv: list[str]) -> None:
    """`megatron-erpd import-rollouts`: rollouts of another program."""
    request = start(ImportRollouts, argv)
    begin(request)

    from rich.console import Console

    from megatron_erpd.data.rollout_warnings import rollout_warnings
    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.sources import import_report, importers

    output, tokenizer = request.output, tokenizer_of(request.tokenizer)
    report = importers.import_rollouts(
        request.source, output / "rollouts.parquet", request.settings, fields=request.fields, tokenizer=tokenizer
    )
    write_json(output / "report.json", report.as_dict())
    Console().print(import_report.render(report))
    finish_artifact(output, figures_of(report.as_dict()), warnings=rollout_warnings(read_rollouts(output)))
