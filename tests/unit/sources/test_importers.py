import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_erpd.data.rollouts import read_rollouts, sample_id
from megatron_erpd.errors import RolloutError
from megatron_erpd.settings import ImportSettings
from megatron_erpd.sources.import_report import ImportReport, constant_groups
from megatron_erpd.sources.importers import import_rollouts, render
from megatron_erpd.sources.tokenizer import tokenizer_digest

WORDS = ["<pad>", "<s>", "</s>", "[user]", "[assistant]", "<unk>", "what", "is", "two", "plus", "four", "five"]
IDS = {word: i for i, word in enumerate(WORDS)}
GOOD = {"prompt_token_ids": [1, 6], "response_token_ids": [8, 2], "reward": 1.0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(
    source: str | Path | Sequence[str | Path],
    output: Path,
    fields: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> ImportReport:
    return import_rollouts(source, output, ImportSettings(**settings), fields=fields, tokenizer=tokenizer)


def test_plain_json_lines_with_token_ids(tmp_path: Path) -> None:
    rows = [
        GOOD | {"behavior_log_probs": [-0.5, -1.5], "finish_reason": "eos", "metadata": {"a": 1}, "prompt": "text"},
        GOOD | {"response_token_ids": [9], "reward": False},
        GOOD | {"prompt_token_ids": [1, 7], "reward": True},
    ]
    source = jsonl(tmp_path / "in.jsonl", [rows[0], "", *rows[1:]])
    report = run(source, tmp_path / "out.parquet")
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert [rollouts.prompt_tokens(i).tolist() for i in range(3)] == [[1, 6], [1, 6], [1, 7]]
    assert [rollouts.response_tokens(i).tolist() for i in range(3)] == [[8, 2], [9], [8, 2]]
    assert rollouts.rewards.tolist() == [1, 0, 1]
    assert rollouts.sample_ids[1] == sample_id([1, 6], [9])
    # Grouped by prompt content, whatever the order.
    assert rollouts.group_ids[0] == rollouts.group_ids[1] != rollouts.group_ids[2]
    log_probs = rollouts.behavior_log_probs(0)
    assert log_probs is not None and log_probs.tolist() == [-0.5, -1.5] and rollouts.behavior_log_probs(1) is None
    assert rollouts.finish_reason(0) == "stop" and rollouts.metadata(0) == {"a": 1}
    assert rollouts.prompt_text(0) == "text"
    assert rollouts.file_metadata == {"imported_from": ["in.jsonl"], "import_preset": "plain"}
    assert (report.accepted, report.groups, report.zero_variance_groups) == (3, 2, 1)
    assert report.with_behavior_log_probs == 1 and report.encoded_responses == report.unverified == 0
    assert report.group_size == {"min": 1, "mean": 1.5, "max": 2}
    assert report.response_length == {"min": 1, "mean": pytest.approx(5 / 3), "max": 2}
    assert report.reward == {"min": 0, "mean": pytest.approx(2 / 3), "max": 1}
    assert report.notes == []


def test_parquet_gives_what_json_lines_give(tmp_path: Path) -> None:
    rows = [GOOD | {"response_token_ids": [i % 9, 2], "reward": i % 2, "extra": "x" * 10} for i in range(150)]
    run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "b.parquet")
    assert read_rollouts(tmp_path / "a.parquet").digest() == read_rollouts(tmp_path / "b.parquet").digest()


def test_folder_and_list_of_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for step in range(3):
        jsonl(tmp_path / "in" / f"{step}.jsonl", [GOOD | {"response_token_ids": [step]}])
    run(tmp_path / "in", tmp_path / "a.parquet")
    files = [tmp_path / "in" / f"{step}.jsonl" for step in range(3)]
    report = run(files, tmp_path / "b.parquet")
    assert report.sources == [str(path) for path in files]
    assert read_rollouts(tmp_path / "a.parquet").digest() == read_rollouts(tmp_path / "b.parquet").digest()


def test_verl_dump_is_encoded_and_the_report_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input": "what is two", "output": "four five", "gts": "4", "score": 1.0, "step": 3}
    source = jsonl(tmp_path / "3.jsonl", [row, row | {"output": "five </s>", "score": 0.0}])
    report = run(source, tmp_path / "out.parquet", format="verl", tokenizer=tokenizer)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert rollouts.prompt_tokens(0).tolist() == ids("what is two")
    assert rollouts.response_tokens(0).tolist() == ids("four five </s>")
    assert rollouts.response_tokens(1).tolist() == ids("five </s>")  # no second end token
    assert rollouts.metadata(0) == {"ground_truth": "4", "step": 3}
    assert rollouts.prompt_text(0) == "what is two" and rollouts.response_text(0) == "four five"
    assert report.encoded_prompts == report.encoded_responses == 2
    assert any("without special tokens" in note for note in report.notes)
    assert any("shifts" in note for note in report.notes)
    assert rollouts.tokenizer_digest == tokenizer_digest(tokenizer)


def test_slime_samples_keep_their_token_ids(tmp_path: Path) -> None:
    row = {
        "tokens": [1, 6, 8, 9, 2],
        "response_length": 3,
        "reward": 1,
        "loss_mask": [1, 1, 1],
        "rollout_log_probs": [-0.1, -0.2, -0.3],
        "group_index": 17,
        "status": "truncated",
        "label": "5",
        "prompt": "p",
        "response": "r",
    }
    source = jsonl(tmp_path / "in.jsonl", [row, row | {"loss_mask": None, "rollout_log_probs": None, "reward": 0}])
    report = run(source, tmp_path / "out.parquet", format="slime")
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert rollouts.prompt_tokens(0).tolist() == [1, 6] and rollouts.response_tokens(0).tolist() == [8, 9, 2]
    np.testing.assert_allclose(rollouts.behavior_log_probs(0), [-0.1, -0.2, -0.3], rtol=1e-6)
    assert rollouts.group_ids.tolist() == [17, 17] and rollouts.finish_reason(0) == "length"
    assert rollouts.metadata(0) == {"label": "5"}
    assert report.repetitions == 1 and report.encoded_responses == 0


def test_trl_texts_and_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "<s> what is", "completion": "four", "accuracy_reward": 1.0},
        {
            "prompt": [{"role": "user", "content": "two plus two"}],
            "completion": [{"role": "assistant", "content": "five"}],
            "accuracy_reward": 0.0,
        },
    ]
    source = jsonl(tmp_path / "in.jsonl", rows)
    fields = {"reward": "accuracy_reward"}
    options: dict[str, Any] = {"format": "trl", "fields": fields, "tokenizer": tokenizer}
    run(source, tmp_path / "out.parquet", **options)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert rollouts.prompt_tokens(0).tolist() == ids("<s> what is")
    assert rollouts.prompt_tokens(1).tolist() == ids("[user] two plus two [assistant]")
    assert rollouts.response_tokens(1).tolist() == ids("five </s>")
    assert rollouts.response_text(1) == "five"
    run(source, tmp_path / "out.parquet", append_eos=False, user_message=True, **options)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert rollouts.response_tokens(1).tolist() == ids("five")
    assert rollouts.prompt_tokens(0).tolist() == ids("[user] <s> what is [assistant]")


