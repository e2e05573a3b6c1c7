"""What the documents promise is what the tests prove."""

from __future__ import annotations

import re
from pathlib import Path

from tests.parallel.test_layouts import CASES

ROOT = Path(__file__).parents[2]


def test_the_table_of_layouts_names_the_cases_of_the_tests_and_no_others() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    section = text.split("## Engine megatron")[1].split("Also proven")[0]
    named = [name for name in re.findall(r"`([^`]+)`", section) if not name.endswith(".py")]
    assert sorted(named) == sorted(CASES)


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deepspeed_configs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
