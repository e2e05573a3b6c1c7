"""What a study leaves to be read: everything in JSON, a table, and a page that stands by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.study.page import write_page
from megatron_ext.study.pictures import forest
from megatron_ext.study.registration import plan_of, register
from megatron_ext.study.results import Results, collect, write_results
from megatron_ext.study.table import write_table
from tests.support.studies import fake_run, fake_study

EFFECTS = {"plain": 0.0, "helps": 0.15, "nothing": 0.0}


def results_of(study: StudyConfig, effects: dict[str, float], seeds: tuple[int, ...] = (0, 1, 2, 3, 4), amend: str | None = None) -> Results:
    runs = [fake_run(study, arm, seed, effect) for arm, effect in effects.items() for seed in seeds]
    registration = register(study.study_dir, plan_of(study, {arm: {"x": arm} for arm in study.arms}), {"numpy": "2"}, amend)
    return collect(study, registration, runs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    study = fake_study(tmp_path_factory.mktemp("study"), EFFECTS, secondary=("greedy/count",), explored=(("nothing", "helps"),))
    return results_of(study, EFFECTS)


def test_the_page_needs_nothing_beside_it_and_links_to_the_runs(results: Results) -> None:
    folder = results.config.study_dir
    page = write_page(results, folder).read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#|[\w-]+/seed-\d/report\.html")', page), "only pictures of its own, and reports of runs"
    assert page.count('src="data:image/svg+xml;base64,') == 5  # verdicts, scores, two explorations, a learning curve
    for link in re.findall(r'href="([^#"]+)"', page):
        assert (folder / link).exists()
    assert "better by 0." in page and results.registration.first_digest in page and "deviates" not in page
    assert forest(results.deciding, 0.03) == forest(results.deciding, 0.03), "the same study makes the same page"


def test_study_json_holds_every_number_that_the_page_shows(results: Results) -> None:
    content = json.loads(write_results(results, results.config.study_dir).read_text())
    assert [(one["arm"], one["verdict"]) for one in content["findings"][:2]] == [("helps", "better"), ("nothing", content["findings"][1]["verdict"])]
    assert content["registration"]["digest"] == results.registration.digest and len(content["runs"]) == 15
    assert content["arms"]["mean@8"][0]["seeds"].keys() == {"0", "1", "2", "3", "4"}


def test_the_table_says_what_the_sign_flips_cannot_do(results: Results) -> None:
    text = write_table(results, results.config.study_dir).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| helps | plain |"))
    assert "(0.0625)" in row and "**better by" in row
    assert "## Exploratory" in text and "greedy/count" in text


def test_a_deviation_stands_at_the_top_of_the_page(tmp_path: Path) -> None:
    results_of(fake_study(tmp_path, EFFECTS), EFFECTS)
    study = fake_study(tmp_path, EFFECTS, smallest_effect=0.05)
    changed = results_of(study, EFFECTS, amend="three points were too few")
    page = write_page(changed, study.study_dir).read_text()
    assert "This study deviates from what was registered" in page and "three points were too few" in page
    assert "**deviation**: three points were too few (smallest_effect was 0.03, is now 0.05)" in write_table(changed, study.study_dir).read_text()


def test_a_study_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    study = fake_study(tmp_path, EFFECTS)
    page = write_page(results_of(study, EFFECTS, seeds=()), study.study_dir).read_text()
    assert page.count("Not there yet") == 3


def test_a_study_in_the_middle_has_no_verdicts(tmp_path: Path) -> None:
    found = results_of(fake_study(tmp_path, EFFECTS), {"plain": 0.0, "helps": 0.1}, seeds=(0,))
    assert [one.words for one in found.findings] == ["unfinished: 1 of 5 seeds, no verdict before all are there"]
