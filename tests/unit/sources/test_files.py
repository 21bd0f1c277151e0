"""Every way in which rows may come, against the same rows as JSON lines; and what is refused by name."""

import bz2
import gzip
import json
import lzma
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RolloutError
from megatron_erpd.sources.files import open_source
from megatron_erpd.sources.names import SourceName, local_path, parse_source
from megatron_erpd.sources.rows import TextRow, read_rows

ROOT = Path(__file__).parents[3]
# What the JSON reader of `datasets` changes: a date, keys that rows lack, 64-bit integers, types that differ by row,
# line ends of Unicode, numbers as text.
ROWS: list[dict[str, Any]] = [
    {"prompt": "a\u2028b\x85c\x0bd", "answer": "2024-01-01", "n": 2**63 - 1, "meta": {"x": 1}},
    {"prompt": "b", "answer": "007", "n": -1, "meta": {"y": [1, 2]}},
    {"prompt": "ü", "answer": "1e-05", "n": 0, "meta": {}},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def rows_of(source: str | Path) -> list[dict[str, Any]]:
    found = [row for path in open_source(source).files for _, row in read_rows(path)]
    assert not [row for row in found if isinstance(row, RowProblem)]
    return found  # type: ignore[return-value]


def array(rows: list[dict[str, Any]], **options: Any) -> bytes:
    return json.dumps(rows, **options).encode()


CONTENTS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES.replace(b"\n", b"\r\n").rstrip(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "lines.json": LINES,
    "array.json": array(ROWS),
    "pretty.json": b"\n " + array(ROWS, indent=2),
    "ascii.json": array(ROWS, ensure_ascii=True, separators=(",", ":")),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "object-pretty.json": json.dumps({"version": [1], "data": ROWS}, indent=1).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "members.jsonl.gz": b"".join(map(gzip.compress, LINES.splitlines(keepends=True))),
    "a.jsonl.bz2": bz2.compress(LINES[:60]) + bz2.compress(LINES[60:]),
    "a.json.xz": lzma.compress(array(ROWS)[:60]) + lzma.compress(array(ROWS)[60:]),
    "a.jsonl.zst": zstd(LINES[:60]) + zstd(LINES[60:]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_comes_back_as_it_was_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert rows_of(tmp_path / name) == ROWS


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**row, "meta": json.dumps(row["meta"])} for row in ROWS])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        found = list(read_rows(tmp_path / name, ("prompt", "n")))
        assert found == [
            (f"{tmp_path / name}: row {i}", {"prompt": r["prompt"], "n": r["n"]}) for i, r in enumerate(ROWS)
        ]
        assert rows_of(tmp_path / name) == table.to_pylist()


