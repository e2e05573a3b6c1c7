"""Which experts serve which skill: from the routes of skill-labelled prompts to a frozen table of expert clusters.

    masses [N, L, E] in memory or on disk, skill_N, template_N        masses.py, sample.py
      -> effects per (skill, layer, expert)                           statistics.py, effect_sizes.py
      -> permutation test within templates                            statistics.py
      -> selection, communities                                       selection.py, communities.py
      -> halves, bootstraps, templates left out                       resampling.py
      -> gates, in words                                              verdicts.py
      -> ExpertClusters                                               read by the bonus and the report

A skill without a cluster that passes every test stays without one, and says why: it gets no bonus. Pure: the same prompts in any order and the same seed
give the same clusters, and renaming skills renames clusters and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.causal_effect import CausalEffect
from megatron_ext.earl.communities import in_communities
from megatron_ext.earl.effect_sizes import log_odds, npmi
from megatron_ext.earl.look import Look, first_look
from megatron_ext.earl.masses import MassArray, MassSource
from megatron_ext.earl.resampling import Resamples, draw, selected_again, split_half_jaccard, transfer_auroc
from megatron_ext.earl.sample import BLOCK_BYTES, Survey
from megatron_ext.earl.selection import best_layers, select, significance, trimmed
from megatron_ext.earl.statistics import auroc, permuted_labels, sigma_from
from megatron_ext.earl.verdicts import Evidence, Status, praise, verdict
from megatron_ext.errors import UserError
from megatron_ext.shapes import check_shape


@dataclass(frozen=True)
class PairEffect:
    """One expert of a cluster and the evidence for it.

    `risk_difference`, `z`, `p` (adjusted for all pairs): after token control where there was one; `uncontrolled_risk_difference`, `uncontrolled_z`: without.
    `lift`, `log_odds` (nats), `npmi`: of the mass itself; `controlled_log_odds`, `controlled_npmi`: minus those of the mass that token ids explain. Without
    token control the two of a kind are equal.
    """

    layer: int
    expert: int
    risk_difference: float
    lift: float
    z: float
    p: float
    bootstrap_frequency: float
    log_odds: float
    npmi: float
    uncontrolled_risk_difference: float
    uncontrolled_z: float
    controlled_log_odds: float
    controlled_npmi: float


@dataclass(frozen=True)
class SkillCluster:
    """A skill and its cluster. `ok`: `pairs` get the bonus. `unstable`: `pairs` were found but not again and again. `empty`: nothing was found.
    `correlational`: masking `pairs` does not hurt the skill as it should (`causal.py`), and discovery was told to hold the bonus back then.

    `sigma` is the standard deviation of the cluster's mass over the skill's prompts (None: no pairs); `auroc` tells the skill's prompts from others by it;
    `transfer_auroc` does so on templates that the selection had not seen (None: no template could be left out); `uncontrolled_pairs` are what `topm` would
    have selected without token control (None: there was no control). `causal`: what masking the cluster did (None: it was not tried).
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
    of the response; `span_information`: the same [L] at those of other spans, by their names. `critical_z`: what a |z| had to exceed (None:
    `discover.correction` = bh let nothing through)."""

    num_layers: int
    num_experts: int
    skills: tuple[SkillCluster, ...]
    mean_mass_XLE: np.ndarray
    risk_difference_XLE: np.ndarray
    information_L: np.ndarray
    critical_z: float | None
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
    mass: np.ndarray | MassSource,
    skill_N: Sequence[str],
    template_N: Sequence[str],
    config: DiscoverConfig,
    seed: int,
    control_NLE: np.ndarray | MassSource | None = None,
    checkpoint: str = "",
    poll: Callable[[], None] = lambda: None,
    block_bytes: int = BLOCK_BYTES,
) -> ExpertClusters:
    """Finds the clusters. `mass` float [N, L, E], in memory or a `MassFile`: gate mass of each prompt's correct answer, summing to 1 over experts; `template_N`
    are the strata of the test.

    With `control_NLE` (the mass that token ids explain, `TokenTable.expected`), skills are compared by `mass - control`. Only as many layers are in memory
    at once as take `block_bytes`, or one; the result is that of all at once, up to the last bits of sums over layers (sample.py).
    `poll` is called every now and then, and may raise. Raises UserError when the settings cannot work on this model or these prompts.
    """
    source, control = _source(mass), None if control_NLE is None else _source(control_NLE)
    _check(source, skill_N, template_N, config, control)
    survey = Survey(source, control, skill_N, template_N, block_bytes)
    rng = np.random.default_rng(seed)
    permuted_RN = permuted_labels(survey.label_N, survey.stratum_N, config.permutations, rng)
    look = first_look(survey, permuted_RN, poll)
    resamples = draw(survey, config.bootstraps, rng)
    evidence = _evidence(survey, look, resamples, config, seed, poll)
    uncontrolled_XLE = select(look.plain, significance(look.plain.z_XLE, look.plain_null, config).significant_XLE, config)
    critical = evidence.significance.critical
    return ExpertClusters(
        num_layers=survey.num_layers,
        num_experts=survey.num_experts,
        skills=_skill_clusters(survey, look, evidence, uncontrolled_XLE, config),
        mean_mass_XLE=look.found.mean_mass_XLE,
        risk_difference_XLE=look.found.risk_difference_XLE,
        information_L=look.information_L,
        critical_z=critical if np.isfinite(critical) else None,
        settings=config,
        seed=seed,
        checkpoint=checkpoint,
    )


def heat_map_table(clusters: ExpertClusters) -> np.ndarray:
    """float [X, L * E]: risk differences, one row a skill in the order of `clusters.skills`, columns by layer and then by expert."""
    return clusters.risk_difference_XLE.reshape(len(clusters.skills), -1)


def effects_in_words(pairs: Sequence[PairEffect]) -> str:
    """How strong a cluster is, to be put behind its reason; empty without pairs."""
    if not pairs:
        return ""
    odds, shared = [pair.log_odds for pair in pairs], [pair.npmi for pair in pairs]
    return f"; log-odds {min(odds):.2f} to {max(odds):.2f}, nPMI {min(shared):.2f} to {max(shared):.2f}"


def pairs_mask(pairs: Sequence[tuple[int, int]], num_layers: int, num_experts: int) -> np.ndarray:
    mask_LE = np.zeros((num_layers, num_experts), dtype=bool)
    for layer, expert in pairs:
        mask_LE[layer, expert] = True
    return mask_LE


def mask_pairs(mask_LE: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(expert)) for layer, expert in np.argwhere(mask_LE))


def _source(mass: np.ndarray | MassSource) -> MassSource:
    return MassArray(mass) if isinstance(mass, np.ndarray) else mass


def _check(source: MassSource, skill_N: Sequence[str], template_N: Sequence[str], config: DiscoverConfig, control: MassSource | None) -> None:
    num_prompts, _, num_experts = source.shape
    if len(skill_N) != num_prompts or len(template_N) != num_prompts:
        raise ValueError(f"masses of {num_prompts} prompts, {len(skill_N)} skills and {len(template_N)} templates")
    if control is not None and control.shape != source.shape:
        raise ValueError(f"masses are {source.shape} and what token control explains is {control.shape}")
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


def _evidence(survey: Survey, look: Look, resamples: Resamples, config: DiscoverConfig, seed: int, poll: Callable[[], None]) -> Evidence:
    passed = significance(look.found.z_XLE, look.null, config)
    strong_XLE = chosen_XLE = select(look.found, passed.significant_XLE, config)
    again_BXLE = selected_again(survey, resamples, passed.critical, config, poll)
    if config.method != "topm":
        together_XLE, together_BXLE = in_communities(survey, look.found, strong_XLE, resamples, config, seed, poll)
        chosen_XLE, again_BXLE = strong_XLE & together_XLE, again_BXLE & together_BXLE
    return Evidence(
        found=look.found,
        significance=passed,
        strong_XLE=strong_XLE,
        chosen_XLE=chosen_XLE,
        jaccard_X=split_half_jaccard(again_BXLE[resamples.halves]),
        frequency_XLE=again_BXLE[resamples.drawn_again].mean(axis=0),
        transfer_X=transfer_auroc(survey, resamples, again_BXLE[resamples.left_out]),
        count_X=look.count_X,
    )


def _skill_clusters(survey: Survey, look: Look, evidence: Evidence, uncontrolled_XLE: np.ndarray, config: DiscoverConfig) -> tuple[SkillCluster, ...]:
    """The budget, and what is measured of the clusters that are within it."""
    verdicts = [verdict(evidence, skill, config) for skill in range(survey.num_skills)]
    wanted = [(skill, trimmed(verdicts[skill].pairs_LE, look.found.risk_difference_XLE[skill], config)) for skill in range(survey.num_skills)]
    if survey.controlled:
        wanted += [(skill, trimmed(chosen_LE, look.plain.risk_difference_XLE[skill], config)) for skill, chosen_LE in enumerate(uncontrolled_XLE)]
    within = best_layers(survey, wanted, config)
    kept = [cut if judged.status == "ok" else judged.pairs_LE for judged, cut in zip(verdicts, within[: survey.num_skills], strict=True)]
    uncontrolled = [mask_pairs(cut) for cut in within[survey.num_skills :]]
    pairs, masses = _pairs(look, evidence, kept), _cluster_masses(survey, kept)
    return tuple(
        SkillCluster(
            skill=name,
            status=verdicts[skill].status,
            reason=verdicts[skill].reason or praise(verdicts[skill], kept[skill], config),
            num_prompts=int(look.count_X[skill]),
            pairs=pairs[skill],
            sigma=sigma_from(masses[skill][survey.label_N == skill]) if kept[skill].any() else None,
            auroc=auroc(masses[skill], survey.label_N == skill),
            transfer_auroc=evidence.transfer_X[skill],
            jaccard=float(evidence.jaccard_X[skill]),
            uncontrolled_pairs=uncontrolled[skill] if survey.controlled else None,
        )
        for skill, name in enumerate(survey.skills)
    )


def _cluster_masses(survey: Survey, kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each cluster the [N] masses: `statistics.cluster_mass`, block by block."""
    totals = [np.zeros(survey.num_prompts) for _ in kept]
    for block in survey.blocks():
        for total_N, kept_LE in zip(totals, kept, strict=True):
            if kept_LE[block.layers].any():
                total_N += np.einsum("nle,le->n", block.mass_NLE, kept_LE[block.layers].astype(np.float64))
    return [total_N / max(int(kept_LE.any(axis=1).sum()), 1) for total_N, kept_LE in zip(totals, kept, strict=True)]


def _pairs(look: Look, evidence: Evidence, kept: Sequence[np.ndarray]) -> list[tuple[PairEffect, ...]]:
    found, plain, mean_XLE = look.found, look.plain, look.found.mean_mass_XLE
    odds_XLE, npmi_XLE = log_odds(mean_XLE, look.count_X), npmi(mean_XLE, look.count_X)
    controlled = (odds_XLE, npmi_XLE)
    if look.control_mean_XLE is not None:
        controlled = (odds_XLE - log_odds(look.control_mean_XLE, look.count_X), npmi_XLE - npmi(look.control_mean_XLE, look.count_X))
    compared = (found.risk_difference_XLE, found.lift_XLE, found.z_XLE, evidence.significance.p_XLE, evidence.frequency_XLE)
    tables = (*compared, odds_XLE, npmi_XLE, plain.risk_difference_XLE, plain.z_XLE, *controlled)
    return [
        tuple(PairEffect(layer, expert, *(float(table[skill, layer, expert]) for table in tables)) for layer, expert in mask_pairs(kept_LE))
        for skill, kept_LE in enumerate(kept)
    ]
