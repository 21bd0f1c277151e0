"""From a teacher's checkpoints to the one that is distilled: selection, `signal: auto`, and what a student makes of it.

The teacher imitates one word, more and more of it. A verifier that likes the word finds the last checkpoint best and
the teacher strong; one that dislikes it finds the first checkpoint best and the teacher worse than its base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_erpd.checkpoint.torch_dist.iterations import latest_iteration, saved_iterations
from megatron_erpd.commands import held_out as commands
from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.errors import StageError
from megatron_erpd.evaluation.strength import read_selection
from megatron_erpd.manifest import verify_manifest
from megatron_erpd.teacher_cache.reader import CacheReader
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import VOCAB_SIZE, write_model

WORD = 5
STOP = 1
VERIFIER = f"""
def likes(record, response):
    words = response.split()
    return words.count("w{WORD}") / max(1, len(words))


def dislikes(record, response):
    return 1.0 - likes(record, response)
"""
"""`likes`: the share of the word in the response. A file that imports nothing: each of many processes loads it."""


def inputs(folder: Path) -> None:
    """`hf` with a tokenizer of words, `rollouts.parquet` that hold the one word, `prompts.jsonl`, `verifier.py`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    write_model(folder / "hf")
    (folder / "verifier.py").write_text(VERIFIER)
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token=f"w{STOP}").save_pretrained(
        folder / "hf"
    )
    rows = [
        Rollout(prompt_token_ids=[i], response_token_ids=[WORD] * 4, group_id=i, reward=float(g % 2))
        for i in range(8, 16)
        for g in range(2)
    ]
    write_rollouts(folder / "rollouts.parquet", rows)
    prompts = [json.dumps({"prompt": f"w{i} w{i + 1}", "answer": ""}) for i in range(16, 28)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    inputs(folder)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    steps = ["--global-batch-size", "16", "--micro-batch-size", "16"]
    select = ["--model", f"{folder}/hf", "--teacher", f"{folder}/teacher", "--candidates", f"{folder}/candidates"]
    select += ["--prompts", f"{folder}/prompts.jsonl", "--num-samples", "2", "--max-new-tokens", "8"]
    verifier = f"python:{folder}/verifier.py"
    up, down = f"{folder}/up", f"{folder}/down"
    unlearned = ["--policy", f"unlearned={folder}/teacher"]
    cache = [*data, *unlearned, "--signal", "auto"]
    distill = [*data, "--base-log-probs", f"{folder}/base-log-probs", "--cache", f"{folder}/cache-down", *steps]
    distill += ["--epochs", "2", "--form", "policy_gradient"]
    sft = ["--loss", "sft", "--epochs", "12", "--learning-rate", "3e-3", "--checkpoints", "2"]

    def to(name: str) -> list[str]:
        return ["--output", f"{folder}/{name}"]

    stages: Stages = [
        ("import", ["--hf", f"{folder}/hf", *to("base")]),
        ("precompute", [*data, "--kind", "token", *to("base-log-probs")]),
        ("train", [*data, *steps, *sft, *to("teacher")]),
        ("export", ["--checkpoint", f"teacher={folder}/teacher@all", *to("candidates")]),
        ("select", [*select, "--verifier", f"{verifier}:likes", "--unlearned", *to("up")]),
        ("select", [*select, "--verifier", f"{verifier}:dislikes", "--unlearned", *to("down")]),
        ("precompute", [*cache, "--policy", f"teacher={up}", "--selection", up, "--k", "4", *to("cache-up")]),
        (
            "precompute",
            [*cache, "--policy", f"teacher={down}", "--selection", down, "--kind", "token", *to("cache-down")],
        ),
        ("distill", [*distill, "--signal", "auto", *to("auto")]),
        ("distill", [*distill, "--signal", "contrast", *to("contrast")]),
        ("distill", [*distill, "--signal", "strong", *to("strong")]),
        ("export", [f"--checkpoint=teacher={down}", f"--checkpoint=teacher={folder}/teacher@all", *to("export")]),
    ]
    run_ranks(run_stages, 1, stages)
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["stage2/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return verify_manifest(folder).summary


@pytest.mark.parametrize(("name", "iteration", "signal"), [("up", 12, "strong"), ("down", 6, "contrast")])
def test_the_better_checkpoint_becomes_the_teacher(name: str, iteration: int, signal: str, made: Path) -> None:
    selection = read_selection(made / name)
    assert [c["iteration"] for c in selection.candidates] == [6, 12]
    assert (selection.iteration, selection.signal) == (iteration, signal)
    chosen, (other,) = selection.chosen, [c for c in selection.candidates if c["iteration"] != iteration]
    assert chosen["reward"] > other["reward"]
    assert (chosen["difference"] > 0) == (signal == "strong")
    assert saved_iterations(made / name / "megatron") == [latest_iteration(made / name / "megatron")] == [iteration]
    source = made / "teacher" / "megatron" / f"iter_{iteration:07d}"
    for path in (p for p in source.rglob("*") if p.is_file()):
        assert (made / name / "megatron" / source.name / path.relative_to(source)).samefile(path)
    assert summary(made / name)["recommended_signal"] == signal


def test_auto_is_what_the_selection_recommends(made: Path) -> None:
    up, down = CacheReader(made / "cache-up").meta, CacheReader(made / "cache-down").meta
    assert (up.signal, up.signal_requested) == ("strong", "auto")
    assert (down.kind, down.signal, down.signal_requested) == ("token", "contrast", "auto")
    assert set(up.policies) == {"base", "teacher", "unlearned"}
    figures = summary(made / "cache-up")
    assert figures["signal"] == figures["recommended_signal"] == "strong"
    assert figures["teacher_reward"] > figures["base_reward"]
    assert verify_manifest(made / "cache-up").settings["signal"] == "auto"


def test_a_student_takes_the_signal_of_the_cache(made: Path) -> None:
    assert losses(made / "auto") == losses(made / "contrast") != losses(made / "strong")


def test_the_chosen_teacher_is_exported_beside_its_checkpoints(made: Path) -> None:
    weights = {p.name: (p / "model.safetensors").read_bytes() for p in (made / "export").iterdir() if p.is_dir()}
    assert set(weights) == {"teacher", "teacher@6", "teacher@12"}
    assert weights["teacher"] == weights["teacher@6"] != weights["teacher@12"]
    manifest = verify_manifest(made / "export")
    assert manifest.settings["iterations"] == {"teacher": None, "teacher@all": "all"}
    assert set(manifest.inputs) == {"teacher", "teacher@all"}


def test_candidates_of_another_teacher_are_refused(made: Path, tmp_path: Path) -> None:
    argv = ["--model", f"{made}/hf", "--teacher", f"{made}/up", "--candidates", f"{made}/candidates"]
    argv += ["--prompts", f"{made}/prompts.jsonl", "--verifier", "math-verify", "--output", f"{tmp_path}/out"]
    with pytest.raises(StageError, match=r"--candidates .*: was not exported from"):
        commands.select(argv)
