"""How often the rule of a study errs, and how often it finds what is there: the table of docs/studies/README.md.

    python tools/studies/simulate.py [--studies 2000]

Every study has six arms against one baseline, prompts of three skills that all seeds answer, and scatter of three kinds: of seeds, of prompts (an arm is
better at some and worse at others, whatever the seed), and of single answers.
"""

from __future__ import annotations

import argparse

import numpy as np

from megatron_ext.study.statistics import bootstrap, effect, holm, sign_flip_p

ARMS, PROMPTS, ALPHA = 6, 60, 0.05
SKILLS = [skill for skill in ("a", "b", "c") for _ in range(PROMPTS // 3)]
SCATTER = {"seeds": (0.10, 0.0, 0.4), "seeds and prompts": (0.05, 0.3, 0.4), "prompts": (0.0, 0.4, 0.4), "answers alone": (0.0, 0.0, 0.4)}
"""Standard deviations of an arm's score over seeds, over prompts, and of what is left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="studies of each kind")
    studies = parser.parse_args().studies
    print("| seeds | scatter | wrong verdict in a study | interval covers | bootstrap covers | sign flips p <= 0.05 | finds 3 SE | finds 6 SE |")
    print("|---|---|---|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for name, scatter in SCATTER.items():
            print(f"| {seeds} | {name} | " + " | ".join(f"{share:.3f}" for share in rates(seeds, scatter, studies)) + " |", flush=True)


def rates(seeds: int, scatter: tuple[float, float, float], studies: int) -> list[float]:
    """Shares of studies in which a true null is rejected after Holm; the 95 % interval covers; the bootstrap's does; flips reach 0.05; an effect of three,
    and of six, true standard errors is found after Holm beside five nulls. The bootstrap is tried in a quarter of them."""
    rng = np.random.default_rng(0)
    of_seeds, of_prompts, rest = scatter
    error = np.sqrt(2 * (of_seeds**2 / seeds + of_prompts**2 / PROMPTS + rest**2 / (seeds * PROMPTS)))
    wrong = covered = flipped = resampled = 0
    found = {3: 0, 6: 0}
    for number in range(studies):
        base_SP, *arms = (_scores(rng, seeds, scatter) for _ in range(ARMS + 1))
        nulls = [effect(arm_SP - base_SP, SKILLS) for arm_SP in arms]
        values = [one.p for one in nulls]
        wrong += min(holm(values)) <= ALPHA
        low, high = nulls[0].interval(1 - ALPHA)
        covered += low <= 0 <= high
        flipped += sign_flip_p(nulls[0].seeds_S) <= ALPHA
        if number % 4 == 0:
            low, high = bootstrap(arms[0] - base_SP, SKILLS, 1 - ALPHA, 300, seed=number)
            resampled += low <= 0 <= high
        for size in found:
            shifted = effect(arms[0] - base_SP + size * error, SKILLS)
            found[size] += shifted.difference > 0 and holm([shifted.p, *values[1:]])[0] <= ALPHA
    return [wrong / studies, covered / studies, resampled / len(range(0, studies, 4)), flipped / studies, found[3] / studies, found[6] / studies]


def _scores(rng: np.random.Generator, seeds: int, scatter: tuple[float, float, float]) -> np.ndarray:
    of_seeds, of_prompts, rest = scatter
    return rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_prompts, (1, PROMPTS)) + rng.normal(0, rest, (seeds, PROMPTS))


if __name__ == "__main__":
    main()
