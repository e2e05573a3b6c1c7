"""A small study as a user types it: stopped in the middle, gone on with, read, amended."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.journeys.test_recipe import megatron_ext, start

pytestmark = pytest.mark.journey

RECIPE = """
name: dense
model: {num_experts: 0}
earl: {enabled: false}
pretrain: {steps: 12, global_batch: 8, micro_batch: 8}
sft: {steps: 30, global_batch: 8, micro_batch: 8, save_every: 2}
evaluate: {prompts_per_skill: 6, samples: 2, sampled_prompts_per_skill: 6}
rollout: {max_new_tokens: 8, replicas: 1}
"""
STUDY = """
name: small
recipe: dense.yaml
shared: pretrain
until: evaluate-sft
arms: {slow: {sft.optimizer.lr: 1e-4}, fast: {sft.optimizer.lr: 3e-3}}
baseline: slow
seeds: [0, 1]
endpoint: greedy
secondary: [mean@2]
smallest_effect: 0.02
bootstraps: 200
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "dense.yaml").write_text(RECIPE)
    (folder / "small.yaml").write_text(STUDY)
    return folder


def test_a_study_that_was_stopped_goes_on_and_ends_in_a_verdict(folder: Path) -> None:
    study = folder / "runs" / "small"
    process = start(folder, "study", "small.yaml")
    deadline = time.monotonic() + 900
    while not list(study.glob("*/seed-*/sft/checkpoints/step_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "The same command resumes it." in errors
    registered = (study / "preregistration.json").read_bytes()

    code, out, errors = megatron_ext(folder, "study", "small.yaml")
    assert code == 0, errors
    assert "| fast | slow |" in out
    assert (study / "preregistration.json").read_bytes() == registered
    content = json.loads((study / "study.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["done"] * 6
    assert content["findings"][0]["seeds"] == [0, 1] and content["findings"][0]["verdict"] is not None
    shared, arm = (study / name / "seed-0" / "pretrain" / "done.json" for name in ("shared", "fast"))
    assert shared.samefile(arm)
    logs = "".join(log.read_text() for log in (study / "logs").glob("*.log"))
    assert "sft: resuming" in logs

    began = time.monotonic()
    code, out, errors = megatron_ext(folder, "study", "small.yaml")
    assert code == 0 and "6 runs, 6 done" in out and time.monotonic() - began < 60


def test_a_changed_study_is_refused_until_a_reason_is_given(folder: Path) -> None:
    code, _, errors = megatron_ext(folder, "study", "small.yaml", "smallest_effect=0.1")
    assert code == 2 and "smallest_effect was 0.02, is now 0.1" in errors
    code, _, errors = megatron_ext(folder, "study", "small.yaml", "smallest_effect=0.1", "--amend", "a slip")
    assert code == 0, errors
    assert "a slip" in (folder / "runs" / "small" / "report.html").read_text()


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(folder: Path) -> None:
    """An arm that would start from what is no checkpoint."""
    broken = ("name=broken", "seeds=[0]", "arms.fast.sft.init_from=dense.yaml")
    code, _, errors = megatron_ext(folder, "study", "small.yaml", *broken)
    assert code == 1
    assert "fast/seed-0 failed (exit code" in errors and "The same command tries them again." in errors
    content = json.loads((folder / "runs" / "broken" / "study.json").read_text())
    assert {run["name"]: run["state"].partition(":")[0] for run in content["runs"]} == {"shared/seed-0": "done", "slow/seed-0": "done", "fast/seed-0": "failed"}
