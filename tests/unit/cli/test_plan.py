"""The verb `plan`: what an operator sees, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.cli.main import main
from megatron_ext.config.load import load_config
from megatron_ext.parallel.plan import check_layout, check_rollout_layout

ROOT = Path(__file__).parents[3]
SFT, RL = (str(ROOT / "examples" / "internvl3_5_30b_a3b" / name) for name in ("sft.yaml", "rl.yaml"))
TINY = str(ROOT / "examples" / "tiny.yaml")
DENSE = ["model.num_experts=0", "earl.enabled=false"]
ALONE = ["model.vision.enabled=false", "model.clvr.enabled=false", "data.kind=jsonl", "data.path=mine.jsonl"]
QWEN3_8B = ["model.num_experts=0", "model.ffn_hidden_size=12288", "model.hidden_size=4096", "model.num_query_groups=8", "earl.enabled=false"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["plan", *arguments]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_layouts_are_ranked_and_the_refused_ones_explained(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, SFT, "--gpus", "64", "--top", "3")
    assert "64 x h100-80gb (79.1 GiB) on 8 nodes" in said
    assert "assumed, not measured" in said
    assert "8 does not divide model.num_query_groups = 4" in said
    rates = [float(line.split()[-3].replace(",", "")) for line in said.splitlines() if line.strip()[:2] in ("1 ", "2 ", "3 ")]
    assert len(rates) == 3
    assert rates == sorted(rates, reverse=True)


def test_one_layout_is_told_by_part_and_against_the_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, SFT, "--gpus", "64", "--why", "TP2xPP2xEP8")
    assert "TP2xPP2xEP8, DP16, recompute full, 1 row a micro-batch" in said
    for part in ("gradients, float32", "optimizer (this rank's shard)", "activations of the ViT", "expert parallel", "pipeline bubble", "of 79.1"):
        assert part in said
    assert "against TP4xEP8" in said


def test_a_layout_that_is_refused_is_told_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, SFT, "--gpus", "64", "--why", "TP8xEP8", code=2)
    assert "parallel.tp: 8 does not divide model.num_query_groups = 4; use 1, 2 or 4" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SFT, "--gpus", "64", "--gpu", "h1000"], "--gpu: there is no type 'h1000'"),
        ([SFT, "--gpus", "0"], "--gpus: 0 is not a number of devices"),
        ([SFT, "--gpus", "12"], "--gpus: 12 do not fill nodes of --gpus-per-node 8"),
        ([SFT, "--gpus", "64", "--only", "xp=2"], "--only: 'xp=2' is no axis with a size"),
        ([SFT, "--gpus", "64", "--why", "TP4xFOO"], "'foo' in 'TP4xFOO' is no part of a layout"),
        ([SFT, "--gpus", "64", "--why", "PP3"], "--gpus 64 do not divide by tp * cp * pp = 3"),
        ([SFT, "--gpus", "64", "--why", "TP4xDP8"], "DP8 is not what --gpus 64 leave over tp * cp * pp = 4"),
        ([SFT, "--gpus", "64", "--row-tokens", "99999"], "--row-tokens: 99999 is not above 0 and at most data.max_length = 16384"),
        ([SFT, "--gpus", "64", "--row-tiles", "100"], "--row-tiles: 100 tiles take 25600 image tokens, and data.max_length = 16384"),
        ([RL, "--gpus", "64", "--prompt-tokens", "39000"], "--prompt-tokens: 39000 and rollout.max_new_tokens = 4096 exceed model.max_positions = 40960"),
        ([SFT, "--gpus", "1"], "--gpus 1: no layout fits h100-80gb"),
        ([SFT, "--gpus", "8", "sft.gobal_batch=3"], "did you mean sft.global_batch"),
        (
            [TINY, "--gpus", "2", "parallel.engine=deepspeed", f"parallel.deepspeed={ROOT}/deepspeed_configs/zero1.json"],
            "parallel.engine: deepspeed is not planned",
        ),
        ([TINY, "--gpus", "2", *DENSE, "--why", "EP2"], "parallel.ep: 2 ranks for the experts of a model that has none (model.num_experts = 0); remove it"),
        ([TINY, "--gpus", "2", *ALONE, "--row-tiles", "2"], "--row-tiles: 2 tiles are shown to a model without vision"),
        ([TINY, "--gpus", "2", "--calibrate", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_a_question_that_makes_no_sense_is_answered_with_what_would(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in plan(capsys, *arguments, code=2)


def test_rollouts_share_the_devices_or_have_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(plan(capsys, RL, "--gpus", "64", "--gpu", "h200", "--response-tokens", "3000", "--json"))
    best = said["found"][0]
    assert said["stage"] == "rl"
    assert best["learner_gpus"] + best["rollout_gpus"] == 64 or best["colocated"]
    assert best["step_s"] == pytest.approx(best["learner"]["step_s"] + sum(best["rollout"]["times"][part] for part in PARTS) + best["refit_s"])
    assert max(best["learner"]["memory_bytes"], best["rollout"]["memory_bytes"]) <= 139.8 * 2**30
    assert any(one["family"] == "rollouts TP8" and "8 does not divide model.num_query_groups = 4" in one["error"] for one in said["refused"])


PARTS = ("prefill_s", "decode_s", "launches_s", "communication_s")


def test_a_step_costs_gpu_hours_and_at_a_price_money(capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads(plan(capsys, SFT, "--gpus", "64", "--json", "--price", "2.5", "--top", "1"))["found"][0]
    assert best["gpu_hours"] == pytest.approx(64 * best["step_s"] / 3600)
    assert best["cost"] == pytest.approx(2.5 * best["gpu_hours"])
    line = next(line for line in plan(capsys, SFT, "--gpus", "64", "--price", "2.5", "--top", "1").splitlines() if line.startswith("1 "))
    assert float(line.split()[-1]) == pytest.approx(best["cost"], abs=0.01)


@pytest.mark.parametrize("changes", [QWEN3_8B, [*QWEN3_8B, *ALONE], [*ALONE], ["model.dense_layers=[0, 1]", "model.ffn_hidden_size=6144"]])
@pytest.mark.parametrize("source", [SFT, RL])
def test_models_without_experts_without_vision_and_with_a_few_dense_layers_are_planned(
    source: str, changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensor parallelism among them, whose etp a dense model must not be asked for."""
    said = plan(capsys, source, *changes, "--gpus", "64", "--gpu", "h200", "--only", "tp=2", "--emit", str(tmp_path / "plan"))
    assert "TP2" in said
    config = load_config(tmp_path / "plan" / "config.yaml").config
    assert config.parallel.tp == 2
    assert check_layout(config.model, config.parallel) == check_rollout_layout(config.model, config.rollout.parallel) == []