def test_openr1_rows_yield_a_rollout_per_generation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "problem": "two plus two",
        "generations": ["four", "five", "four four"],
        "correctness_math_verify": [True, False, None],
        "finish_reasons": ["stop", "stop", "length"],
        "answer": "four",
        "uuid": "u-1",
    }
    second = row | {"problem": "what is", "uuid": "u-2", "finish_reasons": None, "correctness_math_verify": [True] * 3}
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist([row, second]), path)
    options: dict[str, Any] = {"format": "openr1", "tokenizer": tokenizer}
    with pytest.raises(
        RolloutError, match=r"in.parquet: row 0, entry 2: reward \(from 'correctness_math_verify\[\]'\)"
    ):
        run(path, tmp_path / "out.parquet", **options)
    report = run(path, tmp_path / "out.parquet", allow_unverified=True, **options)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert len(rollouts) == 6 and report.groups == 2 and report.zero_variance_groups == 1 and report.unverified == 1
    assert rollouts.reward_status == ["scored", "scored", "unverified", "scored", "scored", "scored"]
    assert rollouts.prompt_tokens(0).tolist() == ids("[user] two plus two [assistant]")
    assert rollouts.response_tokens(1).tolist() == ids("five </s>")
    assert rollouts.response_tokens(2).tolist() == ids("four four")  # cut off: no end token
    assert rollouts.finish_reason(3) is None and rollouts.metadata(4) == {"answer": "four", "uuid": "u-2"}
    assert len(set(rollouts.group_ids[:3].tolist())) == 1


