"""What the recipes for GPUs train with, at every layout: bf16, distributed optimizer, overlapped gradient reduction.

The reference is written in plain PyTorch on transformers' model: bf16 weights forward and backward, gradients summed
in fp32, AdamW on fp32 master weights. The same in fp32 throughout says what bf16 costs. Megatron's gradient of the
first step is read from the checkpoint: Adam's first moment is (1 - beta_1) times it (clipped), in fp32 and under the
parameter's name, whatever the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from megatron_erpd.checkpoint.torch_dist.iterations import iteration_folder, latest_iteration
from megatron_erpd.data.rollouts import read_rollouts
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.test_resume_layouts import Part, metrics, train
from tests.integration.tiny import VOCAB_SIZE, write_mixture, write_model, write_random_rollouts
from tests.tolerances import (
    BF16_LOSS,
    BF16_NORM,
    FP32_LOSS,
    LAYOUT,
    MIN_BF16_COSINE,
    MIN_BF16_COSINE_EXPERTS,
    MIN_BF16_COSINE_UPDATE,
)

STEPS, ROLLOUTS = 20, 32
RATE, BETA_1, BETA_2, CLIP = 1e-4, 0.9, 0.95, 1.0
"""A step of 1e-4 is less than half of the distance of bf16 numbers near 0.3, which the weights are: without fp32 master
weights most of them would never change."""

GPU_RECIPE = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", "4000"]
"""Small buckets, as a large model has several; their ends are padded."""
LAYOUTS = {
    "one": (1, ["--micro-batch-size", "16"]),
    "dp2": (2, ["--data-parallel", "2", "--micro-batch-size", "8"]),
    "tp2-sequence-parallel": (2, ["--tensor-parallel", "2", "--sequence-parallel", "--micro-batch-size", "16"]),
    "pp2": (2, ["--pipeline-parallel", "2", "--micro-batch-size", "8"]),
    "cp2": (2, ["--context-parallel", "2", "--micro-batch-size", "16"]),
    "packed-cp2": (2, ["--context-parallel", "2", "--micro-batch-tokens", "128"]),
    "tp2-pp2": (
        4,
        ["--tensor-parallel", "2", "--sequence-parallel", "--pipeline-parallel", "2", "--micro-batch-size", "16"],
    ),
}
EXPERTS = (2, [*LAYOUTS["tp2-sequence-parallel"][1], "--expert-parallel", "2"])
SHORT = ("packed-cp2", "tp2-sequence-parallel")
LONG = [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]


class Reference(NamedTuple):
    """A training in plain PyTorch: all rollouts in every step."""

    losses: list[float]
    gradient: dict[str, Tensor]
    """Of the first step, before clipping, fp32, by Megatron's names."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_model(tmp_path_factory.mktemp("dense"), write_model)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_model(tmp_path_factory.mktemp("mixture"), write_mixture)


def with_model(folder: Path, write: Callable[[Path], Path]) -> Path:
    """A folder with rollouts, and a model and its checkpoint in bf16."""
    in_bf16(write(folder / "hf"))
    write_random_rollouts(folder / "rollouts.parquet", ROLLOUTS // 4, reward=1.0, shortest=4)
    run_ranks(run_stages, 1, [("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"])])
    return folder


def in_bf16(folder: Path) -> None:
    """Rounds a model's weights, as models are published: Megatron's master weights are those of the bf16 model."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Reference]:
    """Trainings in plain PyTorch, by folder and `bf16` or `fp32`; each is made once."""
    folder = tmp_path_factory.mktemp("references")
    return functools.cache(lambda made, dtype: reference(made, DTYPES[dtype], folder / f"{made.name}-{dtype}"))


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def reference(made: Path, dtype: torch.dtype, folder: Path) -> Reference:
    """Trains with forward and backward in this dtype, all else in fp32."""
    from transformers import AutoModelForCausalLM

    master = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=dtype)
    route_in_fp32(model)
    tokens, mask = sequences(made / "rollouts.parquet")
    optimizer = torch.optim.AdamW(master.parameters(), RATE, (BETA_1, BETA_2), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        model.load_state_dict(master.state_dict())
        logits = model(tokens[:, :-1]).logits.float()
        log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss = -(log_probs * mask[:, 1:]).sum() / mask[:, 1:].sum()
        model.zero_grad()
        loss.backward()
        for parameter, computed in zip(master.parameters(), model.parameters(), strict=True):
            assert computed.grad is not None
            parameter.grad = computed.grad.float()
        if step == 0:
            gradient = by_megatron_names(master, made, folder)
        clip_grad_norm_(master.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return Reference(losses, gradient)


def route_in_fp32(model: torch.nn.Module) -> None:
    """Lets a mixture's routers compute in fp32, as Megatron's do; transformers' compute in the dtype of the weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    for module in model.modules():
        if isinstance(module, Qwen3MoeTopKRouter):
            module.forward = functools.partial(_route, module)  # type: ignore[method-assign]


