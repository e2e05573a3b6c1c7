"""Who reads a bank: the report, and people with pandas."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from megatron_ext.batch import FailedRollout
from megatron_ext.cli.report import report
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.bank.columns import SCHEMA
from megatron_ext.rl.bank.overview import overview
from tests.support.rollouts import group, prompt

PAGE = Path(__file__).parents[4] / "docs" / "bank.md"


@pytest.fixture
def run(tmp_path):
    """Two groups of three, one trained on, one dropped; a failure."""
    bank = open_bank(tmp_path / "runs" / "tiny" / "rl" / "rollouts")
    answers = group("a", text="<b>three") + group("b")
    bank.put(0, answers, [FailedRollout(prompt("f"), 0, "reward_timeout", "no result")])
    bank.train(0, [(0, "a")])
    bank.drop([(0, "b")], "set aside")
    bank.note_advantages(0, answers[:3], [-1.0, 0.0, 1.0])
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text("name: tiny\n")
    return tmp_path / "runs" / "tiny"


def test_the_report_counts_what_became_of_every_group_and_shows_the_best_and_the_worst_answer(run):
    text = report(run).read_text()
    for name, count in (
        ("answers with a reward", 6),
        ("groups trained on", 1),
        ("groups dropped: set aside", 1),
        ("failures: reward_timeout", 1),
        ("groups without an answer", 1),
    ):
        assert f"<td>{name}</td><td>{count}</td>" in text
    assert "count, reward 2, weights 4" in text and "count, reward 0, weights 4" in text and "count, reward 1, weights 4" not in text
    assert "&lt;b&gt;three" in text and text.count("image of the prompt") == 2


def test_a_report_of_a_damaged_bank_says_what_is_damaged_and_changes_nothing(run):
    (segment,) = (run / "rl" / "rollouts" / "answers").iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    assert f"{segment}: has" in overview(run / "rl" / "rollouts")["problem"] and segment.exists()
    segment.unlink()
    found = overview(run / "rl" / "rollouts")
    assert found["problem"] == "" and found["groups"] == [[]] and ("answers with a reward", "0") in found["rows"]
    assert overview(run / "elsewhere") is None


def test_the_page_names_every_column():
    table = PAGE.read_text().split("## Columns of `answers`")[1].split("## ")[0]
    assert set(SCHEMA.names) <= set(re.findall(r"`(\w+)`", table))


def test_the_example_for_pandas_runs_as_it_stands_on_the_page(run, monkeypatch, capsys):
    pytest.importorskip("pandas")
    example = run.parent.parent / "example.py"
    example.write_text(PAGE.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(run.parent.parent)
    found = runpy.run_path(str(example))
    assert "reward_timeout" in capsys.readouterr().out
    assert len(found["scored"]) == 6 and found["trained"].advantage.tolist() == [-1, 0, 1] and found["steps"].step.tolist() == [0]
    first = group("a")[0].rollout
    assert found["experts"].tolist() == first.routes.experts_SLK[3:].tolist() and found["pixels"].tolist() == first.prompt.tiles.pixels_IHWC.tolist()
