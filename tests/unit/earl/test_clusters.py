"""Discovery finds what is there, finds nothing where there is nothing, and does not depend on what does not matter."""

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.clusters import discover, heat_map_table
from megatron_ext.earl.selection import standing_committee
from megatron_ext.errors import UserError

QUICK = DiscoverConfig(committee_top=4, permutations=300, bootstraps=40)


def pairs_of(clusters):
    return {found.skill: set(clusters.pairs(found.skill)) for found in clusters.skills}


def test_planted_clusters_are_found_exactly(planted_prompts):
    mass, skills, templates, planted = planted_prompts(0)
    clusters = discover(mass, skills, templates, QUICK, seed=1)
    assert pairs_of(clusters) == planted
    for found in clusters.skills:
        assert (found.status, found.num_prompts, found.uncontrolled_pairs) == ("ok", 40, None)
        assert found.auroc > 0.95 and found.transfer_auroc > 0.9 and found.jaccard > 0.9
        assert all(pair.risk_difference > 0.02 and pair.lift > 1.5 and pair.p <= 0.05 and pair.bootstrap_frequency >= 0.8 for pair in found.pairs)
    assert clusters.information_L[0] > 0.1 and abs(clusters.information_L[1]) < 0.01
    assert heat_map_table(clusters).shape == (4, 30)
    assert heat_map_table(clusters)[0].argmax() == clusters.risk_difference_XLE[0].argmax()


def test_benjamini_hochberg_lets_more_through_and_nothing_where_nothing_is(planted_prompts):
    mass, skills, templates, _ = planted_prompts(8, boost=1.0)
    config = QUICK.model_copy(update={"correction": "bh", "permutations": 999})
    strict, lenient = (discover(mass, skills, templates, config.model_copy(update={"correction": name}), seed=0) for name in ("fwer", "bh"))
    assert lenient.critical_z < strict.critical_z
    assert sum(map(len, pairs_of(lenient).values())) >= sum(map(len, pairs_of(strict).values())) > 0
    assert all(pair.p <= 0.05 for found in lenient.skills for pair in found.pairs)
    mass[:, 1] = mass[:, 0] = mass[:, 2] = np.random.default_rng(0).dirichlet(np.ones(10), len(mass))
    nothing = discover(mass, skills, templates, config, seed=0)
    assert nothing.critical_z is None and not any(pairs_of(nothing).values())


def test_effects_are_told_with_and_without_token_control(planted_prompts):
    mass, skills, templates, _ = planted_prompts(0)
    plain = discover(mass, skills, templates, QUICK, seed=1).skills[0].pairs[0]
    assert (plain.uncontrolled_risk_difference, plain.uncontrolled_z) == (plain.risk_difference, plain.z)
    assert (plain.controlled_log_odds, plain.controlled_npmi) == (plain.log_odds, plain.npmi) and plain.log_odds > 0.5 and plain.npmi > 0.1
    words = 0.5 * mass + 0.05
    half = discover(mass, skills, templates, QUICK, seed=1, control_NLE=words).skills[0].pairs[0]
    assert half.risk_difference == pytest.approx(half.uncontrolled_risk_difference / 2)
    assert (half.log_odds, half.npmi) == (plain.log_odds, plain.npmi) and 0 < half.controlled_log_odds < half.log_odds


def test_a_cluster_of_one_template_is_refused(planted_prompts):
    """Skills prefer their experts in template t0 only: without it nothing is found, and on it nothing was learned."""
    mass, skills, templates, _ = planted_prompts(0, num_prompts=320, boost=0.0)
    logits = np.log(mass)
    for row, skill in enumerate(skills):
        logits[row, 0, 2 * sorted(set(skills)).index(skill)] += 4.0 * (templates[row] == "t0")
    mass = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    lenient = QUICK.model_copy(update={"min_lift": 1.2, "stability_jaccard": 0.0})
    found = discover(mass, skills, templates, lenient, seed=0).skills
    assert {skill.status for skill in found} == {"unstable"} and all("templates that it was not found on" in skill.reason for skill in found)
    assert {skill.status for skill in discover(mass, skills, templates, lenient.model_copy(update={"transfer_auroc": 0.0}), seed=0).skills} == {"ok"}