def test_csv_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,answer\n"two\nlines, and ""quotes""",007\n\nb,\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("prompt\tanswer\nx,y\t1e-05\n")
    places, rows = zip(*read_rows(tmp_path / "a.csv"), strict=True)
    assert rows == ({"prompt": 'two\nlines, and "quotes"', "answer": "007"}, {"prompt": "b", "answer": ""})
    assert places == (f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:5") and all(isinstance(row, TextRow) for row in rows)
    assert rows_of(tmp_path / "a.tsv") == [{"prompt": "x,y", "answer": "1e-05"}]


def test_what_datasets_saved(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    one, other = datasets.Dataset.from_list([{"a": 1}, {"a": 2}]), datasets.Dataset.from_list([{"a": 3}])
    one.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"of a map")
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")
    # Columns whose types differ by row are JSON text in Arrow.
    (tmp_path / "mixed.jsonl").write_text('{"a": 1}\n{"a": "x"}\n{"a": {"k": [1]}}\n')
    mixed = datasets.load_dataset(
        "json", data_files=str(tmp_path / "mixed.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    mixed.save_to_disk(tmp_path / "mixed")
    assert rows_of(tmp_path / "one") == [{"a": 1}, {"a": 2}]
    assert [p.name for p in open_source(tmp_path / "one").not_read] == [
        *("cache-0123.arrow", "dataset_info.json", "state.json")
    ]
    assert rows_of(f"{tmp_path}/both:test") == [{"a": 3}]
    assert rows_of(tmp_path / "mixed") == [{"a": 1}, {"a": "x"}, {"a": {"k": [1]}}]
    for source, message in (
        (f"{tmp_path}/both", "has several splits; its splits are test, train; name one"),
        (f"{tmp_path}/both:dev", "has no split 'dev'; its splits are test, train"),
        (f"{tmp_path}/one:train", "holds one saved data set, without splits"),
        (f"{tmp_path}/one@v1", "has no revisions"),
        (f"{tmp_path}/both:test@v1", "has no revisions"),
    ):
        with pytest.raises(RolloutError, match=message):
            open_source(source)


def test_folders_are_read_whole_and_the_rest_is_named(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    (inside / "sub" / "deep.jsonl").mkdir(parents=True)
    (inside / ".cache").mkdir()
    for name in (
        "b.jsonl",
        "a.JSONL",
        "test.jsonl",
        "sub/c.jsonl",
        "sub/deep.jsonl/d.jsonl",
        ".cache/e.jsonl",
        ".f.jsonl",
    ):
        (inside / name).write_text(json.dumps({"from": name}) + "\n")
    (inside / "g.jsonl.gz").write_bytes(gzip.compress(b'{"from": "g"}\n'))
    for name in ("README.md", "dataset_info.json", "sub/old.jsonl.lz4", "data.jsonl~", "x.parquet.gz"):
        (inside / name).write_text("nothing")
    (inside / "gone.jsonl").symlink_to(inside / "nowhere.jsonl")
    (inside / "loop").symlink_to(inside)
    opened = open_source(inside)
    assert [path.relative_to(inside).as_posix() for path in opened.files] == [
        *("a.JSONL", "b.jsonl", "g.jsonl.gz", "sub/c.jsonl", "sub/deep.jsonl/d.jsonl", "test.jsonl")
    ]
    assert [path.relative_to(inside).as_posix() for path in opened.not_read] == [
        *("README.md", "data.jsonl~", "dataset_info.json", "gone.jsonl", "sub/old.jsonl.lz4", "x.parquet.gz")
    ]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.txt").write_text("x")
    with pytest.raises(RolloutError, match=r"none: holds no file ending in .*\(it holds x.txt\)"):
        open_source(tmp_path / "none")


def repository(folder: Path) -> Path:
    """A data set as a hub has it, of two configurations and splits."""
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"question": f"{config} {split} {i}", "answer": f"#### {i}"} for i in range(2)]
            pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("train", "test"))
        for config in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_folder_with_configurations_and_splits(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    assert [row["question"] for row in rows_of(f"{folder}:main:test")] == ["main test 0", "main test 1"]
    assert len(open_source(f"{folder}:main:test").not_read) == 4
    for source, message in (
        (f"{folder}:main:dev", "has no split 'dev'; its splits are train, test; name one, as in .*:train"),
        (f"{folder}:other:train", "`datasets` can't open it .*'other' not found.*main"),
        (f"{folder}/README.md:train", "is a file and has no splits"),
        (f"{folder}", "holds files of several splits: test .*, train .*; name one"),
    ):
        with pytest.raises(RolloutError, match=message):
            open_source(source)


HUB_TEST = """
import sys
from megatron_erpd.sources.files import open_source
from megatron_erpd.sources.rows import read_rows
from megatron_erpd.errors import RolloutError
for source in sys.argv[1:]:
    try:
        print([row["question"] for path in open_source(source).files for _, row in read_rows(path)])
    except RolloutError as error:
        print(error)
"""


def test_names_are_read_from_the_hubs_cache(tmp_path: Path) -> None:
    """In a process of its own: the libraries read these variables when they are imported."""
    home, commit, branch = tmp_path / "home", "a" * 40, "b" * 40
    snapshots = home / "hub" / "datasets--some--set" / "snapshots"
    repository(snapshots / commit)
    (repository(snapshots / branch) / "main" / "train-00000-of-00001.parquet").rename(
        snapshots / branch / "main" / "train-00000-of-00002.parquet"
    )
    for name, digest in (("main", commit), ("refs/pr/1", branch)):
        path = snapshots.parent / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest)
    sources = ("some/set:main:train", f"some/set:socratic:test@{commit}", "some/set:main:train@refs/pr/1")
    sources += (f"some/set:main:train@{'c' * 40}", "some/set:train", "some/set", "other/set:train")
    # What `datasets` prepared, of two configurations.
    for config in ("main", "other"):
        prepared = home / "datasets" / "third___set" / config / "0.0.0" / ("d" * 40)
        prepared.mkdir(parents=True)
        table = pa.table({"question": [f"prepared {config}"]})
        with pa.ipc.new_stream(prepared / "set-train.arrow", table.schema) as writer:
            writer.write_table(table)
        info = {
            "features": {"question": {"dtype": "string", "_type": "Value"}},
            "splits": {"train": {"name": "train", "num_bytes": 9, "num_examples": 1, "dataset_name": "set"}},
            **{"builder_name": "parquet", "dataset_name": "set", "config_name": config},
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        }
        (prepared / "dataset_info.json").write_text(json.dumps(info))
    sources += ("third/set:main:train", "third/set:train", "third/set:main:test", "third/set:main:train@v1")
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HUB_TEST, *sources], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "['main train 0', 'main train 1']" and lines[1] == "['socratic test 0', 'socratic test 1']"
    assert "the cache holds 1 of the 2 files train-*" in lines[2]
    assert "can't open it" in lines[3] and "Hub" in lines[3]
    assert "can't open it" in lines[4] and "main" in lines[4]
    assert lines[5].startswith(
        "some/set: no such file or folder; give a file or a folder, or a data set of the hub with"
    )
    assert "can't open it" in lines[6]
    assert lines[7] == "['prepared main']"
    assert "There are multiple 'third/set' configurations in the cache" in lines[8]
    assert "has no split 'test'; its splits are train" in lines[9]
    assert "revision v1 is not in the cache (which has dddd" in lines[10] and len(lines) == 11


