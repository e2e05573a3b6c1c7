"""The causal gate of discovery: the fine-tuned model answers labelled prompts again and again, without the experts of one cluster after another.

    clusters -> trials (earl/causal.py) -> arms: nothing masked; each cluster; random experts in place of each
      -> prompts of the validation split, greedily, under every arm, in chunks that a stop does not lose (chunks.py)
      -> effects of every cluster -> clusters with a verdict each

Under its own random masks only the prompts of a skill are answered: X skills with R masks cost about 1 + X + R answers to each prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.batch import Prompt
from megatron_ext.checkpoint.folder import find_checkpoint
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import draw_skills, num_prompts
from megatron_ext.data.rewards import correctness
from megatron_ext.device import session
from megatron_ext.earl.causal import Arm, Trial, causal_effect, judged, trials_of
from megatron_ext.earl.causal_effect import CausalEffect
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.inference.chunks import NEVER, Chunks, answer_chunks, facts_of, open_chunks
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.replica import all_replicas, load_engine
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.stopping import StopRequest

PROMPT_SEED = 2_000_003
"""Validation prompts that nothing else asks."""
NOTHING = Arm(())

Right = dict[str, dict[str, bool]]
"""By skill and by the key of the prompt: whether the answer is right."""


def run_causal_gate(config: RunConfig, clusters: ExpertClusters, checkpoint: Path, folder: Path, stop: StopRequest = NEVER) -> ExpertClusters:
    """Tries every cluster of `clusters`, which discovery found in `checkpoint`, as `discover.causal_gate` says. Starts its own ranks.

    Raises StoppedForRequeue when asked to stop; run again with the same clusters it goes on, from what it keeps in `folder/causal`.
    """
    settings, trials = config.discover, trials_of(clusters, config.discover.causal_masks, config.seed)
    if not trials:
        return clusters
    arms = arms_of(trials)
    step = find_checkpoint(checkpoint)
    facts = facts_of(config, ["discover.causal_prompts"], step) | {"the masks": json.dumps([arm.pairs for arm in arms])}
    chunks = open_chunks("causal gate", folder / "causal", num_prompts("val", settings.causal_prompts, config.data), config, facts)
    contents = answer_chunks("causal gate", chunks, config, causal_rank, step, arms, stop=stop)
    right = [_joined(parts) for parts in zip(*map(json.loads, contents), strict=True)]
    found = judged(clusters, effects_of(clusters, trials, right, config.seed), settings.causal_gate == "enforce")
    chunks.discard()
    return found


def arms_of(trials: Sequence[Trial]) -> list[Arm]:
    """Nothing masked, then for each trial its cluster and its random masks."""
    return [NOTHING, *(arm for trial in trials for arm in (trial.cluster, *trial.random))]


def causal_rank(rank: int, world_size: int, init_method: str, config: RunConfig, chunks: Chunks, checkpoint: Path, arms: Sequence[Arm]) -> None:
    """Saves which prompts of this rank's chunks are answered right under each arm."""
    with session(), open_parallel(all_replicas(config), rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)
        prompts = draw_skills("val", config.discover.causal_prompts, PROMPT_SEED + config.seed, config.data, tokenizer, config.model.vision)
        for chunk in chunks.left_to(context.dp_rank):
            asked = chunks.prompts_of(chunk, prompts)
            right = [answered(engine, [prompt for prompt in asked if arm.skill in ("", prompt.skill)], arm, config) for arm in arms]
            if context.tp_rank == 0:
                chunks.save(chunk, json.dumps(right).encode())


def answered(engine: Engine, prompts: Sequence[Prompt], arm: Arm, config: RunConfig) -> Right:
    """Whether each prompt's most likely answer is right under this arm. Collective over the replica's ranks, which may have no prompts."""
    correct = correctness(config.rl.reward, config.earl.correct_threshold)
    with engine.model.router_tap.mask(arm.pairs):
        rollouts = engine.generate(prompts, 1, seeds=lambda index, sample: 0, version=0, greedy=True)
    right: Right = {}
    for rollout in rollouts:
        right.setdefault(rollout.prompt.skill, {})[rollout.prompt.key] = correct(rollout.prompt, rollout.text)
    return right


def effects_of(clusters: ExpertClusters, trials: Sequence[Trial], right: Sequence[Right], seed: int) -> dict[str, CausalEffect]:
    """`right`: under each of `arms_of(trials)`. A skill that has no prompts, or that no other skill's can be compared with, has no effect."""
    rng, rows = np.random.default_rng(seed), {found.skill: row for row, found in enumerate(clusters.skills)}
    plain, effects, at = right[0], {}, 1
    for trial in trials:
        masked, random = right[at], right[at + 1 : at + 1 + len(trial.random)]
        at += 1 + len(trial.random)
        others = [(_verdicts(plain, skill, plain), _verdicts(masked, skill, plain)) for skill in plain if skill != trial.skill]
        if trial.skill in plain and others:
            own_AN = np.stack([_verdicts(under, trial.skill, plain) for under in (plain, masked, *random)])
            effects[trial.skill] = causal_effect(trial, own_AN, others, clusters.mean_mass_XLE[rows[trial.skill]], rng)
    return effects


def _verdicts(right: Right, skill: str, order: Right) -> np.ndarray:
    """Bool [N], in the order of the prompts in `order`."""
    return np.array([right[skill][key] for key in order[skill]])


def _joined(parts: Sequence[Right]) -> Right:
    """Of all chunks, in the order of skills and keys, whichever rank answered."""
    keys = {skill: sorted(key for part in parts for key in part.get(skill, {})) for skill in sorted({skill for part in parts for skill in part})}
    answers = {key: verdict for part in parts for of_skill in part.values() for key, verdict in of_skill.items()}
    return {skill: {key: answers[key] for key in of_skill} for skill, of_skill in keys.items()}