def test_field_map_with_nested_paths_and_lists_of_objects(tmp_path: Path) -> None:
    row = {
        "task": {"ids": [1, 2], "key": "problem-7"},
        "samples": [{"out": {"ids": [3]}, "r": {"score": 1.0}}, {"out": {"ids": [4]}, "r": {"score": 0.5}}],
        "a.b": "dotted",
    }
    fields = {
        "prompt_token_ids": "task.ids",
        "group_id": "task.key",
        "response_token_ids": "samples[].out.ids",
        "reward": "samples[].r.score",
        "metadata.x": "a.b",
    }
    for path in (jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "in.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        run(path, tmp_path / "out.parquet", fields=fields)
        rollouts = read_rollouts(tmp_path / "out.parquet")
        assert [rollouts.response_tokens(i).tolist() for i in range(2)] == [[3], [4]]
        assert rollouts.rewards.tolist() == [1.0, 0.5] and rollouts.metadata(1) == {"x": "dotted"}
        assert rollouts.group_ids[0] == rollouts.group_ids[1] >= 0


BAD_ROWS = [
    (GOOD | {"reward": None}, "no_reward", "reward: is missing or null; score the rollout, or pass allow_unverified"),
    ({k: v for k, v in GOOD.items() if k != "reward"}, "no_reward", "reward: is missing or null"),
    ('{"prompt_token_ids": [1], "response_token_ids": [2], "reward": NaN}', "bad_reward", "reward: nan"),
    ('{"prompt_token_ids": [1], "response_token_ids": [2], "reward": Infinity}', "bad_reward", "reward: inf"),
    (GOOD | {"reward": {"score": 1}}, "bad_reward", "as in 'reward.score'"),
    (GOOD | {"reward": "1"}, "bad_reward", "got str"),
    (GOOD | {"response_token_ids": []}, "empty_response", "response_token_ids: empty"),
    (GOOD | {"response_token_ids": None}, "empty_response", "response: no response_token_ids and no response text"),
    (GOOD | {"prompt_token_ids": []}, "empty_prompt", "prompt_token_ids: empty"),
    (GOOD | {"response_token_ids": [12]}, "token_beyond_vocabulary", "token id 12 is beyond the vocabulary of 12"),
    (GOOD | {"response_token_ids": [-1]}, "token_beyond_vocabulary", "token id -1"),
    (GOOD | {"response_token_ids": [3.0]}, "non_integer_token", "3.0 at position 0"),
    (GOOD | {"response_token_ids": ["3"]}, "non_integer_token", "'3' at position 0"),
    (GOOD | {"response_token_ids": 3}, "non_integer_token", "expected a list of token ids, got int"),
    (GOOD | {"behavior_log_probs": [-1.0]}, "behavior_length", "1 values for 2 response tokens"),
    (GOOD | {"behavior_log_probs": [-1.0, 0.9]}, "bad_behavior_log_probs", "0.89"),
    (GOOD | {"sample_id": "first"}, "duplicate_sample", "sample_id: 'first' occurs twice"),
    (GOOD | {"group_id": "g", "prompt_token_ids": [5]}, "group_of_other_prompt", "rollouts of another prompt"),
    (GOOD | {"group_id": 1.5}, "malformed", "group_id: 1.5"),
    (GOOD | {"group_id": 2**63}, "malformed", "doesn't fit 64 bits"),
    (GOOD | {"token_ids": [1, 2], "response_length": 3}, "malformed", "response_length: 3 can't split 2"),
    (GOOD | {"loss_mask": [1, 0]}, "masked_tokens", "loss_mask: masks response tokens out"),
    (GOOD | {"loss_mask": [1]}, "malformed", "loss_mask: 1 values for 2"),
    (GOOD | {"response_token_ids": None, "response": 5}, "malformed", "response: is a int"),
    (GOOD | {"reward": 10**400}, "bad_reward", "reward: inf isn't a finite number"),
    (GOOD | {"reward": [1.0]}, "bad_reward", "got list"),
    (GOOD | {"response_token_ids": [[1, 2]]}, "non_integer_token", "[1, 2] at position 0"),
    (GOOD | {"response_token_ids": [True]}, "non_integer_token", "True at position 0"),
    (GOOD | {"response_token_ids": "[1 2]"}, "non_integer_token", "got str"),
    (GOOD | {"response_token_ids": [10**30]}, "token_beyond_vocabulary", "doesn't fit 64 bits"),
    (GOOD | {"token_ids": [1, 2], "response_length": 1.0}, "malformed", "response_length: 1.0"),
    (GOOD | {"behavior_log_probs": ["-1", "-2"]}, "bad_behavior_log_probs", "expected a list of numbers"),
    (GOOD | {"behavior_log_probs": [False, False]}, "bad_behavior_log_probs", "expected a list of numbers"),
    (GOOD | {"behavior_log_probs": [-1.0, None]}, "bad_behavior_log_probs", "nan at position 1"),
    (GOOD | {"behavior_log_probs": [-(10**400), -1]}, "bad_behavior_log_probs", "expected a list of numbers"),
    (GOOD | {"behavior_log_probs": [-1e39, -1]}, "bad_behavior_log_probs", "-inf at position 0"),
    (GOOD | {"behavior_log_probs": {"0": -1.0}}, "bad_behavior_log_probs", "expected a list of numbers"),
    (GOOD | {"sample_id": {"a": 1}}, "malformed", "sample_id: is a dict"),
    (GOOD | {"sample_id": True}, "malformed", "sample_id: is a bool"),
    (GOOD | {"sample_id": ""}, "malformed", "sample_id: is empty"),
    (
        GOOD | {"response_token_ids": None, "response": ["four"]},
        "malformed",
        "is a list, but not of messages",
    ),
    (GOOD | {"prompt_token_ids": None, "prompt": [1, 6]}, "malformed", "give token ids as prompt_token_ids"),
    (GOOD | {"group_id": ["g"]}, "malformed", "group_id: ['g'] is neither"),
    (
        GOOD | {"finish_reason": {"type": "length"}},
        "malformed",
        "map the field that has it, as in 'finish_reason.type'",
    ),
    (GOOD | {"is_truncated": 1}, "malformed", "truncated (from 'is_truncated'): 1 isn't true or false"),
    (
        {"prompt": json.dumps([{"role": "user", "content": "a"}]), "response": "b", "reward": 1},
        "malformed",
        "prompt: is the text of a list of messages",
    ),
    (GOOD | {"finished": "no"}, "malformed", "finished: 'no' isn't true or false"),
    (GOOD | {"remove_sample": "yes"}, "malformed", "excluded (from 'remove_sample'): 'yes' isn't true or false"),
    (GOOD | {"loss_multiplier": 0.5}, "malformed", "included (from 'loss_multiplier'): 0.5 isn't true"),
    (GOOD | {"loss_mask": "11"}, "malformed", "loss_mask: str values"),
    (GOOD | {"prompt": "\ud83d"}, "unencodable_text", "prompt: has half of a surrogate pair (\\ud83d at 0)"),
    (GOOD | {"response": "a\udc00"}, "unencodable_text", "response: has half of a surrogate pair (\\udc00 at 1)"),
    (GOOD | {"group_id": "\ud83d"}, "unencodable_text", "group_id: has half"),
    (GOOD | {"sample_id": "\ud83d"}, "unencodable_text", "sample_id: has half"),
    (GOOD | {"finish_reason": "\ud83d"}, "unencodable_text", "finish_reason: has half"),
    (GOOD | {"metadata": {"a": [{"b": "\ud83d"}]}}, "unencodable_text", "metadata.a.b: has half"),
    (GOOD | {"metadata": {"\ud83d": 1}}, "unencodable_text", "metadata: has half"),
    (GOOD | {"prompt": [{"role": "user", "content": "\ud83d"}]}, "unencodable_text", "prompt.content: has half"),
    (
        '{"metadata": ' + "[" * 990 + "]" * 990 + json.dumps(GOOD).replace("{", ", ", 1),
        "malformed",
        "nested too deeply",
    ),
    ('{"metadata": {"a": 1e999}' + json.dumps(GOOD).replace("{", ", ", 1), "malformed", "beyond the range of float64"),
    ('{"reward": 1, "reward": 0}', "unreadable", "line: has the key 'reward' twice"),
    ('{"reward": 1', "unreadable", "line: isn't JSON"),
    ("[1, 2]", "unreadable", "line: is a JSON list"),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bad: Any, reason: str, message: str) -> None:
    first = GOOD | {"sample_id": "first", "group_id": "g"}
    source = jsonl(tmp_path / "in.jsonl", [first, GOOD, bad, GOOD | {"reward": 0}])
    output = tmp_path / "out" / "out.parquet"
    with pytest.raises(RolloutError) as error:
        run(source, output, tokenizer=tokenizer)
    assert str(error.value).startswith(f"{source}:3: ") and message in str(error.value)
    assert "nothing was written" in str(error.value) and list(output.parent.iterdir()) == []

    report = run(source, output, tokenizer=tokenizer, on_reject="skip")
    assert report.rejected == Counter({reason: 1}) and report.accepted == 3
    assert message in report.first_rejected[reason]
    assert read_rollouts(output).rewards.tolist() == [1, 1, 0]


SLIME = {"tokens": [1, 6, 8, 2], "response_length": 2, "reward": 1.0, "status": "completed", "group_index": 0}
MARKS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("slime", SLIME, {"remove_sample": True}, "remove_sample True"),
    (
        "slime",
        SLIME,
        {"status": "aborted", "reward": None, "tokens": [], "response_length": 0},
        "status aborted",
    ),
    ("slime", SLIME, {"status": "failed"}, "status failed"),
    ("slime", SLIME, {"status": "pending", "reward": None}, "status pending"),
    ("slime", SLIME, {"loss_mask": [0, 0]}, "loss_mask all zero"),
    ("plain", GOOD, {"loss_mask": [False, False]}, "loss_mask all zero"),
    ("plain", GOOD, {"loss_multiplier": 0.0}, "loss_multiplier 0.0"),
    ("plain", GOOD, {"remove_sample": 1}, "remove_sample 1"),
    ("plain", GOOD, {"finish_reason": "abort"}, "finish_reason abort"),
    ("slime", SLIME, {"status": "Status.ABORTED"}, "status Status.ABORTED"),
    ("plain", GOOD, {"finish_reason": "FINISHED_ABORTED"}, "finish_reason FINISHED_ABORTED"),
]


