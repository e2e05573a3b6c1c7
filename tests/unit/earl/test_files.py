"""What is written is what is read; what is not ours is refused by the name of the field."""

import json

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig, ModelConfig
from megatron_ext.earl.clusters import discover
from megatron_ext.earl.files import read_clusters, write_clusters
from megatron_ext.errors import UserError

MODEL = ModelConfig(num_layers=3, num_experts=10)


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
