"""`study`: which runs a file means, what is checked before anything starts, and what the runs of a seed share."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.cli.main import main
from megatron_ext.cli.marks import DONE, Mark, settings_of
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import STAGES, sections
from megatron_ext.cli.study import _ended
from megatron_ext.cli.study_cells import Cell, Cells, cells_of, settings_by_arm
from megatron_ext.cli.study_progress import panel, study_progress
from megatron_ext.cli.study_runs import Process, log_of, run_arguments, time_left_s, whereabouts
from megatron_ext.cli.study_sharing import hand_over
from megatron_ext.config.load import load_config
from megatron_ext.config.study import load_study
from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.errors import ConfigError, StoppedForRequeue
from megatron_ext.study.schedule import Board, carry_out

ROOT = Path(__file__).parents[3]
STUDY = """
name: one
recipe: tiny.yaml
overrides: {parallel.num_ranks: 1, rl.fleet: local, evaluate.samples: 2}
shared: evaluate-sft
arms:
  base: {earl.bonus: 0}
  more: {rl.steps: 7}
  again: {sft.init_from: "{shared}/sft/checkpoints", sft.steps: 3}
ends: {again: evaluate-sft}
baseline: base
seeds: [0, 1]
endpoint: mean@2
smallest_effect: 0.02
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text((ROOT / "examples" / "tiny.yaml").read_text())
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def opened(*overrides: str) -> tuple[StudyConfig, Cells]:
    study = load_study(Path("study.yaml"), overrides).config
    return study, cells_of(study)


def finish(cell: Cell, *names: str) -> None:
    """Marks stages as done, as a run would."""
    for name in names:
        stage = STAGES[name]
        folder = stage.folder(cell.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(f"{cell.name} {name}")
        Mark(name, json.loads(json.dumps(settings_of(cell.config, sections(stage, cell.config)))), {}, "then", "later", 5.0).write(folder, DONE)
        for output in stage.outputs[1:]:
            (cell.folder.root / output).write_text("{}")


def test_arms_do_only_what_their_seed_s_shared_run_has_not_done_in_the_same_way() -> None:
    _, cells = opened()
    assert [cell.name for cell in cells.every][:4] == ["shared/seed-0", "base/seed-0", "more/seed-0", "again/seed-0"]
    assert [stage.name for stage in cells.named("more/seed-1").own] == ["rl", "evaluate-rl"]
    assert [stage.name for stage in cells.named("again/seed-1").own] == ["sft", "discover", "evaluate-sft"]
    assert cells.named("again/seed-1").config.sft.init_from == Path("runs/one/shared/seed-1/sft/checkpoints")


def test_a_run_of_a_study_is_a_run_like_any_other() -> None:
    """What is typed behind `megatron-ext run` gives the very configuration."""
    study, cells = opened()
    for cell in cells.every:
        recipe, *typed, until, stage = run_arguments(study, cell, force=False)
        assert load_config(recipe, typed).config == cell.config and (until, stage) == ("--until", cell.until)
    assert {cell.config.seed for cell in cells.of_arms} == {0, 1} and cells.named("more/seed-1").folder.root == Path("runs/one/more/seed-1")


def test_arms_of_a_seed_differ_in_what_they_say_and_in_nothing_else() -> None:
    study, cells = opened()
    settings = settings_by_arm(study, cells)
    changed = {name for name in settings["base"] if settings["base"][name] != settings["more"][name]}
    assert changed == {"earl.bonus", "rl.steps"}
    assert settings["again"]["sft.init_from"] == "{shared}/sft/checkpoints", "the same for every seed and every folder"


def test_what_is_wrong_in_an_arm_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "study.yaml", "arms.more.rl.stepz=3"]) == 2
    told = capsys.readouterr().err
    assert "more/seed-0: rl.stepz" in told and "did you mean rl.steps?" in told and told.count("rl.stepz") == 1
    assert not Path("runs").exists()
    with pytest.raises(ConfigError, match=r"mean@2: is not measured with evaluate\.samples = 8"):
        opened("overrides.evaluate.samples=8")


def test_a_dry_run_lists_every_run_and_explain_what_every_arm_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "study.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "more/seed-1    rl, evaluate-rl" in told and "hypotheses    more against base; again against base" in told and "8, " in told
    assert main(["study", "study.yaml", "--explain"]) == 0
    assert "# more: earl.bonus=0.3, rl.steps=7" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_finished_stages_are_handed_over_as_links_and_replaced_when_they_change() -> None:
    _, cells = opened()
    shared, arm = cells.named("shared/seed-0"), cells.named("more/seed-0")
    finish(shared, "tokenizer", "pretrain", "sft", "discover", "evaluate-sft")
    hand_over(shared.folder.root, arm.folder.root, arm.given)
    theirs, mine = (cell.folder.root / "sft" / "weights" for cell in (shared, arm))
    assert mine.samefile(theirs) and (arm.folder.root / "evaluate" / "sft.json").exists()
    (arm.folder.root / "rl").mkdir()
    hand_over(shared.folder.root, arm.folder.root, arm.given)
    assert (arm.folder.root / "rl").exists() and not list(arm.folder.root.glob("*.old-*")), "a second time changes nothing"
    finish_again = Mark("sft", {}, {}, "now", "now")
    (shared.folder.root / "sft" / DONE).unlink()
    finish_again.write(shared.folder.root / "sft", DONE)
    hand_over(shared.folder.root, arm.folder.root, arm.given)
    assert (arm.folder.root / "sft.old-1").exists() and (arm.folder.root / "sft" / DONE).read_text() == (shared.folder.root / "sft" / DONE).read_text()