@pytest.mark.parametrize(("preset", "row", "mark", "reason"), MARKS, ids=[reason for *_, reason in MARKS])
def test_samples_that_another_framework_excludes(
    tmp_path: Path, preset: str, row: dict[str, Any], mark: dict[str, Any], reason: str
) -> None:
    kept = row | {"remove_sample": False, "loss_multiplier": 1, "loss_mask": [1, 1]}
    source = jsonl(tmp_path / "in.jsonl", [row, row | mark, kept])
    # They are no rows that can't be used: nothing ends here.
    report = run(source, tmp_path / "out.parquet", format=preset)
    assert report.excluded == Counter({reason: 1}) and report.accepted == 2 and not report.rejected
    assert report.first_excluded == {reason: f"{source}:2"}
    with pytest.raises(RolloutError, match=f"no rollout could be accepted .1 excluded by {reason}"):
        run(jsonl(source, [row | mark]), tmp_path / "none.parquet", format=preset)


def test_marks_under_other_names(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [GOOD | {"sample_mask": 0}, GOOD | {"sample_mask": 1}])
    report = run(source, tmp_path / "out.parquet", fields={"included": "sample_mask"})
    assert report.accepted == 1 and report.excluded == {"sample_mask 0": 1}


@pytest.mark.parametrize(
    ("end", "reason", "has_eos", "assumed"),
    [
        ({"finish_reason": "LENGTH"}, "length", False, 0),
        ({"finish_reason": "FinishReason.LENGTH"}, "length", False, 0),
        ({"finish_reason": "FINISHED_LENGTH_CAPPED"}, "length", False, 0),
        ({"finish_reason": "Status.TRUNCATED"}, "length", False, 0),
        ({"finish_reason": "max_output_tokens"}, "length", False, 0),
        ({"is_truncated": True}, "length", False, 0),
        ({"finish_reason": "", "is_truncated": True}, "length", False, 0),
        ({"finish_reason": "Stop"}, "stop", True, 0),
        ({"finish_reason": "end_turn"}, "stop", True, 0),
        ({"is_truncated": False}, None, True, 1),
        ({"finish_reason": ""}, None, True, 1),
        ({"finish_reason": "content_filter"}, "content_filter", True, 1),
    ],
)
def test_how_frameworks_write_a_response_s_end(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    end: dict[str, Any],
    reason: str | None,
    has_eos: bool,
    assumed: int,
) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "what is", "response": "two", "reward": 1} | end])
    report = run(source, tmp_path / "out.parquet", tokenizer=tokenizer)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    [row] = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["finish_reason"] == reason and report.assumed_ended == assumed
    assert (rollouts.response_tokens(0)[-1] == tokenizer.eos_token_id) == has_eos


