"""Hugging Face to Megatron and back on every layout: transformers' logits, and a round trip that keeps each bit.

Every checkpoint is converted once, by one process, in blocks that no layout's shards line up with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import (
    compare_weights,
    copy_sidecar,
    export_checkpoint,
    export_hf_weights,
    flags_to_argv,
    model_flags,
    write_checkpoint,
)
from megatron_erpd.errors import CheckpointError
from megatron_erpd.model.logits import compare_logits, megatron_logits
from tests.distributed.checkpoint.tiny_models import (
    MODELS,
    VOCAB_SIZE,
    build_megatron_model,
    load_checkpoint,
    save_checkpoint,
    save_hf_model,
    set_layout,
)
from tests.distributed.harness import Case, run_cases

LAYOUTS = [(4, 1), (1, 2), (2, 2)]
"""TP x PP on four ranks; the ranks left over are data-parallel replicas."""

EVERY = [
    (name, layout)
    for layout in LAYOUTS
    for name in MODELS
    if name in ("qwen3-tied", "llama3-untied") or layout == (2, 2)
]
"""Two models on every layout, four ranks of two key-value heads among them, and each on two pipeline stages of two."""

NUM_RANKS = 4


def convert(rank: int, world_size: int, source: Path, exported: Path, tp: int, pp: int) -> dict[str, Any] | None:
    """Load, forward, export from the model and from what Megatron saves of it; what the last stage saw."""
    set_layout(tp, pp)
    model = build_megatron_model(model_flags(source, tp, pp))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_checkpoint([model], checkpoint_of(source))
    reference = load_file(source.parent / f"{source.name}-logits.safetensors")
    logits = megatron_logits([model], reference["tokens"])
    export_hf_weights([model], source, exported)
    saved = exported.with_name(f"{exported.name}-saved")
    save_checkpoint([model], saved)
    export_checkpoint(saved, source, saved.with_name(f"{saved.name}-exported"), max_shard_bytes=20_000)
    if logits is None:
        return None
    found = compare_logits(logits, reference["logits"])
    padding = logits[..., VOCAB_SIZE:]
    return {"agrees": found.agrees(), "found": found, "padding_is_zero": bool((padding == 0).all() and padding.numel())}


def convert_without_rope_scaling(rank: int, world_size: int, source: Path) -> bool:
    """The control: whether the comparison notices Llama 3's scaling missing."""
    set_layout(1, 1)
    flags = model_flags(source)
    assert flags.pop("use_rope_scaling")
    model = build_megatron_model(flags)
    load_checkpoint([model], checkpoint_of(source))
    reference = load_file(source.parent / f"{source.name}-logits.safetensors")
    logits = megatron_logits([model], reference["tokens"])
    assert logits is not None
    return compare_logits(logits, reference["logits"]).agrees()


def rotary_frequencies(rank: int, world_size: int, source: Path) -> bool:
    """Whether Megatron's rotary frequencies under Llama 3's scaling are those of transformers."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    set_layout(1, 1)
    model = build_megatron_model(model_flags(source))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(source), torch.device("cpu"))
    assert (wanted < 1e-3).any()
    return torch.allclose(model.rotary_pos_emb.inv_freq, wanted, rtol=1e-6, atol=0)


def convert_sidecar_only(rank: int, world_size: int, source: Path, sidecar: Path, exported: Path) -> None:
    """An export that has the sidecar of a bf16 model, not its weights, from an fp32 model; in several files."""
    set_layout(2, 2)
    model = build_megatron_model(model_flags(source, 2, 2))
    load_checkpoint([model], checkpoint_of(source))
    export_hf_weights([model], sidecar, exported, max_shard_bytes=20_000)


def convert_dtype(rank: int, world_size: int, source: Path, exported: Path) -> None:
    set_layout(2, 2)
    model = build_megatron_model(model_flags(source, 2, 2))
    load_checkpoint([model], checkpoint_of(source))
    export_hf_weights([model], source, exported, dtype="bfloat16")


def convert_virtual_stages(rank: int, world_size: int, source: Path, exported: Path) -> int:
    """Two chunks per rank under an interleaved pipeline; returns the number of this rank's layers."""
    set_layout(1, 2, virtual_stages=2)
    flags = model_flags(source, 1, 2)
    chunks = [build_megatron_model(flags, virtual_stages=2, vp_stage=i) for i in range(2)]
    load_checkpoint(chunks, checkpoint_of(source))
    export_hf_weights(chunks, source, exported)
    return sum(len(chunk.decoder.layers) for chunk in chunks)


