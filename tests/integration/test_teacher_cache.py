"""The ways to a teacher cache: several passes, slices, kept hidden states, interruptions; all give the same rows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_erpd.data.batch import length_groups
from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.errors import CacheError, RecipeError, StageError
from megatron_erpd.teacher_cache.reader import CacheReader
from tests import forked
from tests.distributed.harness import RankError, run_ranks
from tests.forked import REPOSITORY
from tests.integration.stages import Stages, make_round, run_stages
from tests.integration.tiny import write_random_rollouts
from tests.tolerances import HALF_PRECISION, LAYOUT

TARGET = ["--k", "8", "--delta", "0.05", "--topk-dtype", "float32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round with a teacher, and two caches: `whole`, and `hidden` with the hidden states."""
    folder = tmp_path_factory.mktemp("round")
    make_round(folder)
    training = ["--loss", "sapo", "--epochs", "2", "--global-batch-size", "8", "--micro-batch-size", "8"]
    training += ["--learning-rate", "3e-3"]
    data = ["--base", f"{folder}/base", "--rollouts", f"{folder}/rollouts.parquet"]
    log_probs = ["--base-log-probs", f"{folder}/base-log-probs"]
    stages: Stages = [
        ("train", [*data, *log_probs, *training, "--output", f"{folder}/teacher"]),
        ("precompute", [*policies(folder), *TARGET, "--output", f"{folder}/whole"]),
        ("precompute", [*policies(folder), *TARGET, "--keep-hidden", "--output", f"{folder}/hidden"]),
    ]
    run_ranks(run_stages, 1, stages)
    return folder


def policies(made: Path) -> list[str]:
    data = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet"]
    return [*data, "--policy", f"teacher={made}/teacher", "--micro-batch-size", "4"]


def rows(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """All that a cache holds, by sample and column."""
    cache = CacheReader(folder)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in cache.sample_ids():
        found[name] = {policy: np.array(cache.token_row(policy, name)) for policy in cache.meta.policies}
        if cache.meta.kind == "topk":
            found[name] |= {k: np.array(v) for k, v in cache.topk_row(name)._asdict().items()}
    return found


def assert_equal_rows(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    a, b = rows(ours), rows(theirs)
    assert a.keys() == b.keys() and a
    for name in b:
        for column, values in b[name].items():
            np.testing.assert_array_equal(a[name][column], values, err_msg=f"{name} {column}")


def precompute(*argv: str) -> None:
    run_ranks(run_stages, 1, [("precompute", list(argv))])


def test_nothing_but_the_cache_is_left(made: Path) -> None:
    tables, aside = {"log_probs.base", "log_probs.teacher", "topk"}, {"cache.json", "manifest.json", "metrics.jsonl"}
    assert {path.name for path in (made / "whole").iterdir()} == {*tables, *aside}
    kept = {*tables, "hidden.base", "hidden.teacher"}
    assert {path.name for path in (made / "hidden").iterdir()} == {*kept, *aside}


def test_passes_are_as_many_as_the_disk_asks_for(made: Path, tmp_path: Path) -> None:
    """With little free disk the rollouts are scored in several passes, and the rows are the same."""
    loads = run_ranks(
        _precompute_with_free_disk, 1, [*policies(made), *TARGET, "--output", f"{tmp_path}/cache"], 40_000
    )
    assert loads[0] >= 6, "base and teacher, at least three times"
    assert_equal_rows(tmp_path / "cache", made / "whole")


def assert_close_rows(ours: Path, theirs: Path) -> None:
    """Other batches: another order of sums."""
    a, b = rows(ours), rows(theirs)
    assert a.keys() == b.keys() and a
    for name in b:
        for column, values in b[name].items():
            if column != "indices":
                LAYOUT.assert_close(a[name][column].tolist(), values.tolist(), f"{name} {column}")


def _precompute_with_free_disk(rank: int, world_size: int, argv: list[str], free: int) -> int:
    from megatron_erpd.model import model
    from megatron_erpd.precompute import passes

    loads = []
    load, usage = model.load_weights, shutil.disk_usage

    def counted(*arguments: Any) -> int:
        loads.append(arguments)
        return load(*arguments)

    model.load_weights = counted  # type: ignore[assignment]
    passes.shutil.disk_usage = lambda path: usage(path)._replace(free=free)  # type: ignore[assignment]
    run_stages(rank, world_size, [("precompute", argv)])
    return len(loads)


def test_slices_make_the_same_cache(made: Path, tmp_path: Path) -> None:
    argv = [*policies(made), *TARGET, "--output", f"{tmp_path}/cache"]
    merge: Stages = [("precompute", [*argv, "--merge-slices"])]
    run_ranks(run_stages, 1, [("precompute", [*argv, "--slice", "1/3"]), ("precompute", [*argv, "--slice", "3/3"])])
    with pytest.raises(RankError, match=r"1 of 3 slices aren't finished, the first is slice-0002-of-0003"):
        run_ranks(run_stages, 1, merge)
    with pytest.raises(CacheError, match="is unfinished"):
        CacheReader(tmp_path / "cache")
    with pytest.raises(RankError, match="holds slices of 3, --slice 2/4 asks for 4"):
        precompute(*argv, "--slice", "2/4")
    run_ranks(run_stages, 2, [("precompute", [*argv, "--slice", "2/3", "--tensor-parallel", "2"])])
    run_ranks(run_stages, 1, merge)
    assert_close_rows(tmp_path / "cache", made / "whole")
    assert not [path.name for path in (tmp_path / "cache").rglob(".*")]
    settings = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "cache", made / "whole")]
    assert settings[0]["settings"] == settings[1]["settings"] and settings[0]["inputs"] == settings[1]["inputs"]
    # Stage 2 reads it as any other.
    student = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--epochs", "0.2"]
    student += ["--base-log-probs", f"{made}/base-log-probs", "--cache", f"{tmp_path}/cache", "--micro-batch-size", "8"]
    run_ranks(run_stages, 1, [("distill", [*student, "--global-batch-size", "8", "--output", f"{tmp_path}/student"])])


