"""`submit`: what it writes is what the repository ships, and what cannot run is refused before it waits in a queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_ext.cli.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["submit", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_the_shipped_jobs_are_what_submit_writes_for_the_tiny_recipe(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    assert script(capsys, "examples/tiny.yaml", "--until", stage, "--nodes", "2") == (ROOT / "examples" / "slurm" / f"{stage}.sbatch").read_text()


def test_a_script_says_which_command_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The command in its header, typed again, gives the same script."""
    values = ["name=it's mine", "parallel.num_ranks=4", "pretrain.micro_batch=4", "sft.micro_batch=4"]
    asked = ["examples/tiny.yaml", *values, "--until", "sft", "--nodes", "2", "--gpus-per-node", "2", "--time", "12:00:00"]
    written = script(capsys, *asked)
    command = next(line for line in written.splitlines() if line.startswith("# Written by")).split("`")[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:2] == ["megatron-ext", "submit"] and words[-1] == "--dry-run"
    assert script(capsys, *words[2:-1]) == written
    assert "#SBATCH --gpus-per-node=2\n" in written and "#SBATCH --ntasks-per-node=2\n" in written and "#SBATCH --time=12:00:00\n" in written


def test_a_script_is_good_bash_whatever_the_run_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("pretrain", "rl"):
        written = script(capsys, "examples/tiny.yaml", "name=a 'b' $c", "--until", stage)
        assert subprocess.run(["bash", "-n"], input=written, text=True, capture_output=True).stderr == ""


def test_a_chain_has_a_script_for_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    written = script(capsys, "examples/tiny.yaml", "--chain", "--nodes", "2")
    assert written.count("#!/usr/bin/env bash\n") == 3
    assert [line.split("=")[1] for line in written.splitlines() if line.startswith("#SBATCH --job-name")] == ["tiny-pretrain", "tiny-sft", "tiny-rl"]


def test_preferences_are_a_link_of_the_chain_where_the_recipe_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    written = script(capsys, "examples/tiny.yaml", "mpo.steps=10", "mpo.global_batch=16", "mpo.micro_batch=4", "--chain", "--nodes", "2")
    assert [line.split("=")[1] for line in written.splitlines() if line.startswith("#SBATCH --job-name")] == [
        "tiny-pretrain",
        "tiny-sft",
        "tiny-mpo",
        "tiny-rl",
    ]


MISTAKES = [
    (["--until", "mpo"], "mpo.steps: is 0: the recipe has no such stage; set it"),
    (["--nodes", "3"], "--nodes: 3 does not divide parallel.num_ranks = 2; use 1, 2"),
    (["--nodes", "0"], "--nodes: 0 is no number of machines"),
    (["--nodes", "2", "--gpus-per-node", "8"], "parallel.num_ranks: 2 ranks are not 2 nodes x 8 GPUs = 16"),
    (["--site", "absent.env"], "--site: there is no absent.env; copy examples/slurm/site.env"),
    (["--until", "sft", "sft.init_from=absent"], "sft.init_from: there is no absent"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_job_that_cannot_run_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["submit", "examples/tiny.yaml", "--until", "pretrain", *arguments, "--dry-run"]) == 2
    assert words in capsys.readouterr().err


def test_local_processes_are_refused_over_several_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "examples/tiny.yaml", "--nodes", "2", "rl.fleet=local"]) == 2
    assert "rl.fleet: local cannot reach 2 nodes; use ray, or --nodes 1" in capsys.readouterr().err


def test_without_slurm_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "examples/tiny.yaml"]) == 2
    assert "sbatch: is not on this machine" in capsys.readouterr().err
