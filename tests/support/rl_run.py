"""A whole run, as small as it can be: a tokenizer, a random model saved as if it were fine-tuned, and a configuration of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.checkpoint.dist import save_checkpoint
from megatron_ext.config.schema import (
    ClvrConfig,
    DataConfig,
    EarlConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    RunConfig,
    VisionConfig,
)
from megatron_ext.data.suite import SKILLS
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.earl.files import write_clusters
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks
from tests.support.models import open_gates

VOCABULARY = 256


def rl_config(folder: Path, parallel: ParallelConfig | None = None, rollout: ParallelConfig | None = None, replicas: int = 2, **rl: Any) -> RunConfig:
    """Two layers of 16 channels, four experts, six prompts of four rollouts a step, two data-parallel learner ranks and two replicas."""
    vision = VisionConfig(patch_size=8, num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16)
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        head_dim=8,
        num_experts=4,
        expert_ffn_hidden_size=16,
        init_std=0.2,
        vision=vision,
        clvr=ClvrConfig(taps=((0, 1),), num_heads=2, num_kv_heads=2, head_dim=8, gate="tanh_gate"),
    )
    settings = {
        "steps": 2,
        "prompts_per_step": 6,
        "rollouts_per_prompt": 4,
        "micro_batch": 8,
        "fleet": "local",
        "reward": "tests.support.vowels:vowels",
        "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=0, schedule="constant"),
    }
    return RunConfig(
        output_dir=folder,
        model=model,
        parallel=parallel or ParallelConfig(num_ranks=2),
        data=DataConfig(vocab_size=VOCABULARY),
        rollout=RolloutConfig(max_new_tokens=8, replicas=replicas, parallel=rollout or ParallelConfig()),
        earl=EarlConfig(enabled=False),
        rl=RLConfig(**{**settings, **rl}),
    )


def prepare(config: RunConfig, looking: bool = False) -> Path:
    """Writes the tokenizer and the checkpoint that RL starts from; returns the latter. `looking`: the gates of its taps are open."""
    train_tokenizer(config.data, config.run_dir / "tokenizer", config.seed, config.model)
    checkpoints = config.run_dir / "sft" / "checkpoints"
    run_ranks(save_random, 1, config, checkpoints, looking, timeout_s=120)
    return checkpoints


def save_random(rank: int, world_size: int, init_method: str, config: RunConfig, checkpoints: Path, looking: bool) -> None:
    with open_parallel(ParallelConfig(), rank, world_size, init_method, 0) as context:
        tokenizer = load_tokenizer(config.run_dir / "tokenizer")
        model = build_model(config.model, tokenizer.image_id, context, seed=3, markers=tokenizer.markers)
        if looking:
            open_gates(model)
        save_checkpoint(checkpoints, 1, model, None, {}, context, config.model, keep=1)


def save_clusters(config: RunConfig, path: Path) -> Path:
    """Expert 0 of every layer as the cluster of every skill."""
    layers, experts = config.model.num_layers, config.model.num_experts
    pairs = tuple(PairEffect(layer, 0, 0.1, 2.0, 9.0, 0.001, 1.0, 0.9, 0.3, 0.1, 9.0, 0.9, 0.3) for layer in range(layers))
    skills = tuple(SkillCluster(skill, "ok", "", 9, pairs, 0.05, 0.9, None, 1.0, None) for skill in SKILLS)
    table = np.full((len(skills), layers, experts), 1 / experts)
    write_clusters(ExpertClusters(layers, experts, skills, table, np.zeros_like(table), np.zeros(layers), 4.0, config.discover, 0, "sft"), path)
    return path