def test_shuffled_labels_give_no_cluster_in_at_least_95_percent_of_runs(planted_prompts):
    """Without the demands on effect size and stability, so that the permutation test alone must hold the rate."""
    lenient = QUICK.model_copy(
        update={"min_risk_difference": 0.0, "min_lift": 0.0, "bootstraps": 1, "bootstrap_frequency": 0.0, "stability_jaccard": 0.0, "permutations": 199}
    )
    mass, skills, templates, _ = planted_prompts(3, num_prompts=96)
    found = 0
    for run in range(100):
        shuffled = np.random.default_rng(run).permutation(skills).tolist()
        found += any(pairs_of(discover(mass, shuffled, templates, lenient, seed=run)).values())
    assert found <= 10, f"{found} of 100 runs found a cluster in noise (5 expected, more than 10 has a chance of 1 %)"


def test_with_every_demand_noise_never_becomes_a_cluster(planted_prompts):
    mass, skills, templates, _ = planted_prompts(4)
    for run in range(10):
        clusters = discover(mass, np.random.default_rng(run).permutation(skills).tolist(), templates, QUICK, seed=run)
        assert not any(pairs_of(clusters).values())
        assert all(found.status in ("empty", "unstable") and found.reason for found in clusters.skills)


def test_the_order_of_prompts_does_not_matter(planted_prompts):
    mass, skills, templates, _ = planted_prompts(5, boost=1.0)
    order = np.random.default_rng(0).permutation(len(skills))
    one = discover(mass, skills, templates, QUICK, seed=2)
    other = discover(mass[order], [skills[row] for row in order], [templates[row] for row in order], QUICK, seed=2)
    assert one.skills == other.skills
    np.testing.assert_array_equal(one.risk_difference_XLE, other.risk_difference_XLE)
    np.testing.assert_array_equal(one.information_L, other.information_L)


def test_renaming_skills_renames_clusters_and_changes_nothing_else(planted_prompts):
    mass, skills, templates, _ = planted_prompts(6, boost=1.0)
    names = {"ocr": "b", "count": "d", "colour": "a", "spatial": "c"}
    one = discover(mass, skills, templates, QUICK, seed=2)
    other = discover(mass, [names[skill] for skill in skills], templates, QUICK, seed=2)
    renamed = {found.skill: found for found in other.skills}
    for index, found in enumerate(one.skills):
        twin = renamed[names[found.skill]]
        assert (twin.status, twin.reason, twin.jaccard) == (found.status, found.reason, found.jaccard)
        assert [(pair.layer, pair.expert, pair.bootstrap_frequency) for pair in twin.pairs] == [
            (pair.layer, pair.expert, pair.bootstrap_frequency) for pair in found.pairs
        ]
        np.testing.assert_allclose(other.risk_difference_XLE[other.skills.index(twin)], one.risk_difference_XLE[index], atol=1e-12)


def test_the_same_seed_gives_the_same_clusters_and_inputs_are_left_alone(planted_prompts):
    mass, skills, templates, _ = planted_prompts(7)
    before = mass.copy()
    assert discover(mass, skills, templates, QUICK, seed=3).skills == discover(mass, skills, templates, QUICK, seed=3).skills
    np.testing.assert_array_equal(mass, before)


def test_a_standing_committee_joins_no_cluster():
    mean_mass_XLE = np.array([[[0.5, 0.3, 0.2]], [[0.4, 0.1, 0.5]]])
    assert standing_committee(mean_mass_XLE, 2).tolist() == [[True, False, False]]
    assert not standing_committee(mean_mass_XLE, 0).any()


def test_a_committee_as_large_as_the_model_is_a_users_mistake(planted_prompts):
    mass, skills, templates, _ = planted_prompts(0, num_prompts=40)
    with pytest.raises(UserError, match=r"discover.committee_top: 10 is not below model.num_experts = 10.*use at most 9"):
        discover(mass, skills, templates, QUICK.model_copy(update={"committee_top": 10}), seed=0)


def test_too_few_permutations_and_a_single_skill_are_users_mistakes(planted_prompts):
    mass, skills, templates, _ = planted_prompts(0, num_prompts=40)
    with pytest.raises(UserError, match=r"discover.permutations: 18 permutations cannot reach discover.fwer = 0.05; use at least 19"):
        discover(mass, skills, templates, QUICK.model_copy(update={"permutations": 18}), seed=0)
    with pytest.raises(UserError, match="at least two skills are needed to compare, found: ocr"):
        discover(mass, ["ocr"] * 40, templates, QUICK, seed=0)