def test_what_was_assumed_about_a_response_s_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "what is", "reward": 1}
    rows = [
        row | {"response": " ".join(["two"] * n), "finish_reason": r} for n, r in ((1, None), (50, None), (50, None))
    ]
    rows += [row | {"response": "two", "finish_reason": "stop"}, row | {"response": "two", "finish_reason": "length"}]
    source = jsonl(tmp_path / "in.jsonl", rows)
    report = run(source, tmp_path / "out.parquet", tokenizer=tokenizer)
    (note,) = (note for note in report.notes if "no finish reason" in note)
    assert report.assumed_ended == 3 and note.startswith(
        "3 responses have no finish reason, or an unknown one: they were taken as complete"
    )
    assert "2 of them are within 2% of the longest (51 tokens)" in note
    ends = [read_rollouts(tmp_path / "out.parquet").response_tokens(i)[-1] for i in range(5)]
    assert ends == [IDS["</s>"]] * 4 + [IDS["two"]]
    report = run(source, tmp_path / "out.parquet", tokenizer=tokenizer, append_eos=False)
    assert report.assumed_ended == 0


def test_openr1_generations_without_an_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "problem": "two",
        "generations": ["four", "five", "plus"],
        "correctness_math_verify": [True, False, True],
        "is_reasoning_complete": [True, False, False],
        "finish_reasons": [None, None, "stop"],
    }
    source = jsonl(tmp_path / "in.jsonl", [row])
    run(source, tmp_path / "out.parquet", format="openr1", tokenizer=tokenizer)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert [rollouts.finish_reason(i) for i in range(3)] == [None, "length", "stop"]
    assert [rollouts.response_tokens(i).tolist() for i in range(3)] == [ids("four </s>"), ids("five"), ids("plus </s>")]


