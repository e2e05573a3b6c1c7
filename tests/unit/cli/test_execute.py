"""Stages are skipped, resumed or refused by what their folders say; nothing is destroyed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.cli.execute import Executor, open_run
from megatron_ext.cli.stages import STAGES, Stage
from megatron_ext.config.load import load_config
from megatron_ext.errors import StoppedForRequeue, UserError


class Bench:
    """The tokenizer and pretraining stages with bodies that only count, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.stop = False

    def stage(self, name: str) -> Stage:
        def body(config, run, launch):
            self.ran.append(name)
            path = run.root / name / "result.txt"
            path.write_text(f"steps {config.pretrain.steps}")
            if self.stop:
                raise StoppedForRequeue("asked to")
            return {"path": path}

        return replace(STAGES[name], execute=body)

    def __call__(self, *overrides: str, force: bool = False, stages: tuple[str, ...] = ("tokenizer", "pretrain")) -> list[str]:
        self.ran = []
        resolved = load_config(None, [f"output_dir={self.folder}", *overrides])
        executor = Executor(resolved.config, open_run(resolved), force)
        for name in stages:
            executor.execute(self.stage(name))
        return self.ran


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_finished_stages_are_skipped_and_said_so(bench: Bench, capsys) -> None:
    assert bench() == ["tokenizer", "pretrain"]
    assert bench() == []
    assert capsys.readouterr().out.count("skipped") == 2


def test_a_stopped_stage_is_run_again_and_said_to_resume(bench: Bench, capsys) -> None:
    bench.stop = True
    with pytest.raises(StoppedForRequeue):
        bench()
    bench.stop = False
    assert bench() == ["tokenizer", "pretrain"]
    assert "tokenizer: resuming in" in capsys.readouterr().out


def test_changed_settings_are_refused_with_what_changed_and_nothing_is_touched(bench: Bench) -> None:
    bench()
    with pytest.raises(UserError) as caught:
        bench("pretrain.steps=70")
    assert "was finished with other settings (pretrain.steps was 100, is now 70)" in str(caught.value)
    assert "--force" in str(caught.value)
    assert "name=" in str(caught.value)
    assert (bench.folder / "tiny/pretrain/result.txt").read_text() == "steps 100"


def test_an_unfinished_stage_is_not_resumed_with_other_settings(bench: Bench) -> None:
    bench(stages=("tokenizer",))
    bench.stop = True
    with pytest.raises(StoppedForRequeue):
        bench(stages=("pretrain",))
    with pytest.raises(UserError, match="was begun with other settings"):
        bench("pretrain.steps=70")


def test_force_starts_a_changed_stage_again_and_keeps_the_old_folder(bench: Bench, capsys) -> None:
    bench()
    assert bench("pretrain.steps=70", force=True) == ["pretrain"]
    assert bench("pretrain.steps=80", force=True) == ["pretrain"]
    root = bench.folder / "tiny"
    kept = [(root / name / "result.txt").read_text() for name in ("pretrain", "pretrain.old-1", "pretrain.old-2")]
    assert kept == ["steps 80", "steps 100", "steps 70"]
    assert "pretrain.steps was 100, is now 70" in capsys.readouterr().out


def test_force_leaves_stages_alone_that_have_not_changed(bench: Bench) -> None:
    bench()
    assert bench(force=True) == []


def test_a_stage_whose_input_was_made_again_is_not_taken_for_done(bench: Bench, monkeypatch) -> None:
    times = iter(f"2026-01-01T00:00:0{n}+00:00" for n in range(10))
    monkeypatch.setattr("megatron_ext.cli.execute.now", lambda: next(times))
    bench()
    (bench.folder / "tiny/tokenizer").rename(bench.folder / "tiny/gone")
    with pytest.raises(UserError, match="tokenizer was run again since"):
        bench()


def test_a_stage_before_its_time_says_what_to_run_first(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"needs `tokenizer`, which is not done in .*--until tokenizer"):
        bench(stages=("pretrain",))


def test_the_configuration_lies_in_the_run_with_every_origin(bench: Bench) -> None:
    bench("seed=3")
    assert "seed: 3" in (text := (bench.folder / "tiny/config.yaml").read_text())
    assert "# command line" in text
    assert load_config(bench.folder / "tiny/config.yaml").config.seed == 3


def test_two_processes_cannot_work_in_one_run(bench: Bench) -> None:
    run = open_run(load_config(None, [f"output_dir={bench.folder}"]))
    with run.locked(), pytest.raises(UserError, match="another process is working in this run"), run.locked():
        pass
    with run.locked():
        pass
