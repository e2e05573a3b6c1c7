"""Runs one stage of a run: skips it when it is done, resumes it when it was stopped, refuses it when its settings changed meanwhile."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ext.cli.launched import Launch
from megatron_ext.cli.marks import DONE, STARTED, Mark, differences, now, read_mark, settings_of, versions
from megatron_ext.cli.profiles import show_profiles
from megatron_ext.cli.run_folder import RunFolder, move_aside
from megatron_ext.cli.stages import STAGES, Stage, needs, sections
from megatron_ext.config.load import Resolved, explain
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import StoppedForRequeue, UserError


@dataclass(frozen=True)
class Executor:
    """Executes stages in the folder of one run. `force`: a stage whose settings changed starts again, with its old folder renamed."""

    config: RunConfig
    run: RunFolder
    force: bool
    launch: Launch = field(default_factory=Launch)

    def execute(self, stage: Stage, label: str = "") -> None:
        """Brings one stage to its end. Raises UserError when a stage it needs is not done, or its settings changed and `force` is not given."""
        ranks = self.launch.ranks
        began = time.monotonic()
        if not ranks.agree(stage.name, lambda: self._begin(stage, label)) or not (ranks.lead or stage.supervised):
            return
        result = stage.execute(self.config, self.run, self.launch)
        if ranks.lead:
            self._finish(stage, label, result, round(time.monotonic() - began, 1))
            if self.config.observe.profile:
                show_profiles(stage.folder(self.run))

    def _begin(self, stage: Stage, label: str) -> bool:
        """Whether there is something to do. Then it is marked as started."""
        if self.launch.stop_asked:
            raise StoppedForRequeue(f"stopped before {stage.name}: run again to resume")
        folder = stage.folder(self.run)
        wanted = Mark(stage.name, settings_of(self.config, sections(stage, self.config)), self._inputs(stage), now(), versions=versions())
        done, started = read_mark(folder / DONE), read_mark(folder / STARTED)
        before = done or started
        if before is not None and (changed := differences(before, wanted)):
            self._put_aside(stage, "finished" if done else "begun", changed)
            done = started = None
        if done is not None:
            print(f"{label}{stage.name}: done at {done.finished_at}, skipped", flush=True)
            return False
        print(f"{label}{stage.name}: {'resuming' if started else 'starting'} in {folder}", flush=True)
        wanted.write(folder, STARTED)
        return True

    def _finish(self, stage: Stage, label: str, result: dict[str, Any], seconds: float) -> None:
        folder = stage.folder(self.run)
        started = read_mark(folder / STARTED)
        assert started is not None
        replace(started, finished_at=now(), seconds=seconds, result=json.loads(json.dumps(result, default=str))).write(folder, DONE)
        print(f"{label}{stage.name}: done in {seconds:g} s", flush=True)

    def _inputs(self, stage: Stage) -> dict[str, str]:
        """When each stage that this one reads had finished."""
        finished = {}
        for name in needs(stage, self.config):
            mark = read_mark(STAGES[name].folder(self.run) / DONE)
            if mark is None:
                raise UserError(stage.name, f"needs `{name}`, which is not done in {self.run.root}", f"first `megatron-ext run CONFIG --until {name}`")
            finished[name] = mark.finished_at
        return finished

    def _put_aside(self, stage: Stage, verb: str, changed: list[str]) -> None:
        reasons = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        if not self.force:
            raise UserError(
                f"{stage.name} in {self.run.root}",
                f"was {verb} with other settings ({reasons})",
                "add --force to start it again (the old folder is renamed, not deleted), or choose another name=...",
            )
        for output in stage.outputs:
            path = self.run.root / output
            if path.exists():
                print(f"{stage.name}: {reasons}; {path} is now {move_aside(path).name}", flush=True)


def open_run(resolved: Resolved) -> RunFolder:
    """The folder of the run, with its configuration and the origin of every value written to `config.yaml`."""
    run = RunFolder(resolved.config.run_dir)
    run.root.mkdir(parents=True, exist_ok=True)
    (run.root / "config.yaml").write_text(explain(resolved), encoding="utf-8")
    return run
