"""Routing data whose truth is known: prompts of skills and templates, token by token, with experts that some skills prefer and nothing else explains.

    router logit[t, l, e] = layer bias + committee + template's taste + boost if (l, e) is planted for the skill      what does not change within a prompt
                            + the prompt's own taste + noise that a token shares with the one before it               what makes tokens no observations
      -> the K largest, softmax -> gates of tokens -> mean over the prompt's tokens: mass

Templates prefer experts too, and skills prefer templates: whoever pools templates finds them. A standing committee is strong in every skill. Used by the
study of error rates and power (docs/studies/discovery_truth.md), to ask how many prompts a question needs, and by tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class World:
    """Sizes and strengths. All `*_sd` and `boost` are in router logits. `num_prompts` are of all skills together; `planted_per_layer` experts of each skill
    in every second layer, the others know no skill; `leaning`: the share of a skill's prompts that come from its favourite template."""

    num_prompts: int = 240
    num_skills: int = 4
    num_templates: int = 3
    num_layers: int = 4
    num_experts: int = 16
    experts_per_token: int = 4
    tokens: tuple[int, int] = (8, 32)
    boost: float = 1.0
    planted_per_layer: int = 2
    leaning: float = 0.6
    bias_sd: float = 0.5
    committee: float = 2.0
    committee_experts: int = 2
    template_sd: float = 0.7
    prompt_sd: float = 0.5
    token_sd: float = 1.0
    token_memory: float = 0.7


@dataclass(frozen=True, eq=False)
class Planted:
    """`mass_NLE` float64; `gates_TLE` float32 with `prompt_T`: the gates of every token and whose it is; `truth_XLE` bool."""

    mass_NLE: np.ndarray
    skill_N: list[str]
    template_N: list[str]
    truth_XLE: np.ndarray
    gates_TLE: np.ndarray
    prompt_T: np.ndarray


def planted(world: World, seed: int) -> Planted:
    """Prompts of this world. With `boost` 0 nothing is planted: `truth_XLE` is empty."""
    rng = np.random.default_rng(seed)
    skill_N = np.arange(world.num_prompts) % world.num_skills
    favourite_N = rng.random(world.num_prompts) < world.leaning
    template_N = np.where(favourite_N, skill_N % world.num_templates, rng.integers(world.num_templates, size=world.num_prompts))
    truth_XLE = _truth(world)
    shape = (world.num_layers, world.num_experts)
    fixed_LE = rng.normal(scale=world.bias_sd, size=shape)
    fixed_LE[:, world.num_experts - world.committee_experts :] += world.committee
    taste_NLE = fixed_LE + rng.normal(scale=world.template_sd, size=(world.num_templates, *shape))[template_N]
    taste_NLE += world.boost * truth_XLE[skill_N] + rng.normal(scale=world.prompt_sd, size=(world.num_prompts, *shape))
    length_N = rng.integers(world.tokens[0], world.tokens[1] + 1, size=world.num_prompts)
    prompt_T = np.repeat(np.arange(world.num_prompts), length_N)
    gates_TLE = _gates(taste_NLE[prompt_T] + _noise(world, rng, prompt_T), world.experts_per_token)
    mass_NLE = np.add.reduceat(gates_TLE, np.concatenate([[0], np.cumsum(length_N)[:-1]]), axis=0, dtype=np.float64) / length_N[:, None, None]
    names = [f"skill {skill}" for skill in skill_N]
    return Planted(mass_NLE, names, [f"template {template}" for template in template_N], truth_XLE, gates_TLE, prompt_T)


def _truth(world: World) -> np.ndarray:
    """Each skill has experts of its own, from the first on; the committee is never planted."""
    truth_XLE = np.zeros((world.num_skills, world.num_layers, world.num_experts), dtype=bool)
    if world.boost:
        for skill in range(world.num_skills):
            first = skill * world.planted_per_layer
            truth_XLE[skill, ::2, first : first + world.planted_per_layer] = True
    return truth_XLE


def _noise(world: World, rng: np.random.Generator, prompt_T: np.ndarray) -> np.ndarray:
    """AR(1) within a prompt: n_t = memory * n_{t-1} + sqrt(1 - memory^2) * fresh."""
    noise_TLE = rng.standard_normal((len(prompt_T), world.num_layers, world.num_experts), dtype=np.float32)
    follows = np.flatnonzero(prompt_T[1:] == prompt_T[:-1]) + 1
    fresh = np.sqrt(1 - world.token_memory**2)
    for token in follows:
        noise_TLE[token] = world.token_memory * noise_TLE[token - 1] + fresh * noise_TLE[token]
    return np.asarray(world.token_sd * noise_TLE)


def _gates(logits_TLE: np.ndarray, experts_per_token: int) -> np.ndarray:
    """float32: softmax over the largest logits of each token and layer, 0 elsewhere."""
    least_TL1 = np.partition(logits_TLE, -experts_per_token, axis=2)[:, :, [-experts_per_token]]
    weight_TLE = np.where(logits_TLE >= least_TL1, np.exp(logits_TLE - logits_TLE.max(axis=2, keepdims=True)), 0.0)
    return (weight_TLE / weight_TLE.sum(axis=2, keepdims=True)).astype(np.float32)
