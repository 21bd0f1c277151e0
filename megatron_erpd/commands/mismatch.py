"""`megatron-erpd mismatch`: the sampler's log-probs against those of the training engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_erpd.errors import RecipeError, RolloutError
from megatron_erpd.files import check_output_file


def mismatch(argv: list[str]) -> None:
    """Compares the sampler's log-probs with those that the training engine recomputed, token by token."""
    parser = argparse.ArgumentParser(
        prog="megatron-erpd mismatch",
        description=f"{mismatch.__doc__} Says what is out of the ordinary, which rollouts, and what to do.",
        epilog="example: megatron-erpd mismatch --rollouts runs/mine/round-01/rollouts "
        "--log-probs runs/mine/round-01/base-log-probs --json mismatch.json",
        allow_abbrev=False,
    )
    parser.add_argument("--rollouts", type=Path, required=True, help="artifact, folder or Parquet file")
    parser.add_argument("--log-probs", type=Path, required=True, help="cache that `megatron-erpd precompute` wrote")
    parser.add_argument("--policy", default="base", help="the policy that sampled, by its name in the cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and verdicts there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(argv)
    if given.json:
        check_output_file(given.json)

    from megatron_erpd.data.rollouts import read_rollouts
    from megatron_erpd.evaluation.mismatch import measure_mismatch
    from megatron_erpd.evaluation.mismatch_verdicts import describe_mismatch, mismatch_report
    from megatron_erpd.teacher_cache.reader import CacheReader

    rollouts = read_rollouts(given.rollouts)
    if not rollouts.has_behavior_log_probs.any():
        raise RolloutError(
            f"{given.rollouts}: no rollout has behavior_log_probs, so there is nothing to compare; sample with "
            "`megatron-erpd sample`, or import rollouts whose sampler recorded them (--field behavior_log_probs=THEIRS)"
        )
    cache = CacheReader(given.log_probs)
    cache.check(rollouts)
    found = measure_mismatch(
        (name, rollouts.behavior_log_probs(i), cache.token_row(given.policy, name))
        for i, name in enumerate(rollouts.sample_ids)
    )
    print(describe_mismatch(found))
    if given.json:
        try:
            given.json.write_text(json.dumps(mismatch_report(found), indent=1) + "\n")
        except OSError as error:
            raise RecipeError(f"--json {given.json}: can't be written ({error.strerror}); give another file") from None
        print(f"wrote {given.json}")
