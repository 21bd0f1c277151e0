"""Writes what the example starts from: `python prepare.py --output DIR`.

What there is then:

    DIR/model/           Hugging Face folder, see get_model.py (--model and --dtype are passed on)
    DIR/prompts.jsonl    problems of the round, see task.py
    DIR/heldout.jsonl    other problems, for the evaluation

The same options give the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from get_model import add_model_arguments, write_model
from task import NUM_PROBLEMS, problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems (default 1)")
    parser.add_argument("--num-prompts", type=int, default=48, help="prompts of the round (default 48)")
    parser.add_argument("--num-heldout", type=int, default=96, help="prompts of the evaluation (default 96)")
    add_model_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.num_prompts + arguments.num_heldout > NUM_PROBLEMS:
        raise SystemExit(f"error: there are {NUM_PROBLEMS} problems; lower --num-prompts or --num-heldout")
    drawn = problems(arguments.seed)
    for name, size in (("heldout", arguments.num_heldout), ("prompts", arguments.num_prompts)):
        lines = [json.dumps(record) + "\n" for record in itertools.islice(drawn, size)]
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    # Last, and once: a prepare stage that was stopped is run again in the same folder.
    if not (arguments.output / "model").exists():
        write_model(arguments.output / "model", arguments.model, arguments.dtype)
    print(f"wrote {arguments.output}: {arguments.num_prompts} prompts, {arguments.num_heldout} held out, model")


if __name__ == "__main__":
    main()
