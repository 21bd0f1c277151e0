"""The pages under docs/: their code runs, the names in them exist, their formulas survive GitHub's Markdown."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`(megatron_erpd(?:\.\w+)+)`")
FILE = re.compile(r"(?<![\w/.])((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)\b")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(text: str) -> str:
    """The text of the ```python blocks at their own lines, everything else blank."""
    kept = [""] * len(text.splitlines())
    for match in FENCE.finditer(text):
        if match[1] == "python":
            first = text[: match.start(2)].count("\n")
            for offset, line in enumerate(match[2].splitlines()):
                kept[first + offset] = line
    return "\n".join(kept)


def run_blocks(text: str, page: str) -> str:
    """Runs all blocks of a page as one doctest, in one namespace; returns what failed."""
    test = doctest.DocTestParser().get_doctest(python_blocks(text), {}, page, page, 0)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run_as_doctests(page: str) -> None:
    with torch.random.fork_rng():
        assert run_blocks(read(page), page) == ""


def test_a_wrong_result_is_found() -> None:
    text = "Words.\n\n```python\n>>> x = 2\n```\n\n```python\n>>> x + x\n5\n```\n"
    assert "Expected:\n    5\nGot:\n    4" in run_blocks(text, "page")


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_has_examples(page: str) -> None:
    assert [code for language, code in FENCE.findall(read(page)) if language == "python" and ">>>" not in code] == []


def test_the_method_has_no_code_but_doctests() -> None:
    languages = [language for language, _ in FENCE.findall(read("docs/method.md"))]
    assert len(languages) > 10
    assert set(languages) == {"python"}


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page: str) -> None:
    assert [name for name in sorted(set(NAME.findall(read(page)))) if not exists(name)] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_files_that_are_named_exist(page: str) -> None:
    assert [file for file in sorted(set(FILE.findall(read(page)))) if source(file) is None] == []


SECTIONS = re.split(r"^## ", read("docs/extending.md"), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_extending_names_what_stands_in_its_files(section: str) -> None:
    """Whatever a section calls by name (`make_engine`, `DistillSettings.divergence`) stands in a file that it names."""
    prose = FENCE.sub("", section)
    files = [path for file in FILE.findall(prose) if (path := source(file)) is not None]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    assert files
    names = [name for name in re.findall(r"`([A-Za-z_][\w.]+)`", prose) if not (ROOT / name).is_file()]
    assert [name for name in names if not words.issuperset(name.split("."))] == []


def source(file: str) -> Path | None:
    """The file of a path from the repository's root, or from the package's."""
    return next((base / file for base in (ROOT, ROOT / "megatron_erpd") if (base / file).is_file()), None)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("megatron_erpd.objectives.projection", True),
        ("megatron_erpd.objectives.projection.Partition.variance", True),
        ("megatron_erpd.vocab_parallel.VocabShard.dense", False),  # a re-export is no home
        ("megatron_erpd.objectives.replay.REPLAY_LOSSES", True),
        ("megatron_erpd.objectives.replay.no_loss", False),
        ("megatron_erpd.nothing", False),
    ],
)
def test_exists(name: str, there: bool) -> None:
    assert exists(name) == there


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that one defines. Read from the source: nothing is imported."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.is_file():
            return _defines(ast.parse(source.read_text(encoding="utf-8")).body, parts[length:])
    return False


def _defines(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == names[0]:
            return _defines(node.body, names[1:])
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if len(names) == 1 and any(isinstance(t, ast.Name) and t.id == names[0] for t in targets):
            return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_formulas_survive_markdown(page: str) -> None:
    r"""GitHub reads a backslash before punctuation (\, \{ \\) as Markdown, and a bar inside a table as a column."""
    prose = FENCE.sub("", read(page))
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", prose, re.DOTALL)
    assert [f for f in formulas if re.search(r"\\[^A-Za-z\s]", f)] == []
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert [line for line in rows if any("|" in f for f in re.findall(r"\$[^$]+\$", line))] == []
    assert prose.count("$") % 2 == 0
