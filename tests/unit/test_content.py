"""What counts of a folder and of a program: neither notes beside a model nor comments in a verifier."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from megatron_erpd.content import module_file, program_digest
from megatron_erpd.manifest import file_digest, former_digests, input_digest
from megatron_erpd.sampling.inputs import input_digests
from megatron_erpd.sampling.policy import policy_fingerprint

MODEL = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "modeling.py": "x = 1",
}
UNREAD = [
    *(".cache/huggingface/download/config.json.metadata", ".DS_Store", ".git/HEAD", "._model.safetensors"),
    *("._config.json", "sub/.DS_Store", "additional_chat_templates/.tool.jinja.swp", "Thumbs.db", "desktop.ini"),
    *("__pycache__/modeling.cpython-312.pyc", "config.json~", "config.json.bak", "model.safetensors.lock"),
    *("model.safetensors.incomplete", "x.tmp", ".locks/a/b.lock", "README.md", "LICENSE", "LICENSE.txt"),
    *("USE_POLICY.md", "assets/plot.png", "original/consolidated.00.pth", "onnx/model.onnx", "pytorch_model.bin"),
    *("pytorch_model.bin.index.json", "tf_model.h5", "figures/README.md", ".gitattributes", ".idea/x.json"),
]
READ = [
    *("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "adapter_config.json"),
    *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "sub/code.py"),
    *("chat_template.json", "additional_chat_templates/rag.jinja", "tokenizer.model", "preprocessor_config.json"),
]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_models_folder_is_what_is_read_of_it(tmp_path):
    folder = write(tmp_path / "model", MODEL)
    plain, fingerprint = input_digest(folder), policy_fingerprint(folder)
    entries = sorted((name, file_digest(folder / name)) for name in MODEL)
    assert plain == hashlib.sha256(json.dumps(entries).encode()).hexdigest(), "as in the version before"
    for name in UNREAD:
        write(folder, {name: "x"})
        assert input_digest(folder) == plain, name
    (folder / "pytorch_model.bin.index.json").unlink()  # a policy's fingerprint takes any JSON that is not hidden
    (folder / "README.md").write_text("changed")
    assert input_digest(folder) == plain and policy_fingerprint(folder) == fingerprint
    for name in READ:
        before = input_digest(folder)
        write(folder, {name: "y"})
        assert input_digest(folder) != before, name
    for name in MODEL:
        before = input_digest(folder)
        (folder / name).write_text("edited")
        assert input_digest(folder) != before, name


def test_without_safetensors_other_weights_count(tmp_path):
    folder = write(tmp_path, {"config.json": "{}", "pytorch_model.bin": "a"})
    before = input_digest(folder)
    (folder / "pytorch_model.bin").write_text("b")
    assert input_digest(folder) != before


def test_a_folder_of_data_has_subfolders(tmp_path):
    folder = write(tmp_path, {"train/a.jsonl": "{}"})
    before = input_digest(folder)
    write(folder, {".cache/x": "1", "train/.a.jsonl.swp": "1", "README.md": "1", "train/a.jsonl.lock": ""})
    assert input_digest(folder) == before
    write(folder, {"test/b.jsonl": "{}"})
    assert input_digest(folder) != before


def test_digests_of_the_version_before_are_known(tmp_path):
    """... which took every file: with the notes of a hub, which it had or which came later."""
    folder = write(tmp_path / "model", {**MODEL, "README.md": "x", "original/a.pth": "y"})
    entries = sorted((str(p.relative_to(folder)), file_digest(p)) for p in folder.rglob("*") if p.is_file())
    former = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    assert former in former_digests(folder) and former != input_digest(folder)
    write(folder, {".cache/notes": "1"})
    assert former in former_digests(folder)
    write(folder, {"config.json": "{ }"})
    assert former not in former_digests(folder)


def test_a_tokenizer_is_no_weights(tmp_path):
    folder = write(tmp_path / "model", MODEL)

    def digests() -> dict[str, str]:
        return input_digests("import-rollouts", {"source": folder / "config.json", "tokenizer": folder})

    before, model = digests(), input_digests("sample", {"model": folder})
    (folder / "model.safetensors").write_text("trained")
    assert digests() == before and input_digests("sample", {"model": folder}) != model
    (folder / "tokenizer.json").write_text("other")
    assert digests() != before


SCORE = '''\
"""Scores."""
import helper
from package import grade as g

LIMIT = 3

def score(record, response):
    """Right or wrong."""
    return float(len(response) > LIMIT)  # longer is better
'''


@pytest.fixture
def program(tmp_path: Path) -> Path:
    modules = {
        "score.py": SCORE,
        "helper.py": "from package.deep import thing\n",
        "unrelated.py": "x = 1\n",
        "package/__init__.py": "",
        "package/grade.py": "from . import sibling\nfrom .deep import thing\n",
        "package/sibling.py": "y = 1\n",
        "package/unused.py": "y = 1\n",
        "package/deep/__init__.py": "",
        "package/deep/thing.py": "def f():\n    import late\n",
        "late.py": "z = 1\n",
    }
    return write(tmp_path, modules) / "score.py"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # longer is better", "", True),
        ("# longer is better", "# shorter is worse", True),
        ('    """Right or wrong."""\n', "", True),
        ('"""Scores."""', '"""Scores responses."""\n# and more\n', True),
        ("float(len(response) > LIMIT)", "float(\n        len( response ) > LIMIT,\n    )", True),
        ("LIMIT = 3\n", "LIMIT = 3\n\n\n\n", True),
        ("    return", "  return", None),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("LIMIT = 3", "LIMIT = 3.0", False),
        ("record, response", "row, response", False),
        (">", ">=", False),
        ("return float", "return int", False),
    ],
)
def test_a_program_is_its_code(program, old, new, same):
    before = program_digest(program)
    assert old in SCORE
    text = SCORE.replace(old, new)
    if same is None:  # the indentation of the whole body
        text = SCORE.replace("\n    ", "\n  ")
        same = True
    program.write_text(text)
    assert (program_digest(program) == before) == same


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        *((name, True) for name in ("helper", "package/grade", "package/sibling", "package/deep/thing", "late")),
        *((name, True) for name in ("package/__init__", "package/deep/__init__")),
        *((name, False) for name in ("unrelated", "package/unused")),
    ],
)
def test_modules_that_a_program_imports_count(program, module, counts):
    before, alone = program_digest(program), program_digest(program, with_modules=False)
    file = program.parent / f"{module}.py"
    file.write_text(file.read_text() + "# a comment\n")
    assert program_digest(program) == before
    file.write_text(file.read_text() + "added = 1\n")
    assert (program_digest(program) != before) == counts
    assert program_digest(program, with_modules=False) == alone


def test_the_file_of_a_module_is_found_without_importing_it(program, monkeypatch):
    monkeypatch.syspath_prepend(str(program.parent))
    for name in ("package", "package.deep", "package.deep.thing", "helper"):
        found = module_file(name)
        assert found is not None and found.is_relative_to(program.parent) and name not in sys.modules
    assert module_file("package.missing") is None and module_file("sys") is None
    # An installed module brings its own package, and not all that is installed beside it.
    regex = module_file("pytest")
    assert regex is not None and program_digest(regex)


def test_a_file_that_can_not_be_parsed_is_its_bytes(tmp_path):
    file = write(tmp_path, {"bad.py": "def ("}) / "bad.py"
    before = program_digest(file)
    file.write_text("def (  ")
    assert program_digest(file) != before


def test_prompts_are_what_is_read_of_them(tmp_path):
    file = tmp_path / "prompts.jsonl"

    def digest(text: str) -> str:
        file.write_text(text)
        return input_digests("evaluate", {"prompts": file})["prompts"]

    first = digest('{"prompt": "1+1=", "answer": "2"}\n')
    assert digest('{"answer":"2","prompt":"1+1="}\n\n') == first
    assert digest('{"answer": "2", "prompt": "1+1=", "metadata": {}}') == first
    assert digest('{"answer": "3", "prompt": "1+1="}') != first
    assert digest('{"answer": "2", "prompt": "1+2="}') != first


def test_a_script_of_prepare_is_its_own_code(program):
    inputs = {"file-score.py": program, "file-data": program.parent / "helper.py"}
    before = input_digests("prepare", inputs)
    program.write_text(SCORE + "# done\n")
    assert input_digests("prepare", inputs) == before
    (program.parent / "helper.py").write_text("changed = 1  # named as data, so every byte of it counts\n")
    after = input_digests("prepare", inputs)
    assert after["file-score.py"] == before["file-score.py"] and after["file-data"] != before["file-data"]
