"""What a conversation may be, and the text and tokens that it becomes under templates of the kinds that models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_erpd.data.rollouts import read_rollouts
from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RecipeError, RolloutError
from megatron_erpd.sampling.prompts import encode_prompts, load_prompts
from megatron_erpd.settings import ChatSettings, ImportSettings, TemplateSettings
from megatron_erpd.sources.chat import Chat, checked_messages
from megatron_erpd.sources.importers import import_rollouts

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: contents that are no text are nothing, reasoning is shown behind the last question alone.
REASONING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and thought %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>' + content + '</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
# As DeepSeek-R1's distilled models: the answer begins with <think>, which messages don't show.
THINKS_FIRST = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
# As Llama 3.2's, in a macro as in gpt-oss's.
DATED = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- macro today() %}{{- "Today: " + date_string + strftime_now(", %A") }}{%- endmacro %}
{{- today() + '\n' }}
{%- for m in messages %}{{- '[' + m.role + ']' + m.content | trim + '</s>' }}{%- endfor %}"""
FIXED_DATE = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today: {{ date_string }}\n"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
CLOCK = "{{ strftime_now('%H:%M:%S') }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}"
)
STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('\n')[0] }}{% endfor %}"


def tokenizer_of(template: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def chat(template: Any, **settings: Any) -> Chat:
    return Chat(tokenizer_of(template), TemplateSettings(**settings))


def user(content: Any = "2+2?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "4", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]), user()),
        (user(["2+", {"type": "input_text", "text": "2?"}]), user()),
        (user([{"type": "text", "text": "2+2?", "image_url": None}]), user()),
        (assistant([{"type": "output_text", "text": "4", "annotations": []}]), assistant()),
        ({**assistant(), "name": None, "tool_calls": None, "refusal": None}, assistant()),
        (assistant(None, tool_calls=[CALL]), assistant("", tool_calls=[CALL])),
        (user(""), user("")),
    ],
)
def test_contents_become_text(message: Any, expected: Any) -> None:
    assert checked_messages([message], "prompt") == [expected]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "not empty"),
        ({"messages": [user()]}, "a list of"),
        ([[user()]], "message 1 is a list"),
        ([user(), "text"], "message 2 is a str"),
        ([{"messages": [user()]}], "message 1 has the key 'messages'"),
        ([user(None)], "message 1 has no text: its content is null"),
        ([user(7)], "its content is a int"),
        ([user({"text": "a"})], "its content is a dict"),
        ([user([])], "its content is an empty list"),
        ([{"role": "user"}], "its content is missing"),
        ([{"content": "a"}], "message 1 has no role"),
        ([{"role": 1, "content": "a"}], "message 1 has no role but 1"),
        ([{"role": "", "content": "a"}], "has no role"),
        (
            [user(), user([{"type": "image_url", "image_url": {"url": "x"}}])],
            r"message 2 .* isn't text \('image_url'\)",
        ),
        ([user([{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}])], "'input_audio'"),
        ([user([{"type": "text", "text": None}])], "isn't text"),
        ([user([{"text": "a"}])], "isn't text"),
        ([user([None])], "isn't text"),
        ([user([{"type": "text", "text": "a", "cache_control": {"type": "x"}}])], "the key 'cache_control'"),
        ([{**user(), "weight": 0}], "the key 'weight'"),
        ([assistant(audio={"id": "1"})], "the key 'audio'"),
        ([assistant(reasoning_content=["a"])], "a list as reasoning_content"),
        ([assistant(reasoning_content="a", thinking="b")], "which differ"),
        ([assistant(tool_calls="add")], "tool_calls"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        checked_messages(messages, "prompt")


QUESTION = "<|im_start|>user\n2+2?<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (CHATML, [user()], QUESTION + "<|im_start|>assistant\n"),
        (REASONING, [user([{"type": "text", "text": "2+2?"}])], QUESTION + "<|im_start|>assistant\n"),
        # the beginning of the answer is continued, its last space included
        (CHATML, [user(), assistant("It is ")], QUESTION + "<|im_start|>assistant\nIt is "),
        (CHATML, [user(), assistant("")], QUESTION + "<|im_start|>assistant\n"),
        (REASONING, [user(), assistant("It", reasoning_content="Hm")],
         QUESTION + "<|im_start|>assistant\n<think>\nHm\n</think>\n\nIt"),
        # what a template leaves out of earlier turns is left out, here as when the model answers
        (REASONING, [user(), assistant(reasoning_content="Hm"), user("And 3+3?")],
         QUESTION + "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n"
         "<|im_start|>assistant\n"),
        (REASONING, [user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "4"}],
         QUESTION + '<|im_start|>assistant\n\n<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>\n'
         "<|im_start|>user\n<tool_response>4</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, [{"role": "system", "content": "Be brief."}],
         "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_a_prompt_is_rendered_whole(template: str, messages: Any, text: str) -> None:
    prompt = chat(template).prompt(messages, user_message=False)
    assert prompt.text == text
    assert prompt.ids == tokenizer_of(template).encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (STRICT, [{"role": "system", "content": "Be brief."}, user()], "System role not supported"),
        (NO_SYSTEM, [{"role": "system", "content": "2"}, user()], r"message 1 \(role 'system'\) isn't in what"),
        (NO_SYSTEM, [user(), {"role": "tool", "content": "4"}], r"message 2 \(role 'tool'\)"),
        (
            CHATML,
            [user(), assistant(reasoning_content="Hm"), user()],
            "message 2 has reasoning_content, which the chat",
        ),
        (CHATML, [user(), assistant(reasoning_content="Hm")], "message 2 has reasoning_content"),
        (CHATML, [user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "4"}], "has tool_calls"),
        (CHATML, [{**user(), "name": "Ann"}], "message 1 has name"),
        (REASONING, [user(), {"role": "tool", "content": "4", "tool_call_id": "1"}], "message 2 has tool_call_id"),
        (REASONING, [user(), assistant("", tool_calls=[CALL])], "ends with tool calls"),
        (REASONING, [user(), assistant("<think>Hm</think>It is")], "which the chat template writes as another text"),
        (STRIPPING, [user(), assistant("It\nis")], "which the chat template writes as another text"),
    ],
)
def test_what_a_template_does_not_render_is_refused(template: str, messages: Any, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        chat(template).prompt(messages, user_message=False)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "text"),
    [
        (CHATML, "2+2?", [assistant()], "4"),
        (CHATML, [user()], [assistant([{"type": "text", "text": "4"}])], "4"),
        (CHATML, [user(), assistant("It is")], [assistant(" 4")], " 4"),
        (REASONING, [user()], [assistant(reasoning_content="Hm")], "<think>\nHm\n</think>\n\n4"),
        (REASONING, [user()], [assistant(thinking="Hm")], "<think>\nHm\n</think>\n\n4"),
        (REASONING, [user()], [assistant("So", tool_calls=[CALL])],
         'So\n<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("append_eos", [True, False])
def test_a_response_is_what_follows_the_prompt(
    template: str, prompt: Any, response: Any, text: str, append_eos: bool
) -> None:
    renderer, tokenizer = chat(template), tokenizer_of(template)
    encoded = renderer.prompt(prompt, user_message=False)
    found, ids = renderer.response(response, encoded, append_eos=append_eos)
    assert found == text
    assert ids == tokenizer.encode(text + "<|im_end|>" * append_eos, add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "problem"),
    [
        (CHATML, [user()], [user("five")], "of the role 'user'"),
        (CHATML, [user()], [assistant(), assistant()], "2 messages"),
        (CHATML, [user()], [assistant(None)], "content is null"),
        (
            CHATML,
            [user()],
            [assistant(reasoning_content="Hm")],
            "has reasoning_content, which the chat template doesn't",
        ),
        (CHATML, [user()], [assistant(tool_calls=[CALL])], "has tool_calls, which"),
        (CHATML, "2+2?", [assistant(reasoning_content="Hm")], "behind a prompt without messages"),
        (
            REASONING,
            [user(), assistant("It")],
            [assistant(reasoning_content="Hm")],
            "behind the beginning of a message",
        ),
        (REASONING, [user()], [assistant("<think>Oh</think>4", reasoning_content="Hm")], "lacks a part"),
        (THINKS_FIRST, [user()], [assistant(reasoning_content="Hm")], "has reasoning_content, which"),
    ],
)
def test_a_response_that_would_lose_a_part_is_refused(template: str, prompt: Any, response: Any, problem: str) -> None:
    renderer = chat(template)
    encoded = renderer.prompt(prompt, user_message=False)
    with pytest.raises(RowProblem, match=problem):
        renderer.response(response, encoded, append_eos=True)


def test_a_response_that_begins_otherwise_than_the_generation_prompt_is_refused() -> None:
    renderer = chat(REASONING, template_arguments={"enable_thinking": False})
    encoded = renderer.prompt([user()], user_message=False)
    assert encoded.text.endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(RowProblem, match="doesn't begin where the prompt ends"):
        renderer.response([assistant(reasoning_content="Hm")], encoded, append_eos=True)


@pytest.mark.parametrize(
    ("template", "settings", "text"),
    [
        (CHATML, {"system_prompt": "Be brief."}, "<|im_start|>system\nBe brief.<|im_end|>\n" + QUESTION),
        (REASONING, {"template_arguments": {"enable_thinking": True}}, QUESTION),
        (DATED, {"template_date": "2026-11-29"}, "<s>Today: 29 Nov 2026, Sunday\n[user]2+2?</s>"),
        (DATED, {"template_date": "2026-11-29", "template_arguments": {"date_string": "now"}},
         "<s>Today: now, Sunday\n[user]2+2?</s>"),
        (FIXED_DATE, {}, "Today: 26 Jul 2024\n2+2?"),
        (FIXED_DATE, {"template_date": "2026-11-29"}, "Today: 29 Nov 2026\n2+2?"),
        (CLOCK, {"template_date": "2026-11-29"}, "00:00:00\n2+2?"),
        ("  \n" + CLOCK, {"template_date": "2026-11-29"}, "  \n00:00:00\n2+2?"),
        ("  {% if true %}\n" + CLOCK + "{% endif %}", {"template_date": "2026-11-29"}, "00:00:00\n2+2?"),
        # a clock that is there but not read needs no date
        ("{% if with_time is defined %}" + CLOCK + "{% else %}{{ messages[0].content }}{% endif %}", {}, "2+2?"),
    ],
)  # fmt: skip
def test_what_a_template_is_given(template: str, settings: dict[str, Any], text: str) -> None:
    assert (
        chat(template, **settings).prompt("2+2?", user_message=True).text.removesuffix("<|im_start|>assistant\n")
        == text
    )


@pytest.mark.parametrize(
    ("template", "settings", "problem"),
    [
        (None, {}, "has no chat template"),
        ("{% for m in messages %}{{ m.content }}", {}, r"the chat template is broken \(line 1: Unexpected end"),
        ("{{ messages | no_such_filter }}", {}, "the chat template is broken .*no_such_filter"),
        ({"a": CHATML, "b": CHATML}, {}, "default"),
        (DATED, {}, r"puts the date or the time into the text.*template_date: \d{4}-\d\d-\d\d"),
        (CLOCK, {}, "set template_date"),
        (CHATML, {"template_date": "2026-11-29"}, "the chat template shows no date"),
        (REASONING, {"template_arguments": {"enable_thinkng": False}}, "never reads it; did you mean enable_thinking"),
        (CHATML, {"template_arguments": {"enable_thinking": False}}, "never reads it; it reads add_generation_prompt"),
        (CHATML, {"template_arguments": {"add_generation_prompt": False}}, "the renderer sets itself"),
    ],
)
def test_a_template_that_can_not_be_used_is_named(template: Any, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){problem}"):
        chat(template, **settings).prompt("2+2?", user_message=True)
    # Text alone needs no template.
    if not settings:
        assert chat(template).prompt("2+2?", user_message=False).text == "2+2?"


def test_settings_that_a_prompt_would_not_take_are_refused() -> None:
    renderer = chat(CHATML, system_prompt="Be brief.")
    with pytest.raises(RowProblem, match="a system message of its own"):
        renderer.prompt([{"role": "system", "content": "Be long."}, user()], user_message=False)
    with pytest.raises(RowProblem, match="system_prompt would have no effect"):
        renderer.prompt("2+2?", user_message=False)


@pytest.mark.parametrize(("text", "begin"), [("2+2?", True), ("<s>2+2?", False), (" <s>2+2?", True), ("2<s>", True)])
def test_text_gets_one_begin_token(text: str, begin: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(CHATML)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    plain = tokenizer.encode(text, add_special_tokens=False)
    found = Chat(tokenizer).prompt(text, user_message=False).ids
    assert found == [tokenizer.bos_token_id] * begin + plain
    # A template writes its own.
    assert Chat(tokenizer).prompt([user(text)], user_message=False).ids[0] != tokenizer.bos_token_id


PROMPTS = [
    "2+2?",
    [user([{"type": "text", "text": "2+2?"}])],
    [user(), assistant("It is ")],
    [user(), assistant(), user("And 3+3?")],
]


@pytest.mark.parametrize(
    "response",
    [
        "<think>\nso\n</think>\n4",
        "so\n</think>\n4",
        "\n<think>\nso\n</think>\n4",
        [assistant("<think>\nso\n</think>\n4")],
    ],
)
def test_what_the_template_opened_is_opened_once(response: Any) -> None:
    reader = chat(THINKS_FIRST)
    prompt = reader.prompt([user()], user_message=False)
    assert prompt.text.endswith("<think>\n")
    text, ids = reader.response(response, prompt, append_eos=False)
    assert text == "so\n</think>\n4" and ids == reader.tokenizer.encode(text, add_special_tokens=False)
    assert reader.repeated_openings == (0 if response == "so\n</think>\n4" else 1)
    # A prompt that is text says itself what it ends with.
    as_text = reader.prompt("2+2?<think>\n", user_message=False)
    assert reader.response("<think>\n4", as_text, append_eos=False)[0] == "<think>\n4"


def test_openings_that_were_repeated_are_reported(tmp_path: Path) -> None:
    rows = [{"problem": "2+2?", "generations": ["<think>\n4", "5"], "correctness_math_verify": [True, False]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings, tokenizer = ImportSettings(format="openr1"), tokenizer_of(THINKS_FIRST)
    report = import_rollouts(tmp_path / "in.jsonl", tmp_path / "out.parquet", settings, tokenizer=tokenizer)
    assert any(note.startswith("1 responses begin with what the chat template") for note in report.notes)


CLOSES_FIRST = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' and '</think>' not in m.content %}"
    "<think>\n\n</think>\n{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_prefix_that_opens_what_the_template_closed_is_refused() -> None:
    reader = chat(CLOSES_FIRST)
    with pytest.raises(RowProblem, match="begins with <think>, which the chat template writes before it too"):
        reader.prompt([user("<think>?"), assistant("<think>\nLet")], user_message=False)
    for prefix in ("Let", "<think>\nso\n</think>\n4", "<answer>"):
        assert reader.prompt([user("<think>?"), assistant(prefix)], user_message=False).text.endswith(prefix)


def test_links_between_calls_and_results_need_not_be_rendered() -> None:
    result = {"role": "tool", "content": "4", "tool_call_id": "a", "name": "add"}
    messages = [user(), assistant("", tool_calls=[CALL | {"id": "a"}]), result]
    assert "<tool_response>4</tool_response>" in chat(REASONING).prompt(messages, user_message=False).text
    for other in ({"tool_call_id": "b"}, {"name": "subtract"}):
        with pytest.raises(RowProblem, match="message 3 has (tool_call_id|name)"):
            chat(REASONING).prompt([*messages[:2], result | other], user_message=False)
    with pytest.raises(RowProblem, match="message 1 has name"):
        chat(REASONING).prompt([user() | {"name": "ann"}], user_message=False)


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        (json.dumps([user()]), True),
        (json.dumps([user()], indent=1), True),
        (str([user([{"type": "text", "text": "a"}])]), True),
        ('[{"content": "a", "role": "user"}]', True),
        ('Sort [{"role": "user"}]', False),
        ('[{"role": 3}]', False),
        ("[{1, 2}]", False),
    ],
)
def test_messages_that_were_written_as_text_are_refused(tmp_path: Path, text: str, is_refused: bool) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": text}))
    if not is_refused:
        assert load_prompts(tmp_path / "in.jsonl")[0]["prompt"] == text
        return
    with pytest.raises(RecipeError, match="in.jsonl:1: prompt: is the text of a list of messages"):
        load_prompts(tmp_path / "in.jsonl")


def test_sampling_and_imports_read_prompts_alike(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(REASONING)
    settings: dict[str, Any] = {"system_prompt": "Be brief.", "template_arguments": {"enable_thinking": False}}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    rows = [{"prompt": p, "response": "4", "reward": 1} for p in PROMPTS]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = encode_prompts(
        tokenizer, load_prompts(tmp_path / "p.jsonl"), ChatSettings(chat_template=True, **settings)
    )
    reading = ImportSettings(user_message=True, **settings)
    import_rollouts(tmp_path / "r.jsonl", tmp_path / "out.parquet", reading, tokenizer=tokenizer)
    rollouts = read_rollouts(tmp_path / "out.parquet")
    assert [rollouts.prompt_tokens(i).tolist() for i in range(len(rollouts))] == sampled
    assert sampled[0] == sampled[1] != sampled[2]
    assert rollouts.file_metadata["template"] == settings


def test_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("a", [{"role": "system", "content": "b"}, user()]))
    )
    with pytest.raises(RecipeError, match=r"p\.jsonl.*2: prompt: the chat template refuses it \(System role"):
        encode_prompts(tokenizer_of(STRICT), load_prompts(file), ChatSettings(chat_template=True))
    with pytest.raises(RecipeError, match=r"p\.jsonl.*2: the prompt is a list of messages; set chat_template"):
        encode_prompts(tokenizer_of(STRICT), load_prompts(file))


def test_imported_token_ids_take_no_template_settings(tmp_path: Path) -> None:
    row = {"prompt_token_ids": [1], "response_token_ids": [2], "reward": 1}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    for tokenizer, problem in ((tokenizer_of(CHATML), "taken as they are"), (None, "give the base model's tokenizer")):
        with pytest.raises(RolloutError, match=problem):
            settings = ImportSettings(system_prompt="Be brief.")
            import_rollouts(tmp_path / "r.jsonl", tmp_path / "out.parquet", settings, tokenizer=tokenizer)
