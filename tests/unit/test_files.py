"""Files that are seen whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.files import (
    check_output,
    check_output_file,
    new_file,
    new_folder,
    partial_folder,
    write_json,
    write_text,
)


def no_room() -> OSError:
    """What a write says on a full disk: it names no file."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_former_content_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.txt"
    write_text(path, "former ∑\n")
    with new_file(path) as temporary:
        temporary.write_bytes(b"half of")
        assert path.read_text(encoding="utf-8") == "former ∑\n"
        temporary.write_bytes(b"all of it")
    assert path.read_bytes() == b"all of it" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_given_once_where_nothing_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    path = tmp_path / "file.txt"
    with new_file(path, replace=False) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileExistsError), new_file(path, replace=False) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_its_name_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    partial_folder(path).mkdir(parents=True)
    (partial_folder(path) / "left").touch()
    with pytest.raises(KeyboardInterrupt), new_folder(path) as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with new_folder(path) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("whole")
        assert not path.exists()
    assert [str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()] == ["folder/inner/file"]


@pytest.mark.parametrize("error", [no_room(), KeyboardInterrupt()])
def test_a_failure_leaves_the_former_content_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "former")
    with pytest.raises(type(error)), new_file(path) as temporary:
        temporary.write_text("half of")
        raise error
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(OSError) as raised, new_file(path):
        raise no_room()
    assert raised.value.filename == str(path)
    (tmp_path / "folder" / "in").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as raised:
        write_text(tmp_path / "folder", "text")
    assert raised.value.filename == str(tmp_path / "folder") and raised.value.filename2 is None
    other = tmp_path / "other" / "missing"
    with pytest.raises(FileNotFoundError) as raised, new_file(path):
        other.read_text()
    assert raised.value.filename == str(other)
    assert not path.exists()


def test_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, 2.5]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n "a": [\n  1,\n  2.5\n ]\n}\n'
    write_json(path, {"a": Path("b")}, default=str)
    assert path.read_text() == '{\n "a": "b"\n}\n'


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A file, a link to nothing, and an empty folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("folder", ["folder", "folder/new/newer", "made"])
def test_a_folder_that_can_be_written_is_left_as_it_was(places: Path, folder: str) -> None:
    before = sorted(places.rglob("*"))
    check_output(places / folder)
    check_output_file(places / "folder" / "figures.json")
    check_output_file(places / "file")
    check_output_file(Path("/dev/null"))
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory in .*file"),
        ("link", "Not a directory"),
        ("folder/" + 300 * "n", "too long"),
        ("/proc/new/folder", "in /proc"),
    ],
)
def test_a_folder_that_can_not_be_written(places: Path, folder: str, why: str) -> None:
    with pytest.raises(RecipeError, match=f"{folder}: can't be written .*{why}.*give another folder"):
        check_output(places / folder)


@pytest.mark.parametrize("file", ["folder", "file/below", "nowhere/f.json", "/proc/f.json", "/proc/new/f.json"])
def test_a_file_that_can_not_be_written(places: Path, file: str) -> None:
    with pytest.raises(RecipeError, match=r"can't be written .*give"):
        check_output_file(places / file)


def test_a_disk_that_is_full_is_no_matter_of_permissions(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**where: object) -> str:
        raise no_room()

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(OSError, match="No space"):
        check_output(places / "folder")
