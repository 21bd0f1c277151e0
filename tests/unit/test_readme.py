"""What the documentation shows is true: its recipes are valid, its links lead somewhere, its targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_erpd.data.field_map import PRESETS
from megatron_erpd.pipeline.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md"]
RECIPES = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_recipes_are_valid(text: str) -> None:
    assert Recipe(**yaml.safe_load(text)).name == "my-run"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_readme_lists_every_import_format() -> None:
    table = (ROOT / "README.md").read_text().split("| `format` | rows |\n|---|---|\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.M) == list(PRESETS)


@pytest.mark.parametrize("page", PAGES[:2])
def test_make_targets_that_the_documentation_names_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:`|^ *)make (\w+)", (ROOT / page).read_text(), re.M)
    assert targets
    assert [t for t in targets if f"\n{t}:" not in makefile] == []
