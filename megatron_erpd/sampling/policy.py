"""A policy as a Hugging Face folder holds it: model, tokenizer and the tokens that end a response."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from megatron_erpd.content import is_junk
from megatron_erpd.errors import CheckpointError
from megatron_erpd.model_folder import read_tensors, refuse_adapter, weight_files
from megatron_erpd.sources.tokenizer import load_tokenizer, without_end

_WHOLE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**16


@dataclass(frozen=True)
class Policy:
    """A loaded causal language model, in evaluation mode on one device.

    Attributes:
        model: a transformers causal LM (`...ForCausalLM`).
        tokenizer: its tokenizer.
        stop_token_ids: ids that end a response, from the generation config, the model's config and the tokenizer.
        pad_token_id: fills rows of a batch; never read by the model.
        path: the folder.
    """

    model: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    path: Path

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, where its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def holds_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return bool(getattr(self.model.config, "num_experts", 0))


def load_policy(
    hf_path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Policy:
    """Loads a Hugging Face folder.

    Args:
        hf_path: a local folder with `config.json`, safetensors weights and a tokenizer.
        device: default: CUDA where there is one, else the CPU.
        dtype: of the weights; default: that of the checkpoint on CUDA, float32 on a CPU.

    Raises:
        CheckpointError: the folder, its weights or its tokenizer are missing or can't be read, or programs would
            choose different files as its weights (`model_folder.weight_files`).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype if dtype is not None else (torch.float32 if place.type == "cpu" else "auto")
    folder = _checked_folder(hf_path)
    read_tensors(folder)
    tokenizer = load_tokenizer(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: can't be loaded as a causal language model: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model.to(place).eval()
    stop = _stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    return Policy(model, tokenizer, stop, pad, folder)


def reload_weights(policy: Policy, hf_path: str | Path) -> None:
    """Takes the weights of another folder of the same architecture into a loaded policy, in place.

    Raises:
        CheckpointError: the folder lacks a weight of the model, or holds one that the model hasn't or of another shape.
    """
    folder = _checked_folder(hf_path)
    weight_files(folder)
    found = _experts_joined(policy, folder) if policy.holds_experts else _as_stored(policy, folder)
    own = policy.model.state_dict()
    written = {own[name].data_ptr() for name in found if name in own}
    # A tied weight is stored under one of its names.
    missing = [name for name, value in own.items() if name not in found and value.data_ptr() not in written]
    foreign = [name for name, value in found.items() if name not in own or own[name].shape != value.shape]
    if missing or foreign:
        raise CheckpointError(
            f"{folder}: doesn't fit the policy that was loaded from {policy.path}: {(missing or foreign)[0]} is "
            f"{'missing' if missing else 'unknown or of another shape'}"
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def _as_stored(policy: Policy, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        found |= load_file(path, device=str(policy.device))
    return found


def _experts_joined(policy: Policy, folder: Path) -> dict[str, torch.Tensor]:
    """A mixture's weights as the library holds them: the experts of a layer, apart on disk, are one tensor."""
    from transformers import AutoModelForCausalLM

    unfit = f"{folder}: doesn't fit the policy that was loaded from {policy.path}"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=policy.model.dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an expert is missing or of another shape
        raise CheckpointError(f"{unfit}: {error}") from error
    amiss = [*report["missing_keys"], *report["unexpected_keys"]]
    if amiss:
        raise CheckpointError(f"{unfit}: {amiss[0]} is missing or unknown")
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def policy_fingerprint(hf_path: str | Path) -> str:
    """A digest that tells two policies apart without reading all of their weights.

    It covers the names and sizes of the folder's JSON files and weights, the whole of small files, and the head of
    large ones together with 64 evenly spaced blocks: weights that were trained further differ in every block.
    It doesn't depend on where the folder lies or when it was written, nor on hidden files and those never read.

    Raises:
        CheckpointError: from `model_folder.weight_files`.
    """
    folder = _checked_folder(hf_path)
    digest = hashlib.sha256()
    described = [p for p in folder.glob("*.json") if p.name != "manifest.json" and not is_junk(PurePath(p.name))]
    for path in sorted([*described, *weight_files(folder)]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(64):
                file.seek(block * (size - _BLOCK_BYTES) // 63)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _checked_folder(hf_path: str | Path) -> Path:
    folder = Path(hf_path)
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            refuse_adapter(folder)
        raise CheckpointError(f"{folder}: isn't a Hugging Face model folder (no config.json); give a local folder")
    return folder


def _stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Chat models name several (end of turn, end of text) and spread them over three places."""
    ids: list[int] = []
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and token not in ids:
                ids.append(int(token))
    if not ids:
        raise without_end(model.config.name_or_path)
    return tuple(ids)
