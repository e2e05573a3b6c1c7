"""The shipped SLURM jobs on a real SLURM of two nodes on this machine: time limits, requeues, resumes, failures, chains, and Ray over both nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_ext.checkpoint.folder import read_manifest
from megatron_ext.observe.metrics import read_metrics
from tests.support.slurm import ROOT, SCRIPT, Slurm, left_behind, megatron_ext, processes_of

pytestmark = [
    pytest.mark.journey,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in ("slurmctld", "slurmd", "munged", "sbatch")),
        reason="SLURM is not installed here: as root, tools/slurm_local/cluster.sh install",
    ),
]

STEPS = 60
RECIPE = f"""
name: tiny
parallel: {{num_ranks: 2}}
pretrain: {{steps: {STEPS}, global_batch: 8, micro_batch: 4, log_every: 1}}
sft: {{steps: 40, global_batch: 16, micro_batch: 8, mix: {{qa: 1.0, composite: 0.5}}}}
rollout: {{max_new_tokens: 8, replicas: 2}}
discover: {{prompts_per_skill: 20, permutations: 50, bootstraps: 10}}
earl: {{enabled: false}}
rl: {{steps: 12, prompts_per_step: 8, rollouts_per_prompt: 4, micro_batch: 32}}
evaluate: {{prompts_per_skill: 5, samples: 2, sampled_prompts_per_skill: 2}}
"""
TINY = "examples/tiny.yaml"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster, and a folder to submit from that has the shipped jobs beside a smaller recipe of the same name."""
    folder = tmp_path_factory.mktemp("login node")
    shutil.copytree(ROOT / "examples" / "slurm", folder / "examples" / "slurm")
    (folder / TINY).write_text(RECIPE)
    site = (folder / "examples" / "slurm" / "site.env").read_text()
    ours = f"PYTHON={sys.executable}\nexport PYTHONPATH='{ROOT}'"
    (folder / "examples" / "slurm" / "site.env").write_text(site.replace("PYTHON=.venv/bin/python", ours))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "SLURM_LOCAL_DIR": str(tmp_path_factory.mktemp("slurm")), "SLURM_LOCAL_PORT": str(port)}
    up = subprocess.run([SCRIPT, "up", "2"], env=environment, capture_output=True, text=True, timeout=90)
    try:
        assert up.returncode == 0, up.stderr
        yield Slurm(folder, Path(environment["SLURM_LOCAL_DIR"]) / "slurm.conf")
    finally:
        subprocess.run([SCRIPT, "down"], env=environment, check=True, timeout=90)


@pytest.fixture(scope="module")
def straight(slurm: Slurm) -> Path:
    """The recipe run through on this machine, without SLURM and without a stop."""
    done = megatron_ext(slurm.folder, "run", TINY, "name=straight", "rl.fleet=local")
    assert done.returncode == 0, done.stderr
    return slurm.folder / "runs" / "straight"


def numbers(folder: Path) -> list[dict[str, float]]:
    """What was measured, without the clock."""
    timed = ("time", "timing_s/", "perf/")
    return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in read_metrics(folder)]


def tensors(stage: Path, step: int) -> dict[str, str]:
    """Digests of the files that hold weights and moments."""
    manifest = read_manifest(stage / "checkpoints" / f"step_{step:06d}")
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".distcp")}


