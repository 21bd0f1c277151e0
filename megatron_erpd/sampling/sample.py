"""The sampling stage: a policy and prompts become scored rollouts on disk, resumable part by part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout, sample_id
from megatron_erpd.errors import RolloutError, StageError
from megatron_erpd.files import write_json
from megatron_erpd.progress import OnProgress
from megatron_erpd.sampling.engine import SampledResponse, SamplingEngine, TransformersEngine
from megatron_erpd.sampling.inputs import questions_digest
from megatron_erpd.sampling.parts import num_parts, part_name, prompts_of, take_parts
from megatron_erpd.sampling.policy import policy_fingerprint
from megatron_erpd.sampling.prompts import PromptRecord, encode_prompts, prompt_text
from megatron_erpd.sampling.score import REPORT, VERIFIER_ERROR, Scorer, errors_of, reward_figures
from megatron_erpd.sampling.verifiers import Verdict
from megatron_erpd.settings import SampleSettings
from megatron_erpd.slices import Slice
from megatron_erpd.sources.tokenizer import load_tokenizer, tokenizer_digest


def sample_rollouts(
    hf_path: str | Path,
    prompts: Sequence[PromptRecord],
    output_dir: str | Path,
    settings: SampleSettings,
    *,
    verifier: str | None = None,
    workers: int | None = None,
    only: Slice | None = None,
    elsewhere: Sequence[Path] = (),
    engine: SamplingEngine | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Draws `settings.num_rollouts` responses to every prompt, scores them and writes them.

    Writes `rollouts-00000-of-000NN.parquet` and so on, each when its prompts are done, and `report.json` at the end.
    Called again after an interruption, it makes the parts that are missing; the result is that of an uninterrupted
    run, file by file. Parts that another verifier has scored, or for other answers, are scored again, and so are those
    on which the verifier failed throughout. A prompt's place in `prompts` is its group id.

    Args:
        hf_path: the policy's Hugging Face folder.
        prompts: N records, from `load_prompts`.
        output_dir: made if need be.
        settings: how to sample.
        verifier, workers: as in `Verifier`, which scores a part while the next one is sampled; None scores nothing: new
            rollouts are unverified.
        only: makes the part files of this slice and no others; as in the whole, their names and content included.
        elsewhere: folders that may hold parts of the same rollouts, which are taken from there (`take_parts`).
        engine: drawn from instead of the one that `settings.engine` names.
        device, dtype: as in `load_policy`.
        progress: told the number of finished responses, those of earlier runs included.

    Returns:
        The report: counts, rewards, lengths (see `describe_rollouts`) and errors of the verifier. Besides it,
        `parts_resumed`, the part files that were there already.

    Raises:
        RolloutError: the folder holds parts that were made with other settings, prompts or policy.
        StageError: the verifier failed on every response, of all or of this run.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(hf_path)
    scorer = Scorer(verifier, workers) if verifier is not None else None
    if scorer is not None:
        _ = scorer.verifier  # one that can't be loaded is an error before anything is sampled
    plan = _Plan(
        records=prompts,
        token_ids=encode_prompts(tokenizer, prompts, settings),
        folder=folder,
        file_metadata={
            "tokenizer_digest": tokenizer_digest(tokenizer),
            "policy": policy_fingerprint(hf_path),
            "prompts": questions_digest(prompts),
            "sampling": settings.model_dump(exclude={"batch_size", "tensor_parallel"}),
        },
        scorer=scorer,
        parts=(only or Slice(1, 1)).share(num_parts(len(prompts))),
    )
    plan.refuse_foreign_files()
    take_parts([plan.path(part).name for part in plan.parts], elsewhere, folder)
    missing = [part for part in plan.parts if not plan.is_done(part)]
    for part in plan.parts:
        if part not in missing:
            plan.score_again(part)
    if missing:
        engine = engine or make_engine(hf_path, settings, device, dtype)
        # On a thread: what scores is elsewhere, and so may be what samples.
        with ThreadPoolExecutor(1, thread_name_prefix="scoring") as scoring:
            written = None
            for part in missing:
                samples = _sample_part(engine, plan, part, settings, progress)
                if written is not None:
                    written.result()
                written = scoring.submit(_write_part, plan, part, samples, tokenizer)
            if written is not None:
                written.result()
    rollouts = read_rollouts(folder)
    errors = [error for error in errors_of(rollouts) if error] if scorer is not None else []
    if scorer is not None and scorer.has_always_failed:
        raise StageError(
            f"verifier {verifier} failed on all {scorer.num_asked} responses, first with: {errors[0]}; correct it and "
            f"run this again: the responses in {folder} are kept, and scored again"
        )
    report = describe_rollouts(rollouts)
    report["verifier"] = {"spec": verifier, "errors": len(errors), "first_error": errors[0] if errors else None}
    write_json(folder / REPORT, report, default=str)
    return {**report, "parts_resumed": len(plan.parts) - len(missing)}


def make_engine(
    hf_path: str | Path, settings: SampleSettings, device: str | None = None, dtype: str | None = None
) -> SamplingEngine:
    """The engine that the settings name, with the policy loaded."""
    if settings.engine == "vllm":
        from megatron_erpd.sampling.vllm import VllmEngine

        return VllmEngine(hf_path, dtype=dtype or "auto", tensor_parallel_size=settings.tensor_parallel)
    return TransformersEngine(hf_path, device, dtype)


def describe_rollouts(rollouts: Rollouts) -> dict[str, Any]:
    """What a set of rollouts holds, as plain numbers.

    Returns:
        `num_rollouts`, `num_groups`, `accepted` (scored), `unverified`, `zero_variance_groups` (no signal for
        group-relative advantages), `reward` (mean, std, min, max; None without any), `response_length` (mean, max and
        percentiles, in tokens), `truncated` (fraction that met `max_new_tokens`), `num_response_tokens`,
        `mean_log_prob` (of the drawn tokens; None where not recorded).
    """
    lengths = rollouts.response_lengths
    rows = [rollouts.behavior_log_probs(i) for i in range(len(rollouts))]
    recorded = [row for row in rows if row is not None]
    percentiles = np.percentile(lengths, [50, 90, 99])
    return {
        **reward_figures(rollouts.rewards, rollouts.group_ids),
        "response_length": {
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
            **{f"p{rank}": float(value) for rank, value in zip((50, 90, 99), percentiles, strict=True)},
        },
        "truncated": rollouts.finish_reasons.count("length") / len(rollouts),
        "num_response_tokens": int(lengths.sum()),
        "mean_log_prob": float(np.concatenate(recorded).mean(dtype=np.float64)) if recorded else None,
    }


@dataclass
class _Plan:
    """Which prompts go into which part file, and what every part says of itself."""

    records: Sequence[PromptRecord]
    token_ids: list[list[int]]
    folder: Path
    file_metadata: dict[str, Any]
    parts: range
    """Those that are wanted in this folder."""
    scorer: Scorer | None = None

    def __post_init__(self) -> None:
        if not self.records:
            raise RolloutError("there are no prompts to sample from")
        # The same prompt may stand in the set more than once; its copies' samples need names of their own.
        seen: Counter[tuple[int, ...]] = Counter()
        self.copies = []
        for ids in self.token_ids:
            self.copies.append(seen[tuple(ids)])
            seen[tuple(ids)] += 1

    def prompts_of(self, part: int) -> range:
        return prompts_of(part, len(self.records))

    def path(self, part: int) -> Path:
        return self.folder / part_name(part, len(self.records))

    def refuse_foreign_files(self) -> None:
        expected = {self.path(part).name for part in self.parts}
        foreign = sorted(p.name for p in self.folder.glob("*.parquet") if p.name not in expected)
        if foreign:
            raise RolloutError(f"{self.folder / foreign[0]}: is of another run; sample into an empty folder")

    def is_done(self, part: int) -> bool:
        """Whether the part is there; `RolloutError` if it was made from something else."""
        if not self.path(part).exists():
            return False
        found = read_rollouts(self.path(part)).file_metadata
        for name, value in self.file_metadata.items():
            # As JSON, for tuples come back as lists.
            if json.dumps(found.get(name), sort_keys=True) != json.dumps(value, sort_keys=True):
                raise RolloutError(
                    f"{self.path(part)}: was made with another {name!r} ({found.get(name)}, now {value}); "
                    "sample into an empty folder, or remove this one"
                )
        return True

    def score_again(self, part: int) -> None:
        """Asks the verifier about a part that is there, if its rewards aren't this verifier's for these records."""
        found = read_rollouts(self.path(part))
        if self.scorer is None or self.scorer.has_scored(found, self.records_of(part)):
            return
        before = [found.record(i) for i in range(len(found))]
        verdicts = self.scorer([(self.records[row.group_id], row.response or "") for row in before])
        rows = []
        for row, (reward, error) in zip(before, verdicts, strict=True):
            metadata = row_metadata(self.records[row.group_id], error)
            rows.append(replace(row, reward=reward, reward_status=None, metadata=metadata))
        self.write(part, rows)

    def records_of(self, part: int) -> list[PromptRecord]:
        return [self.records[i] for i in self.prompts_of(part)]

    def write(self, part: int, rows: Sequence[Rollout | dict[str, Any]]) -> None:
        records = self.records_of(part)
        said = {} if self.scorer is None else {"verifier": self.scorer.name, **self.scorer.file_metadata(records)}
        metadata = {**self.file_metadata, "part_prompts": questions_digest(records), **said}
        write_rollouts(self.path(part), rows, metadata)


def row_metadata(record: PromptRecord, error: str | None) -> dict[str, Any]:
    """What a rollout keeps of its prompt, and of the verifier that failed on it."""
    return {"answer": record["answer"], **record["metadata"], **({VERIFIER_ERROR: error} if error else {})}


def _sample_part(
    engine: SamplingEngine, plan: _Plan, part: int, settings: SampleSettings, progress: OnProgress | None
) -> list[list[SampledResponse]]:
    places, first, last = plan.prompts_of(part), plan.prompts_of(plan.parts[0]), plan.prompts_of(plan.parts[-1])
    before, total = ((place - first.start) * settings.num_rollouts for place in (places.start, last.stop))

    def report(finished: int, of: int) -> None:
        if progress is not None:
            progress(before + finished, total)

    return engine.sample(
        [plan.token_ids[i] for i in places],
        num_samples=settings.num_rollouts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=settings.batch_size,
        prompt_indices=places,
        progress=report,
    )


def _write_part(plan: _Plan, part: int, samples: list[list[SampledResponse]], tokenizer: Any) -> None:
    """Scores and writes a part's responses."""
    drawn = [(index, sample) for index, group in zip(plan.prompts_of(part), samples, strict=True) for sample in group]
    texts = tokenizer.batch_decode([sample.response_token_ids for _, sample in drawn], skip_special_tokens=True)
    verdicts: list[Verdict] = [(None, None)] * len(drawn)
    if plan.scorer is not None:
        verdicts = plan.scorer([(plan.records[index], text) for (index, _), text in zip(drawn, texts, strict=True)])
    rows, repetitions = [], Counter[tuple[int, bytes]]()
    for (index, sample), text, (reward, error) in zip(drawn, texts, verdicts, strict=True):
        record, ids, tokens = plan.records[index], plan.token_ids[index], sample.response_token_ids
        k = plan.copies[index] * len(samples[0]) + repetitions[index, tokens.tobytes()]
        repetitions[index, tokens.tobytes()] += 1
        rows.append(
            {
                "sample_id": sample_id(ids, tokens, k),
                "group_id": index,
                "prompt_token_ids": ids,
                "response_token_ids": tokens,
                "behavior_log_probs": sample.log_probs,
                "reward": reward,
                "finish_reason": sample.finish_reason,
                "prompt": prompt_text(record),
                "response": text,
                "metadata": row_metadata(record, error),
            }
        )
    plan.write(part, rows)
