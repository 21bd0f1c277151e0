"""Advantages of a training's rollouts: what is counted, what is refused and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_erpd.data.rollouts import Rollouts, read_rollouts, write_rollouts
from megatron_erpd.data.schema import Rollout
from megatron_erpd.errors import RolloutError
from megatron_erpd.plan.packs import stage_packs
from megatron_erpd.recipe.requests import TrainTeacher
from megatron_erpd.recipe.stages import Stage
from megatron_erpd.settings import DistillSettings, Layout, ReplaySettings
from megatron_erpd.training import run as run_module
from megatron_erpd.training.advantages import advantages_of
from megatron_erpd.training.run import ReplayRun
from tests.unit.plan.test_gpu_fit import EIGHT_B

Groups = dict[int, list[float]]
ONES: Groups = {1: [1.0], 2: [0.0], 3: [0.5]}
EQUAL: Groups = {1: [1.0, 1.0], 2: [0.0, 0.0], 3: [1.0]}
MIXED: Groups = {1: [1.0, 0.0], 2: [0.0, 0.0], 3: [1.0], 4: [0.0, 1.0]}


@pytest.fixture
def rollouts(tmp_path: Path):
    def make(groups: Groups) -> Rollouts:
        rows = [
            Rollout(prompt_token_ids=np.array([1]), response_token_ids=np.array([2, i]), group_id=group, reward=reward)
            for group, rewards in groups.items()
            for i, reward in enumerate(rewards)
        ]
        write_rollouts(tmp_path / "rollouts.parquet", rows)
        return read_rollouts(tmp_path / "rollouts.parquet")

    return make


def gradient(**values: object) -> DistillSettings:
    return DistillSettings(form="policy_gradient", **values)  # type: ignore[arg-type]


def test_groups_are_counted(rollouts) -> None:
    found = advantages_of(rollouts(MIXED), ReplaySettings(loss="sapo", advantage="group_mean"), Path("r"))
    assert found.values.dtype == np.float32
    assert found.values.tolist() == [0.5, -0.5, 0, 0, 0, -0.5, 0.5]
    assert found.figures() == {"groups": 4, "groups_without_signal": 2, "groups_of_one": 1}
    assert "2 of 4 groups carry no signal" in found.describe() and "1 of them" in found.describe()


@pytest.mark.parametrize(
    ("settings", "groups", "told"),
    [
        (ReplaySettings(loss="sapo"), MIXED, True),
        (ReplaySettings(loss="sapo"), {1: [1.0, 0.0]}, False),
        (ReplaySettings(loss="sapo", advantage="raw"), MIXED, False),
        (ReplaySettings(loss="ce"), MIXED, False),
    ],
)
def test_people_are_told_where_it_matters(settings, groups: Groups, told: bool, rollouts, tmp_path: Path) -> None:
    found = advantages_of(rollouts(groups), settings, tmp_path)
    run = ReplayRun(
        stage="train-teacher",
        prefix="stage1",
        settings=settings,
        layout=Layout(),
        base=tmp_path,
        output=tmp_path,
        inputs={},
        pass_through=[],
        make_step=lambda run, args: lambda batches, model: None,
        rollouts=rollouts(groups),
        advantages=found,
    )
    assert run.note() == (found.describe() if told else None)
    assert bool(run.figures()) == (settings.loss == "sapo" and settings.advantage != "raw")


def test_packs_are_told_and_kept_beside_the_groups(rollouts, tmp_path: Path, monkeypatch) -> None:
    """The same that a plan says of these rollouts."""
    monkeypatch.setattr(run_module, "read_model_shape", lambda folder: EIGHT_B)
    data, settings = rollouts(MIXED), ReplaySettings(loss="sapo", global_batch_size=6, epochs=1.5)
    layout = Layout(micro_batch_tokens=5, data_parallel=2)
    run = ReplayRun(
        stage="train-teacher",
        prefix="stage1",
        settings=settings,
        layout=layout,
        base=tmp_path,
        output=tmp_path,
        inputs={},
        pass_through=[],
        make_step=lambda run, args: lambda batches, model: None,
        rollouts=data,
        advantages=advantages_of(data, settings, tmp_path),
    )
    request = TrainTeacher(base=tmp_path, rollouts=tmp_path, settings=settings, output=tmp_path, layout=layout)
    (planned,) = stage_packs([Stage("teacher", request)], EIGHT_B, data.lengths).values()
    assert (run.note() or "").split("\n") == [run.advantages.describe(), planned.describe()]
    assert run.figures() == run.advantages.figures() | planned.summary()
    assert planned.packs == 2 and planned.filled == 0.6  # in both steps 6 rollouts of 2 tokens, in 4 packs of 5


SINGLE = r"r: each of the 3 groups holds one scored rollout \(group_id\)"
CONSTANT = "r: in none of the 3 groups do the rewards differ"


@pytest.mark.parametrize(
    ("settings", "groups", "expected"),
    [
        (ReplaySettings(loss="ppo"), ONES, SINGLE + ".*--advantage group_norm .* --loss ppo .*--advantage raw"),
        (ReplaySettings(loss="mse", advantage="group_mean"), ONES, SINGLE + ".*--advantage group_mean"),
        (ReplaySettings(loss="gspo", advantage="leave_one_out"), ONES, SINGLE + ".*--advantage leave_one_out"),
        (ReplaySettings(loss="cispo", unlearn=True), EQUAL, CONSTANT + ".*--advantage group_norm .* --loss cispo"),
        (ReplaySettings(loss="sapo", advantage="raw"), {1: [0.0, 0.0]}, "r: all rewards are 0; so --advantage raw"),
        (gradient(advantage_weight=0.5), EQUAL, CONSTANT + ".* --advantage-weight 0.5 has nothing"),
        (gradient(sign_agreement=True), ONES, SINGLE + ".* --sign-agreement has nothing"),
    ],
)
def test_all_zero_is_refused(settings, groups: Groups, expected: str, rollouts) -> None:
    with pytest.raises(RolloutError, match=expected):
        advantages_of(rollouts(groups), settings, Path("r"))


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        (ReplaySettings(loss="ce"), ONES),
        (ReplaySettings(loss="sft"), EQUAL),
        (ReplaySettings(loss="ppo", advantage="raw"), ONES),
        (gradient(), EQUAL),
        (DistillSettings(), ONES),
    ],
)
def test_what_reads_no_advantages_takes_any_groups(settings, groups: Groups, rollouts) -> None:
    assert len(advantages_of(rollouts(groups), settings, Path("r")).values) == sum(map(len, groups.values()))
