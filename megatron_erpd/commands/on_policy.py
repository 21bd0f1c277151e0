"""`megatron-erpd train-on-policy`: the baseline that samples afresh for every optimizer step."""

from __future__ import annotations

import numpy as np

from megatron_erpd.commands.sizes import with_size
from megatron_erpd.commands.train import training_fields, training_request
from megatron_erpd.manifest import read_manifest
from megatron_erpd.plan.budgets import StageRollouts
from megatron_erpd.recipe.requests import TrainOnPolicy
from megatron_erpd.sampling.prompts import encode_prompts, load_prompts
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.sources.tokenizer import load_tokenizer
from megatron_erpd.training.fresh_rollouts import Sampler
from megatron_erpd.training.on_policy import OnPolicyRun, on_policy_step
from megatron_erpd.training.run import with_rates


def train_on_policy(argv: list[str]) -> None:
    """`megatron-erpd train-on-policy`, in every process of its layout."""
    request = training_request(TrainOnPolicy, argv)
    hf_folder, output = request.base / "hf", request.output
    read_manifest(request.base)
    settings = with_rates(request.settings, request.base)
    request = request.model_copy(update={"settings": settings})
    records = load_prompts(request.prompts, request.num_prompts, verifier=request.verifier)
    token_ids = encode_prompts(load_tokenizer(hf_folder), records, settings)
    prompts = np.array([len(ids) for ids in token_ids])
    drawn = StageRollouts(
        prompts, prompts + settings.max_new_tokens, lambda row: f"prompt {row + 1}", what="possible rollout"
    )
    request = with_size(request, drawn)
    run = OnPolicyRun(
        **training_fields(request),
        prefix="stage1",
        settings=settings,
        make_step=on_policy_step,
        num_prompts=request.num_prompts,
        sampler=Sampler(
            settings=settings,
            records=records,
            token_ids=token_ids,
            verifier=Verifier(request.verifier, workers=1),
            hf_folder=hf_folder,
            scratch=output / "sampler",
            dtype="bfloat16" if request.layout.precision == "bf16" else "float32",
        ),
    )
    run.check_lengths()
    run.execute()
