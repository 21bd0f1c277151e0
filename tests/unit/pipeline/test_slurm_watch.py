"""What a job sees of its stage."""

from __future__ import annotations

import time

from megatron_erpd.pipeline.slurm_watch import Watch, first_traceback, read_from

OUTPUT = """step 1
[rank1]:Traceback (most recent call last):
[rank1]:  File "train.py", line 3, in <module>
[rank1]:    fail()
[rank1]:RuntimeError: first
Traceback (most recent call last):
  File "other.py", line 1
ConnectionError: second
"""


def test_the_first_traceback_is_shown_whole_and_alone():
    shown = first_traceback(OUTPUT)
    assert shown.splitlines()[0] == "Traceback (most recent call last):"
    assert shown.splitlines()[-1] == "RuntimeError: first"
    assert first_traceback("step 1\nstep 2") == ""


def test_the_stacks_of_a_hanging_process_count_as_one():
    assert first_traceback("step\nFatal Python error: Aborted\n\nThread 0x1\n").startswith(
        "Fatal Python error: Aborted"
    )


def test_growing_logs_and_files_are_signs_of_life(tmp_path):
    log, output = tmp_path / "log", tmp_path / "output"
    log.write_text("a")
    (output / "deep").mkdir(parents=True)
    watch = Watch([log, output], seconds=0.3)
    for write in (lambda: log.write_text("ab"), lambda: (output / "deep" / "part").write_text("x")):
        time.sleep(0.2)
        write()
        assert not watch.hangs()
    time.sleep(0.2)
    assert not watch.hangs()
    time.sleep(0.2)
    assert watch.hangs()


def test_only_what_this_start_wrote_is_read(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\nafter\rnow\n")
    assert read_from(log, len("before\n")) == "after\nnow\n"
