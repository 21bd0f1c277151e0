"""`megatron-erpd`: help, dispatch, errors."""

from __future__ import annotations

import errno
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_erpd import __version__
from megatron_erpd.commands import cli
from megatron_erpd.errors import RecipeError, StageError, StageInterrupted
from megatron_erpd.launch import program
from megatron_erpd.launcher import is_launchers
from megatron_erpd.manifest import write_manifest
from megatron_erpd.recipe.stages import TOOLS

RECIPE = """
name: mine
model: model
rollouts: {prompts: p.jsonl, verifier: math-verify}
teacher: {loss: ce}
"""


def ended(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program."""
    code = 0
    try:
        cli.main(list(argv))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command_with_an_example(capsys, argv):
    code, out, _ = ended(capsys, *argv)
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name} " in out and f"megatron-erpd {command.example}" in out
        assert command.example.split()[0] == name


def test_version(capsys):
    assert ended(capsys, "--version")[:2] == (0, f"{__version__}\n")


@pytest.mark.parametrize("name", [n for n, c in cli.COMMANDS.items() if not c.launches])
def test_each_command_explains_itself(capsys, name):
    code, out, _ = ended(capsys, name, "--help")
    assert code == 0 and f"megatron-erpd {name}" in out and "example:" in out


def test_an_unknown_command(capsys):
    code, _, err = ended(capsys, "trian")
    assert code == 2 and err.startswith("error: trian is no command; the commands are run, status")


def test_convert_is_another_name(capsys, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "_dispatch", lambda name, argv: called.append((name, argv)))
    cli.main(["convert", "export", "--output", "x"])
    assert called == [("export", ["--output", "x"])]
    assert ended(capsys, "convert", "--help")[0] == 0
    assert ended(capsys, "convert", "both")[0] == 2


def test_a_layout_of_several_processes_is_launched(monkeypatch):
    calls = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(cli, "_launch", calls.append)
    monkeypatch.setattr(cli.Command, "load", lambda self: lambda argv: calls.append(argv))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["--base", "b", "--tensor-parallel", "2", "--pipeline-parallel=3", "--", "--tensor-parallel", "7"]
    cli.main(["distill", *argv])
    launched = calls[0]
    assert launched[launched.index("--nproc-per-node") + 1] == "6"
    assert launched[-len(argv) - 4 :] == ["-m", "--", "megatron_erpd.commands.cli", "distill", *argv]


@pytest.mark.parametrize("argv", [["--base", "b"], ["--tensor-parallel", "2", "--help"]])
def test_one_process_runs_here(monkeypatch, argv):
    calls = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(cli, "_launch", lambda flags: pytest.fail("launched"))
    monkeypatch.setattr(cli.Command, "load", lambda self: calls.append)
    cli.main(["precompute", *argv])
    assert calls == [argv]


def test_under_a_launcher_nothing_is_launched_again(monkeypatch):
    calls = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.Command, "load", lambda self: calls.append)
    cli.main(["distill", "--tensor-parallel", "2"])
    assert calls == [["--tensor-parallel", "2"]]


def test_what_is_launched_here_hears_of_no_other_launcher(monkeypatch):
    def launch(flags):
        assert not any(map(is_launchers, os.environ)) and os.environ["OMP_NUM_THREADS"].isdecimal()

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "PET_NNODES": "2", "MASTER_ADDR": "node17"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(cli, "_launch", launch)
    cli.main(["import", "--processes", "2"])


@pytest.mark.parametrize("command", ["import", "distill", "sample", "evaluate"])
def test_a_rank_of_nothing_is_refused(capsys, monkeypatch, command):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    required = ["--model", "base=m", "--prompts", "p", "--rollouts", "r", "--output", "out", "--hf", "m", "--base", "b"]
    parser_takes = {
        "import": required[8:10] + required[6:8],
        "distill": required[4:8] + required[10:],
        "sample": required[:4] + required[6:8],
        "evaluate": required[:8],
    }
    code, _, err = ended(capsys, command, *parser_takes[command])
    assert code == 2 and err.startswith("error: RANK is 3 in the environment, but WORLD_SIZE is not set")


def test_dry_run_prints_the_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    flags = ["--tensor-parallel", "2", "--set", "teacher.epochs=3", "--output", "there", "--dry-run"]
    code, out, err = ended(capsys, "run", "r.yaml", *flags)
    assert code == 2 and "base, rollouts: hf model: no such file or folder" in err  # as `run` would say
    assert "# teacher\ntorchrun --standalone --nproc-per-node 2 -- " in out
    assert "--epochs 3.0 --output there/round-01/teacher --verify-inputs --tensor-parallel 2" in out
    assert os.listdir(tmp_path) == ["r.yaml"]


def test_a_run_that_can_not_start(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    code, _, err = ended(capsys, "run", "r.yaml")
    assert code == 2
    assert err.startswith("error: mine: the run can't start:\n  base, rollouts: hf model: no such file or folder")
    assert "Traceback" not in err


def test_status(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    code, out, _ = ended(capsys, "status", "r.yaml")
    assert code == 0
    assert "waits for base, rollouts" in out and "p.jsonl: no such file" in out


def test_verify(capsys, tmp_path):
    folder = tmp_path / "run" / "teacher"
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    write_manifest(folder, "train-teacher", {}, {})
    code, out, _ = ended(capsys, "verify", str(tmp_path / "run"))
    assert code == 0 and f"{folder}: train-teacher, 1 files, whole" in out
    (folder / "data").write_text("y")
    code, _, err = ended(capsys, "verify", str(tmp_path / "run"), str(tmp_path / "nothing"))
    assert code == 2 and "data: differs" in err and "nothing: holds no artifact" in err


def test_errors_are_one_message_and_a_traceback_only_when_asked_for(capsys):
    def fails(argv):
        raise StageError(f"first\nsecond {argv}")

    with pytest.raises(SystemExit) as caught:
        program.run_command(fails, ["a"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: first\n  second ['a']\n"
    with pytest.raises(StageError, match=r"second \['a', '--', '--debug'\]"):
        program.run_command(fails, ["a", "--debug", "--", "--debug"])


def test_bad_pairs(capsys):
    flags = ["--prompts", "p", "--rollouts", "r", "--output", "o"]
    assert "write NAME=VALUE" in ended(capsys, "evaluate", "--model", "base", *flags)[2]
    assert "given twice" in ended(capsys, "evaluate", "--model", "base=a", "--model", "base=b", *flags)[2]
    assert "the base policy is missing" in ended(capsys, "evaluate", "--model", "a=b", *flags)[2]


@pytest.mark.parametrize("script", sorted(TOOLS.values()))
def test_the_scripts_call_the_same_functions(script, monkeypatch):
    called = []
    monkeypatch.setattr(program, "run_command", called.append)
    runpy.run_path(str(Path(cli.__file__).parents[2] / "tools" / script), run_name="__main__")
    name = next(command for command, file in TOOLS.items() if file == script)
    assert called == [cli.COMMANDS[name].load()]


@pytest.mark.parametrize(("error", "code"), [(StageInterrupted("stopped"), 75), (RecipeError("stopped"), 2)])
def test_a_stage_that_would_go_on_has_an_exit_code_of_its_own(error, code, capsys):
    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        program.run_command(fail, [])
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: stopped\n"


def full(*names):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def hidden(error, cause=None):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (full(), "runs/a/teacher"),
        (full("metrics.jsonl"), "metrics.jsonl"),
        (full("from", None, "to"), "to"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "runs/a/teacher"),
        (hidden(RuntimeError("writing failed"), full()), "runs/a/teacher"),
        (RuntimeError("Worker failure: [Errno 28] No space left on device"), "runs/a/teacher"),
    ],
)
def test_a_full_disk_is_no_traceback_wherever_it_is_met(error, place, capsys):
    def fail(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        program.run_command(fail, ["--output", "runs/a/teacher", "--", "--output", "x"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {place}: can't be written (") and "make room and run the same command again" in said


def test_other_errors_of_the_file_system_keep_their_traceback():
    def fail(argv):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        program.run_command(fail, ["--output", "a"])


@pytest.mark.parametrize(
    ("error", "said"),
    [(full(), "a thread that writes ended: No space left on device\n"), (KeyError("x"), "KeyError: 'x'\n")],
)
def test_a_thread_that_meets_a_full_disk_says_so_in_a_line(error, said, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def starts_a_thread(argv):
        def write():
            raise error

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    program.run_command(starts_a_thread, [])
    err = capsys.readouterr().err
    assert err.endswith(said) and ("Traceback" in err) == isinstance(error, KeyError)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_any_more(lines, buffered):
    """As before `| head`: neither a traceback nor Python's own complaint at its end."""
    code = f"from megatron_erpd.launch.program import run_command; run_command(lambda _: print('a line' * {lines}), [])"
    python = [sys.executable, *([] if buffered else ["-u"])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen([*python, "-c", code], stdout=-1, stderr=-1, env=environment) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE
