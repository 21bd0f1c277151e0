"""Whether policies and rollouts can be compared token by token: one architecture, one vocabulary, one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_erpd.checkpoint.mapping.config import model_flags
from megatron_erpd.data.batch import open_rollouts
from megatron_erpd.data.rewards import with_rewards
from megatron_erpd.data.rollouts import Rollouts
from megatron_erpd.errors import CheckpointError, RolloutError
from megatron_erpd.manifest import read_manifest
from megatron_erpd.model.arguments import rank
from megatron_erpd.sources.tokenizer import check_policies, check_rollouts, has_tokenizer

_MAY_DIFFER = ("max_position_embeddings",)
SOURCE_POLICY = "policy_fingerprint"
"""In the summary of an import: `policy_fingerprint` of the model's folder, which rollouts sampled from it have too."""


def check_compatible(policies: Mapping[str, Path]) -> None:
    """Every policy must be readable as the base is: all are built from the base's configuration and see its tokens.

    Args:
        policies: name to artifact, `base` among them; each holds `hf/`.

    Raises:
        CheckpointError: a policy has another vocabulary size (padding rows follow from it), another architecture or
            another tokenizer than the base; names both folders and what differs.
    """
    base = policies["base"]
    expected = model_flags(base / "hf")
    for name, folder in policies.items():
        if folder == base:
            continue
        found = model_flags(folder / "hf")
        # The vocabulary first: it is what most often differs, and the reason for many other differences.
        for key in sorted(expected, key=lambda key: key != "vocab_size"):
            if key not in _MAY_DIFFER and found.get(key) != expected[key]:
                raise CheckpointError(
                    f"policy {name!r} {folder} has {key} {found.get(key)}, the base {base} has {expected[key]}: their "
                    "log-probs can't be compared; give a policy that was trained from this base"
                )
        _check_tokenizer(name, folder, base)


def _check_tokenizer(name: str, folder: Path, base: Path) -> None:
    ours, theirs = folder / "hf", base / "hf"
    if has_tokenizer(ours) != has_tokenizer(theirs):
        without, other = (theirs, ours) if has_tokenizer(ours) else (ours, theirs)
        raise CheckpointError(
            f"policy {name!r}: {without} holds no tokenizer and {other} does, so nothing tells whether their token "
            "ids mean the same; import it from a folder with its tokenizer"
        )
    if has_tokenizer(ours):
        check_policies(name, ours, theirs)


def check_data(rollouts: Rollouts, path: Path, base: Path) -> list[str]:
    """Whether rollouts are of a base policy's token ids.

    Args:
        rollouts: read from `path`.
        base: artifact of the base policy.

    Returns:
        What people should know: where no tokenizer is recorded or the base has none, and where the rollouts were
        sampled from another model than the base was imported from.

    Raises:
        RolloutError: they were made with another tokenizer than the base's.
        CheckpointError: the base's tokenizer can't be loaded.
    """
    note = check_rollouts(rollouts, path, base / "hf")
    notes = [] if note is None else [note]
    sampled, imported = rollouts.file_metadata.get("policy"), read_manifest(base).summary.get(SOURCE_POLICY)
    if sampled and imported and sampled != imported:
        notes.append(
            f"{path}: was sampled from another model than {base} was imported from, so the sampler's log-probs are not "
            "those of the base; `megatron-erpd mismatch` says how far they are apart"
        )
    return notes


def load_data(path: Path, base: Path, scored: bool = True, rewards: Path | None = None) -> Rollouts:
    """The rollouts of a stage, checked against the model; with `scored`, those that a verifier has scored.

    Args:
        rewards: an artifact of `megatron-erpd score`, whose rewards take the place of the rollouts' own.

    Raises:
        StageError, RolloutError: the base isn't an artifact, or the rollouts can't be used with it.
        CheckpointError: the base's tokenizer can't be loaded.
    """
    read_manifest(base)
    flags = model_flags(base / "hf")
    rollouts = open_rollouts(path, int(flags["vocab_size"]), int(flags["max_position_embeddings"]))  # type: ignore[call-overload]
    if rank() == 0:  # its error ends the others
        for note in check_data(rollouts, path, base):
            print(f"note: {note}", flush=True)
    if rewards is not None:
        rollouts = with_rewards(rollouts, path, rewards)
    if not scored:
        return rollouts
    kept = np.flatnonzero(~np.isnan(rollouts.rewards))
    if len(kept) == 0:
        raise RolloutError(f"{rewards or path}: no rollout has a reward; score them with `megatron-erpd score`")
    return rollouts if len(kept) == len(rollouts) else rollouts.select(kept)
