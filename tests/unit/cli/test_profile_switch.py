"""`--profile` on the command line: what it sets, what it refuses, and what is printed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.cli.main import main
from megatron_ext.cli.profiles import show_profiles
from megatron_ext.observe.profile_table import Spent, Table
from megatron_ext.observe.profiles import FOLDER, Profile

TINY = "examples/tiny.yaml"


@pytest.mark.parametrize("switch, steps", [([], 0), (["--profile"], 3), (["--profile", "5"], 5)])
def test_the_switch_is_a_setting(switch: list[str], steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", TINY, "--explain", *switch]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("profile:")]
    assert line.split()[1] == str(steps)


def test_a_switch_in_front_of_other_words_is_a_mistake_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--profile", TINY]) == 2
    assert "write --profile, or --profile STEPS, behind CONFIG and key=value" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "pretrain", "sft", "discover", "rl", "evaluate"])
def test_verbs_that_work_for_long_have_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--profile" in capsys.readouterr().out.split("examples")[0]


def test_the_end_of_a_stage_shows_its_profiles_and_says_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_profiles(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / FOLDER).mkdir()
    Profile("learner rank 0", True, Table(1.0, 1, {"head": Spent(host_s=1.0)}, {})).write(tmp_path / FOLDER / "learner-rank-0.json")
    show_profiles(tmp_path)
    said = capsys.readouterr().out
    assert "learner rank 0: 1 step, 1.00 s" in said and f"profile: {tmp_path / FOLDER}; open its *.trace.json.gz in https://ui.perfetto.dev" in said