def _route(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[n, experts]`, and weights and numbers of the chosen experts `[n, top_k]`."""
    logits = hidden.reshape(-1, router.hidden_dim).float() @ router.weight.float().T
    weights, chosen = logits.softmax(-1).topk(router.top_k)
    return logits, (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype), chosen


def sequences(path: Path) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[b, s]` of all rollouts; what follows a rollout is seen by none of its tokens."""
    rollouts = read_rollouts(path)
    rows = [
        (torch.tensor(rollouts.prompt_tokens(i)).long(), torch.tensor(rollouts.response_tokens(i)).long())
        for i in range(len(rollouts))
    ]
    tokens = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.cat([torch.zeros(len(p)), torch.ones(len(r))]) for p, r in rows], batch_first=True)
    return tokens, mask


def by_megatron_names(model: torch.nn.Module, made: Path, folder: Path) -> dict[str, Tensor]:
    """A model's gradients in Megatron's tensors: those of a model that has them as its weights."""
    from transformers import AutoModelForCausalLM

    gradients = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(gradients.parameters(), model.parameters(), strict=True):
            assert theirs.grad is not None
            ours.copy_(theirs.grad)
    gradients.save_pretrained(folder / "hf")
    run_ranks(run_stages, 1, [("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/megatron"])])
    return weights(folder / "megatron")


def tensors(artifact: Path, iteration: int | None = None) -> dict[str, Tensor]:
    """All tensors of an artifact's checkpoint (the latest), whole, without the rows that pad the vocabulary."""
    checkpoint = artifact / "megatron"
    reader = FileSystemReader(iteration_folder(checkpoint, iteration or latest_iteration(checkpoint)))
    found = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in reader.read_metadata().state_dict_metadata.items()
        if hasattr(value, "size")
    }
    load(found, storage_reader=reader, no_dist=True)
    return {
        name: value[:VOCAB_SIZE] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else value
        for name, value in found.items()
    }


def weights(artifact: Path) -> dict[str, Tensor]:
    return {name: value for name, value in tensors(artifact).items() if not name.startswith("optimizer")}


def states(artifact: Path, state: str, iteration: int | None = None) -> dict[str, Tensor]:
    """`param` (the fp32 master weights), `exp_avg` or `exp_avg_sq` of all parameters, by their names."""
    prefix, found = f"optimizer.state.{state}.", tensors(artifact, iteration)
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def first_gradient(artifact: Path) -> dict[str, Tensor]:
    """The gradient of a training's first step, before clipping; the checkpoint of that step must be there."""
    scale = max(1.0, metrics(artifact)[0]["grad-norm"] / CLIP) / (1 - BETA_1)
    return {name: value * scale for name, value in states(artifact, "exp_avg", 1).items()}


def norm_of(gradient: Mapping[str, Tensor]) -> float:
    return torch.stack([value.norm() for value in gradient.values()]).norm().item()


