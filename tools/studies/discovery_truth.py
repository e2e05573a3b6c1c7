"""Does discovery find what is planted, and nothing else? `python tools/studies/discovery_truth.py`, results in docs/studies/discovery_truth.md.

Worlds of megatron_ext/earl/planted.py: skills and templates that go together, a standing committee, tokens of a prompt that are alike. An error is any pair
that is reported for any skill where nothing is planted; `the test alone` reports whatever is significant, `all gates` what would get the bonus. Power is the
share of planted pairs that would get the bonus. Two rows show what the gates are for: one test for each token, and prompts whose templates are pooled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import beta, norm

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.clusters import discover
from megatron_ext.earl.planted import Planted, World, planted

WORLD = World(num_prompts=240, boost=2.0)
"""Its planted risk differences are those of the clusters that the toy recipe has (examples/tiny.yaml: 0.06 to 0.29, median 0.15), and so are its prompts."""
ALL_GATES = DiscoverConfig(committee_top=4, permutations=199, bootstraps=50)
NO_GATES = {"min_risk_difference": 0.0, "min_lift": 0.0, "committee_top": 0, "stability_jaccard": 0.0, "bootstrap_frequency": 0.0, "transfer_auroc": 0.0}
UNLIMITED = {"experts_per_layer": 1000, "max_layers": 1000, "bootstraps": 1}
METHODS: dict[str, dict[str, str]] = {
    **{method: {"method": method} for method in ("topm", "nmf", "spectral", "louvain")},
    "topm, bh": {"correction": "bh"},
}
Finder = Callable[[Planted, int], np.ndarray]


def gates(update: dict[str, str]) -> Finder:
    return lambda data, seed: found(data, ALL_GATES.model_copy(update=update), seed)


def alone(update: dict[str, str]) -> Finder:
    return lambda data, seed: found(data, ALL_GATES.model_copy(update={**NO_GATES, **UNLIMITED, **update}), seed)


def pooled(data: Planted, seed: int) -> np.ndarray:
    """The test alone, with all templates as one."""
    return alone({})(replace(data, template_N=["all"] * len(data.template_N)), seed)


def by_tokens(data: Planted, seed: int) -> np.ndarray:
    """bool [X, L, E]: Welch's z test of each skill's tokens against all others', Bonferroni over all pairs, 5 % in all: what the unit of inference is for."""
    skills = sorted(set(data.skill_N))
    label_T = np.array([skills.index(skill) for skill in data.skill_N])[data.prompt_T]
    z_XLE = []
    for skill in range(len(skills)):
        mine, rest = data.gates_TLE[label_T == skill], data.gates_TLE[label_T != skill]
        error_LE = np.sqrt(mine.var(axis=0) / len(mine) + rest.var(axis=0) / len(rest))
        z_XLE.append((mine.mean(axis=0) - rest.mean(axis=0)) / np.maximum(error_LE, 1e-12))
    return np.stack(z_XLE) > norm.isf(0.05 / 2 / np.size(z_XLE))


def found(data: Planted, config: DiscoverConfig, seed: int) -> np.ndarray:
    """bool [X, L, E]: the pairs that would get the bonus."""
    clusters = discover(data.mass_NLE, data.skill_N, data.template_N, config, seed)
    return np.stack([clusters.mask(skill.skill) for skill in clusters.skills])


def errors(finder: Finder, repetitions: int) -> dict[str, float]:
    """Of `repetitions` worlds without anything planted. `upper`, `lower`: one-sided 95 % bounds of the rate of worlds with an error (Clopper, Pearson 1934)."""
    false = [int(finder(planted(replace(WORLD, boost=0.0), 10_000 + seed), seed).sum()) for seed in range(repetitions)]
    wrong = sum(count > 0 for count in false)
    upper = float(beta.ppf(0.95, wrong + 1, repetitions - wrong)) if wrong < repetitions else 1.0
    lower = float(beta.ppf(0.05, wrong, repetitions - wrong + 1)) if wrong else 0.0
    return {"rate": wrong / repetitions, "lower": lower, "upper": upper, "false pairs": float(np.mean(false))}


def power(finder: Finder, world: World, repetitions: int) -> dict[str, float]:
    """`power`: the share of planted pairs that is found, `false`: of found pairs that is not planted; `low`, `median`, `high`: planted risk differences."""
    hits, wrong, differences = 0, 0, []
    for seed in range(repetitions):
        data = planted(world, 20_000 + seed)
        chosen_XLE = finder(data, seed)
        hits, wrong = hits + int((chosen_XLE & data.truth_XLE).sum()), wrong + int((chosen_XLE & ~data.truth_XLE).sum())
        mine_XN = np.array([[name == skill for name in data.skill_N] for skill in sorted(set(data.skill_N))])
        mean_XLE, rest_XLE = (np.stack([data.mass_NLE[mask].mean(axis=0) for mask in masks]) for masks in (mine_XN, ~mine_XN))
        differences += (mean_XLE - rest_XLE)[data.truth_XLE].tolist()
    low, middle, high = np.quantile(differences, [0.1, 0.5, 0.9])
    total = repetitions * int(data.truth_XLE.sum())
    return {"power": hits / total, "false": wrong / max(hits + wrong, 1), "low": float(low), "median": float(middle), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nulls", type=int, default=200, help="worlds without anything planted (%(default)s)")
    parser.add_argument("--worlds", type=int, default=25, help="worlds with planted clusters (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{options.nulls} worlds without, {options.worlds} with planted clusters\n")
    print("| method | errors, the test alone [95 % bounds] | errors, all gates [upper bound] | power | false among found |\n|---|---|---|---|---|")
    for name, update in METHODS.items():
        row = {"alone": errors(alone(update), options.nulls), "gates": errors(gates(update), options.nulls)}
        row["planted"] = power(gates(update), WORLD, options.worlds)
        test, gated, truth = row.values()
        rates = f"{test['rate']:.3f} [{test['lower']:.3f}, {test['upper']:.3f}] | {gated['rate']:.3f} [{gated['upper']:.3f}]"
        print(f"| {name} | {rates} | {truth['power']:.3f} | {truth['false']:.3f} |", flush=True)
        told[name] = row
    for name, finder in (("templates pooled", pooled), ("by tokens", by_tokens)):
        told[name] = {"alone": errors(finder, options.nulls)}
        test = told[name]["alone"]
        print(
            f"| {name} | {test['rate']:.3f} [{test['lower']:.3f}, {test['upper']:.3f}], {test['false pairs']:.1f} false pairs a world | - | - | - |", flush=True
        )
    print("\n| boost, logits | risk difference of planted pairs: 10 %, median, 90 % | power at 120 prompts | 240 | 480 | 960 |\n|---|---|---|---|---|---|")
    for boost in (0.7, 1.0, 1.5, 2.0):
        sizes = {str(n): power(gates({}), replace(WORLD, boost=boost, num_prompts=n), max(1, options.worlds // 2)) for n in (120, 240, 480, 960)}
        seen = sizes["960"]
        cells = " | ".join(f"{size['power']:.2f}" for size in sizes.values())
        print(f"| {boost} | {seen['low']:.3f}, {seen['median']:.3f}, {seen['high']:.3f} | {cells} |", flush=True)
        told[f"boost {boost}"] = sizes
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
