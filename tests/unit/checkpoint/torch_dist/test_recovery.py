"""Which checkpoint an interrupted training goes on from, whatever a kill or a full disk left."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_erpd.checkpoint import write_checkpoint
from megatron_erpd.checkpoint.torch_dist.iterations import TRACKER, iteration_folder, latest_iteration
from megatron_erpd.checkpoint.torch_dist.recovery import damage, recover
from megatron_erpd.errors import CheckpointError
from tests.distributed.checkpoint.tiny_models import save_hf_model


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_hf_model("qwen3-tied", folder)
    return folder


@pytest.fixture
def checkpoint(hf_folder: Path, tmp_path: Path) -> Path:
    """Steps 10, 20 and 30, the last one tracked."""
    folder = tmp_path / "megatron"
    for step in (10, 20, 30):
        write_checkpoint(hf_folder, iteration_folder(folder, step), dict, file_bytes=15_000)
    (folder / TRACKER).write_text("30")
    return folder


def cut_off(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut_off, r"__1_0\.distcp is cut off: \d+ of \d+ bytes"),
    "missing": (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "unfinished": (lambda folder: (folder / "metadata.json").unlink(), "its save was not finished"),
    "metadata": (lambda folder: (folder / ".metadata").write_bytes(b"\x80"), "not the metadata of a torch_dist"),
}


def test_a_whole_checkpoint_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    assert recover(checkpoint, tmp_path / "aside") is None
    assert latest_iteration(checkpoint) == 30 and not (tmp_path / "aside").exists()


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert recover(tmp_path / "megatron", tmp_path / "aside") is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_a_damaged_one_is_taken(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    DAMAGE[kind][0](iteration_folder(checkpoint, 30))
    note = recover(checkpoint, tmp_path / "aside")
    assert note is not None and "step 30 is damaged" in note and "resuming from step 20" in note
    assert latest_iteration(checkpoint) == 20
    assert (tmp_path / "aside" / "iter_0000030").is_dir() and not iteration_folder(checkpoint, 30).exists()
    assert recover(checkpoint, tmp_path / "aside") is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_wrong_is_said(checkpoint: Path, kind: str) -> None:
    work, words = DAMAGE[kind]
    folder = iteration_folder(checkpoint, 30)
    assert damage(folder) is None
    work(folder)
    found = damage(folder)
    assert found is not None and re.search(words, found)


@pytest.mark.parametrize("text", ["", "garbage\n", "40", "\x00\x00"])
def test_a_tracker_that_names_nothing_is_mended(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (checkpoint / TRACKER).write_text(text)
    note = recover(checkpoint, tmp_path / "aside")
    assert note is not None and "named no checkpoint that is there" in note and "resuming from step 30" in note
    assert latest_iteration(checkpoint) == 30


def test_a_later_save_that_is_not_tracked_yet_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / TRACKER).write_text("20")
    cut_off(iteration_folder(checkpoint, 30))
    assert recover(checkpoint, tmp_path / "aside") is None and latest_iteration(checkpoint) == 20


def test_a_first_save_that_was_cut_off_is_begun_anew(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / TRACKER).unlink()
    for step in (10, 20, 30):
        (iteration_folder(checkpoint, step) / "metadata.json").unlink()
    assert recover(checkpoint, tmp_path / "aside") is None


def test_without_a_whole_one_every_problem_is_told(checkpoint: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        cut_off(iteration_folder(checkpoint, step))
    with pytest.raises(CheckpointError, match=r"(?s)delete the stage's folder.*step 30: .*step 20: .*step 10: "):
        recover(checkpoint, tmp_path / "aside")
    assert iteration_folder(checkpoint, 30).is_dir()


def test_two_damaged_ones_of_one_step_are_both_kept(checkpoint: Path, hf_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        cut_off(iteration_folder(checkpoint, 30))
        recover(checkpoint, tmp_path / "aside")
        write_checkpoint(hf_folder, iteration_folder(checkpoint, 30), dict, file_bytes=15_000)
        (checkpoint / TRACKER).write_text("30")
    assert {path.name for path in (tmp_path / "aside").iterdir()} == {"iter_0000030", "iter_0000030.2"}


def test_a_flipped_bit_is_found_where_megatron_recorded_checksums(checkpoint: Path, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    folder = iteration_folder(checkpoint, 30)
    save_integrity_manifest(str(folder))
    assert damage(folder, checksums=True) is None
    shard = folder / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert damage(folder) is None
    found = damage(folder, checksums=True)
    assert found is not None and "__0_0.distcp" in found
    note = recover(checkpoint, tmp_path / "aside", checksums=True)
    assert note is not None and "resuming from step 20" in note
