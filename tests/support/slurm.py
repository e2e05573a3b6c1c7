"""A real SLURM on this machine, and jobs on it, as a person at a login node would see them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "slurm_local" / "cluster.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def megatron_ext(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "megatron_ext.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@dataclass(frozen=True)
class Slurm:
    """Two nodes, n1 and n2. `folder`: where jobs are submitted from."""

    folder: Path
    conf: Path

    def command(self, *words: str) -> str:
        done = subprocess.run(words, cwd=self.folder, env={**os.environ, "SLURM_CONF": str(self.conf)}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sbatch(self, *words: str) -> str:
        """The id of a new job."""
        return self.command("sbatch", "--parsable", *words).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(word.split("=", 1) for word in self.command("scontrol", "show", "job", "-o", job).split() if "=" in word)

    def wait(self, job: str, until: Callable[[], bool] | None = None, timeout_s: float = 300) -> dict[str, str]:
        """The facts once the job has ended, or `until` is true."""
        deadline = time.monotonic() + timeout_s
        while True:
            facts = self.facts(job)
            if facts["JobState"] in ENDED or (until is not None and until()):
                return facts
            assert time.monotonic() < deadline, f"job {job} still is {facts['JobState']} after {timeout_s:.0f} s: {self.said(job)}"
            time.sleep(0.2)

    def said(self, job: str) -> str:
        """The log of the job and of its tasks."""
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in [*self.folder.glob(f"*-{job}.log"), *self.folder.glob(f"runs/*/logs/{job}.*/*.log")])


def left_behind(job: str, within_s: float = 60.0) -> dict[int, str]:
    """Processes of a job that has ended which are still there: a fork server ends when it sees that its user has, which takes a moment."""
    until = time.monotonic() + within_s
    while (found := processes_of(job)) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def processes_of(job: str, task: int | None = None) -> dict[int, str]:
    """The Python and Ray processes of a job, or of one of its tasks: their command lines by id."""
    wanted = {f"SLURM_JOB_ID={job}".encode()} | (set() if task is None else {f"SLURM_PROCID={task}".encode()})
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inherited, command = set((entry / "environ").read_bytes().split(b"\0")), (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended, or belongs to another user
        if wanted <= inherited and (b"python" in command or b"ray" in command):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found
