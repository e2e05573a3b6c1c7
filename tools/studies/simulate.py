"""How often the rule of a study errs, and what it can find: the table of docs/studies/README.md.

    python tools/studies/simulate.py

Differences scatter over seeds, over prompts (an arm is better at some and worse at others, whatever the seed) and from answer to answer, normally. Then the
three mean squares that the rule is made of are independent multiples of chi-squares, and are drawn as such, 200,000 times; the bootstrap is tried on whole
tables of differences, 400 times.
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from megatron_ext.study.statistics import bootstrap, reach

STUDIES, BOOTSTRAPPED, RESAMPLES = 200_000, 400, 300
PROMPTS, SKILLS, HYPOTHESES, ALPHA = 600, 6, 6, 0.05
SCATTER = {"seeds": (0.05, 0.0, 0.4), "seeds and prompts": (0.02, 0.2, 0.4), "prompts": (0.0, 0.3, 0.4), "answers alone": (0.0, 0.0, 0.4)}
"""Standard deviations over seeds, over prompts, and of what is left, of differences between two arms."""


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"| seeds | scatter of | wrong at {ALPHA:g} | wrong in a study of {HYPOTHESES} | with Satterthwaite | bootstrap covers | least effect found |")
    print("|---|---|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for name, scatter in SCATTER.items():
            numbers = rates(rng, seeds, *scatter)
            print(
                f"| {seeds} | {name} | " + " | ".join(f"{number:.3f}" for number in (*numbers[:3], covered(rng, seeds, *scatter), numbers[3])) + " |",
                flush=True,
            )


def rates(rng: np.random.Generator, seeds: int, of_seeds: float, of_prompts: float, rest: float) -> tuple[float, float, float, float]:
    """Without an effect: how often one hypothesis at ALPHA, and any of HYPOTHESES at their share of it, is found wrongly; the latter with Satterthwaite's
    degrees of freedom, too. With one: the size that is found in four of five studies, beside HYPOTHESES - 1 others."""
    left = PROMPTS - SKILLS
    v_seeds = (of_seeds**2 + rest**2 / PROMPTS) / seeds * rng.chisquare(seeds - 1, STUDIES) / (seeds - 1)
    v_prompts = (of_prompts**2 + rest**2 / seeds) / PROMPTS * rng.chisquare(left, STUDIES) / left
    v_rest = rest**2 / (seeds * PROMPTS) * rng.chisquare((seeds - 1) * left, STUDIES) / ((seeds - 1) * left)
    error = np.sqrt(of_seeds**2 / seeds + of_prompts**2 / PROMPTS + rest**2 / (seeds * PROMPTS))
    noise = rng.normal(0, error, STUDIES)

    one, share = (np.asarray(reach(level, seeds, left, v_seeds, v_prompts, v_rest)) for level in (ALPHA, ALPHA / HYPOTHESES))
    variance = np.maximum.reduce([v_seeds + v_prompts - v_rest, v_seeds, v_prompts])
    spread = v_seeds**2 / (seeds - 1) + v_prompts**2 / left + v_rest**2 / ((seeds - 1) * left)
    satterthwaite = -stdtrit(np.maximum(variance**2 / spread, seeds - 1), ALPHA / HYPOTHESES / 2) * np.sqrt(variance)
    in_a_study = [1 - (1 - float(np.mean(np.abs(noise) >= far))) ** HYPOTHESES for far in (share, satterthwaite)]
    return float(np.mean(np.abs(noise) >= one)), *in_a_study, float(np.quantile(share - noise, 0.8))


def covered(rng: np.random.Generator, seeds: int, of_seeds: float, of_prompts: float, rest: float) -> float:
    """How often the bootstrap's interval at 1 - ALPHA holds the true difference of 0."""
    skills = [str(skill) for skill in range(SKILLS) for _ in range(PROMPTS // SKILLS)]
    held = 0
    for number in range(BOOTSTRAPPED):
        difference_SP = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_prompts, (1, PROMPTS)) + rng.normal(0, rest, (seeds, PROMPTS))
        low, high = bootstrap(difference_SP, skills, 1 - ALPHA, RESAMPLES, seed=number)
        held += low <= 0 <= high
    return held / BOOTSTRAPPED


if __name__ == "__main__":
    main()