@pytest.mark.parametrize("source", [SFT, RL])
def test_what_is_emitted_is_a_configuration_that_training_accepts(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, source, "--gpus", "64", "--gpu", "h200", "--emit", str(tmp_path / "plan"))
    assert f"written: {tmp_path}/plan/config.yaml" in said
    resolved = load_config(tmp_path / "plan" / "config.yaml")
    config = resolved.config
    assert check_layout(config.model, config.parallel) == check_rollout_layout(config.model, config.rollout.parallel) == []
    used = config.parallel.num_ranks + (config.rollout.replicas * config.rollout.parallel.num_ranks if source == RL else 0)
    assert used in (64, 128)
    assert config.sft.optimizer == load_config(source).config.sft.optimizer
    assert "parallel.num_ranks" not in resolved.origins or "# plan" in (tmp_path / "plan" / "config.yaml").read_text()
    script = (tmp_path / "plan" / "run.sbatch").read_text()
    assert "#SBATCH --nodes=8" in script
    assert f"megatron_ext.cli run {tmp_path}/plan/config.yaml" in script and "scontrol requeue" in script
    subprocess.run(["bash", "-n", str(tmp_path / "plan" / "run.sbatch")], check=True)
    assert "is there already" in plan(capsys, source, "--gpus", "64", "--gpu", "h200", "--emit", str(tmp_path / "plan"), code=2)


def test_a_budget_of_tokens_is_emitted_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["sft.micro_batch_tokens=32768", "pretrain.packed=true", "pretrain.micro_batch_tokens=16384", "sft.train_vision=false"]
    plan(capsys, SFT, "--gpus", "64", "--gpu", "h200", "--row-tokens", "4000", "--emit", str(tmp_path / "plan"), *budget)
    resolved = load_config(tmp_path / "plan" / "config.yaml")
    assert (resolved.config.sft.micro_batch_tokens, resolved.config.pretrain.micro_batch_tokens) == (32768, 16384)
    assert resolved.config.sft.micro_batch == load_config(SFT, budget).config.sft.micro_batch


def test_planning_imports_neither_torch_nor_numpy() -> None:
    code = f"""
import sys
from megatron_ext.cli.main import main
assert main(["plan", {SFT!r}, "--gpus", "8", "--gpu", "h200"]) == 0
assert main(["plan", {RL!r}, "--gpus", "64", "--gpu", "h200"]) == 0
heavy = {{"torch", "numpy", "ray", "megatron", "deepspeed", "transformers", "tensorboard"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
