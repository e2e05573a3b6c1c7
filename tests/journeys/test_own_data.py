"""From a published checkpoint and one's own conversations to a model improved by RL and back: what a user does who has both. Small and random, but every step
is the real one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support import hf
from tests.support.hf_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.journey
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}
RECIPE: dict[str, Any] = {
    "name": "own",
    "data": {"kind": "jsonl", "path": "mine.jsonl", "max_tiles": 4},
    "sft": {"init_from": "ours", "steps": 120, "global_batch": 32, "micro_batch": 32, "optimizer": {"lr": 5e-3}},
    "rollout": {"max_new_tokens": 8, "replicas": 1},
    "discover": {"prompts_per_skill": 60, "permutations": 100, "bootstraps": 20},
    "rl": {"steps": 2, "prompts_per_step": 8, "rollouts_per_prompt": 4, "micro_batch": 32, "fleet": "local"},
    "evaluate": {"prompts_per_skill": 10, "samples": 2, "sampled_prompts_per_skill": 5},
}


def megatron_ext(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_ext.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_conversations(folder: Path) -> None:
    """Pictures of one colour, some of them wide or high so that they are cut into tiles; and numbers to repeat, without a picture."""
    chosen, lines = random.Random(0), []
    for number in range(400):
        if number % 2:
            name, (width, height) = chosen.choice(sorted(COLORS)), chosen.choice([(16, 16), (40, 16), (16, 40)])
            noise = np.random.default_rng(number).integers(-20, 20, (height, width, 3))
            Image.fromarray((np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
            said = {"image": f"{number}.png", "skill": "color", "question": "<image>\nWhat is in the picture?", "answer": name}
        else:
            digit = chosen.choice("123456789")
            said = {"skill": "echo", "question": f"{digit} circles. How many {number}?", "answer": digit}
        turns = [{"from": "human", "value": said.pop("question")}, {"from": "gpt", "value": said.pop("answer")}]
        lines.append(json.dumps({**said, "conversations": turns}))
    (folder / "mine.jsonl").write_text("\n".join(lines))


def test_a_converted_checkpoint_learns_ones_own_conversations_and_goes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    save_tokenizer(tmp_path / "hf")
    hf.build(vocab_size=328).save_pretrained(tmp_path / "hf")
    write_conversations(tmp_path)
    megatron_ext(tmp_path, "convert", "--from", "hf", "--to", "megatron", "hf", "ours")
    recipe = yaml.safe_load((tmp_path / "ours" / "model.yaml").read_text())
    for section, values in RECIPE.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    recipe["model"]["clvr"] = {"enabled": True, "taps": [[0, 1]], "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    out = megatron_ext(tmp_path, "run", "mine.yaml")
    assert "before -> after reinforcement learning" in out and "color" in out and "echo" in out
    table = json.loads((tmp_path / "runs" / "own" / "evaluate" / "sft.json").read_text())
    assert list(table["skills"]) == ["color", "echo"]
    assert table["skills"]["color"]["greedy"] >= 0.8 and table["skills"]["echo"]["greedy"] >= 0.5
    assert table["skills"]["color"]["blind"] <= 0.7 and table["skills"]["color"]["chance"] is None
    found = json.loads((tmp_path / "runs" / "own" / "discover" / "expert_clusters.json").read_text())
    assert {skill["skill"] for skill in found["skills"]} == {"color", "echo"}
    said = megatron_ext(tmp_path, "generate", "mine.yaml", "--prompt", "7 circles. How many 2?")
    assert "answer: " in said
    megatron_ext(tmp_path, "convert", "--from", "megatron", "--to", "hf", "runs/own/rl/checkpoints", "exported", "--like", "hf")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
