"""Kills and stops what a run is made of, at random, and says whether anything came of it: `make chaos`.

    python tools/chaos/chaos.py --faults 20 --seed 0          a Ray fleet, about a quarter of an hour on two cores

    a run that nothing disturbs                                                              -> what there should be
    the same again: a fault -> wait until answers are banked again -> a fault -> ... -> end  -> what there is; started again whenever its driver ends

Faults are SIGKILL and SIGSTOP of rollout ranks, learner ranks, reward workers, Ray's head and the driver (`monkey.py`). Then the run must have ended, each
prompt must have been trained on once, every number and every weight must be that of the undisturbed run (`verdict.py`), and no process may be left.
Exit code 1 where something is wrong; the folder is kept then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from monkey import Hit, Monkey
from verdict import objections

from megatron_ext.config.load import load_config

CONFIG = Path(__file__).with_name("chaos.yaml")
NAME = "chaos"
GIVE_UP_S = 240.0
"""Without anything banked for so long, the run has not recovered."""
DELAY_S = (0.2, 3.0)
"""Between the moment a run is at work again and the next fault."""


@dataclass(frozen=True)
class Recovered:
    hit: Hit
    seconds: float


class Run:
    """A run in a folder of its own, started again whenever it ends unfinished."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.stage_dir = folder / NAME / "rl"
        self._command = [sys.executable, "-m", "megatron_ext.cli", "run", str(CONFIG), "--until", "rl", f"output_dir={folder}", *overrides]
        self._log = (folder / "log.txt").open("a")
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.driver = subprocess.Popen(self._command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)

    def progress(self) -> int:
        """Grows with every group of answers, and every step."""
        journal = self.stage_dir / "rollouts" / "journal.jsonl"
        return journal.stat().st_size if journal.exists() else 0

    def finished(self) -> bool:
        """Starts it again where it has ended too early."""
        code = self.driver.poll()
        if code not in (None, 0):
            self.start()
        return code == 0

    def await_progress(self) -> bool:
        """Whether something was banked; False: the run has finished. Raises TimeoutError where neither happens."""
        before, deadline = self.progress(), time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            if self.finished():
                return False
            if self.progress() > before:
                return True
            time.sleep(0.05)
        raise TimeoutError(f"nothing was banked for {GIVE_UP_S:.0f} s: see {self._log.name}")

    def end(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults and the time between them")
    parser.add_argument("--folder", type=Path, help="where the two runs go; unset: a temporary folder, removed where all is well")
    parser.add_argument("overrides", nargs="*", help="section.field=value, for both runs; rl.fleet=local is quicker")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    for one in (undisturbed, disturbed):
        one.mkdir(parents=True)
    print(f"the undisturbed run, in {undisturbed}", flush=True)
    calm = Run(undisturbed, args.overrides)
    began = time.monotonic()
    if calm.driver.wait() != 0:
        sys.exit(f"the undisturbed run failed: see {undisturbed}/log.txt")
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    shutil.copytree(undisturbed / NAME, disturbed / NAME, ignore=shutil.ignore_patterns("rl"))
    recovered, starts = disturb(disturbed, args)
    wrong = [
        *objections(load_config(CONFIG, [f"output_dir={undisturbed}", *args.overrides]).config, calm.stage_dir, disturbed / NAME / "rl"),
        *left_behind(disturbed),
    ]
    if len(recovered) < args.faults:
        wrong.append(f"the run was over after {len(recovered)} of {args.faults} faults: give it more steps")
    report(recovered, starts, wrong)
    if wrong:
        sys.exit(1)
    if args.folder is None:
        shutil.rmtree(folder)


def disturb(folder: Path, args: argparse.Namespace) -> tuple[list[Recovered], int]:
    """The faults and how long each took to mend, and how often the run was started."""
    run, recovered = Run(folder, args.overrides), list[Recovered]()
    monkey = Monkey(run.stage_dir, args.seed)
    print(f"the disturbed run, in {folder}", flush=True)
    try:
        while run.await_progress() and len(recovered) < args.faults:
            time.sleep(monkey.random.uniform(*DELAY_S))
            while (hit := monkey.hit(run.driver.pid)) is None:
                if run.finished():
                    return recovered, run.starts
            began = time.monotonic()
            going_on = run.await_progress()
            recovered.append(Recovered(hit, time.monotonic() - began))
            print(f"  {len(recovered):3d}  {hit.kind:<16} {recovered[-1].seconds:6.1f} s", flush=True)
            if not going_on:
                return recovered, run.starts
        while run.await_progress():
            continue
    finally:
        run.end()
    return recovered, run.starts


def left_behind(folder: Path) -> list[str]:
    """Processes of the run that have outlived it by five seconds."""
    deadline = time.monotonic() + 5
    while (left := [process for process in psutil.process_iter() if _of_run(process, folder)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"process {process.pid} is left behind: {' '.join(process.cmdline())[:80]}" for process in left if process.is_running()]


def _of_run(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.pid != os.getpid() and (str(folder) in " ".join(process.cmdline()) or any(str(folder) in file.path for file in process.open_files()))
    except psutil.Error:
        return False


def report(recovered: Sequence[Recovered], starts: int, wrong: Sequence[str]) -> None:
    """A line for each kind of fault, then the verdict."""
    print("\n| fault | times | seconds until answers were banked again: median | most |\n|---|---|---|---|")
    for kind in sorted({one.hit.kind for one in recovered}):
        seconds = [one.seconds for one in recovered if one.hit.kind == kind]
        print(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    print(f"\n{len(recovered)} faults; the command was started {starts} times")
    print(
        "\n".join(f"WRONG: {one}" for one in wrong)
        or "every prompt trained on once; every number and every weight that of the undisturbed run; no process left"
    )


if __name__ == "__main__":
    main()