def test_csv_gives_what_json_lines_give(tmp_path: Path) -> None:
    rows = [GOOD | {"group_id": "007", "behavior_log_probs": [-0.5, -1e-05], "finish_reason": "length"}, dict(GOOD)]
    rows[1] |= {"reward": True, "metadata": {"a": [1, "x"]}, "response": "007", "prompt": "p,\n", "sample_id": "1"}
    run(jsonl(tmp_path / "in.jsonl", rows), tmp_path / "a.parquet")
    columns = ["group_id", "prompt_token_ids", "response_token_ids", "reward", "behavior_log_probs", "finish_reason"]
    columns += ["metadata", "response", "prompt", "sample_id"]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            values = (row.get(name, "") for name in columns)
            writer.writerow([json.dumps(v) if isinstance(v, dict) else v for v in values])
    run(tmp_path / "in.csv", tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == pq.read_table(tmp_path / "b.parquet").to_pylist()
    (tmp_path / "in.csv").write_text("prompt_token_ids,response_token_ids,reward\n[1],[2],high\n")
    with pytest.raises(RolloutError, match="in.csv:2: reward: 'high' is neither a number nor JSON"):
        run(tmp_path / "in.csv", tmp_path / "c.parquet")


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "1.jsonl", [GOOD])
    (tmp_path / "in" / "2.jsonl.lz4").write_text("x")
    report = run(tmp_path / "in", tmp_path / "out.parquet")
    assert report.as_dict()["not_read"] == [str(tmp_path / "in" / "2.jsonl.lz4")]
    console = Console(file=io.StringIO(), record=True, width=1000)
    console.print(render(report))
    assert "2.jsonl.lz4" in console.export_text()
    with pytest.raises(RolloutError, match="of rollouts, fields are mapped by themselves"):
        run(f"{tmp_path}/in/1.jsonl?reward=score", tmp_path / "out.parquet")


