"""On-policy GRPO: the gradient of a batch built by hand, resuming, layouts, and that it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_erpd.commands.on_policy import train_on_policy
from megatron_erpd.manifest import MANIFEST, REQUEST, read_manifest
from megatron_erpd.recipe.planner import plan
from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.training import on_policy
from tests.distributed.harness import run_ranks
from tests.integration.stages import Stages, run_stages
from tests.integration.tiny import VOCAB_SIZE, write_model
from tests.tolerances import LAYOUT

VERIFIER = (
    "def score(record, response):\n    words = response.split()\n    return words.count('w3') / max(1, len(words))\n"
)
UPDATES, PROMPTS, GROUP = 8, 4, 8
FLAGS = [
    *("--prompts-per-update", str(PROMPTS), "--num-rollouts", str(GROUP), "--max-new-tokens", "8"),
    *("--learning-rate", "1e-2"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, prompts, a verifier, the base, and whole trainings, with and without a KL penalty."""
    folder = tmp_path_factory.mktemp("on-policy")
    write_model(folder / "hf")
    write_tokenizer(folder / "hf")
    lines = [json.dumps({"prompt": f"w{5 + i} w{7 + 2 * i}" + " w9" * (i % 2)}) for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "verifier.py").write_text(VERIFIER)
    stages: Stages = [
        ("import", ["--hf", f"{folder}/hf", "--output", f"{folder}/base"]),
        ("on-policy", command(folder, "whole", "--updates", str(UPDATES), "--checkpoints", "2")),
        ("on-policy", command(folder, "penalised", "--updates", "3", "--kl-coefficient", "0.5")),
    ]
    (made,) = run_ranks(run_as_over_nccl, 1, stages, timeout=400)
    assert made == ["gloo"] * 2, "a training makes one group for its weights, however many updates it has"
    return folder


