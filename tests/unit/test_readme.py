"""What the documentation shows is true: its recipes are valid, its links lead somewhere, its targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_erpd.recipe.recipe import Recipe
from megatron_erpd.sampling.prompts import PromptRecord
from megatron_erpd.sampling.verifiers import Verifier
from megatron_erpd.sources.field_map import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
RECIPES = [block for block in BLOCKS if block.startswith("name:")]
SECTIONS = [block for block in BLOCKS if not block.startswith("name:")]


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_recipes_are_valid(text: str) -> None:
    assert Recipe(**yaml.safe_load(text)).name == "my-run"


@pytest.mark.parametrize("text", SECTIONS, ids=range(len(SECTIONS)))
def test_sections_fit_into_the_first_recipe(text: str) -> None:
    assert Recipe(**{**yaml.safe_load(RECIPES[0]), **yaml.safe_load(text)})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)]+)\)", prose)
    for target in (link for link in links if not link.startswith("https://")):
        file, _, heading = target.partition("#")
        leads_to = path.parent / file if file else path
        assert leads_to.exists(), target
        assert not heading or heading in headings(leads_to), target


def test_the_verifier_works(tmp_path: Path) -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    (tmp_path / "task.py").write_text(code)
    verifier = Verifier(f"python:{tmp_path}/task.py:score")
    record = PromptRecord(prompt="1 + 1", answer="2", metadata={})
    assert [verifier(record, response) for response in ("2", "3")] == [1.0, 0.0] and verifier.num_errors == 0


def headings(page: Path) -> set[str]:
    """As GitHub makes them into anchors."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_lists_every_import_format() -> None:
    table = (ROOT / "README.md").read_text().split("| `format` | rows |\n|---|---|\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.M) == list(PRESETS)


@pytest.mark.parametrize("page", PAGES[:2])
def test_make_targets_that_the_documentation_names_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:`|^ *)make (\w+)", (ROOT / page).read_text(), re.M)
    assert targets
    assert [t for t in targets if f"\n{t}:" not in makefile] == []
