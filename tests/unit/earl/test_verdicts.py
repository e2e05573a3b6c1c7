"""The gates of discovery, one after the other, and what each says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.selection import Significance
from megatron_ext.earl.statistics import Effects
from megatron_ext.earl.verdicts import Evidence, praise, verdict

CONFIG = DiscoverConfig(committee_top=1)


def evidence() -> Evidence:
    """Two skills, one layer, three experts: expert 1 is skill 0's and passes everything."""
    table = np.array([[[0.3, 0.5, 0.2]], [[0.6, 0.1, 0.3]]])
    mine = np.array([[[False, True, False]], [[False, False, False]]])
    found = Effects(mean_mass_XLE=table, risk_difference_XLE=table - table[::-1], lift_XLE=2 * table / table.sum(axis=0), z_XLE=20 * (table - table[::-1]))
    return Evidence(
        found=found,
        significance=Significance(mine, np.where(mine, 0.001, 1.0), 4.0),
        strong_XLE=mine,
        chosen_XLE=mine,
        jaccard_X=np.array([0.9, 0.0]),
        frequency_XLE=np.where(mine, 0.95, 0.0),
        transfer_X=[0.9, 0.5],
        count_X=np.array([40, 40]),
    )


def test_what_passes_every_gate_is_ok():
    judged = verdict(evidence(), 0, CONFIG)
    assert (judged.status, judged.pairs_LE.tolist()) == ("ok", [[False, True, False]])
    assert praise(judged, judged.pairs_LE, CONFIG) == "1 experts pass every test"
    assert verdict(evidence(), 1, CONFIG).reason == "no expert passes the permutation test: the largest z is 6.00, 4.00 is needed"


def test_a_cluster_that_does_not_work_on_other_templates_is_refused_and_says_how_badly():
    weak = replace(evidence(), transfer_X=[0.71, None])
    judged = verdict(weak, 0, CONFIG)
    assert judged.status == "unstable" and "with an AUROC of 0.71, 0.8 is needed" in judged.reason and judged.pairs_LE.any()
    assert verdict(weak, 0, CONFIG.model_copy(update={"transfer_auroc": 0.7})).status == "ok"
    assert verdict(replace(evidence(), transfer_X=[None, None]), 0, CONFIG).status == "ok", "no template can be left out: not asked"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"count_X": np.array([7, 40])}, "empty", "only 7 correct answers, at least 8 are needed"),
        ({"chosen_XLE": np.zeros((2, 1, 3), bool)}, "empty", "its 1 significant experts work together with those of other skills (louvain)"),
        ({"frequency_XLE": np.full((2, 1, 3), 0.6)}, "unstable", "no expert is found in 80% of the bootstraps (the best in 60%)"),
        ({"jaccard_X": np.array([0.4, 0.0])}, "unstable", "overlap by 0.40, 0.6 is needed"),
    ],
)
def test_every_other_gate_says_what_is_missing(change, status, words):
    judged = verdict(replace(evidence(), **change), 0, CONFIG.model_copy(update={"method": "louvain"}))
    assert judged.status == status and words in judged.reason
