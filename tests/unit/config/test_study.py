"""The file of a study: strict, and in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.study import as_overrides, explain_study, load_study
from megatron_ext.errors import ConfigError

GOOD = """
name: one
recipe: examples/tiny.yaml
arms:
  base: {}
  more: {rl.steps: 20, rl.optimizer: {lr: 1e-3}}
baseline: base
seeds: [0, 1]
endpoint: mean@8
smallest_effect: 0.02
"""


def written(folder: Path, text: str = GOOD) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_every_arm_is_compared_with_the_baseline_unless_hypotheses_are_given(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert load_study(path).config.pairs == (("more", "base"),)
    assert load_study(path, ["hypotheses=[[base, more]]"]).config.pairs == (("base", "more"),)


def test_the_command_line_changes_fields_shared_values_and_arms(tmp_path: Path) -> None:
    study = load_study(written(tmp_path), ["seeds=[3]", "overrides.rl.steps=4", "arms.more.rl.steps=5", "arms.third.earl.bonus=0"])
    config = study.config
    assert config.seeds == (3,) and config.overrides == {"rl.steps": 4}
    assert config.arms["more"] == {"rl.steps": 5, "rl.optimizer": {"lr": 1e-3}} and config.arms["third"] == {"earl.bonus": 0}
    assert study.origins["seeds"] == "command line" and study.origins["endpoint"].endswith("study.yaml:9") and study.origins["jobs"] == "default"


def test_what_is_explained_is_the_same_study_again(tmp_path: Path) -> None:
    study = load_study(written(tmp_path), ["arms.more.evaluate.split=val"])
    again = load_study(written(tmp_path, explain_study(study)))
    assert again.config == study.config


def test_overrides_are_typed_as_a_run_reads_them() -> None:
    typed = as_overrides({"rl.steps": 7, "sft.mix": {"qa": 1.0}, "model.clvr.taps": [[0, 1]], "name": "it's mine: yes"})
    config = load_config(None, typed).config
    assert (config.rl.steps, config.sft.mix, config.model.clvr.taps, config.name) == (7, {"qa": 1.0}, ((0, 1),), "it's mine: yes")


@pytest.mark.parametrize(
    "change, said",
    [
        (("endpoint:", "endpiont:"), "endpiont .*is not a key of a study; did you mean endpoint"),
        (("smallest_effect: 0.02", ""), "smallest_effect: is missing"),
        (("smallest_effect: 0.02", "smallest_effect: 0"), "smallest_effect .*0 must be greater than 0; Smallest difference"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "seeds .*holds 0 twice"),
        (("baseline: base", "baseline: bass"), "there is no arm 'bass'; did you mean base"),
        (("mean@8", "mean@eight"), "'mean@eight' is not an endpoint"),
        (("base: {}", "base: {seed: 3}"), "arms.base.seed .*is set by the study, run by run; leave it out: the study has seeds"),
        (("base: {}", "shared: {}"), "arms.shared .*cannot name the folder of an arm"),
        (("base: {}", "base: {rl.steps: 20, rl.optimizer: {lr: 1e-3}}"), "arms.more .*changes the same as base"),
        (("seeds: [0, 1]", "seeds: [0]\nhypotheses: [[more, base], [base, more]]"), "hypotheses.1 .*base and more are compared before"),
        (("seeds: [0, 1]", "seeds: [0]\nuntil: rl"), "until .*'rl' is not one of its values"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_a_remedy(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=said):
        load_study(written(tmp_path, GOOD.replace(*change)))


@pytest.mark.parametrize("override", ["seeds", "arms.base=1", "recipe.x=2", "=3", "seeds=[0"])
def test_what_is_no_override_is_told(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="is no override of a study"):
        load_study(written(tmp_path), [override])
