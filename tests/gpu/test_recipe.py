"""The toy recipe on one GPU, as a user types it: skipped without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
ONE_GPU = [
    "parallel.num_ranks=1",
    "rollout.replicas=1",
    "rl.fleet=local",
    "pretrain.steps=150",
    "sft.steps=80",
    "rl.steps=3",
    "rl.prompts_per_step=16",
    "rl.micro_batch=64",
]
SHORT = [
    "discover.prompts_per_skill=24",
    "discover.permutations=50",
    "discover.bootstraps=5",
    "evaluate.prompts_per_skill=20",
    "evaluate.sampled_prompts_per_skill=10",
]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.timeout(600)
def test_every_stage_runs_on_the_gpu_and_learner_and_rollouts_share_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ext.cli", "run", str(RECIPE), "name=gpu", *ONE_GPU, *SHORT]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    run = tmp_path / "runs" / "gpu"
    steps = [json.loads(line) for line in (run / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["mismatch/logprob_abs_diff_max"] < 1e-2 for step in steps)  # the learner computes what was sampled from, to float32's rounding
    assert (run / "report.html").exists()
