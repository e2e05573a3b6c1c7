"""What experts tell about the skill outside the response: at the positions of the image, and of the question.

Clusters are found at the positions of the response alone. The other spans are never pooled with them: an image is read before the question, by a causal model
that cannot know the skill there, and a question says its skill by its very words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.masses import MassSource
from megatron_ext.earl.statistics import excess_information, permuted_labels

_PERMUTATIONS = 100


def with_spans(clusters: ExpertClusters, masses: Mapping[str, MassSource], skill_N: Sequence[str], template_N: Sequence[str]) -> ExpertClusters:
    """The clusters with `span_information`. `masses`: those of each span by its name, nan for a prompt that has no such span; a span that prompts of fewer
    than two skills have is left out. One layer of a span is in memory at a time."""
    found = {}
    for span, mass in masses.items():
        has_N = np.isfinite(mass.layers(0, 1)).all(axis=(1, 2))
        (skills, label_N), (_, stratum_N) = (np.unique(np.array(names)[has_N], return_inverse=True) for names in (skill_N, template_N))
        if len(skills) > 1:
            permuted_RN = permuted_labels(label_N, stratum_N, _PERMUTATIONS, np.random.default_rng(clusters.seed))
            bits = [excess_information(mass.layers(layer, layer + 1)[has_N], label_N, permuted_RN, len(skills)) for layer in range(mass.shape[1])]
            found[span] = np.concatenate(bits)
    return replace(clusters, span_information=found)