def test_a_run_is_done_when_all_its_stages_are_with_these_settings() -> None:
    _, cells = opened()
    cell = cells.named("more/seed-0")
    finish(cell, "tokenizer", "pretrain", "sft", "discover", "rl")
    assert not cell.done
    finish(cell, "evaluate-rl")
    assert cell.done
    assert not opened("arms.more.rl.steps=8")[1].named("more/seed-0").done


def test_it_is_told_where_a_run_is_and_how_long_all_will_take() -> None:
    _, cells = opened()
    cell = cells.named("more/seed-0")
    assert whereabouts(cell) == ("before rl", 0, 7)
    (cell.folder.root / "rl").mkdir(parents=True)
    Mark("rl", {}, {}, "now").write(cell.folder.root / "rl", "started.json")
    (cell.folder.root / "rl" / "metrics.jsonl").write_text('{"step": 3, "time": 0}\n{"step": 4, "ti')
    assert whereabouts(cell) == ("rl", 3, 7)
    board = Board(dict.fromkeys([one.name for one in cells.every], "waiting"))
    assert time_left_s(cells, board, 2, 0.0) is None
    board.states |= {"shared/seed-0": "done", "base/seed-0": "done", "more/seed-0": "running"}
    board.took_s |= {"shared/seed-0": 500.0, "base/seed-0": 100.0}
    board.began_s |= {"more/seed-0": 10.0}
    assert time_left_s(cells, board, 2, 40.0) == (70 + 5 * 100) / 2
    assert panel(cells, board, 2) is not None


def test_a_log_gets_a_line_for_every_run_that_begins_or_ends(capsys: pytest.CaptureFixture[str]) -> None:
    _, cells = opened()
    board = Board(dict.fromkeys([one.name for one in cells.every], "waiting"))
    with study_progress(cells, 2) as show:
        for state in ("waiting", "running", "failed"):
            board.states["shared/seed-0"] = state
            board.why = {"shared/seed-0": "exit code 1"} if state == "failed" else {}
            show(board)
    assert capsys.readouterr().err.splitlines() == ["shared/seed-0: running", "shared/seed-0: failed: exit code 1"]


@dataclass
class Sleeps:
    """A real process in the place of a run."""

    name: str
    needs: str | None = None

    def start(self) -> Process:
        return Process(subprocess.Popen(["sleep", "60"], start_new_session=True))


def test_a_request_to_stop_ends_processes_that_have_only_just_begun() -> None:
    """Before a run catches signals it dies of them: that is a stop, too, and no failure."""
    board = carry_out([Sleeps("one"), Sleeps("two"), Sleeps("three")], [], 2, stop_asked=lambda: True)
    assert set(board.states.values()) == {"waiting"}, "nothing is begun after a request"
    asked = iter([False, True])
    board = carry_out([Sleeps("one"), Sleeps("two"), Sleeps("three")], [], 2, stop_asked=lambda: next(asked, True))
    assert board.states == {"one": "stopped", "two": "stopped", "three": "waiting"}


def test_a_study_with_failed_runs_says_which_and_ends_with_1_a_stopped_one_with_75(capsys: pytest.CaptureFixture[str]) -> None:
    study, cells = opened()
    board = Board({one.name: "done" for one in cells.every})
    assert _ended(study, cells, board) == 0
    board.states["more/seed-0"], board.why["more/seed-0"] = "failed", "exit code 2"
    log = log_of(study, cells.named("more/seed-0"))
    log.parent.mkdir(parents=True)
    log.write_text("much\nbefore\nerror: rl.steps: too many\n")
    assert _ended(study, cells, board) == 1
    assert "more/seed-0 failed (exit code 2), runs/one/logs/more-seed-0.log ends with" in (told := capsys.readouterr().err)
    assert "    error: rl.steps: too many\n" in told and "The same command tries them again." in told
    board.states["more/seed-1"] = "stopped"
    with pytest.raises(StoppedForRequeue, match="6 of 8 runs are done"):
        _ended(study, cells, board)


def test_jobs_of_a_cluster_do_one_run_each_after_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    site = ROOT / "examples" / "slurm" / "site.env"
    assert main(["study", "study.yaml", "seeds=[0]", "--slurm", "--dry-run", "--site", str(site), "--time", "01:00:00"]) == 0
    written = capsys.readouterr().out
    assert written.count("#!/usr/bin/env bash\n") == 4 and "#SBATCH --job-name=more-seed-0" in written
    assert "-m megatron_ext.cli study study.yaml 'seeds=[0]' --cell more/seed-0 &" in written
    assert not RunFolder(Path("runs/one")).root.exists()


def test_a_report_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "study.yaml", "--report-only"]) == 2
    assert "holds no study that was begun" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["earl", "clvr"])
def test_the_studies_of_the_repository_are_well_formed(name: str) -> None:
    config = load_study(ROOT / "examples" / f"{name}_study.yaml").config
    assert len(config.seeds) >= 5 and len(config.arms) >= 8 and config.baseline in ("no-bonus", "none")
