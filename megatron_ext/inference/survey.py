"""The survey before discovery: which experts do correct, on-policy answers use, prompt by prompt?

    train-split prompts of every skill -> sampled answers -> the correct ones -> gate mass [L, E] of each answer's positions -> survey.npz

Prompt and response are logged apart and never pooled: `mass_NLE` is the answer's, `prompt_mass_NLE` the prompt's. `control_NLE` is what the token ids
alone explain
(`earl/token_control.py`). The unit is the prompt: one answer each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ext.batch import Rollout, gate_mass
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import draw_skills
from megatron_ext.data.rewards import correctness
from megatron_ext.device import session
from megatron_ext.earl.token_control import TokenTable
from megatron_ext.errors import UserError
from megatron_ext.inference.replica import all_replicas, load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks

SURVEY_FILE = "survey.npz"
PROMPT_SEED = 1_000_003
"""Train-split prompts that training streams and RL do not draw with their own seeds."""
TIMEOUT_S = 3600.0


def run_discovery_survey(config: RunConfig, checkpoint: Path, folder: Path) -> Path:
    """Answers `discover.prompts_per_skill` prompts of every skill, keeps the correct answers, and writes `folder/survey.npz`. Starts its own ranks.

    Raises UserError when no answer was correct: there is nothing to find clusters of.
    """
    parallel = all_replicas(config)
    parts = run_ranks(survey_rank, parallel.num_ranks, config, checkpoint, timeout_s=TIMEOUT_S, threads_per_rank=parallel.threads_per_rank)
    asked = sum(part[0] for part in parts)
    correct = [rollout for part in parts for rollout in part[1]]
    if not correct:
        raise UserError("discover", f"none of {asked} sampled answers of {checkpoint} was correct", "fine-tune longer, or lower data.level")
    folder.mkdir(parents=True, exist_ok=True)
    path, draft = folder / SURVEY_FILE, folder / f"partial-{SURVEY_FILE}"
    np.savez_compressed(draft, allow_pickle=False, **survey_table(correct, config), asked=np.array(asked))
    draft.replace(path)
    return path


def survey_rank(rank: int, world_size: int, init_method: str, config: RunConfig, checkpoint: Path) -> tuple[int, list[Rollout]]:
    """How many prompts this rank asked, and its correct answers."""
    with session(), open_parallel(all_replicas(config), rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)
        prompts = draw_skills("train", config.discover.prompts_per_skill, PROMPT_SEED + config.seed, config.data, tokenizer, config.model.vision)
        mine = prompts[context.dp_rank :: context.layout.dp]

        def seeds(index: int, sample: int) -> int:
            return rollout_seed("survey", config.seed, mine[index].key, sample)

        right = correctness(config.rl.reward, config.earl.correct_threshold)
        correct = [rollout for rollout in engine.generate(mine, 1, seeds=seeds, version=0) if right(rollout.prompt, rollout.text)]
        return (len(mine), correct) if context.tp_rank == 0 else (0, [])


def survey_table(rollouts: list[Rollout], config: RunConfig) -> dict[str, np.ndarray]:
    """The arrays of `survey.npz`, one row an answer, in the order of their keys whatever rank answered."""
    rollouts = sorted(rollouts, key=lambda rollout: rollout.prompt.key)
    experts = config.model.num_experts
    table = TokenTable(experts, config.discover.token_control_kappa)
    tokens = [np.concatenate([rollout.prompt.tokens_S, rollout.response_T]) for rollout in rollouts]
    for rollout, sequence in zip(rollouts, tokens, strict=True):
        table.add(rollout.routes, sequence, *rollout.response_rows, rollout.prompt.skill)
    spans = [slice(*rollout.response_rows) for rollout in rollouts]
    return {
        "mass_NLE": np.stack([gate_mass(rollout.routes, experts, *rollout.response_rows) for rollout in rollouts]),
        "prompt_mass_NLE": np.stack([gate_mass(rollout.routes, experts, 0, rollout.response_rows[0]) for rollout in rollouts]),
        "control_NLE": np.stack([table.expected(sequence[span]) for sequence, span in zip(tokens, spans, strict=True)]),
        "skill_N": np.array([rollout.prompt.skill for rollout in rollouts]),
        "template_N": np.array([str(rollout.prompt.meta["template"]) for rollout in rollouts]),
        "key_N": np.array([rollout.prompt.key for rollout in rollouts]),
    }