def minutes_run(facts: dict[str, str]) -> int:
    hours, minutes, _ = facts["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


def tell(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def test_pretraining_over_two_nodes_stops_at_the_time_limit_is_queued_again_and_ends_bit_for_bit_where_an_undisturbed_run_does(
    slurm: Slurm, straight: Path
) -> None:
    tiny = slurm.folder / "runs" / "tiny"
    pretrain = tiny / "pretrain"
    job = slurm.sbatch("--time=60", "--signal=B:USR1@290", "examples/slurm/pretrain.sbatch")
    warned = (tiny / "logs" / f"{job}.0" / "STOP").exists
    slurm.wait(job, lambda: len(read_metrics(pretrain)) >= 3)
    ranks = [*processes_of(job, task=0), *processes_of(job, task=1)]
    tell(ranks, signal.SIGSTOP)  # on a fast machine they would be done before SLURM looks at its clock, which it does every half minute
    slurm.command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_run(slurm.facts(job)) + 5}")  # under 290 s at its next look, and enough to stop
    slurm.wait(job, warned)
    tell(ranks, signal.SIGCONT)
    slurm.wait(job, lambda: slurm.facts(job)["Restarts"] == "1")
    slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"], facts["NumNodes"]) == ("COMPLETED", "1", "2"), slurm.said(job)
    assert "stopped after step" in slurm.said(job) and "pretrain: resuming" in slurm.said(job)
    assert [record["step"] for record in read_metrics(pretrain)] == list(range(1, STEPS + 1))
    assert numbers(pretrain) == numbers(straight / "pretrain")
    assert tensors(pretrain, STEPS) == tensors(straight / "pretrain", STEPS) != {}


def test_reinforcement_learning_over_two_nodes_is_queued_again_and_ends_where_one_machine_without_ray_does(slurm: Slurm, straight: Path) -> None:
    tiny = slurm.folder / "runs" / "tiny"
    for stage in ("tokenizer", "pretrain", "sft", "discover", "evaluate"):
        shutil.copytree(straight / stage, tiny / stage, dirs_exist_ok=True)
    shutil.rmtree(tiny / "evaluate" / "rl")
    (tiny / "evaluate" / "rl.json").unlink()
    job = slurm.sbatch("--time=30", "examples/slurm/rl.sbatch")
    slurm.wait(job, lambda: len(read_metrics(tiny / "rl")) >= 2)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # what SLURM sends before the limit
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.said(job)
    logs = [tiny / "logs" / f"{job}.{start}" for start in (0, 1)]
    assert "stopped after step" in (logs[0] / "rank-0000.log").read_text() and "rl: resuming" in (logs[1] / "rank-0000.log").read_text()
    assert all("joining the Ray cluster at 127.0.1.1:" in (log / "rank-0001.log").read_text() for log in logs)
    assert not any((log / "token").exists() for log in logs)
    assert numbers(tiny / "rl") == numbers(straight / "rl")
    assert tensors(tiny / "rl", 12) == tensors(straight / "rl", 12) != {}
    assert left_behind(job) == {}
    assert (tiny / "evaluate" / "rl.json").read_text() == (straight / "evaluate" / "rl.json").read_text().replace("straight", "tiny")


def test_a_rank_that_is_killed_is_named_and_the_jobs_that_wait_for_it_are_cancelled(slurm: Slurm) -> None:
    done = megatron_ext(slurm.folder, "submit", TINY, "name=killed", "--chain", "--until", "sft", "--nodes", "2", "--time", "30", SLURM_CONF=str(slurm.conf))
    assert done.returncode == 0, done.stderr
    first, second = [line.split()[-1] for line in done.stdout.splitlines()]
    killed = slurm.folder / "runs" / "killed"
    slurm.wait(first, lambda: len(read_metrics(killed / "pretrain")) >= 2)
    (victim,) = processes_of(first, task=1)
    os.kill(victim, signal.SIGKILL)
    assert slurm.wait(first)["JobState"] == "FAILED"
    said = (killed / "logs" / f"{first}.0" / "post-mortem.txt").read_text()
    assert said.startswith("post-mortem: 2 of 2 tasks failed\nfirst: rank 1 on n2 never said that it ended")
    assert "then: rank 0 on n1 ended with exit code 1" in said
    assert any(words in said for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe"))  # what rank 0 was doing decides
    assert said in (slurm.folder / f"killed-pretrain-{first}.log").read_text()
    assert slurm.wait(second)["Reason"] == "DependencyNeverSatisfied"


def test_a_chain_runs_each_stage_after_the_one_before(slurm: Slurm) -> None:
    words = ("name=chained", "pretrain.steps=2", "sft.steps=2", "--chain", "--until", "sft", "--nodes", "2", "--time", "30")
    done = megatron_ext(slurm.folder, "submit", TINY, *words, SLURM_CONF=str(slurm.conf))
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[-1] for line in done.stdout.splitlines()]
    assert [slurm.wait(job)["JobState"] for job in jobs] == ["COMPLETED"] * 2, "".join(map(slurm.said, jobs))
    assert slurm.facts(jobs[0])["EndTime"] <= slurm.facts(jobs[1])["StartTime"]
    assert [record["step"] for record in read_metrics(slurm.folder / "runs" / "chained" / "sft")] == [2]


def test_a_mistake_ends_the_job_with_its_one_message_and_a_cancelled_job_is_gone_for_good(slurm: Slurm) -> None:
    job = slurm.sbatch("--time=30", "examples/slurm/pretrain.sbatch", "unused")
    slurm.wait(job, lambda: (slurm.folder / "runs" / "tiny" / "logs" / f"{job}.0" / "rank-0001.json").exists())
    slurm.command("scancel", job)
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    (slurm.folder / TINY).write_text(RECIPE.replace(f"steps: {STEPS}", "steps: 7"))
    job = slurm.sbatch("--time=30", "examples/slurm/pretrain.sbatch")
    facts = slurm.wait(job)
    (slurm.folder / TINY).write_text(RECIPE)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    said = slurm.said(job)
    assert "first: rank 0 on n1 ended with exit code 2" in said and f"pretrain.steps was {STEPS}, is now 7" in said and "Traceback" not in said
