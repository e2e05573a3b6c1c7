"""The whole recipe as a user types it: small, real, from an empty folder to a report; and a stop in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.observe.metrics import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.journey

RECIPE = """
name: small
pretrain: {steps: 200, global_batch: 32, micro_batch: 32}
sft: {steps: 150, global_batch: 32, micro_batch: 32, mix: {qa: 1.0, composite: 0.5}}
rollout: {max_new_tokens: 8, replicas: 1}
discover: {prompts_per_skill: 60, permutations: 100, bootstraps: 20}
rl: {steps: 2, prompts_per_step: 8, rollouts_per_prompt: 4, micro_batch: 32}
evaluate: {prompts_per_skill: 10, samples: 2, sampled_prompts_per_skill: 5}
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, "-m", "megatron_ext.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def megatron_ext(folder: Path, *arguments: str, timeout_s: float = 1500) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    try:
        out, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with a space")
    (folder / "small.yaml").write_text(RECIPE)
    return folder


@pytest.mark.parametrize("fleet", ["local", "ray"])
def test_a_recipe_goes_from_nothing_to_a_report_and_its_second_run_skips_everything(folder: Path, fleet: str) -> None:
    options = ("run", "small.yaml", f"rl.fleet={fleet}")
    code, out, errors = megatron_ext(folder, *options)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert "accuracy on the test split" in out
    assert "before -> after reinforcement learning" in out
    root = folder / "runs" / "small"
    assert (root / "report.html").stat().st_size > 100_000
    assert [record["step"] for record in read_metrics(root / "rl")] == [1, 2]
    for of in ("sft", "rl"):
        assert json.loads((root / "evaluate" / f"{of}.json").read_text())["split"] == "test"
    code, out, _ = megatron_ext(folder, *options)
    assert code == 0
    assert out.count("skipped") == 7
    (root / "rl").rename(root / f"rl-{fleet}")
    (root / "evaluate" / "rl").rename(root / "evaluate" / f"rl-{fleet}")


def test_a_trained_model_answers_a_question_about_a_picture(folder: Path) -> None:
    code, out, errors = megatron_ext(folder, "generate", "small.yaml", "--example", "count", "--samples", "2")
    assert code == 0, errors
    assert (out.count("\nanswer: "), out.count("\nsample: ")) == (1, 2)
    code, out, errors = megatron_ext(folder, "generate", "small.yaml", "--image", "runs/small/generate/count-0.png", "--prompt", "how many circles?")
    assert code == 0, errors
    code, out, errors = megatron_ext(folder, "generate", "small.yaml", "--example", "ocr", "--trace", "--out", "ocr.html")
    assert code == 0 and "tap 0: 1 -> 2" in out, errors
    assert (folder / "ocr.html").stat().st_size > 20_000 and json.loads((folder / "ocr.json").read_text())[0]["skill"] == "ocr"
    code, _, errors = megatron_ext(folder, "generate", "small.yaml", "--image", "absent.png", "--prompt", "what?")
    assert (code, errors.count("error: ")) == (2, 1)


def test_a_stopped_stage_resumes_where_it_was_with_the_same_command(folder: Path) -> None:
    arguments = ("run", "small.yaml", "--until", "pretrain", "name=stopped", "pretrain.steps=120", "pretrain.log_every=1")
    metrics = folder / "runs" / "stopped" / "pretrain"
    process = start(folder, *arguments)
    deadline = time.monotonic() + 300
    while len(read_metrics(metrics)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "The same command resumes it." in errors
    stopped_at = int(read_metrics(metrics)[-1]["step"])
    assert stopped_at < 120
    code, out, errors = megatron_ext(folder, *arguments)
    assert code == 0, errors
    assert "pretrain: resuming" in out
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, 121))
