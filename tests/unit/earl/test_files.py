"""What is written is what is read; what is not ours is refused by the name of the field."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig, ModelConfig, RunConfig
from megatron_ext.earl.causal import judged
from megatron_ext.earl.causal_effect import CausalEffect
from megatron_ext.earl.clusters import discover
from megatron_ext.earl.files import read_clusters, read_paid_clusters, write_clusters
from megatron_ext.errors import UserError

MODEL = ModelConfig(num_layers=3, num_experts=10)
EFFECT = CausalEffect(40, 0.6, 0.1, 0.2, 0.3, (0.2, 0.4), (-0.2, 0.0), (-0.3, -0.1), 0.5, 0.4, 0.25, "correlational", "not surely more")


@pytest.fixture
def written(planted_prompts, tmp_path):
    mass, skills, templates, _ = planted_prompts(0)
    config = DiscoverConfig(committee_top=4, permutations=100, bootstraps=5)
    clusters = discover(mass, skills, templates, config, seed=5, control_NLE=np.full_like(mass, 0.1), checkpoint="sft/step_000100")
    path = tmp_path / "discover" / "expert_clusters.json"
    write_clusters(clusters, path)
    return clusters, path


def test_there_and_back_is_the_identity(written):
    clusters, path = written
    again = read_clusters(path, MODEL)
    assert (again.skills, again.settings, again.seed, again.checkpoint, again.critical_z) == (
        clusters.skills,
        clusters.settings,
        5,
        "sft/step_000100",
        clusters.critical_z,
    )
    for name in ("mean_mass_XLE", "risk_difference_XLE", "information_L"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clusters, name))
    assert [file.name for file in path.parent.iterdir()] == ["expert_clusters.json"]


def test_what_masking_did_and_what_other_spans_tell_come_back_too(written):
    clusters, path = written
    bits = {"image": np.array([0.0, 0.1, 0.2]), "question": np.array([0.5, 0.6, 0.7])}
    tried = judged(replace(clusters, span_information=bits), {clusters.skills[0].skill: EFFECT}, enforce=True)
    write_clusters(tried, path)
    again = read_clusters(path, MODEL)
    assert again.skills == tried.skills and again.skills[0].causal == EFFECT and again.skills[0].status == "correlational"
    assert {span: bits_L.tolist() for span, bits_L in again.span_information.items()} == {span: bits_L.tolist() for span, bits_L in bits.items()}
    with pytest.raises(UserError, match=r"span_information.image has 3 layers, model.num_layers is 4|model.num_layers"):
        read_clusters(path, ModelConfig(num_layers=4, num_experts=10))


def test_correlational_clusters_are_paid_for_only_where_that_is_asked_for(written):
    clusters, path = written
    write_clusters(judged(clusters, {}, enforce=True), path)
    run = RunConfig(model=MODEL)
    forced = run.model_copy(update={"earl": run.earl.model_copy(update={"force_correlational": True})})
    assert read_paid_clusters(path, run).sigmas() == {} and read_paid_clusters(path, forced).sigmas() == clusters.sigmas() != {}


def test_layers_are_those_with_experts(written):
    read_clusters(written[1], ModelConfig(num_layers=4, num_experts=10, dense_layers=(0,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema_version=1), "schema_version"),
        (lambda content: content.pop("seed"), "seed: Field required"),
        (lambda content: content.update(extra=1), "extra: Extra inputs"),
        (lambda content: content["model"].update(num_experts="ten"), "model.num_experts"),
        (lambda content: content["skills"][1].update(status="good"), "skills.1.status"),
        (lambda content: content["skills"][0]["pairs"][0].update(layer=1.5), "skills.0.pairs.0.layer"),
        (lambda content: content["skills"][0]["pairs"][0].update(expert=99), "skills.0.pairs names a layer or expert"),
        (lambda content: content["skills"][0].update(sigma=0), "skills.0.sigma"),
        (lambda content: content["skills"][2]["mean_mass_LE"].pop(), "skills.2.mean_mass_LE is not 3 x 10"),
        (lambda content: content["skills"][1].update(skill=content["skills"][0]["skill"]), "names a skill twice"),
        (lambda content: content["information_L"].append(0.1), "information_L has 4 layers"),
        (lambda content: content["skills"][0].update(pairs=[]), "skills.0.status is ok with 0 pairs"),
        (lambda content: content["settings"].update(fwer=7), "settings.fwer"),
        (lambda content: content.update(critical_z=float("nan")), "critical_z"),
        (lambda content: content.update(span_information={"image": [0.1]}), "span_information.image has 1 layers"),
        (lambda content: content["skills"][0].pop("causal"), "skills.0.causal"),
    ],
)
def test_a_malformed_file_is_refused_by_the_name_of_the_field(written, change, message):
    path = written[1]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_clusters(path, MODEL)
    assert message in str(error.value) and "expert_clusters.json" in str(error.value) and "discover" in error.value.remedy


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_file_is_a_users_mistake(written, text):
    written[1].write_text(text)
    with pytest.raises(UserError, match=r"expert_clusters.json"):
        read_clusters(written[1], MODEL)


def test_clusters_of_another_model_are_refused_with_both_numbers(written):
    with pytest.raises(UserError, match=r"model.num_experts: the clusters are of a model with 10, this model has 8"):
        read_clusters(written[1], ModelConfig(num_layers=3, num_experts=8))
    with pytest.raises(UserError, match=r"model.num_layers: the clusters are of a model with 3, this model has 4"):
        read_clusters(written[1], ModelConfig(num_layers=4, num_experts=10))


def test_a_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(UserError, match="there is no such file; run `discover` first"):
        read_clusters(tmp_path / "none.json", MODEL)