def parse_flags(rank: int, world_size: int, source: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The flags, and what Megatron's own argument parser makes of them (on one rank: the import takes a while)."""
    flags = model_flags(source)
    if rank != 0:
        return flags, {}
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    found = vars(parser.parse_args(flags_to_argv(flags)))
    found["norm_epsilon"] = found["layernorm_epsilon"]
    found["disable_bias_linear"] = not found["add_bias_linear"]
    return flags, {name: found[name] for name in flags}


def import_refused(rank: int, world_size: int, bad: Path, folder: Path) -> str:
    """The error that every rank gets from an import."""
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(bad, folder, dict)
    return str(caught.value)


def export_refused(
    rank: int, world_size: int, good: Path, source: Path, output: Path, change: dict[str, Any] | None = None
) -> str:
    """The error that every rank gets from the export of a model that was built from `good` and changed flags."""
    set_layout(2, 2)
    model = build_megatron_model({**model_flags(good, 2, 2), **(change or {})})
    with pytest.raises(CheckpointError) as caught:
        export_hf_weights([model], source, output)
    return str(caught.value)


def checkpoint_of(source: Path) -> Path:
    """Where a source's checkpoint is."""
    return source.with_name(f"{source.name}-checkpoint")


class Workspace:
    """The folders that the cases work on, and what the ranks returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[Any]] = {}

    def source(self, name: str) -> Path:
        return self.folder / name

    def exported(self, name: str, layout: tuple[int, int] = (0, 0)) -> Path:
        return self.folder / f"{name}-exported-{layout[0]}x{layout[1]}"


def _prepare(space: Workspace) -> None:
    tokens = torch.randint(VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(0))
    for name in MODELS:
        model = save_hf_model(name, space.source(name))
        with torch.no_grad():
            logits = model(tokens).logits
        save_file({"tokens": tokens, "logits": logits}, space.folder / f"{name}-logits.safetensors")
    save_hf_model("qwen2-untied", space.source("bf16"), torch.bfloat16, max_shard_size="30KB")
    for name in (*MODELS, "bf16"):
        write_checkpoint(
            space.source(name), checkpoint_of(space.source(name)), dict, block_bytes=3000, file_bytes=20_000
        )
    (space.source("bf16") / "tokenizer.json").write_text("{}")
    copy_sidecar(space.source("bf16"), space.source("bf16-sidecar"))
    cut_off = space.folder / f".{space.exported('bf16').name}.partial"
    cut_off.mkdir()
    (cut_off / "model-00009-of-00009.safetensors").write_text("left by an export that was killed")
    _prepare_bad_folders(space)


def _prepare_bad_folders(space: Workspace) -> None:
    good = space.source("qwen3-tied")
    tensors = load_file(good / "model.safetensors")
    config = (good / "config.json").read_text()
    norm = "model.layers.1.self_attn.k_norm.weight"
    changed = {
        "missing": {name: value for name, value in tensors.items() if name != norm},
        "unknown": {**tensors, "model.layers.0.self_attn.q_proj.lora": torch.ones(2)},
        "shape": {**tensors, norm: torch.ones(8)},
        "head": {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
        "ignorable": {
            **tensors,
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
    }
    for name, content in changed.items():
        folder = space.source(name)
        folder.mkdir()
        (folder / "config.json").write_text(config)
        save_file(content, folder / "model.safetensors")
    copy_sidecar(space.source("unknown"), space.source("unknown-sidecar"))
    write_checkpoint(space.source("ignorable"), checkpoint_of(space.source("ignorable")), dict)


def _cases(space: Workspace) -> list[Case]:
    """All cases, those of one layout after another: a change of layout costs more than most of them."""
    llama3, bf16, good = space.source("llama3-untied"), space.source("bf16"), space.source("qwen3-tied")
    cases: list[Case] = [
        ("rope-control", convert_without_rope_scaling, (llama3,)),
        ("rope-frequencies", rotary_frequencies, (llama3,)),
    ]
    for name, (tp, pp) in EVERY:
        target = space.exported(name, (tp, pp))
        cases.append((f"{name}-{tp}x{pp}", convert, (space.source(name), target, tp, pp)))
    cases += [
        ("sidecar", convert_sidecar_only, (bf16, space.source("bf16-sidecar"), space.exported("bf16"))),
        ("no-disk", export_refused, (good, good, good / "config.json" / "below-a-file")),
        ("dtype", convert_dtype, (llama3, space.exported("llama3-bf16"))),
        ("ignorable", convert_dtype, (space.source("ignorable"), space.exported("ignorable"))),
        ("no-qk-norm", export_refused, (good, good, space.exported("never"), {"qk_layernorm": False})),
        ("more-layers", export_refused, (good, good, space.exported("never"), {"num_layers": 4})),
        ("fewer-layers", export_refused, (good, space.source("qwen3-untied"), space.exported("never"))),
        ("output-exists", export_refused, (good, good, space.source("missing"))),
        ("lost-tensor", export_refused, (good, space.source("unknown-sidecar"), space.exported("never"))),
    ]
    bad = ("missing", "unknown", "shape", "head")
    cases += [(f"bad-{name}", import_refused, (space.source(name), space.folder / "never")) for name in bad]
    untied = space.source("qwen3-untied")
    cases.append(("virtual", convert_virtual_stages, (untied, space.exported("virtual"))))
    return [*cases, ("flags", parse_flags, (llama3,))]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """All cases are run once, by four ranks: starting Megatron in them takes longer than any case."""
    space = Workspace(tmp_path_factory.mktemp("conversion"))
    _prepare(space)
    space.results = run_cases(_cases(space), NUM_RANKS, timeout=120)
    return space


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=str)
def test_logits_are_those_of_transformers(space: Workspace, name: str, layout: tuple[int, int]) -> None:
    found = [result for result in space.results[f"{name}-{layout[0]}x{layout[1]}"] if result is not None]
    assert len(found) == NUM_RANKS // layout[1]
    assert all(result["agrees"] for result in found), found
    assert all(result["padding_is_zero"] for result in found)


@pytest.mark.parametrize(("name", "layout"), EVERY, ids=str)
def test_round_trip_keeps_every_bit(space: Workspace, name: str, layout: tuple[int, int]) -> None:
    exported = space.exported(name, layout)
    assert compare_weights(space.source(name), exported) == []
    assert compare_weights(space.source(name), exported.with_name(f"{exported.name}-saved-exported")) == []
    assert (exported / "config.json").read_bytes() == (space.source(name) / "config.json").read_bytes()
    assert not list(space.folder.glob(".*.partial"))


def test_the_comparison_notices_missing_rope_scaling(space: Workspace) -> None:
    assert space.results["rope-control"] == [False] * NUM_RANKS


def test_llama3_frequencies_are_those_of_transformers(space: Workspace) -> None:
    assert space.results["rope-frequencies"] == [True] * NUM_RANKS


def test_export_with_a_sidecar_alone(space: Workspace) -> None:
    exported = space.exported("bf16")
    assert compare_weights(space.source("bf16"), exported) == []
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (exported / "tokenizer.json").is_file() and not (exported / "source_tensors.json").exists()
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    source_index = json.loads((space.source("bf16") / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source_index["metadata"]["total_size"]


def test_exported_folder_loads_in_transformers(space: Workspace) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(space.exported("bf16"), dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_export_in_another_dtype_rounds_once_and_says_so(space: Workspace) -> None:
    source, exported = space.source("llama3-untied"), space.exported("llama3-bf16")
    written = load_file(exported / "model.safetensors")
    for name, value in load_file(source / "model.safetensors").items():
        assert torch.equal(written[name], value.bfloat16()), name
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_that_carry_nothing_are_left_out(space: Workspace) -> None:
    written = load_file(space.exported("ignorable") / "model.safetensors")
    assert written.keys() == load_file(space.source("qwen3-tied") / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bad-missing", ["model.layers.1.self_attn.k_norm.weight is missing"]),
        ("bad-unknown", ["model.layers.0.self_attn.q_proj.lora is unknown for qwen3"]),
        ("bad-shape", ["model.layers.1.self_attn.k_norm.weight has shape [8], but config.json makes it [16]"]),
        ("bad-head", ["lm_head.weight differs from model.embed_tokens.weight"]),
        ("no-qk-norm", ["the model has no parameter decoder.layers.self_attention.q_layernorm.weight of layer 0"]),
        ("more-layers", ["decoder.layers.mlp.linear_fc2.weight of layer 3 is unknown"]),
        ("fewer-layers", ["the model has no parameter decoder.layers.mlp.linear_fc2.weight of layer 3"]),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(space: Workspace, case: str, words: list[str]) -> None:
    messages = set(space.results[case])
    assert len(messages) == 1
    assert all(word in messages.copy().pop() for word in words), messages
    assert not space.exported("never").exists() and not (space.folder / "never").exists()


def test_round_trip_under_an_interleaved_pipeline(space: Workspace) -> None:
    assert space.results["virtual"] == [2] * NUM_RANKS
    assert compare_weights(space.source("qwen3-untied"), space.exported("virtual")) == []


def test_megatron_parses_the_flags_as_they_are_meant(space: Workspace) -> None:
    flags, parsed = space.results["flags"][0]
    assert parsed == flags


def test_a_disk_that_can_not_be_written_is_an_error_on_every_rank(space: Workspace) -> None:
    messages = set(space.results["no-disk"])
    assert len(messages) == 1 and "config.json" in messages.pop()


def test_an_existing_folder_is_never_written_over(space: Workspace) -> None:
    assert len(set(space.results["output-exists"])) == 1
    assert "exists and is never written over" in space.results["output-exists"][0]


def test_an_export_that_would_lose_a_tensor_is_refused(space: Workspace) -> None:
    assert all("q_proj.lora would be lost" in message for message in space.results["lost-tensor"])
    assert not space.exported("never").exists()