def test_at_most_k_experts_of_a_layer_and_at_most_max_layers(planted_prompts):
    mass, skills, templates, planted = planted_prompts(0)
    clusters = discover(mass, skills, templates, QUICK.model_copy(update={"experts_per_layer": 1, "max_layers": 1}), seed=1)
    for skill, pairs in pairs_of(clusters).items():
        assert len(pairs) == 1 and pairs < planted[skill]
        assert "3 beyond 1 a layer and 1 layers" in next(found.reason for found in clusters.skills if found.skill == skill)


def test_an_effect_that_is_significant_but_small_is_refused_in_words(planted_prompts):
    mass, skills, templates, _ = planted_prompts(0)
    clusters = discover(mass, skills, templates, QUICK.model_copy(update={"min_lift": 9.0}), seed=1)
    assert {found.status for found in clusters.skills} == {"empty"}
    assert "significant but none is specific enough" in clusters.skills[0].reason and "(9.0 is needed)" in clusters.skills[0].reason


def test_a_skill_with_few_answers_or_with_templates_of_its_own_gets_no_cluster_and_says_why(planted_prompts):
    mass, skills, templates, _ = planted_prompts(0)
    few = [row for row, skill in enumerate(skills) if skill != "ocr"] + [row for row, skill in enumerate(skills) if skill == "ocr"][:5]
    own = ["own" if skills[row] == "count" else templates[row] for row in few]
    clusters = {found.skill: found for found in discover(mass[few], [skills[row] for row in few], own, QUICK, seed=1).skills}
    assert clusters["ocr"].reason == "only 5 correct answers, at least 8 are needed"
    assert clusters["count"].reason == "no other skill shares its templates, so it cannot be told from them"
    assert (clusters["ocr"].status, clusters["count"].status, clusters["colour"].status) == ("empty", "empty", "ok")
    assert clusters["ocr"].sigma is None and clusters["ocr"].pairs == ()


def test_an_effect_of_few_prompts_is_unstable(planted_prompts):
    """Eight of 40 prompts carry the whole effect: significant, but resamples do not find it again."""
    mass, skills, templates, _ = planted_prompts(1, boost=0.0)
    for row in [row for row, skill in enumerate(skills) if skill == "ocr"][:8]:
        mass[row, 0] = np.eye(10)[3]
    demanding = QUICK.model_copy(update={"bootstrap_frequency": 0.99, "min_lift": 1.0})
    ocr = next(found for found in discover(mass, skills, templates, demanding, seed=0).skills if found.skill == "ocr")
    assert ocr.status == "unstable" and "bootstraps" in ocr.reason
    assert ocr.pairs and not discover(mass, skills, templates, demanding, seed=0).mask("ocr").any()


def test_token_control_removes_what_the_words_explain_and_reports_both(planted_prompts):
    mass, skills, templates, planted = planted_prompts(2)
    words = np.full_like(mass, 0.1)
    for skill in ("ocr", "count"):  # all that these two skills prefer is explained by their words
        rows = [row for row, name in enumerate(skills) if name == skill]
        words[rows] = mass[rows].mean(axis=0)
    clusters = discover(mass, skills, templates, QUICK, seed=0, control_NLE=words)
    by_name = {found.skill: found for found in clusters.skills}
    assert by_name["ocr"].status == "empty" and set(by_name["ocr"].uncontrolled_pairs) == planted["ocr"]
    assert pairs_of(clusters)["colour"] == planted["colour"]


def test_malformed_masses_are_refused():
    with pytest.raises(ValueError, match="negative or non-finite"):
        discover(np.full((4, 1, 6), np.nan), ["a", "b"] * 2, ["t"] * 4, QUICK, seed=0)


def test_a_large_model_without_structure_has_no_clusters():
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.ones(128), size=(600, 48)).astype(np.float32)
    clusters = discover(mass, ["a", "b", "c", "d", "e"] * 120, ["t"] * 600, DiscoverConfig(bootstraps=20), seed=0)
    assert [found.status for found in clusters.skills] == ["empty"] * 5
