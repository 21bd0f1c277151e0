"""Writes everything the quickstart starts from: an untrained model, demonstrations and prompts.

    python prepare.py --output DIR --seed 1

    DIR/model/                   Hugging Face folder: a Qwen3 of about 75k parameters, random weights, its tokenizer
    DIR/demonstrations.parquet   rollouts with reward 1.0, some of them wrong (see task.py); the base is trained on them
    DIR/prompts.jsonl            problems of the round:        {"prompt": ..., "answer": ..., "metadata": {...}}
    DIR/heldout.jsonl            problems for the evaluation

No problem is in two of the three files. The same options and seed give the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from task import CHARACTERS, LARGEST, SMALLEST, Problem, distinct_problems, solve
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_erpd.data.rollouts import write_rollouts
from megatron_erpd.sources.tokenizer import tokenizer_digest

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS = 0, 1, 2

# A chat is its messages' texts one after another: the task has no roles, the template only lets chat tools run.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"

# The usual 0.02 is meant for hidden sizes in the thousands; at 64 it doubles the steps until the carry is learned.
INITIALIZER_RANGE = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; every encoded text starts with <bos>."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int, vocabulary_size: int, num_layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights whose heads and key-value heads can be split over two tensor-parallel ranks."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=INITIALIZER_RANGE,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
    return model


def demonstrations(
    problems: Iterable[Problem], tokenizer: PreTrainedTokenizerFast, carry_drop: float, rng: random.Random
) -> Iterator[dict[str, object]]:
    """One rollout per problem, each a group of its own; reward 1.0 because all of them are to be imitated."""
    for group, problem in enumerate(problems):
        response = solve(problem, carry_drop, rng)
        prompt_token_ids = tokenizer.encode(problem.prompt)
        response_token_ids = [*tokenizer.encode(response, add_special_tokens=False), EOS]
        yield {
            "group_id": group,
            "prompt_token_ids": prompt_token_ids,
            "response_token_ids": response_token_ids,
            "reward": 1.0,
            "finish_reason": "stop",
            "prompt": problem.prompt,
            "response": response,
            "metadata": {"answer": problem.answer},
        }


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON object per line: `prompt`, `answer`, `metadata`."""
    path.write_text("".join(json.dumps(problem.record()) + "\n" for problem in problems), encoding="utf-8")


def prepare(arguments: argparse.Namespace) -> None:
    """Write the four artifacts into `arguments.output`."""
    sizes = (arguments.num_heldout, arguments.num_prompts, arguments.num_demonstrations)
    available = (LARGEST - SMALLEST + 1) ** arguments.num_summands
    # Rejection of problems already drawn is slow when few are left.
    if sum(sizes) > available // 2:
        raise SystemExit(
            f"{sum(sizes)} problems are more than half of the {available} that {arguments.num_summands} summands "
            "give: lower --num-demonstrations, --num-prompts or --num-heldout, or raise --num-summands"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(arguments.seed, len(tokenizer), arguments.num_layers)
    model.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")

    rng = random.Random(arguments.seed)
    problems = distinct_problems(rng, arguments.num_summands, arguments.aligned)
    heldout, prompts, demonstrated = (list(itertools.islice(problems, size)) for size in sizes)
    write_problems(arguments.output / "heldout.jsonl", heldout)
    write_problems(arguments.output / "prompts.jsonl", prompts)
    write_rollouts(
        arguments.output / "demonstrations.parquet",
        demonstrations(demonstrated, tokenizer, arguments.carry_drop, rng),
        {"tokenizer_digest": tokenizer_digest(tokenizer), "carry_drop": arguments.carry_drop},
    )
    print(
        f"wrote {arguments.output}: a model of {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(demonstrated):,} demonstrations, {len(prompts):,} prompts, {len(heldout):,} held-out prompts"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights, the problems and the wrong steps")
    parser.add_argument("--num-summands", type=int, default=3, help="numbers in a chain sum (default 3)")
    parser.add_argument(
        "--aligned", action="store_true", help="write summands as wide as the sums: long sums are learned far sooner"
    )
    parser.add_argument("--num-demonstrations", type=int, default=20_000, help="default 20000")
    parser.add_argument("--num-prompts", type=int, default=256, help="prompts of the round (default 256)")
    parser.add_argument("--num-heldout", type=int, default=512, help="prompts of the evaluation (default 512)")
    parser.add_argument(
        "--carry-drop", type=float, default=0.4, help="probability that an addition drops its carries (default 0.4)"
    )
    parser.add_argument("--num-layers", type=int, default=2, help="layers of the model (default 2)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    prepare(parse_arguments())
