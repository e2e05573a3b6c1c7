"""What is known of a cluster from taking its experts away; how it is found is in `causal.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["causal", "correlational"]


@dataclass(frozen=True)
class CausalEffect:
    """What masking a skill's cluster did. Drops are shares of prompts; `beyond_*` are 95 % intervals of own - others and own - random. `cluster_mass`,
    `random_mass`: gate mass of the skill's answers on what was masked, mean over layers; `random_overlap`: the share of the random masks' experts that belong
    to the cluster."""

    num_prompts: int
    accuracy: float
    drop_own: float
    drop_others: float
    drop_random: float
    random_drops: tuple[float, ...]
    beyond_others: tuple[float, float]
    beyond_random: tuple[float, float]
    cluster_mass: float
    random_mass: float
    random_overlap: float
    verdict: Verdict
    reason: str