def cosines(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {
        name: torch.cosine_similarity(ours[name].flatten().double(), theirs[name].flatten().double(), dim=0).item()
        for name in theirs
    }


def assert_same_gradient(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bounds: Mapping[str, float]) -> None:
    """Compares directions, by each parameter's smallest cosine, and norms: those that a factor of TP would change."""
    for name, value in cosines(ours, theirs).items():
        assert value > bounds[name], f"direction of {name}"
        BF16_NORM.assert_close(ours[name].norm(), theirs[name].norm(), f"norm of {name}")


def training(made: Path, layout: list[str], epochs: int, output: Path) -> list[str]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--output", str(output)]
    settings = ["--loss", "sft", "--global-batch-size", f"{ROLLOUTS}", "--learning-rate", f"{RATE}"]
    settings += ["--epochs", str(epochs), "--adam-beta1", f"{BETA_1}", "--adam-beta2", f"{BETA_2}"]
    return [*data, *settings, "--clip-gradient", f"{CLIP}", "--precision", "bf16", *layout, "--", *GPU_RECIPE]


@pytest.mark.parametrize("layout", LONG)
def test_bf16_training_is_that_of_fp32_master_weights(
    layout: str, made: Path, reference_of: Callable[[Path, str], Reference], tmp_path: Path
) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    ranks, flags = LAYOUTS[layout]
    stages: Stages = [("train", training(made, flags, 1, first)), ("train", training(made, flags, STEPS, last))]
    stages.append(("export", ["--checkpoint", f"policy={last}", "--output", f"{tmp_path}/export"]))
    stages.append(("import", ["--hf", f"{tmp_path}/export/policy", "--output", f"{tmp_path}/again"]))
    run_ranks(run_stages, ranks, stages)

    base, updated, moments = weights(made / "base"), states(first, "param"), states(first, "exp_avg")
    for name in DTYPES:
        expected = reference_of(made, name)
        losses = [row["stage1/loss"] for row in metrics(last)]
        (BF16_LOSS if name == "bf16" else FP32_LOSS).assert_close(losses, expected.losses, f"losses of {name}")
        total = norm_of(expected.gradient)
        assert_same_gradient(
            first_gradient(first), expected.gradient, dict.fromkeys(expected.gradient, MIN_BF16_COSINE)
        )
        assert metrics(first)[0]["grad-norm"] == pytest.approx(total, rel=BF16_LOSS.rtol)
    for name, step in adam_step({name: value / (1 - BETA_1) for name, value in moments.items()}).items():
        # From master weights that were those of the checkpoint in bf16.
        LAYOUT.assert_close(updated[name], base[name].float() - RATE * step, name)

    kept = weights(last)
    for name, value in states(last, "param").items():
        assert torch.equal(kept[name], value.bfloat16()), name
    assert all(value.dtype == torch.bfloat16 for value in kept.values())
    exported = load_file(tmp_path / "export" / "policy" / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in exported.values())
    again = weights(tmp_path / "again")
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@pytest.mark.long
def test_layouts_among_themselves(made: Path, reference_of: Callable[[Path, str], Reference], tmp_path: Path) -> None:
    """Prints (with `-s`) the figures that docs/method.md has of bf16 training: the smallest cosine of a parameter's
    gradient and of its first update, and the largest relative difference of a loss."""
    small_batches = (2, ["--data-parallel", "2", "--micro-batch-size", "4"])
    layouts = {**LAYOUTS, "dp2 again": LAYOUTS["dp2"], "dp2, micro-batches of 4": small_batches}
    runs = {name: reference_of(made, name) for name in DTYPES}
    for name, (processes, flags) in layouts.items():
        first, last = tmp_path / name / "first", tmp_path / name / "last"
        stages: Stages = [("train", training(made, flags, 1, first)), ("train", training(made, flags, STEPS, last))]
        run_ranks(run_stages, processes, stages)
        runs[name] = Reference([row["stage1/loss"] for row in metrics(last)], first_gradient(first))
    for name, run in runs.items():
        for other in ("bf16", "fp32", "one", "dp2"):
            gradient = min(cosines(run.gradient, runs[other].gradient).values())
            update = min(cosines(adam_step(run.gradient), adam_step(runs[other].gradient)).values())
            pairs = zip(run.losses, runs[other].losses, strict=True)
            loss = max(abs(ours / theirs - 1) for ours, theirs in pairs)
            print(f"figures: {name}, {other}: gradient {gradient:.5f}, update {update:.4f}, loss {loss:.1e}")
            if name not in DTYPES and other not in DTYPES:
                assert gradient > MIN_BF16_COSINE and loss < 0.1 * BF16_LOSS.rtol
    assert runs["dp2 again"].losses == runs["dp2"].losses
    assert all(torch.equal(value, runs["dp2"].gradient[key]) for key, value in runs["dp2 again"].gradient.items())


def adam_step(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The direction of Adam's first step: the sign of every entry, but for the smallest."""
    return {name: value / (value.abs() + 1e-8) for name, value in gradient.items()}


def run_parts(made: Path, output: Path, parts: list[Part]) -> Path:
    """Trains 10 steps in parts; returns the artifact."""
    argv = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--loss", "sft", "--precision", "bf16"]
    argv += ["--epochs", "5", "--global-batch-size", "16", "--learning-rate", f"{RATE}", "--save-interval", "2"]
    for part in parts:
        train("train", argv, output, part._replace(layout=[*part.layout, "--", *GPU_RECIPE]), output.parent)
    return output


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training under data parallelism, without an interruption."""
    return run_parts(made, tmp_path_factory.mktemp("whole") / "artifact", [Part(*LAYOUTS["dp2"])])


def test_bf16_training_resumes_bit_for_bit(made: Path, whole: Path, tmp_path: Path) -> None:
    parts = [Part(*LAYOUTS["dp2"], "signal", 3, 3), Part(*LAYOUTS["dp2"], "signal", 6, 6), Part(*LAYOUTS["dp2"])]
    resumed = run_parts(made, tmp_path / "artifact", parts)
    for name in ("stage1/loss", "grad-norm"):
        assert [row[name] for row in metrics(resumed)] == [row[name] for row in metrics(whole)], name
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
def test_bf16_training_resumes_under_another_layout(made: Path, whole: Path, tmp_path: Path) -> None:
    parts = [
        Part(*LAYOUTS["dp2"], "signal", 2, 2),
        Part(*LAYOUTS["tp2-sequence-parallel"], "signal", 4, 4),
        Part(*LAYOUTS["pp2"], "signal", 6, 6),
        Part(*LAYOUTS["cp2"], "signal", 8, 8),
        Part(*LAYOUTS["one"]),
    ]
    resumed = run_parts(made, tmp_path / "artifact", parts)
    for name in ("stage1/loss", "grad-norm"):
        BF16_LOSS.assert_close([row[name] for row in metrics(resumed)], [row[name] for row in metrics(whole)], name)
    base = {name: value.float() for name, value in weights(made / "base").items()}
    changes = [{name: value - base[name] for name, value in states(x, "param").items()} for x in (resumed, whole)]
    for name, value in cosines(*changes).items():
        assert value > MIN_BF16_COSINE_UPDATE, name


def test_bf16_training_of_experts_over_ranks_is_that_of_plain_pytorch(
    mixture: Path, reference_of: Callable[[Path, str], Reference], tmp_path: Path
) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    processes, flags = EXPERTS
    stages: Stages = [("train", training(mixture, flags, 1, first)), ("train", training(mixture, flags, STEPS, last))]
    run_ranks(run_stages, processes, stages)
    for name in DTYPES:
        expected = reference_of(mixture, name)
        losses = [row["stage1/loss"] for row in metrics(last)]
        (BF16_LOSS if name == "bf16" else FP32_LOSS).assert_close(losses, expected.losses, f"losses of {name}")
        bounds = dict.fromkeys(expected.gradient, MIN_BF16_COSINE_EXPERTS)
        assert_same_gradient(first_gradient(first), expected.gradient, bounds)


@pytest.mark.long
def test_bf16_training_of_experts_over_ranks_resumes_bit_for_bit(mixture: Path, tmp_path: Path) -> None:
    whole = run_parts(mixture, tmp_path / "whole", [Part(*EXPERTS)])
    resumed = run_parts(mixture, tmp_path / "resumed", [Part(*EXPERTS, "signal", 3, 3), Part(*EXPERTS)])
    ours, theirs = tensors(resumed), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = weights(whole)
    for name, value in states(whole, "param").items():
        assert torch.equal(kept[name], value.bfloat16()), name
