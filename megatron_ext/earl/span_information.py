"""What experts tell about the skill outside the response: at the positions of the image, and of the question.

Clusters are found at the positions of the response alone. The other spans are never pooled with them: an image is read before the question, by a causal model
that cannot know the skill there, and a question says its skill by its very words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.statistics import excess_information, permuted_labels

_PERMUTATIONS = 100


def with_spans(clusters: ExpertClusters, masses: Mapping[str, np.ndarray], skill_N: np.ndarray, template_N: np.ndarray) -> ExpertClusters:
    """The clusters with `span_information`. `masses`: [N, L, E] of each span by its name, nan for a prompt that has no such span; a span that prompts of fewer
    than two skills have is left out."""
    found = {}
    for span, mass_NLE in masses.items():
        has_N = np.isfinite(mass_NLE).all(axis=(1, 2))
        if len(set(skill_N[has_N])) > 1:
            found[span] = _information(mass_NLE[has_N], skill_N[has_N], template_N[has_N], clusters.seed)
    return replace(clusters, span_information=found)


def _information(mass_NLE: np.ndarray, skill_N: np.ndarray, template_N: np.ndarray, seed: int) -> np.ndarray:
    """[L], bits: `excess_information`."""
    (skills, label_N), (_, stratum_N) = (np.unique(names, return_inverse=True) for names in (skill_N, template_N))
    permuted_RN = permuted_labels(label_N, stratum_N, _PERMUTATIONS, np.random.default_rng(seed))
    return excess_information(mass_NLE, label_N, permuted_RN, len(skills))