def test_bad_utf8_names_its_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [GOOD])
    source.write_bytes(source.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(RolloutError, match=r"in.jsonl:2: line: isn't UTF-8 \(byte 0xff"):
        run(source, tmp_path / "out.parquet")


def test_message_names_the_source_field(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [GOOD | {"score": None}])
    with pytest.raises(RolloutError, match=r"in.jsonl:1: reward \(from 'score'\): is missing or null"):
        run(source, tmp_path / "out.parquet", fields={"reward": "score"})


def test_repeated_content_is_a_draw_unless_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [GOOD, GOOD, GOOD])
    report = run(source, tmp_path / "out.parquet")
    assert report.accepted == 3 and report.repetitions == 2
    assert read_rollouts(tmp_path / "out.parquet").sample_ids == [sample_id([1, 6], [8, 2], k) for k in range(3)]
    with pytest.raises(RolloutError, match="in.jsonl:2: response_token_ids: the same tokens occurred before"):
        run(source, tmp_path / "out.parquet", duplicates="reject")
    report = run(source, tmp_path / "out.parquet", duplicates="reject", on_reject="skip")
    assert report.accepted == 1 and report.rejected == {"duplicate_sample": 2} and report.repetitions == 0


def test_parallel_lists_of_different_length(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"problem": "two", "generations": ["four", "five"], "correctness_math_verify": [True]}
    source = jsonl(tmp_path / "in.jsonl", [row])
    with pytest.raises(RolloutError, match="in.jsonl:1: generations.*differ in length"):
        run(source, tmp_path / "out.parquet", format="openr1", tokenizer=tokenizer)
    source = jsonl(tmp_path / "in.jsonl", [row | {"generations": "four"}])
    with pytest.raises(RolloutError, match="generations: is a str; 'generations.*' needs a list"):
        run(source, tmp_path / "out.parquet", format="openr1", tokenizer=tokenizer)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    row = {"prompt": "two", "response": "four", "reward": 1}
    source = jsonl(tmp_path / "in.jsonl", [row])
    # Not a bad row: it must not be skipped silently.
    with pytest.raises(RolloutError, match="in.jsonl:1: prompt: the source has text without token ids; give the base"):
        run(source, tmp_path / "out.parquet", on_reject="skip")