class OverNccl:
    """`torch.distributed` as it is where the ranks' group is NCCL's; keeps what groups are made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def get_backend(self) -> str:
        return "nccl"

    def new_group(self, backend: str) -> Any:
        self.made.append(backend)
        return torch.distributed.new_group(backend=backend)


def run_as_over_nccl(rank: int, world_size: int, stages: Stages) -> list[str]:
    """Runs stages; returns the backends of the groups that were made to export weights."""
    from megatron_erpd.checkpoint import model_export

    model_export.dist = seen = OverNccl()  # type: ignore[attr-defined,assignment]
    run_stages(rank, world_size, stages)
    return seen.made


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)


def command(folder: Path, output: str, *flags: str) -> list[str]:
    task = ["--prompts", f"{folder}/prompts.jsonl", "--verifier", f"python:{folder}/verifier.py:score"]
    return ["--base", f"{folder}/base", *task, "--output", str(folder / output), *FLAGS, *flags]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_gradient_is_that_of_a_batch_built_by_hand(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_erpd.data.replay_dataset import BatchOrder
    from megatron_erpd.sampling.engine import TransformersEngine

    engine = TransformersEngine(made / "hf", "cpu")
    tokenizer = engine.policy.tokenizer
    prompts = [
        tokenizer.encode(json.loads(line)["prompt"]) for line in (made / "prompts.jsonl").read_text().split("\n")
    ]
    chosen = [prompts[i] for i in BatchOrder([len(p) for p in prompts], PROMPTS, seed=1).stream(0, PROMPTS)]
    groups = engine.sample(chosen, num_samples=GROUP, max_new_tokens=8, seed=1)
    rewards = np.array([[np.mean(s.response_token_ids[s.response_token_ids != 0] == 3) for s in g] for g in groups])
    rewards = np.nan_to_num(rewards)  # a response of the end token alone
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    model = AutoModelForCausalLM.from_pretrained(made / "hf").double()
    total, surrogate, num_tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
    for prompt, group, row in zip(chosen, groups, advantages, strict=True):
        for sample, advantage in zip(group, row, strict=True):
            tokens = torch.tensor([[*prompt, *sample.response_token_ids]])
            log_probs = model(tokens[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
            total = total - advantage * log_probs.gather(-1, tokens[0, len(prompt) :, None]).sum()
            surrogate -= advantage * len(sample.response_token_ids)  # the ratio of every token is 1
            num_tokens += len(sample.response_token_ids)
    (total / num_tokens).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()

    first = metrics(made / "whole")[0]
    assert first["stage1/reward"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert first["stage1/response_length"] == pytest.approx(num_tokens / rewards.size)
    assert first["stage1/loss"] == pytest.approx(surrogate / num_tokens, abs=1e-6)
    assert first["grad-norm"] == pytest.approx(float(norm), rel=1e-4)


def test_it_learns_and_leaves_nothing_behind(made: Path) -> None:
    rewards = [row["stage1/reward"] for row in metrics(made / "whole")]
    assert len(rewards) == UPDATES
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1
    assert not (made / "whole" / "sampler").exists()
    assert not any("sampler" in name for name in read_manifest(made / "whole").files)


def test_the_penalty_is_the_exact_kl_to_the_base(made: Path) -> None:
    rows = metrics(made / "penalised")
    assert rows[0]["stage1/policy_base_kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["stage1/policy_base_kl"] > 1e-3
    # The policy that the second update starts from is the same with and without: the first KL has no gradient.
    plain = metrics(made / "whole")
    for key in ("stage1/reward", "stage1/response_length", "stage1/entropy"):
        assert rows[1][key] == pytest.approx(plain[1][key], rel=1e-4)


def test_a_resumed_training_is_the_uninterrupted_one(made: Path, tmp_path: Path) -> None:
    interrupted = made / "interrupted"
    shutil.copytree(made / "whole", interrupted)
    manifest = read_manifest(interrupted)
    request = {"stage": manifest.stage, "settings": manifest.settings, "inputs": manifest.inputs}
    (interrupted / REQUEST).write_text(json.dumps(request))
    (interrupted / MANIFEST).unlink()
    shutil.rmtree(interrupted / "megatron" / f"iter_{UPDATES:07d}")
    (interrupted / "megatron" / "latest_checkpointed_iteration.txt").write_text(str(UPDATES // 2))
    (interrupted / "sampler").mkdir()  # as a kill leaves it
    exports = [f"{name}={made}/{name}" for name in ("whole", "interrupted")]
    stages: Stages = [
        ("on-policy", command(made, "interrupted", "--updates", str(UPDATES), "--checkpoints", "2")),
        ("export", ["--checkpoint", exports[0], "--checkpoint", exports[1], "--output", f"{tmp_path}/export"]),
    ]
    run_ranks(run_stages, 1, stages, timeout=400)
    ours, theirs = (metrics(made / name) for name in ("interrupted", "whole"))
    assert [row["iteration"] for row in ours] == list(range(1, UPDATES + 1))
    assert [row["stage1/loss"] for row in ours] == [row["stage1/loss"] for row in theirs]
    weights = [(tmp_path / "export" / name / "model.safetensors").read_bytes() for name in ("interrupted", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("layout", "micro_batch"),
    [
        # Packs, of as many as an update's responses need.
        ("data-parallel", ["--micro-batch-tokens", "30"]),
        ("tensor-parallel", ["--micro-batch-size", "4"]),
        ("pipeline-parallel", ["--micro-batch-size", "4"]),
        pytest.param("context-parallel", ["--micro-batch-tokens", "20"], marks=pytest.mark.long),
    ],
)
def test_two_ranks_give_the_same(layout: str, micro_batch: list[str], made: Path) -> None:
    flags = ["--updates", "3", "--kl-coefficient", "0.5", *micro_batch, f"--{layout}", "2"]
    run_ranks(run_stages, 2, [("on-policy", command(made, layout, *flags))], timeout=400)
    for step, (ours, theirs) in enumerate(zip(metrics(made / layout), metrics(made / "penalised"), strict=True)):
        for key in ("stage1/loss", "stage1/reward", "stage1/response_length", "stage1/policy_base_kl", "grad-norm"):
            expected = pytest.approx(theirs[key], rel=LAYOUT.rtol * (1 + 9 * step), abs=1e-6)
            assert ours[key] == expected, f"step {step + 1}, {key}"


def test_plan_and_command_agree_on_the_identity(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    shutil.copytree(made / "base", tmp_path / "round-01" / "base")
    rollouts = {"prompts": f"{made}/prompts.jsonl", "verifier": f"python:{made}/verifier.py:score"}
    sampling = {"num_rollouts": 4, "max_new_tokens": 8, "num_prompts": 5}
    controls = {"grpo": {"kind": "on_policy", "updates": 3, "num_rollouts": 2}}
    recipe = Recipe(
        name="x", output=str(tmp_path), model=f"{made}/hf", rollouts={**rollouts, **sampling}, controls=controls
    )
    (stage,) = (s for s in plan(recipe) if s.command == "train-on-policy")
    seen: list[Any] = []
    monkeypatch.setattr(on_policy.OnPolicyRun, "execute", lambda run: seen.extend([run.identity, run.inputs]))
    train_on_policy(stage.flags())
    assert seen == [stage.request.recorded.identity, stage.inputs]
    assert stage.identity["num_rollouts"] == 2 and stage.identity["max_new_tokens"] == 8
