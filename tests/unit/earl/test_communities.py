"""Other methods than topm: clusters are those of experts that work together, and no method makes more of noise than the test lets through."""

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.clusters import discover
from megatron_ext.earl.communities import coactivation, membership

METHODS = ("nmf", "spectral", "louvain")
QUICK = DiscoverConfig(committee_top=4, permutations=100, bootstraps=20)


def two_teams(seed: int = 0, num_prompts: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contrast of six experts: 0, 2, 4 work together in prompts of skill 0, 1, 3, 5 in those of skill 1. Templates shift everybody."""
    rng = np.random.default_rng(seed)
    label_N, stratum_N = np.arange(num_prompts) % 2, np.arange(num_prompts) // 2 % 3
    contrast_NS = rng.normal(scale=0.3, size=(num_prompts, 6)) + stratum_N[:, None]
    contrast_NS[:, ::2] += (label_N == 0)[:, None]
    contrast_NS[:, 1::2] += (label_N == 1)[:, None]
    return contrast_NS, label_N, stratum_N


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_work_together_go_to_one_skill(method):
    contrast_NS, label_N, stratum_N = two_teams()
    mine_XS = membership(contrast_NS, label_N, stratum_N, 2, method, seed=0)
    assert mine_XS.tolist() == [[True, False] * 3, [False, True] * 3]
    assert membership(contrast_NS[:, :1], label_N, stratum_N, 2, method, seed=0).tolist() == [[True], [False]], "one expert is a community"
    assert membership(contrast_NS[:, :0], label_N, stratum_N, 2, method, seed=0).shape == (2, 0)


def test_the_graph_joins_what_is_active_together_and_not_what_a_template_moves():
    contrast_NS, _, stratum_N = two_teams()
    centred_NS = contrast_NS - np.stack([contrast_NS[stratum_N == template].mean(axis=0) for template in range(3)])[stratum_N]
    weight_SS = coactivation(centred_NS / centred_NS.std(axis=0))
    assert (weight_SS[::2, 1::2] == 0).all() and (np.diag(weight_SS) == 0).all()
    assert (weight_SS[::2, ::2] + np.eye(3) > 0.5).all() and (weight_SS == weight_SS.T).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_planted_clusters_and_depends_on_neither_order_nor_names(planted_prompts, method):
    mass, skills, templates, planted = planted_prompts(0)
    config = QUICK.model_copy(update={"method": method})
    order, names = np.random.default_rng(0).permutation(len(skills)), {"ocr": "b", "count": "d", "colour": "a", "spatial": "c"}
    one = discover(mass, skills, templates, config, seed=2)
    other = discover(mass[order], [names[skills[row]] for row in order], [templates[row] for row in order], config, seed=2)
    for found in one.skills:
        twin = next(twin for twin in other.skills if twin.skill == names[found.skill])
        assert set(one.pairs(found.skill)) == planted[found.skill]
        assert (twin.status, twin.reason, twin.jaccard, other.pairs(twin.skill)) == (found.status, found.reason, found.jaccard, one.pairs(found.skill))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_expert_serves_two_skills(method, seed):
    """Expert 0 works in both, where topm would give it to both."""
    contrast_NS, label_N, stratum_N = two_teams(seed)
    contrast_NS[:, 0] = contrast_NS[:, 2] + contrast_NS[:, 1]
    assert (membership(contrast_NS, label_N, stratum_N, 2, method, seed=0).sum(axis=0) == 1).all()