def test_mixed_ids_and_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "two", "response_token_ids": [10], "reward": 1}])
    report = run(source, tmp_path / "out.parquet", tokenizer=tokenizer)
    assert (report.encoded_prompts, report.encoded_responses) == (1, 0)
    # The tokenizer's vocabulary bounds given ids as well.
    source = jsonl(tmp_path / "in.jsonl", [GOOD | {"response_token_ids": [12]}])
    with pytest.raises(RolloutError, match="beyond the vocabulary of 12"):
        run(source, tmp_path / "out.parquet", tokenizer=tokenizer)


def test_messages_that_can_not_be_encoded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "assistant", "content": "four"}, {"role": "tool", "content": "five"}]
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "two", "completion": turns, "reward": 1}])
    with pytest.raises(RolloutError, match=r"response \(from 'completion'\): 2 messages; a response is a single"):
        run(source, tmp_path / "out.parquet", format="trl", tokenizer=tokenizer)


def test_wrong_arguments(tmp_path: Path) -> None:
    source, output = jsonl(tmp_path / "in.jsonl", [GOOD]), tmp_path / "out.parquet"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"fields": {"rewrad": "x"}}, "field_map: 'rewrad' isn't one of"),
        ({"fields": {"behavior_log_probs": "logprbs"}}, "maps 'behavior_log_probs' to 'logprbs', which no row has"),
    ]
    for options, message in wrong:
        with pytest.raises(RolloutError, match=message):
            run(source, output, **options)
    assert not output.exists()


def test_sources_that_can_not_be_read(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "in.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path / "empty.jsonl", [])
    for name, message in (
        ("nothing", "no such file"),
        ("in.txt", "must end in"),
        ("in.parquet", "can't be read as Parquet"),
        ("empty", "holds no file ending in"),
        ("empty.jsonl", "there are no rows"),
    ):
        with pytest.raises(RolloutError, match=message):
            run(tmp_path / name, output)
    source = jsonl(tmp_path / "bad.jsonl", [GOOD | {"reward": None}] * 2)
    with pytest.raises(RolloutError, match=r"accepted \(2 no_reward; first .*bad.jsonl:1: reward"):
        run(source, output, on_reject="skip")
    assert not output.exists()


def test_report_for_machines_and_people(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [GOOD, GOOD | {"reward": None}])
    report = run(source, tmp_path / "out.parquet", on_reject="skip")
    values = json.loads(json.dumps(report.as_dict()))
    assert values["accepted"] == 1 and values["rejected"] == {"no_reward": 1}
    console = Console(file=io.StringIO(), record=True, width=1000)
    console.print(render(report))
    text = console.export_text()
    assert "no_reward" in text and "in.jsonl:2" in text and "accepted" in text


def test_constant_groups_by_hand() -> None:
    nan = np.nan
    groups = np.array([1, 1, 2, 2, 3, 3, 4, 5])
    rewards = np.array([1, 1, 0, 1, nan, 0.5, nan, 2])
    # 1: equal; 3: one scored rollout; 5: a group of one. 4 has none scored and isn't counted.
    assert constant_groups(groups, rewards) == 3
    assert constant_groups(np.array([1]), np.array([nan])) == 0