def test_verify_looks_at_every_row(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_erpd.commands.verify import verify

    shutil.copytree(made / "hidden", tmp_path / "cache")
    verify([f"{tmp_path}/cache", "--rollouts", f"{made}/rollouts.parquet"])
    assert "precompute, " in capsys.readouterr().out
    write_random_rollouts(tmp_path / "others.parquet", 3, seed=5)
    with pytest.raises(StageError, match="sample"):
        verify([f"{tmp_path}/cache", "--rollouts", f"{tmp_path}/others.parquet"])
    # A number changed in a row, and all checksums of files made to fit.
    part = next((tmp_path / "cache" / "log_probs.teacher").glob("part-*"))
    content = bytearray(part.read_bytes())
    value = np.array(CacheReader(made / "hidden").token_row("teacher", rows_in(part)[0])[:1]).tobytes()
    content[content.index(value)] ^= 1
    before = hashlib.sha256(part.read_bytes()).hexdigest()
    part.write_bytes(content)
    for name in ("cache.json", "manifest.json"):
        path = tmp_path / "cache" / name
        path.write_text(path.read_text().replace(before, hashlib.sha256(content).hexdigest()))
        if name == "cache.json":
            record = json.loads((tmp_path / "cache" / "manifest.json").read_text())
            record["files"][name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            del record["checksum"]
            (tmp_path / "cache" / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match=r"log_probs\.teacher/part-.*isn't what was written"):
        verify([f"{tmp_path}/cache"])


def rows_in(part: Path) -> list[str]:
    import pyarrow as pa

    return pa.ipc.open_file(part).get_batch(0).column("sample_id").to_pylist()


def test_slices_of_another_teacher_are_refused(made: Path, tmp_path: Path) -> None:
    argv = [*policies(made), *TARGET, "--output", f"{tmp_path}/cache"]
    run_ranks(run_stages, 1, [("precompute", [*argv, "--slice", f"{i}/2"]) for i in (1, 2)])
    path = tmp_path / "cache" / "slice-0002-of-0002" / "cache.json"
    text = path.read_text()
    path.write_text(text.replace('"delta": 0.05', '"delta": 0.06'))
    manifest = tmp_path / "cache" / "slice-0002-of-0002" / "manifest.json"
    assert text != path.read_text() and manifest.is_file()
    with pytest.raises(RankError, match=r"slice-0002-of-0002: was made from something else: projection is"):
        precompute(*argv, "--merge-slices")


def test_slices_and_a_global_eta_exclude_each_other(made: Path, tmp_path: Path) -> None:
    from megatron_erpd.commands.precompute import precompute as command

    argv = [*policies(made), *TARGET, "--output", f"{tmp_path}/cache", "--projection", "global"]
    with pytest.raises(RecipeError, match="--projection global looks for one eta"):
        command([*argv, "--slice", "1/2"])


def test_another_target_needs_no_forward_pass(made: Path, tmp_path: Path) -> None:
    """From kept hidden states: the same q bit for bit at the same settings, and at others what passes would give."""
    given = [*policies(made), "--topk-dtype", "float32", "--k", "8", "--hidden", f"{made}/hidden"]
    other = ["--delta", "0.002", "--signal", "0.5*teacher/base"]
    made_anew = [*policies(made), *TARGET[:2], "--topk-dtype", "float32", *other, "--keep-hidden"]
    forwards = run_ranks(_precompute_without_forward, 1, [*given, "--delta", "0.05", "--output", f"{tmp_path}/same"])
    forwards += run_ranks(_precompute_without_forward, 1, [*given, *other, "--output", f"{tmp_path}/other"])
    assert forwards == [0, 0]
    precompute(*made_anew, "--output", f"{tmp_path}/passes")
    assert_equal_rows(tmp_path / "same", made / "hidden")
    assert_equal_rows(tmp_path / "other", tmp_path / "passes")
    run_ranks(
        run_stages, 2, [("precompute", [*given, *other, "--tensor-parallel", "2", "--output", f"{tmp_path}/tp2"])]
    )
    assert_close_rows(tmp_path / "tp2", tmp_path / "passes")


def test_hidden_states_of_more_rollouts_serve_a_slice(made: Path, tmp_path: Path) -> None:
    given = [*policies(made), *TARGET, "--hidden", f"{made}/hidden", "--output", f"{tmp_path}/cache"]
    stages: Stages = [("precompute", [*given, "--slice", f"{i}/2"]) for i in (1, 2)]
    run_ranks(run_stages, 1, [*stages, ("precompute", [*given, "--merge-slices"])])
    assert_close_rows(tmp_path / "cache", made / "hidden")


def _precompute_without_forward(rank: int, world_size: int, argv: list[str]) -> int:
    from megatron_erpd.precompute import forward as running

    calls = []
    forward = running.forward_stage

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return forward(*arguments)

    running.forward_stage = counted
    run_stages(rank, world_size, [("precompute", argv)])
    return len(calls)


def test_hidden_states_round_what_was_scored(made: Path) -> None:
    """Half precision of the hidden states is all that `--keep-hidden` changes of q."""
    ours, theirs = rows(made / "hidden"), rows(made / "whole")
    for name in theirs:
        np.testing.assert_array_equal(ours[name]["teacher"], theirs[name]["teacher"])
        HALF_PRECISION.assert_close(ours[name]["tail_log_prob"].tolist(), theirs[name]["tail_log_prob"].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--policy", "teacher={made}/base"], "made from another teacher: policy 'teacher' has fingerprint"),
        (["--precision", "bf16"], "precision is 'fp32', expected 'bf16'"),
        (["--hidden", "{made}/whole"], "holds no hidden states of 'base'; precompute with --keep-hidden"),
        (["--keep-hidden"], "take --kind topk without --keep-hidden"),
    ],
)
def test_hidden_states_of_something_else_are_refused(
    change: list[str], message: str, made: Path, tmp_path: Path
) -> None:
    argv = [*policies(made), "--k", "8", "--hidden", f"{made}/hidden", "--output", f"{tmp_path}/out"]
    if change[0] == "--policy":
        argv = [word for word in argv if word not in ("--policy", f"teacher={made}/teacher")]
    with pytest.raises(RankError, match=message):
        precompute(*argv, *(word.format(made=made) for word in change))


def test_a_killed_run_goes_on(made: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the base policy's rows are there: they are taken over, and the rows are those of one run."""
    output = tmp_path / "cache"
    command = [sys.executable, str(REPOSITORY / "tools" / "precompute.py"), *policies(made), *TARGET]
    command += ["--output", str(output)]
    kept = kill_when(command, lambda: any(output.glob("log_probs.base/part-*")), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in output.glob("log_probs.base/part-*")}
    assert kept and before and not (output / "cache.json").exists()
    done = forked.run(command, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before, "written again"
    assert len(list(output.glob("log_probs.base/part-*"))) == len(before)
    assert_equal_rows(output, made / "whole")


@pytest.mark.parametrize(("name", "parts"), [("whole", 7), ("whole", 30), ("hidden", 17)])
def test_a_run_that_stopped_in_a_table_goes_on_to_the_same_bits(
    made: Path, tmp_path: Path, name: str, parts: int
) -> None:
    """A row's last digits may depend on the rows of its batch, so these stay together, written or not."""
    argv = [*policies(made), *TARGET, *(["--keep-hidden"] if name == "hidden" else []), "--output", f"{tmp_path}/cache"]
    with pytest.raises(RankError, match="stopped on purpose"):
        run_ranks(_precompute_and_stop, 1, argv, parts)
    assert len(list((tmp_path / "cache").rglob("part-*.arrow"))) == parts
    batches = run_ranks(_precompute_and_tell_batches, 1, argv)[0]
    lengths = read_rollouts(made / "rollouts.parquet").lengths
    whole = [group.tolist() for group in length_groups(lengths, 4 * (int(lengths.max()) - 1), 1)]
    # The first parts may all be of one table, so that each batch still lacks something.
    assert all(batch in whole for batch in batches) and len(batches) <= 2 * len(whole) - (parts > 7)
    assert_equal_rows(tmp_path / "cache", made / name)


def _precompute_and_tell_batches(rank: int, world_size: int, argv: list[str]) -> list[list[int]]:
    from megatron_erpd.precompute import passes

    told: list[list[int]] = []
    forward = passes.run_forward

    def telling(model: Any, rollouts: Any, groups: Any, *others: Any) -> None:
        told.extend(group.tolist() for group in groups)
        forward(model, rollouts, groups, *others)

    passes.run_forward = telling
    run_stages(rank, world_size, [("precompute", argv)])
    return told


def _precompute_and_stop(rank: int, world_size: int, argv: list[str], parts: int) -> None:
    """With parts of a row or two, in an uneven number of which a batch of four ends."""
    from megatron_erpd.precompute import passes
    from megatron_erpd.teacher_cache import writer

    publish, left = writer.CacheWriter._publish, parts

    def counted(self: writer.CacheWriter, table: str) -> None:
        nonlocal left
        if left == 0:
            raise RuntimeError("stopped on purpose")
        left -= 1
        publish(self, table)

    writer.CacheWriter._publish = counted  # type: ignore[method-assign]
    passes.CacheWriter = partial(writer.CacheWriter, part_bytes=150)  # type: ignore[misc, assignment]
    run_stages(rank, world_size, [("precompute", argv)])


def kill_when(command: list[str], ready: Callable[[], bool], logs: Path) -> bool:
    """Starts a command and kills it as soon as `ready`; False where it ended before."""
    with open(logs / "killed.log", "w") as log:
        process = forked.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if ready():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
    return False


def test_two_programs_on_one_folder(made: Path, tmp_path: Path) -> None:
    from megatron_erpd.teacher_cache.writer import exclusive

    with exclusive(tmp_path / "cache"), pytest.raises(RankError, match=r"process \d+ on .* is writing this cache"):
        precompute(*policies(made), *TARGET, "--output", f"{tmp_path}/cache")
    precompute(*policies(made), *TARGET, "--output", f"{tmp_path}/cache")
    with pytest.raises(StageError, match="already holds a finished artifact"):
        from megatron_erpd.commands.precompute import precompute as command

        command([*policies(made), *TARGET, "--output", f"{tmp_path}/cache"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chat_template_digest", "of another", "chat_template_digest is of another, the base policy's is"),
        ("temperature", 0.7, "temperature is 0.7, training compares at 1"),
        ("format_version", 4, "format_version 4, this program reads 3; read it with the program that wrote it"),
        ("tokenizer_digest", "of another", None),
    ],
)
def test_a_cache_of_something_else_is_not_trained_on(
    field: str, value: Any, message: str | None, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "whole", tmp_path / "cache")
    path, manifest = tmp_path / "cache" / "cache.json", tmp_path / "cache" / "manifest.json"
    changed, record = json.loads(path.read_text()), json.loads(manifest.read_text())
    changed[field] = value
    path.write_text(json.dumps(changed))
    student = ["--base", f"{made}/base", "--rollouts", f"{made}/rollouts.parquet", "--epochs", "0.2"]
    student += ["--base-log-probs", f"{made}/base-log-probs", "--cache", f"{tmp_path}/cache", "--micro-batch-size", "8"]
    stages: Stages = [("distill", [*student, "--global-batch-size", "8", "--output", f"{tmp_path}/student"])]
    with pytest.raises(RankError, match=r"cache\.json: differs from what manifest\.json recorded"):
        run_ranks(run_stages, 1, stages)
    if message is None:
        message = "tokenizer_digest is None, expected 'of another'"  # what the parts say
    record["files"]["cache.json"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    del record["checksum"]
    manifest.write_text(json.dumps(record))
    with pytest.raises(RankError, match=message):
        run_ranks(run_stages, 1, stages)
