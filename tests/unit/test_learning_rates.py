import itertools
import re
from pathlib import Path

import pytest

from megatron_erpd.settings import DistillSettings, OnPolicySettings, ReplaySettings
from megatron_erpd.settings.learning_rates import (
    DEFAULT_RATES,
    WARMUP_FRACTION,
    chosen_rates,
    default_rate,
    describe_rates,
)


def test_the_rows_are_every_size_once_and_larger_models_take_smaller_rates():
    assert DEFAULT_RATES[0].low == 0 and DEFAULT_RATES[-1].high == float("inf")
    for row, following in itertools.pairwise(DEFAULT_RATES):
        assert row.high == following.low and row.rate > following.rate


@pytest.mark.parametrize(
    ("num_parameters", "rate"),
    [
        (1, 1e-4),
        (75_200, 1e-4),
        (9_999_999, 1e-4),
        (10_000_000, 5e-6),
        (134_515_008, 5e-6),  # SmolLM2-135M
        (361_821_120, 5e-6),
        (494_032_768, 1e-6),  # Qwen2.5-0.5B
        (70_553_706_496, 1e-6),
    ],
)
def test_the_rate_follows_the_size(num_parameters, rate):
    assert default_rate(num_parameters).rate == rate


def refused():
    raise AssertionError("the size must not be asked for")


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ((2e-5, None), (2e-5, 0.0)),  # as before there was a default by size
        ((2e-5, 0.02), (2e-5, 0.02)),
        ((None, None), (1e-6, WARMUP_FRACTION)),
        ((None, 0.0), (1e-6, 0.0)),
        ((None, 0.3), (1e-6, 0.3)),
    ],
)
def test_a_warm_up_belongs_to_a_default_rate(given, chosen):
    size = refused if given[0] else (lambda: 4_000_000_000)
    assert tuple(chosen_rates(*given, size).values()) == chosen


@pytest.mark.parametrize("model", [ReplaySettings, DistillSettings, OnPolicySettings])
def test_settings_take_numbers(model):
    settings = model().with_rates(lambda: 8_000_000_000)
    assert (settings.learning_rate, settings.warmup_fraction) == (1e-6, WARMUP_FRACTION)
    assert model(learning_rate=1e-3).with_rates(refused).warmup_fraction == 0


@pytest.mark.parametrize(
    ("given", "size", "text"),
    [
        (
            (None, None),
            134_515_008,
            "5e-06: default for models of 10M to 400M parameters (this one has 135M), warm-up over the first 10% of "
            "the steps",
        ),
        ((None, 0.0), 4_022_468_096, "1e-06: default for models from 400M parameters (this one has 4.02B)"),
        ((None, 0.0), 75_200, "0.0001: default for models below 10M parameters (this one has 75.2K)"),
        ((0.0004, 0.02), 75_200, "0.0004: given, warm-up over the first 2% of the steps"),
        ((0.0004, None), 75_200, "0.0004: given"),
    ],
)
def test_a_rate_says_why(given, size, text):
    assert describe_rates(*given, size) == text


def test_the_flag_says_what_the_table_says():
    help_text = ReplaySettings.model_fields["learning_rate"].description
    assert [float(number) for number in re.findall(r"\de-\d", help_text)] == [row.rate for row in DEFAULT_RATES]
    assert f"{WARMUP_FRACTION:g} where" in ReplaySettings.model_fields["warmup_fraction"].description


def test_the_page_has_the_rows_of_the_table():
    page = (Path(__file__).parents[2] / "docs/learning-rates.md").read_text()
    rows = [tuple(cells) for cells in re.findall(r"^\| ([^|]+) \| (\de-\d) \|", page, re.MULTILINE)]
    assert [float(rate) for _, rate in rows] == [row.rate for row in DEFAULT_RATES]
    for (sizes, _), row in zip(rows, DEFAULT_RATES, strict=True):
        assert sizes in str(row).replace("of ", "")
