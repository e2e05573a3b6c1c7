"""Whether a skill has a cluster, and why not, in words: the gates of discovery, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.selection import Significance, standing_committee
from megatron_ext.earl.statistics import Effects

MIN_PROMPTS = 8

Status = Literal["ok", "correlational", "unstable", "empty"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that the gates look at. `strong_XLE`: significant and strong pairs; `chosen_XLE`: those of them in a community of the skill (topm: the same)."""

    found: Effects
    significance: Significance
    strong_XLE: np.ndarray
    chosen_XLE: np.ndarray
    jaccard_X: np.ndarray
    frequency_XLE: np.ndarray
    transfer_X: list[float | None]
    count_X: np.ndarray


@dataclass(frozen=True, eq=False)
class Verdict:
    """`pairs_LE`: what is recorded, before the budget. `unstable`: how many pairs were left out because resamples do not find them again."""

    status: Status
    reason: str
    pairs_LE: np.ndarray
    unstable: int = 0


def verdict(evidence: Evidence, skill: int, config: DiscoverConfig) -> Verdict:
    """Enough prompts -> significant, strong and of its community -> found again in bootstraps -> in halves -> works on templates it has not seen."""
    chosen_LE, frequency_LE, jaccard = evidence.chosen_XLE[skill], evidence.frequency_XLE[skill], float(evidence.jaccard_X[skill])
    transfer, none_LE = evidence.transfer_X[skill], np.zeros_like(chosen_LE)
    if evidence.count_X[skill] < MIN_PROMPTS:
        return Verdict("empty", f"only {evidence.count_X[skill]} correct answers, at least {MIN_PROMPTS} are needed", none_LE)
    if not chosen_LE.any():
        return Verdict("empty", _why_empty(evidence, skill, config), none_LE)
    stable_LE = chosen_LE & (frequency_LE >= config.bootstrap_frequency)
    if not stable_LE.any():
        best = frequency_LE[chosen_LE].max()
        return Verdict("unstable", f"no expert is found in {config.bootstrap_frequency:.0%} of the bootstraps (the best in {best:.0%})", chosen_LE)
    if jaccard < config.stability_jaccard:
        return Verdict("unstable", f"the clusters of two halves of the prompts overlap by {jaccard:.2f}, {config.stability_jaccard} is needed", chosen_LE)
    if transfer is not None and transfer < config.transfer_auroc:
        problem = f"on templates that it was not found on the cluster tells the skill with an AUROC of {transfer:.2f}, {config.transfer_auroc} is needed"
        return Verdict("unstable", problem, chosen_LE)
    return Verdict("ok", "", stable_LE, int(chosen_LE.sum() - stable_LE.sum()))


def praise(judged: Verdict, kept_LE: np.ndarray, config: DiscoverConfig) -> str:
    """The reason of a cluster that passed, once it has been cut to its budget."""
    surplus = int(judged.pairs_LE.sum() - kept_LE.sum())
    left_out = ", ".join(
        [f"{judged.unstable} unstable"] * (judged.unstable > 0)
        + [f"{surplus} beyond {config.experts_per_layer} a layer and {config.max_layers} layers"] * (surplus > 0)
    )
    return f"{int(kept_LE.sum())} experts pass every test" + (f" (left out: {left_out})" if left_out else "")


def _why_empty(evidence: Evidence, skill: int, config: DiscoverConfig) -> str:
    found, significant_LE, critical = evidence.found, evidence.significance.significant_XLE[skill], evidence.significance.critical
    z_LE = found.z_XLE[skill]
    if not z_LE.any():
        return "no other skill shares its templates, so it cannot be told from them"
    if not significant_LE.any():
        needed = f", {critical:.2f} is needed" if np.isfinite(critical) else ", and no expert of any skill does"
        return f"no expert passes the permutation test: the largest z is {z_LE.max():.2f}{needed}"
    if strong := int(evidence.strong_XLE[skill].sum()):
        return f"its {strong} significant experts work together with those of other skills ({config.method})"
    difference, lift = found.risk_difference_XLE[skill][significant_LE].max(), found.lift_XLE[skill][significant_LE].max()
    committee = int((significant_LE & standing_committee(found.mean_mass_XLE, config.committee_top)).sum())
    return (
        f"{int(significant_LE.sum())} experts are significant but none is specific enough: the largest risk difference is {difference:.3f} "
        f"({config.min_risk_difference} is needed), the largest lift {lift:.2f} ({config.min_lift} is needed), {committee} serve every skill"
    )
