"""Bad input ends a command before training with one message that names the culprit; nothing is written over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.utils.cpp_extension  # noqa: F401  # logs at its import where there is nvcc and no GPU; Megatron imports it

from megatron_erpd.commands import cli
from megatron_erpd.data.rollouts import read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from tests.distributed.harness import run_ranks
from tests.integration.stages import make_round, run_stages
from tests.integration.tiny import VOCAB_SIZE, write_model, write_random_rollouts

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round, a second base, and a teacher cache made from the first base and `teacher`."""
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    write_model(folder / "other-hf", seed=5)
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    stages = [
        ("import", ["--hf", f"{folder}/other-hf", "--output", f"{folder}/other"]),
        ("precompute", [*data, "--policy", f"teacher={folder}/other", "--k", "4", "--output", f"{folder}/cache"]),
        ("precompute", [*data, "--signal", "none", "--k", "4", "--output", f"{folder}/rows"]),
    ]
    run_ranks(run_stages, 1, stages)
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fails:
    """Runs a command that must end with exit code 2, and returns its message; `out` may hold no work."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: object) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in argv])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        assert not any(p for p in (tmp_path / "out").rglob("*") if p.name != "request.json")
        return message

    return run


def training(made: Path, out: Path, **changed: object) -> list[object]:
    paths = {"base": made / "base", "rollouts": made / "rollouts.parquet", "base_log_probs": made / "base-log-probs"}
    flags: list[object] = []
    for name, value in {**paths, "output": out, **changed}.items():
        if value is not None:
            flags += ["--" + name.replace("_", "-"), value]
    return flags


def rollout_file(path: Path, **changed: object) -> Path:
    rows = []
    for i in range(4):
        row = {"prompt_token_ids": np.array([1, 2]), "response_token_ids": np.array([3, 4 + i]), "group_id": 0}
        rows.append(Rollout(**{**row, "reward": float(i % 2), **(changed if i == 2 else {})}))  # type: ignore[arg-type]
    write_rollouts(path, rows)
    return path


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of `VOCAB_SIZE` words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


def test_missing_folder(fails: Fails, tmp_path: Path) -> None:
    message = fails("import", "--hf", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert "nowhere" in message and "no such f" in message


def test_unsupported_architecture(fails: Fails, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    message = fails("import", "--hf", tmp_path / "hf", "--output", tmp_path / "out")
    assert "MambaForCausalLM" in message and "Qwen3ForCausalLM" in message


def test_tensor_parallel_that_does_not_divide_the_heads(
    fails: Fails, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    message = fails("train-teacher", *training(made, tmp_path / "out"), "--tensor-parallel", 3)
    assert "tensor parallel size 3" in message and "use 1, 2 or 4" in message


def test_layout_that_is_not_the_number_of_processes(
    fails: Fails, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = fails("train-teacher", *training(made, tmp_path / "out"), "--tensor-parallel", 2)
    assert "needs 2 processes, 3 were started" in message


def test_finished_artifact_is_not_written_over(fails: Fails, made: Path) -> None:
    before = (made / "base" / "manifest.json").read_bytes()
    message = fails("import", "--hf", made / "hf", "--output", made / "base")
    assert "already holds a finished artifact" in message
    assert (made / "base" / "manifest.json").read_bytes() == before


def test_wrong_base(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out", base=tmp_path / "bass"))
    assert "bass" in message and "no such folder" in message


def test_megatrons_own_load_path_is_refused(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out"), "--", "--load", "/nowhere")
    assert message.startswith("error: --load")


def test_flag_that_contradicts_the_checkpoint(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out"), "--", "--num-layers", 4)
    assert "--num-layers" in message and "checkpoint" in message


def test_vocabulary_that_does_not_match(fails: Fails, made: Path, tmp_path: Path) -> None:
    file = rollout_file(tmp_path / "r.parquet", response_token_ids=np.array([3, VOCAB_SIZE]))
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=file))
    assert "r.parquet" in message and str(VOCAB_SIZE) in message and "row 2" in message


def test_rollout_longer_than_the_model(fails: Fails, made: Path, tmp_path: Path) -> None:
    file = rollout_file(tmp_path / "r.parquet", response_token_ids=np.full(80, 3))
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=file))
    assert "row 2" in message and "64 positions" in message


@pytest.mark.parametrize("command", ["train-teacher", "precompute"])
def test_prompt_longer_than_the_budget(command: str, fails: Fails, made: Path, tmp_path: Path) -> None:
    data = rollout_file(tmp_path / "d.parquet", prompt_token_ids=np.arange(1, 6), sample_id="long", group_id=1)
    unread = {} if command == "train-teacher" else {"base_log_probs": None, "kind": "token"}
    flags = training(made, tmp_path / "out", rollouts=data, micro_batch_tokens=4, **unread)
    assert "micro_batch_tokens 4: the prompt of rollout long alone has 5 tokens; give at least 1024" in fails(
        command, *flags
    )


def test_rewards_that_are_no_probabilities(fails: Fails, made: Path, tmp_path: Path) -> None:
    file = rollout_file(tmp_path / "r.parquet", reward=3.0)
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=file), "--loss", "ce")
    assert "reward 3.0" in message and "[0, 1]" in message


@pytest.mark.parametrize(("flags", "words"), [([], "above"), (["--unlearn"], "at most")])
def test_imitation_of_nothing(flags: list[str], words: str, fails: Fails, made: Path, tmp_path: Path) -> None:
    file = write_random_rollouts(tmp_path / "r.parquet", reward=0.0 if words == "above" else 1.0)
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=file), "--loss", "sft", *flags)
    assert "r.parquet: loss sft" in message and f"{words} --sft-threshold 0.5, and there are none" in message


def test_groups_without_a_signal(fails: Fails, made: Path, tmp_path: Path) -> None:
    equal = write_random_rollouts(tmp_path / "equal.parquet", reward=1.0)
    single = write_random_rollouts(tmp_path / "single.parquet", group_size=1)
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=equal), "--loss", "sapo")
    assert "equal.parquet: in none of the 10 groups do the rewards differ" in message
    assert "--advantage group_norm is 0 for every rollout" in message and "--loss sapo" in message
    mean = ["--loss", "mse", "--advantage", "group_mean"]
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=single), *mean)
    assert "single.parquet: each of the 10 groups holds one scored rollout" in message
    assert "--advantage group_mean" in message and "--advantage raw" in message
    control = ["--form", "policy_gradient", "--signal-weight", 0, "--advantage-weight", 1]
    message = fails("distill", *training(made, tmp_path / "out", rollouts=equal), *control)
    assert "--advantage-weight 1.0 has nothing to learn from" in message


@pytest.mark.parametrize("flag", ["--delta", "--eta-max", "--projection-clip"])
@pytest.mark.parametrize("value", [0, -1, "nan", "inf"])
def test_trust_region_without_a_size(flag: str, value: object, fails: Fails, made: Path, tmp_path: Path) -> None:
    policy = ["--policy", f"teacher={made}/other"]
    for command, flags in {
        "precompute": training(made, tmp_path / "out", base_log_probs=None),
        "distill": [*training(made, tmp_path / "out"), "--teacher", "live"],
    }.items():
        message = fails(command, *flags, *policy, flag, value)
        assert message.startswith(f"error: {flag}: Input should be ")


def test_signal_whose_weights_cancel(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = [*training(made, tmp_path / "out", base_log_probs=None), "--policy", f"teacher={made}/other"]
    message = fails("precompute", *flags, "--signal", "0.5*strong - 0.5*teacher/base")
    assert "signal '0.5*strong - 0.5*teacher/base'" in message and "the signal is 0 everywhere" in message


def test_log_probs_that_are_missing(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out", base_log_probs=None))
    assert "--base-log-probs" in message and "precompute --kind token" in message


def test_kl_ceiling_without_log_probs(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = [*training(made, tmp_path / "out", base_log_probs=None), "--loss", "sft", "--max-kl", 0.1]
    message = fails("train-teacher", *flags)
    assert "--max-kl" in message and "--base-log-probs" in message


@pytest.mark.parametrize("flag", ["--max-kl", "--min-entropy", "--save-interval"])
def test_bounds_that_are_not_above_zero(flag: str, fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out"), flag, 0)
    assert flag in message and "greater than" in message


def test_log_probs_of_other_rollouts(fails: Fails, made: Path, tmp_path: Path) -> None:
    file = write_random_rollouts(tmp_path / "other.parquet", seed=9)
    message = fails("train-teacher", *training(made, tmp_path / "out", rollouts=file))
    assert "has no row for sample" in message and "precompute the cache again" in message


def test_log_probs_of_another_base(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("train-teacher", *training(made, tmp_path / "out", base=made / "other"))
    assert "another teacher" in message and "base" in message


def test_log_probs_of_another_precision(fails: Fails, made: Path, tmp_path: Path) -> None:
    for command in ("train-teacher", "distill"):
        flags = training(made, tmp_path / "out", **({"cache": made / "cache"} if command == "distill" else {}))
        message = fails(command, *flags, "--precision", "bf16")
        assert f"{made}/base-log-probs: its log-probs were computed in fp32" in message
        assert "precompute with --precision bf16, or train with --precision fp32" in message


def test_rollouts_of_another_tokenizer(fails: Fails, made: Path, tmp_path: Path) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    config = (base / "hf" / "config.json").read_bytes()
    write_tokenizer(base / "hf")
    (base / "hf" / "config.json").write_bytes(config)
    rollouts = tmp_path / "r.parquet"
    rows = [read_rollouts(made / "rollouts.parquet").record(i) for i in range(4)]
    write_rollouts(rollouts, rows, {"tokenizer_digest": "0" * 64})
    for command, changed in {
        "precompute": {"base_log_probs": None, "kind": "token"},
        "train-teacher": {},
        "distill": {"cache": made / "cache"},
    }.items():
        message = fails(command, *training(made, tmp_path / "out", base=base, rollouts=rollouts, **changed))
        assert f"{rollouts}: was made with another tokenizer (digest 000000000000) than that of {base}/hf" in message


def test_exact_kl_without_the_bases_rows(fails: Fails, made: Path, tmp_path: Path) -> None:
    exact = ["--kl-coefficient", 1, "--kl-estimator", "exact"]
    message = fails("train-teacher", *training(made, tmp_path / "out"), *exact)
    assert "--kl-estimator exact" in message and "precompute --signal none --k 64" in message
    message = fails("train-teacher", *training(made, tmp_path / "out", base_log_probs=made / "cache"), *exact)
    assert "holds no top-k rows of the base policy" in message  # of q, which isn't the base
    message = fails("train-teacher", *training(made, tmp_path / "out", base_log_probs=made / "rows"), *exact)
    assert "--kl-topk 64" in message and "give --kl-topk 4" in message


def test_cache_of_another_teacher(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = [*training(made, tmp_path / "out", cache=made / "cache"), "--policy", f"teacher={made}/base"]
    message = fails("distill", *flags)
    assert "made from another teacher" in message and "'teacher'" in message


def test_token_cache_for_the_projection(fails: Fails, made: Path, tmp_path: Path) -> None:
    message = fails("distill", *training(made, tmp_path / "out", cache=made / "base-log-probs"))
    assert "--kind topk" in message


def test_signal_without_its_policy(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = training(made, tmp_path / "out", base_log_probs=None)
    message = fails("precompute", *flags, "--signal", "unlearned", "--policy", f"teacher={made}/other")
    assert "--policy unlearned=DIR" in message


def test_teacher_with_another_vocabulary(fails: Fails, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "other", tmp_path / "larger")
    config = json.loads((tmp_path / "larger" / "hf" / "config.json").read_text())
    (tmp_path / "larger" / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    policy = ["--policy", f"teacher={tmp_path}/larger"]
    for command, flags in {
        "precompute": training(made, tmp_path / "out", base_log_probs=None),
        "distill": [*training(made, tmp_path / "out"), "--teacher", "live"],
    }.items():
        message = fails(command, *flags, *policy)
        assert "vocab_size 40" in message and str(tmp_path / "larger") in message and str(made / "base") in message


def test_auto_without_a_selection(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = [*training(made, tmp_path / "out", base_log_probs=None), "--policy", f"teacher={made}/other"]
    message = fails("precompute", *flags, "--signal", "auto")
    assert "--signal auto" in message and "--selection DIR" in message
    message = fails("precompute", *flags, "--signal", "auto", "--selection", made / "cache")
    assert "selection.json" in message and "megatron-erpd select" in message


def test_auto_of_a_cache_that_chose_none(fails: Fails, made: Path, tmp_path: Path) -> None:
    flags = training(made, tmp_path / "out", cache=made / "base-log-probs", form="policy_gradient", signal="auto")
    message = fails("distill", *flags)
    assert "records no signal" in message and "--selection" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt_token_ids": [1], "response_token_ids": [2]}, "reward"),
        ({"prompt_token_ids": [1], "response_token_ids": [2], "reward": float("nan")}, "reward"),
        ({"prompt_token_ids": [1], "response_token_ids": [], "reward": 1}, "response"),
        ({"prompt_token_ids": [1], "response_token_ids": [99], "reward": 1}, "99"),
    ],
)
def test_import_of_a_bad_row(fails: Fails, made: Path, tmp_path: Path, row: dict[str, object], expected: str) -> None:
    good = {"prompt_token_ids": [1], "response_token_ids": [2], "reward": 1}
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    flags = ["--source", source, "--tokenizer", write_tokenizer(tmp_path / "hf"), "--output", tmp_path / "out"]
    message = fails("import-rollouts", *flags)
    assert "source.jsonl:2" in message and expected in message


def test_typo_in_the_recipe(fails: Fails, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: m\nrollouts: {file: r.parquet}\nteacher: {lose: ce, epochs: -1}\n")
    message = fails("run", recipe)
    assert "teacher.lose" in message and "teacher.epochs" in message
