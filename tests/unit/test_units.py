"""Times and sizes for people."""

from megatron_erpd.units import duration, size


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600 * 2 + 300)] == [
        *("0 s", "59 s", "1 min 00 s", "59 min 59 s", "2 h 05 min"),
    ]


def test_sizes():
    assert [size(n) for n in (0, 999, 1000, 2.5e9, 3e15)] == ["0 B", "999 B", "1.0 kB", "2.5 GB", "3.0 PB"]
