"""What a study registered stays registered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.study.registration import FILE, plan_of, read_registration, register
from tests.unit.study.test_verdict import study

SETTINGS = {"base": {"rl.steps": 1}, "more": {"rl.steps": 2}}


def test_the_same_plan_is_registered_once(tmp_path: Path) -> None:
    first = register(tmp_path, plan_of(study(), SETTINGS), {"numpy": "2"}, None)
    assert register(tmp_path, plan_of(study(jobs=7, bootstraps=9), SETTINGS), {"numpy": "3"}, None) == first == read_registration(tmp_path)
    assert not first.amendments and first.first_digest == first.digest


@pytest.mark.parametrize(
    "changes, settings, said",
    [
        ({"endpoint": "greedy/count"}, SETTINGS, 'endpoint was "greedy", is now "greedy/count"'),
        ({"hypotheses": (("base", "more"),)}, SETTINGS, "hypotheses was"),
        ({}, {**SETTINGS, "more": {"rl.steps": 3}}, "arms.more.rl.steps was 2, is now 3"),
        ({"seeds": (0, 1, 2, 3)}, SETTINGS, "seeds was"),
    ],
)
def test_another_plan_is_refused_unless_a_reason_is_given(tmp_path: Path, changes: dict[str, object], settings: dict[str, dict[str, int]], said: str) -> None:
    register(tmp_path, plan_of(study(), SETTINGS), {}, None)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match="with another plan") as refused:
        register(tmp_path, plan_of(study(**changes), settings), {}, None)
    assert said in str(refused.value) and (tmp_path / FILE).read_bytes() == before
    amended = register(tmp_path, plan_of(study(**changes), settings), {}, "a mistake in the file")
    (amendment,) = amended.amendments
    assert amendment.kind == "deviation" and amendment.reason == "a mistake in the file" and said in amendment.changes[0]
    assert amended.deviates and amended.first_digest != amended.digest == amendment.digest


def test_more_seeds_are_an_amendment_of_their_own_kind(tmp_path: Path) -> None:
    register(tmp_path, plan_of(study(), SETTINGS), {}, None)
    more = study(seeds=(0, 1, 2, 3, 4, 5))
    with pytest.raises(UserError, match="seeds was"):
        register(tmp_path, plan_of(more, SETTINGS), {}, None)
    amended = register(tmp_path, plan_of(more, SETTINGS), {}, "more power")
    assert amended.amendments[0].kind == "seeds" and not amended.deviates


def test_a_registration_that_was_edited_is_refused(tmp_path: Path) -> None:
    register(tmp_path, plan_of(study(), SETTINGS), {}, None)
    content = json.loads((tmp_path / FILE).read_text())
    content["plan"]["endpoint"] = "greedy/color"
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="changed by hand"):
        read_registration(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match="no registration of a study"):
        read_registration(tmp_path)