@pytest.mark.parametrize(
    ("text", "expected", "path"),
    [
        ("data/x.jsonl", SourceName("data/x.jsonl"), "data/x.jsonl"),
        (
            "data/x.jsonl?prompt=q&answer=a",
            SourceName("data/x.jsonl", fields={"prompt": "q", "answer": "a"}),
            "data/x.jsonl",
        ),
        ("a/b:train", SourceName("a/b", None, "train"), None),
        ("gsm8k:main:train@v1?prompt=q", SourceName("gsm8k", "main", "train", "v1", {"prompt": "q"}), None),
        ("a/b:main:train@refs/pr/1", SourceName("a/b", "main", "train", "refs/pr/1"), None),
        ("data/x.jsonl:train", SourceName("data/x.jsonl", None, "train"), "data/x.jsonl"),
        ("runs/x/prepare/data:train", SourceName("runs/x/prepare/data", None, "train"), "runs/x/prepare/data"),
        ("a/b:c:d:e", SourceName("a/b:c:d:e"), "a/b:c:d:e"),
        ("a@b/x.jsonl", SourceName("a", None, None, "b/x.jsonl"), "a"),
    ],
)
def test_how_sources_are_written(text: str, expected: SourceName, path: str | None) -> None:
    assert parse_source(text) == expected
    assert local_path(text) == (None if path is None else Path(path))


def test_existing_paths_come_before_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/b:train").write_text("x")
    assert local_path("a/b:train") == Path("a/b:train")
    Path("x?y@z:w.jsonl").write_bytes(LINES)
    assert rows_of("x?y@z:w.jsonl") == ROWS
    for empty in ("", " "):
        with pytest.raises(RolloutError, match="is empty; give a file"):
            local_path(empty)


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
PROBLEMS: list[tuple[bytes, str]] = [
    (b'{"a": 1', "isn't JSON"),
    (b'{"a": 1}{"a": 2}', "isn't JSON"),
    (b"[1]", "is a JSON list, expected an object"),
    (b"null", "is a JSON NoneType"),
    (b'{"a": 1, "b": {"k": 1, "k": 2}}', "has the key 'k' twice"),
    (b'{"a": "caf\xe9"}', r"isn't UTF-8 \(byte 0xe9 at 10\)"),
    (b'{"a": "\xed\xa0\xbd"}', "isn't UTF-8"),
    (b'{"a": ' + b"1" * 5000 + b"}", "holds a number that can't be read"),
    (DEEP, "nested too deeply"),
    (b'{"a": "x\x00"}', "isn't JSON"),
]


@pytest.mark.parametrize(("line", "message"), PROBLEMS, ids=range(len(PROBLEMS)))
def test_a_line_that_can_not_be_read_is_a_problem_of_its_own(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    found = list(read_rows(path))
    assert [place for place, _ in found] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert found[0][1] == {"a": 1} and found[2][1] == {"a": 3}
    with pytest.raises(RowProblem, match=message):
        raise found[1][1]  # type: ignore[misc]
    # As an element of an array: an object that is none, or has a key twice, can be passed over; broken JSON can't.
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1},\n' + line + b',\n{"a": 3}]')
    try:
        rows = [row for _, row in read_rows(path)]
    except RolloutError as error:
        assert str(error).startswith(f"{path}: row ")
    else:
        assert isinstance(rows[1], RowProblem) and rows[2] == {"a": 3}


def test_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    found = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert found[0] == {"a": "ok"} and found[2] == {"a": "fine"} and isinstance(found[1], RowProblem)


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


