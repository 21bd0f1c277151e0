"""What a job sees of its stage."""

from __future__ import annotations

import time

from megatron_erpd.launch.watch import Watch, read_from


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
