"""Which experts serve which skill: from the routes of skill-labelled prompts to a frozen table of expert clusters.

    mass_NLE, skill_N, template_N
      -> effects per (skill, layer, expert)             statistics.py
      -> permutation test within templates              statistics.py
      -> selection, split halves, bootstraps            selection.py
      -> ExpertClusters                                 read by the bonus and the report

A skill without a cluster that passes every test stays without one, and says why: it gets no bonus. Pure: the same prompts in any order and the same seed
give the same clusters, and renaming skills renames clusters and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.causal_effect import CausalEffect
from megatron_ext.earl.selection import Sample, bootstrap_frequency, select, split_half_jaccard, standing_committee, transfer_auroc, within_budget
from megatron_ext.earl.statistics import Effects, auroc, cluster_mass, critical_z, excess_information, family_wise_p, max_z_null, permuted_labels, sigma_from
from megatron_ext.errors import UserError
from megatron_ext.shapes import check_shape

MIN_PROMPTS = 8
_INFORMATION_PERMUTATIONS = 100

Status = Literal["ok", "correlational", "unstable", "empty"]


@dataclass(frozen=True)
class PairEffect:
    """One expert of a cluster and the evidence for it. `risk_difference`, `z`, `p`: after token control where there was one; `lift`: of the mass itself."""

    layer: int
    expert: int
    risk_difference: float
    lift: float
    z: float
    p: float
    bootstrap_frequency: float


@dataclass(frozen=True)
class SkillCluster:
    """A skill and its cluster. `ok`: `pairs` get the bonus. `unstable`: `pairs` were found but not again and again. `empty`: nothing was found.
    `correlational`: masking `pairs` does not hurt the skill as it should (`causal.py`), and discovery was told to hold the bonus back then.

    `sigma` is the standard deviation of the cluster's mass over the skill's prompts (None: no pairs); `auroc` tells the skill's prompts from others by it;
    `transfer_auroc` does so on templates that the selection had not seen (None: no template could be left out); `uncontrolled_pairs` are what would
    have been selected without token control (None: there was no control). `causal`: what masking the cluster did (None: it was not tried).
    """

    skill: str
    status: Status
    reason: str
    num_prompts: int
    pairs: tuple[PairEffect, ...]
    sigma: float | None
    auroc: float
    transfer_auroc: float | None
    jaccard: float
    uncontrolled_pairs: tuple[tuple[int, int], ...] | None
    causal: CausalEffect | None = None


@dataclass(frozen=True, eq=False)
class ExpertClusters:
    """The clusters of every skill and the tables behind them. `information_L`: bits that the expert tells about the skill, chance taken off, at the positions
    of the response; `span_information`: the same [L] at those of other spans, by their names."""

    num_layers: int
    num_experts: int
    skills: tuple[SkillCluster, ...]
    mean_mass_XLE: np.ndarray
    risk_difference_XLE: np.ndarray
    information_L: np.ndarray
    critical_z: float
    settings: DiscoverConfig
    seed: int
    checkpoint: str
    span_information: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = (len(self.skills), self.num_layers, self.num_experts)
        check_shape("mean_mass_XLE", self.mean_mass_XLE, *table)
        check_shape("risk_difference_XLE", self.risk_difference_XLE, *table)
        check_shape("information_L", self.information_L, self.num_layers)
        for span, bits_L in self.span_information.items():
            check_shape(f"span_information[{span!r}]", bits_L, self.num_layers)

    def pairs(self, skill: str) -> tuple[tuple[int, int], ...]:
        """The (layer, expert) pairs that get the bonus: empty for a skill that is unknown or whose status is not ok."""
        return next((tuple((pair.layer, pair.expert) for pair in found.pairs) for found in self.skills if found.skill == skill and found.status == "ok"), ())

    def mask(self, skill: str) -> np.ndarray:
        """bool [L, E]: `pairs` as a table."""
        return pairs_mask(self.pairs(skill), self.num_layers, self.num_experts)

    def sigmas(self) -> dict[str, float]:
        """sigma of every skill whose status is ok."""
        return {found.skill: found.sigma for found in self.skills if found.status == "ok" and found.sigma is not None}

    def forced(self) -> ExpertClusters:
        """With the clusters that are correlational as if they were ok."""
        return replace(self, skills=tuple(replace(found, status="ok") if found.status == "correlational" else found for found in self.skills))


def discover(
    mass_NLE: np.ndarray,
    skill_N: Sequence[str],
    template_N: Sequence[str],
    config: DiscoverConfig,
    seed: int,
    control_NLE: np.ndarray | None = None,
    checkpoint: str = "",
    poll: Callable[[], None] = lambda: None,
) -> ExpertClusters:
    """Finds the clusters. `mass_NLE` float: gate mass of each prompt's correct answer, summing to 1 over experts; `template_N` are the strata of the test.

    With `control_NLE` (the mass that token ids explain, `TokenTable.expected`), skills are compared by `mass - control`. `poll` is called every now and
    then, and may raise. Raises UserError when the settings cannot work on this model or these prompts.
    """
    mass_NLE = np.asarray(mass_NLE, dtype=np.float64)
    _check(mass_NLE, skill_N, template_N, config, control_NLE)
    skills = sorted(set(skill_N))
    plain, sample = _samples(mass_NLE, control_NLE, skill_N, template_N, skills)
    rng = np.random.default_rng(seed)
    permuted_RN = permuted_labels(sample.label_N, sample.stratum_N, config.permutations, rng)
    null_R = max_z_null(sample.contrast_NLE, permuted_RN, sample.stratum_N, len(skills), poll)
    critical, found = critical_z(null_R, config.fwer), sample.effects()
    evidence = _Evidence(
        sample=sample,
        found=found,
        critical=critical,
        p_XLE=family_wise_p(found.z_XLE, null_R),
        chosen_XLE=select(found, critical, config),
        jaccard_X=split_half_jaccard(sample, critical, config, rng),
        frequency_XLE=bootstrap_frequency(sample, critical, config, rng, poll),
        transfer_X=transfer_auroc(sample, critical, config),
        uncontrolled_XLE=None if control_NLE is None else _uncontrolled(plain, permuted_RN, config),
    )
    return ExpertClusters(
        num_layers=mass_NLE.shape[1],
        num_experts=mass_NLE.shape[2],
        skills=tuple(_skill_cluster(evidence, index, skill, config) for index, skill in enumerate(skills)),
        mean_mass_XLE=found.mean_mass_XLE,
        risk_difference_XLE=found.risk_difference_XLE,
        information_L=excess_information(sample.mass_NLE, sample.label_N, permuted_RN[:_INFORMATION_PERMUTATIONS], len(skills)),
        critical_z=critical,
        settings=config,
        seed=seed,
        checkpoint=checkpoint,
    )


def heat_map_table(clusters: ExpertClusters) -> np.ndarray:
    """float [X, L * E]: risk differences, one row a skill in the order of `clusters.skills`, columns by layer and then by expert."""
    return clusters.risk_difference_XLE.reshape(len(clusters.skills), -1)


def pairs_mask(pairs: Sequence[tuple[int, int]], num_layers: int, num_experts: int) -> np.ndarray:
    mask_LE = np.zeros((num_layers, num_experts), dtype=bool)
    for layer, expert in pairs:
        mask_LE[layer, expert] = True
    return mask_LE


def mask_pairs(mask_LE: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(expert)) for layer, expert in np.argwhere(mask_LE))


@dataclass(frozen=True, eq=False)
class _Evidence:
    sample: Sample
    found: Effects
    critical: float
    p_XLE: np.ndarray
    chosen_XLE: np.ndarray
    jaccard_X: np.ndarray
    frequency_XLE: np.ndarray
    transfer_X: list[float | None]
    uncontrolled_XLE: np.ndarray | None


def _check(mass_NLE: np.ndarray, skill_N: Sequence[str], template_N: Sequence[str], config: DiscoverConfig, control_NLE: np.ndarray | None) -> None:
    check_shape("mass_NLE", mass_NLE, len(skill_N), None, None)
    if control_NLE is not None:
        check_shape("control_NLE", control_NLE, *mass_NLE.shape)
    if len(template_N) != len(skill_N):
        raise ValueError(f"{len(skill_N)} skills but {len(template_N)} templates")
    if not np.isfinite(mass_NLE).all() or (mass_NLE < 0).any():
        raise ValueError("mass_NLE holds a negative or non-finite gate mass")
    num_experts = mass_NLE.shape[2]
    if config.committee_top >= num_experts:
        problem = f"{config.committee_top} is not below model.num_experts = {num_experts}, so every expert would be a standing committee member"
        raise UserError("discover.committee_top", problem, f"use at most {num_experts - 1}, or 0 for no committee")
    least = int(np.ceil(1 / config.fwer - 1e-9)) - 1
    if config.permutations < least:
        raise UserError("discover.permutations", f"{config.permutations} permutations cannot reach discover.fwer = {config.fwer}", f"use at least {least}")
    if len(set(skill_N)) < 2:
        names = ", ".join(sorted(set(skill_N))) or "none"
        raise UserError(
            "discover", f"correct answers of at least two skills are needed to compare, found: {names}", "train further, or raise discover.prompts_per_skill"
        )


def _samples(
    mass_NLE: np.ndarray, control_NLE: np.ndarray | None, skill_N: Sequence[str], template_N: Sequence[str], skills: list[str]
) -> tuple[Sample, Sample]:
    """The prompts in an order that depends on their content alone: without token control, and as they are compared."""
    order = sorted(range(len(skill_N)), key=lambda row: (mass_NLE[row].tobytes(), template_N[row], skill_N[row]))
    label_N = np.array([skills.index(skill_N[row]) for row in order])
    strata: dict[str, int] = {}
    stratum_N = np.array([strata.setdefault(template_N[row], len(strata)) for row in order])
    ordered_NLE = mass_NLE[order]
    plain = Sample(ordered_NLE, ordered_NLE, label_N, stratum_N, len(skills))
    if control_NLE is None:
        return plain, plain
    return plain, Sample(plain.mass_NLE, plain.mass_NLE - np.asarray(control_NLE, dtype=np.float64)[order], label_N, stratum_N, len(skills))


def _uncontrolled(plain: Sample, permuted_RN: np.ndarray, config: DiscoverConfig) -> np.ndarray:
    null_R = max_z_null(plain.contrast_NLE, permuted_RN, plain.stratum_N, plain.num_skills)
    found = plain.effects()
    chosen_XLE = select(found, critical_z(null_R, config.fwer), config)
    return np.stack([within_budget(chosen_LE, plain, found, skill, config) for skill, chosen_LE in enumerate(chosen_XLE)])


def _skill_cluster(evidence: _Evidence, index: int, skill: str, config: DiscoverConfig) -> SkillCluster:
    mine_N = evidence.sample.label_N == index
    status, reason, kept_LE = _verdict(evidence, index, int(mine_N.sum()), config)
    mass_N = cluster_mass(evidence.sample.mass_NLE, kept_LE)
    return SkillCluster(
        skill=skill,
        status=status,
        reason=reason,
        num_prompts=int(mine_N.sum()),
        pairs=_pairs(evidence, kept_LE, index),
        sigma=sigma_from(mass_N[mine_N]) if kept_LE.any() else None,
        auroc=auroc(mass_N, mine_N),
        transfer_auroc=evidence.transfer_X[index],
        jaccard=float(evidence.jaccard_X[index]),
        uncontrolled_pairs=None if evidence.uncontrolled_XLE is None else mask_pairs(evidence.uncontrolled_XLE[index]),
    )


def _verdict(evidence: _Evidence, index: int, num_prompts: int, config: DiscoverConfig) -> tuple[Status, str, np.ndarray]:
    """Status, reason in words, and the pairs to record."""
    chosen_LE, frequency_LE, jaccard = evidence.chosen_XLE[index], evidence.frequency_XLE[index], float(evidence.jaccard_X[index])
    none_LE = np.zeros_like(chosen_LE)
    if num_prompts < MIN_PROMPTS:
        return "empty", f"only {num_prompts} correct answers, at least {MIN_PROMPTS} are needed", none_LE
    if not chosen_LE.any():
        return "empty", _why_empty(evidence.found, evidence.critical, index, config), none_LE
    stable_LE = chosen_LE & (frequency_LE >= config.bootstrap_frequency)
    if not stable_LE.any():
        best = frequency_LE[chosen_LE].max()
        return "unstable", f"no expert is found in {config.bootstrap_frequency:.0%} of the bootstraps (the best in {best:.0%})", chosen_LE
    if jaccard < config.stability_jaccard:
        return "unstable", f"the clusters of two halves of the prompts overlap by {jaccard:.2f}, {config.stability_jaccard} is needed", chosen_LE
    kept_LE = within_budget(stable_LE, evidence.sample, evidence.found, index, config)
    unstable, surplus = int(chosen_LE.sum() - stable_LE.sum()), int(stable_LE.sum() - kept_LE.sum())
    left_out = ", ".join(
        [f"{unstable} unstable"] * (unstable > 0) + [f"{surplus} beyond {config.experts_per_layer} a layer and {config.max_layers} layers"] * (surplus > 0)
    )
    return "ok", f"{int(kept_LE.sum())} experts pass every test" + (f" (left out: {left_out})" if left_out else ""), kept_LE


def _why_empty(found: Effects, critical: float, skill: int, config: DiscoverConfig) -> str:
    z_LE = found.z_XLE[skill]
    if not z_LE.any():
        return "no other skill shares its templates, so it cannot be told from them"
    significant_LE = z_LE > critical
    if not significant_LE.any():
        return f"no expert passes the permutation test: the largest z is {z_LE.max():.2f}, {critical:.2f} is needed"
    difference, lift = found.risk_difference_XLE[skill][significant_LE].max(), found.lift_XLE[skill][significant_LE].max()
    committee = int((significant_LE & standing_committee(found.mean_mass_XLE, config.committee_top)).sum())
    return (
        f"{int(significant_LE.sum())} experts are significant but none is specific enough: the largest risk difference is {difference:.3f} "
        f"({config.min_risk_difference} is needed), the largest lift {lift:.2f} ({config.min_lift} is needed), {committee} serve every skill"
    )


def _pairs(evidence: _Evidence, kept_LE: np.ndarray, index: int) -> tuple[PairEffect, ...]:
    found = evidence.found
    tables = (found.risk_difference_XLE, found.lift_XLE, found.z_XLE, evidence.p_XLE, evidence.frequency_XLE)
    return tuple(PairEffect(layer, expert, *(float(table[index, layer, expert]) for table in tables)) for layer, expert in mask_pairs(kept_LE))