LONG = b"".join(json.dumps({"a": os.urandom(20).hex()}).encode() + b"\n" for _ in range(2000))
FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"\xff\xfe\x00\x00{\x00\x00\x00", "is UTF-32"),
    ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl:1: is UTF-16; convert it to UTF-8"),
    ("a.csv", b"\xfe\xff\x00p", "is UTF-16"),
    ("a.jsonl", b"PAR1....", "is a .parquet file by its content; rename it"),
    ("a.parquet", b'{"a": 1}\n', "can't be read as Parquet"),
    ("a.parquet", b"", "can't be read as Parquet"),
    ("a.arrow", b'{"a": 1}\n', "can't be read as Arrow"),
    ("a.arrow", b"", "a.arrow: "),
    ("a.jsonl", gzip.compress(LINES), "is a .gz file by its content; rename it"),
    ("a.jsonl.gz", zstd(LINES), "is a .zst file by its content"),
    ("a.jsonl.gz", LINES, "can't be read at its beginning"),
    ("a.jsonl.gz", b"", "is empty, without even the header"),
    ("a.jsonl.gz", truncated(gzip.compress(LONG)), r"can't be read after .*a.jsonl.gz:\d+ \(.*is it complete"),
    ("a.jsonl.bz2", truncated(bz2.compress(LONG)), "can't be read"),
    ("a.jsonl.xz", truncated(lzma.compress(LONG)), "can't be read"),
    ("a.jsonl.zst", truncated(zstd(LONG)), "can't be read .*Truncated"),
    ("a.jsonl.zst", zstd(LINES) + b"rest", "can't be read"),
    ("a.csv.gz", truncated(gzip.compress(b"a,b\n" + b"1,2\n" * 50_000)), "can't be read"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
    ("a.json", b"PK\x03\x04....", "is a zip archive"),
    ("a.json", b'[{"a": 1}, {"a": 2}', "row 2: .*the array's end is missing"),
    ("a.json", b'[{"a": 1} {"a": 2}]', "row 1: a comma is missing"),
    ("a.json", b'[{"a": 1},]', "row 1: isn't JSON"),
    ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "row 1: there is more after the array's end"),
    ("a.json", b'[{"a": "\xe9"}]', "row 0: isn't UTF-8"),
    ("a.csv", b"a,a\n1,2\n", "the column 'a' occurs twice"),
    ("a.csv", b'a,b\n1,"2\n', "isn't CSV"),
    ("a.csv", b"caf\xe9,b\n1,2\n", "a.csv:1: isn't UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RolloutError, match=message):
        list(read_rows(open_source(path).files[0]))


def test_csv_rows_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1\n1,2,3\ncaf\xe9,2\n3,4\n")
    found = dict(read_rows(path))
    assert found.pop(f"{path}:5") == {"a": "3", "b": "4"}
    assert [str(row) for row in found.values()] == [
        "line: has 1 cells, the first line 2 names; quote cells that hold the separator",
        "line: has 3 cells, the first line 2 names; quote cells that hold the separator",
        "line: isn't UTF-8 (byte 0xe9); convert the file to UTF-8",
    ]


def test_other_things_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    os.mkdir(tmp_path / "latin1")
    open(os.fsencode(tmp_path / "latin1") + b"/caf\xe9.jsonl", "wb").close()
    with pytest.raises(RolloutError, match="its name isn't UTF-8; rename it"):
        open_source(tmp_path / "latin1")
    for name, message in (("pipe.jsonl", "a pipe"), ("gone.jsonl", "a broken link"), ("a.txt", "must end in .jsonl")):
        with pytest.raises(RolloutError, match=message):
            open_source(tmp_path / name)


def writers() -> dict[str, Callable[[Path, int], None]]:
    row = json.dumps({"a": "x" * 1000, "b": [1, 2, 3]})

    def lines(path: Path, count: int) -> None:
        path.write_text((row + "\n") * count)

    def compressed(path: Path, count: int) -> None:
        path.write_bytes(gzip.compress(((row + "\n") * count).encode(), 1))

    def elements(path: Path, count: int) -> None:
        path.write_text("[" + ",".join([row] * count) + "]")

    def cells(path: Path, count: int) -> None:
        path.write_text("a,b\n" + f'{"x" * 1000},"[1, 2, 3]"\n' * count)

    return {"a.jsonl": lines, "a.jsonl.gz": compressed, "a.json": elements, "a.csv": cells}


@pytest.mark.parametrize("name", writers())
def test_large_files_are_streamed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writers()[name](path, 30_000)  # 30 MB as text
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in read_rows(path)) == 30_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KiB


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"), "train .*test|test .*train"),
        (("data/train/0.jsonl", "data/val/0.jsonl"), "train"),
        (("math_dev.jsonl", "math_train.jsonl"), "validation .*train"),
        (("step_1.jsonl", "step_2/train.jsonl"), None),
        (("latest-1.jsonl", "retrained.jsonl", "devices.jsonl"), None),
        (("test_cases/1.jsonl", "test_cases/2.jsonl"), None),
    ],
)
def test_splits_in_a_folder_are_not_read_together(tmp_path: Path, names: tuple[str, ...], splits: str | None) -> None:
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text('{"prompt": "a"}\n')
    if splits is None:
        assert len(open_source(tmp_path / "set").files) == len(names)
        return
    with pytest.raises(RolloutError, match=f"set: holds files of several splits: .*({splits}).*name one"):
        open_source(tmp_path / "set")
