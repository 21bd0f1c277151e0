"""Import, verify and export as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import compare_weights, write_checkpoint
from megatron_erpd.manifest import verify_manifest
from tests import forked
from tests.distributed.checkpoint.published import PUBLISHED
from tests.distributed.harness import run_ranks
from tests.forked import REPOSITORY
from tests.integration.test_bad_input import write_tokenizer
from tests.integration.tiny import write_model, write_random_rollouts


def erpd(*argv: object, code: int = 0) -> str:
    """Runs a command, which must end with this code; what it said."""
    command = [sys.executable, "-m", "megatron_erpd.commands.cli", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = forked.run(command, env=environment, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, imported by two processes."""
    folder = tmp_path_factory.mktemp("conversion")
    write_model(folder / "hf")
    config = (folder / "hf" / "config.json").read_bytes()
    write_tokenizer(folder / "hf")
    (folder / "hf" / "config.json").write_bytes(config)
    said = erpd("import", "--hf", folder / "hf", "--output", folder / "base", "--processes", 2)
    assert f"base: {len(load_file(folder / 'hf' / 'model.safetensors'))} tensors" in said
    return folder


def test_an_import_is_verified_with_its_logits(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("w1 w2 w3 w30", "w5")))
    said = erpd("verify", folder / "base", "--source", folder / "hf", "--prompts", prompts)
    assert "equal, bit for bit" in said and "logits of 2 prompts, 2 tokens" in said and "100.0% of them" in said


def _agree(rank: int, world_size: int, iteration: Path, sources: list[Path]) -> list[bool]:
    """Whether a checkpoint's logits are those of each folder; for `run_ranks`."""
    from megatron_erpd import platform

    platform.enable_cpu()
    from megatron_erpd.checkpoint.compare import Pair
    from megatron_erpd.model.logits import compare_on_prompts

    return [compare_on_prompts(Pair(iteration, source), [[1, 2, 3, 4]])[0].agrees() for source in sources]


def test_each_side_is_built_from_its_own_configuration(folder: Path, tmp_path: Path) -> None:
    """The weights alone are equal bit for bit."""
    source = shutil.copytree(folder / "hf", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 100 * config["rms_norm_eps"]}))
    said = erpd("verify", folder / "base", "--source", source, code=2)
    assert "rms_norm_eps is 1e-06 in" in said and "equal, bit for bit" not in said
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    iteration = folder / "base" / "megatron" / "iter_0000000"
    assert run_ranks(_agree, 1, iteration, [folder / "hf", source]) == [[True, False]]


def test_an_export_is_whole_and_verified(folder: Path, tmp_path: Path) -> None:
    said = erpd("export", "--checkpoint", f"base={folder / 'base'}", "--output", tmp_path / "export", "--processes", 2)
    assert "each compared with" in said and "equal" in said
    assert compare_weights(folder / "hf", tmp_path / "export" / "base") == []
    summary = verify_manifest(tmp_path / "export").summary
    assert (
        summary["tensors"] == len(load_file(folder / "hf" / "model.safetensors")) and summary["peak_memory_bytes"] > 0
    )
    weights = tmp_path / "export" / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights)
    said = erpd("verify", tmp_path / "export" / "base", "--source", folder / "base", code=2)
    assert "they differ" in said and "model.norm.weight: 1 of 32 elements differ, by up to 1" in said


def test_a_dry_run_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama-3.1-70b"]))
    sizes = ["--tensor-parallel", 8, "--pipeline-parallel", 4, "--precision", "bf16"]
    said = erpd("import", "--hf", tmp_path, "--dry-run", *sizes, "--json", tmp_path / "plan.json")
    assert "70,553,706,496 parameters" in said and "decoder.layers.[0-79].mlp.linear_fc1.weight" in said
    assert len(json.loads((tmp_path / "plan.json").read_text())["stages"]) == 4
    message = erpd("import", "--hf", tmp_path, "--output", tmp_path / "out", "--tensor-parallel", 8, code=2)
    assert "--tensor-parallel: is read with --dry-run only" in message
    assert "--output: is missing" in erpd("import", "--hf", tmp_path, code=2)


def test_a_checkpoint_of_another_program_is_taken(folder: Path, tmp_path: Path) -> None:
    """One that has none of Megatron-LM's arguments, as Megatron-Bridge's have not, and its tracker alone."""
    other = tmp_path / "other" / "iter_0000250"
    write_checkpoint(folder / "hf", other, lambda: {"iteration": 250, "checkpoint_version": 3.0})
    torch.save({"step": torch.tensor(250)}, other.parent / "latest_train_state.pt")
    erpd("import", "--hf", folder / "hf", "--checkpoint", other.parent, "--output", tmp_path / "base")
    erpd("verify", tmp_path / "base", "--source", folder / "hf")
    write_random_rollouts(tmp_path / "rollouts.parquet")
    data = ["--base", tmp_path / "base", "--rollouts", tmp_path / "rollouts.parquet"]
    short = ["--loss", "sft", "--global-batch-size", 16, "--micro-batch-size", 16, "--epochs", 0.4]
    erpd("train-teacher", *data, *short, "--output", tmp_path / "teacher")
    write_model(tmp_path / "untied", tied=False)
    message = erpd("import", "--hf", tmp_path / "untied", "--checkpoint", other, "--output", tmp_path / "no", code=2)
    assert "the checkpoint has no tensor output_layer.weight" in message


def test_a_folder_without_bridge_says_how_to_get_it(folder: Path, tmp_path: Path) -> None:
    message = erpd("import", "--hf", folder / "hf", "--via", "megatron-bridge", "--output", tmp_path / "x", code=2)
    assert "--via megatron-bridge: can't be imported here" in message
