"""Comparing a checkpoint with a folder: what counts as equal, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import copy_sidecar, export_checkpoint, write_checkpoint
from megatron_erpd.checkpoint.compare import Pair, compare_pair, find_pair
from megatron_erpd.commands.verify import verify
from megatron_erpd.errors import CheckpointError
from tests.distributed.checkpoint.tiny_models import save_hf_model


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A tied model, whose folder holds the output layer too, and an artifact with its checkpoint."""
    folder, iteration = tmp_path / "hf", tmp_path / "base" / "megatron" / "iter_0000007"
    save_hf_model("qwen3-tied", folder)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    write_checkpoint(folder, iteration, dict, block_bytes=1000)
    (iteration.parent / "latest_checkpointed_iteration.txt").write_text("7")
    return Pair(iteration, folder)


def change(folder: Path, work: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert callable(work)
    work(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_pair_is_found_in_either_order(pair: Pair, tmp_path: Path) -> None:
    artifact = pair.iteration.parents[1]
    for checkpoint in (artifact, artifact / "megatron", pair.iteration, Path(f"{artifact}@7")):
        assert find_pair(checkpoint, pair.hf_folder) == pair == find_pair(pair.hf_folder, checkpoint)
    assert find_pair(Path(f"{artifact}@3"), pair.hf_folder).iteration.name == "iter_0000003"
    for other in (pair.hf_folder, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{other} is (a Hugging Face folder|neither)"):
            find_pair(other, pair.hf_folder)


def test_equal(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    found = compare_pair(pair, lambda done, total: told.append((done, total)))
    tensors = load_file(pair.hf_folder / "model.safetensors")
    assert found.compared.differences == () and found.compared.num_tensors == len(tensors) - 1
    assert found.left_out == ("lm_head.weight",) and not found.rounded
    assert told[-1][0] == told[-1][1] == found.compared.num_bytes
    assert found.compared.num_bytes == sum(t.nbytes for name, t in tensors.items() if name != "lm_head.weight")


@pytest.mark.parametrize(("value", "words"), [(-0.0, "1 of 16"), (float("nan"), "1 of 16")])
def test_bits_are_compared_not_values(pair: Pair, value: float, words: str) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    change(pair.hf_folder, lambda tensors: tensors[name].__setitem__(3, 0.0))
    iteration = pair.iteration.with_name("iter_0000008")
    write_checkpoint(pair.hf_folder, iteration, dict)
    assert not compare_pair(Pair(iteration, pair.hf_folder)).compared.differences
    change(pair.hf_folder, lambda tensors: tensors[name].__setitem__(3, value))
    (line,) = compare_pair(Pair(iteration, pair.hf_folder)).compared.differences
    assert line.startswith(f"{name}: {words} elements differ")


def test_a_wider_checkpoint_is_rounded_and_said_to_be(pair: Pair, tmp_path: Path) -> None:
    export_checkpoint(pair.iteration, pair.hf_folder, tmp_path / "bf16", dtype=torch.bfloat16)
    found = compare_pair(Pair(pair.iteration, tmp_path / "bf16"))
    assert found.rounded and not found.compared.differences and "rounded to the folder's type" in found.describe()


def test_a_folder_that_lacks_a_tensor(pair: Pair) -> None:
    change(pair.hf_folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        compare_pair(pair)


def configured(folder: Path, name: str, values: dict[str, object]) -> None:
    path = folder / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("config.json", {"rms_norm_eps": 1e-4}, r"rms_norm_eps is 1e-06 in .*/base/hf/config\.json, 0\.0001 in "),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta is",
        ),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'silu'"),
        ("config.json", {"attention_bias": True}, "attention_bias is False"),
        ("config.json", {"tie_word_embeddings": False}, "tie_word_embeddings is True"),
        ("config.json", {"head_dim": 32, "num_attention_heads": 2}, "head_dim is"),
        ("config.json", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window is"),
        ("config.json", {"eos_token_id": 7}, "eos_token_id is"),
        ("config.json", {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow is not set in .*, 1 in"),
        (
            "generation_config.json",
            {"eos_token_id": [3, 4]},
            r"eos_token_id is .*/hf/generation_config\.json, \[3, 4\] in",
        ),
    ],
)
def test_a_configuration_that_computes_something_else(
    pair: Pair, name: str, values: dict[str, object], words: str
) -> None:
    copy_sidecar(pair.hf_folder, pair.iteration.parents[1] / "hf")
    assert not compare_pair(pair).compared.differences
    configured(pair.hf_folder, name, values)
    with pytest.raises(CheckpointError, match=f"are not one model.*{words}".replace("model.*", r"model[\s\S]*")):
        compare_pair(pair)


def test_what_changes_no_logit_is_noted(pair: Pair) -> None:
    assert "no configuration lies beside" in compare_pair(pair).notes[0]
    copy_sidecar(pair.hf_folder, pair.iteration.parents[1] / "hf")
    assert compare_pair(pair).notes == ()
    configured(pair.hf_folder, "config.json", {"max_position_embeddings": 99, "dtype": "float16", "_name_or_path": "x"})
    found = compare_pair(pair).notes
    assert [note.split()[0] for note in found] == ["dtype", "max_position_embeddings"]


def test_stop_ids_in_another_order_are_the_same(pair: Pair) -> None:
    configured(pair.hf_folder, "generation_config.json", {"eos_token_id": [4, 3]})
    copy_sidecar(pair.hf_folder, pair.iteration.parents[1] / "hf")
    configured(pair.hf_folder, "generation_config.json", {"eos_token_id": [3, 4]})
    assert compare_pair(pair).notes == ()


def test_the_command_says_what_it_compared(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = str(pair.iteration.parents[1])
    verify([artifact, "--source", str(pair.hf_folder)])
    out = capsys.readouterr().out
    assert "compared 24 tensors" in out and "left out" in out and "equal, bit for bit" in out
    change(pair.hf_folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"they differ: model\.norm\.weight: 32 of 32 elements"):
        verify([artifact, "--source", str(pair.hf_folder)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["a", "b", "--source", "c"], "is compared with one folder, 2 were given"), (["a", "--prompts", "p"], "--source")],
)
def test_flags_that_make_no_sense(argv: list[str], words: str) -> None:
    from megatron_erpd.errors import RecipeError

    with pytest.raises(RecipeError, match=words):
        verify(argv)
