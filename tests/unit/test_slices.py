"""Slices: who has what, and what of them is there."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import MANIFEST
from megatron_erpd.slices import Slice, finished_slices, refuse_other_counts


@pytest.mark.parametrize("total, count", [(1, 1), (3, 2), (7, 3), (16, 16), (100, 7)])
def test_the_shares_are_all_of_it_and_alike(total: int, count: int) -> None:
    shares = [Slice(number, count).share(total) for number in range(1, count + 1)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/10000", "-1/3"])
def test_what_is_no_slice(text: str) -> None:
    assert str(Slice.parse("3/16")) == "3/16"
    with pytest.raises(argparse.ArgumentTypeError, match="write I/N"):
        Slice.parse(text)


@pytest.mark.parametrize("prefix", ["", "."])
def test_all_slices_of_one_number_must_be_finished(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(StageError, match="holds no slices; run the jobs with --slice 1/N"):
        finished_slices(tmp_path)
    folders = [tmp_path / f"{prefix}{Slice(number, 11).folder}" for number in range(1, 12)]
    for folder in folders:
        folder.mkdir()
        if folder != folders[2]:
            (folder / MANIFEST).touch()
    with pytest.raises(StageError, match=r"1 of 11 slices aren't finished, the first is \.?slice-0003-of-0011"):
        finished_slices(tmp_path)
    (folders[2] / MANIFEST).touch()
    assert finished_slices(tmp_path) == folders
    refuse_other_counts(tmp_path, Slice(4, 11))
    with pytest.raises(StageError, match="holds slices of 11, --slice 4/12 asks for 12"):
        refuse_other_counts(tmp_path, Slice(4, 12))
    (tmp_path / f"{prefix}{Slice(1, 2).folder}").mkdir()
    with pytest.raises(StageError, match="holds slices of 2 and of 11"):
        finished_slices(tmp_path)
