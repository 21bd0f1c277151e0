import csv
import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_erpd.errors import RecipeError
from megatron_erpd.sampling.prompts import PromptRecord, encode_prompts, load_prompts, prompt_text, prompts_digest
from megatron_erpd.settings import ChatSettings


def test_lines_become_records(tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "1+1="}]
    file.write_text(
        json.dumps({"prompt": "1+1=", "answer": "2"})
        + "\n\n"
        + json.dumps({"prompt": chat, "answer": 2, "metadata": {"level": 1}})
    )
    records = load_prompts(file)
    assert records == [
        {"prompt": "1+1=", "answer": "2", "metadata": {}},
        {"prompt": chat, "answer": 2, "metadata": {"level": 1}},
    ]
    assert load_prompts(file, limit=1) == records[:1]
    assert prompt_text(records[1]) == "user: 1+1="
    assert prompts_digest(records) != prompts_digest(records[:1])


def test_prompts_from_a_place_on_and_around_the_end(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(5)))

    def read(*given):
        return "".join(record["prompt"] for record in load_prompts(file, *given))

    assert [read(2, first) for first in (0, 2, 4, 6)] == ["01", "23", "40", "12"]
    assert read(5, 3) == read(9, 3) == read(None, 3) == "01234", "all are used in any case"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "jsonl:2: isn't JSON"),
        ('{"question": "1"}', "jsonl:2: has no 'prompt'"),
        ('{"prompt": "1", "gold": "2"}', "'gold' isn't one of"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": []}', "not empty"),
        ('{"prompt": [{"role": "user"}]}', "message 1 has no text: its content is missing"),
        ('{"prompt": "1", "metadata": [1]}', "metadata is a list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=message):
        load_prompts(file)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl")


def test_reasoning_gym_spec():
    spec = "reasoning-gym:chain_sum?size=4&seed=3&min_terms=2&max_terms=2"
    records = load_prompts(spec)
    assert len(records) == 4 and records == load_prompts(spec)
    assert all(len(record["metadata"]["expression"].split()) == 3 for record in records)
    assert records != load_prompts(spec.replace("seed=3", "seed=4"))
    # No seed means the same seed every time.
    assert load_prompts("reasoning-gym:chain_sum?size=2") == load_prompts("reasoning-gym:chain_sum?size=2")


def test_every_format_gives_the_same_prompts(tmp_path):
    """And so the same digest, whatever it is written in."""
    rows = [{"prompt": "1+1=", "answer": "007", "metadata": {"level": "1"}}, {"prompt": "é\u2028", "answer": "1e-05"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("prompt", "answer", "metadata"))
        writer.writeheader()
        writer.writerows(row | {"metadata": json.dumps(row["metadata"]) if "metadata" in row else ""} for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name, row in (("0.json", rows[0]), ("sub/1.JSONL", rows[1])):
        (tmp_path / "folder" / name).write_text(json.dumps(row))
    names = ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "folder")
    digests = {name: prompts_digest(load_prompts(tmp_path / name)) for name in names}
    assert len(set(digests.values())) == 1, digests
    assert load_prompts(tmp_path / "a.csv")[0]["answer"] == "007"


def test_fields_that_are_called_otherwise(tmp_path):
    row = {"question": "1+1=", "solution": {"final": "2"}, "level": 3, "when": datetime.date(2024, 1, 2)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    path = f"{tmp_path}/a.parquet"
    others = {"solution": {"final": "2"}, "level": 3, "when": "2024-01-02"}
    assert load_prompts(f"{path}?prompt=question&answer=solution.final") == [
        {"prompt": "1+1=", "answer": "2", "metadata": others}
    ]
    for query, message in (
        ("", r"a.parquet: row 0: has no 'prompt' \(it has 'question', 'solution', .*\?prompt=question"),
        ("?prompt=q", "has no 'q'"),
        ("?prompt=question&answer=gold", "has no 'gold', which is to be the answer"),
        ("?prompt=question&gold=solution", r"\?gold=... isn't one of prompt, answer, metadata"),
        ("?prompt=question&metadata=level", "metadata is a int"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_prompts(path + query)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a \\ud83d"}',
        '{"prompt": [{"role": "user", "content": "\\udc00"}]}',
        '{"prompt": "a", "answer": "\\ud83d"}',
        '{"prompt": "a", "metadata": {"b": ["\\ud83d"]}}',
        '{"prompt": "a", "metadata": {"\\ud83d": 1}}',
        '{"prompt": "a", "metadata": {"b": 1e999}}',
        '{"prompt": "a", "metadata": ' + '{"b": ' * 990 + "1" + "}" * 990 + "}",
    ],
)
def test_what_no_file_could_give_back_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n' + line + "\n")
    with pytest.raises(RecipeError, match="a.jsonl:2: .*(surrogate|float64|nested)"):
        load_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("options", ["sizes=4", "size=0", "min_terms=9&max_terms=2"])
def test_bad_reasoning_gym_options_are_refused(options):
    with pytest.raises(RecipeError, match="refuses its options"):
        load_prompts(f"reasoning-gym:chain_sum?{options}")


def test_encoding(policy):
    text = PromptRecord(prompt="1+1=", answer=None, metadata={})
    chat = PromptRecord(prompt=[{"role": "user", "content": "1+1="}], answer=None, metadata={})
    bos, tokenizer = policy.tokenizer.bos_token_id, policy.tokenizer
    [ids] = encode_prompts(tokenizer, [text])
    assert ids[0] == bos and tokenizer.decode(ids, skip_special_tokens=True) == "1+1="
    assert encode_prompts(tokenizer, [text, chat], ChatSettings(chat_template=True)) == [ids, ids]
    with pytest.raises(RecipeError, match="chat_template"):
        encode_prompts(tokenizer, [chat])


def test_a_missing_template_is_refused(policy):
    import copy

    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        encode_prompts(tokenizer, [{"prompt": "1", "answer": None, "metadata": {}}], ChatSettings(chat_template=True))
