"""Reading a configuration: layers, origins, and every kind of mistake in one message."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.config.algorithms import ALGORITHMS
from megatron_ext.config.load import explain, load_config
from megatron_ext.config.presets import PRESETS
from megatron_ext.config.schema import RLConfig, RunConfig, TrainConfig
from megatron_ext.config.yaml_tree import dump_inline, parse_scalar
from megatron_ext.errors import ConfigError, UserError


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def problems(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_every_value_knows_where_it_came_from(write) -> None:
    path = write("name: mine\nrl:\n  steps: 7\n")
    resolved = load_config(path, ["rl.micro_batch=32"])
    assert (resolved.config.name, resolved.config.rl.steps, resolved.config.rl.micro_batch) == ("mine", 7, 32)
    assert resolved.origins["name"] == f"{path}:1"
    assert resolved.origins["rl.steps"] == f"{path}:3"
    assert resolved.origins["rl.micro_batch"] == "command line"
    assert resolved.origins["discover.committee_top"] == "preset tiny"
    assert resolved.origins["seed"] == "default"


def test_one_value_of_a_section_does_not_reset_its_other_values(write) -> None:
    """rl.optimizer has a learning rate of its own; naming another field of it must not bring back the one of supervised training."""
    config = load_config(write("rl:\n  optimizer:\n    clip_grad: 0.5\n")).config
    assert config.rl.optimizer.lr == RunConfig().rl.optimizer.lr == 3e-4
    assert config.rl.optimizer.clip_grad == 0.5


def test_a_file_replaces_a_whole_mix_and_an_override_changes_one_weight(write) -> None:
    path = write("rl:\n  mix: {qa: 3.0}\n")
    assert load_config(path).config.rl.mix == {"qa": 3.0}
    assert load_config(path, ["rl.mix.composite=1"]).config.rl.mix == {"qa": 3.0, "composite": 1.0}
    assert load_config(None, ["rl.mix.qa=0"]).config.rl.mix == {"qa": 0.0, "composite": 1.0}


def test_a_preset_brings_its_numbers_and_the_file_overrides_them(write) -> None:
    path = write("model:\n  preset: internvl3_5_30b_a3b\n  num_layers: 40\n")
    resolved = load_config(path)
    assert (resolved.config.model.num_layers, resolved.config.model.num_experts) == (40, 128)
    assert resolved.config.data.image_size == resolved.config.model.vision.image_size == 448
    assert resolved.origins["model.num_experts"] == "preset internvl3_5_30b_a3b"
    assert load_config(path, ["model.preset=tiny"]).config.model.num_experts == 8, "the command line picks the preset"


def test_an_algorithm_brings_its_parts_explain_shows_them_and_each_can_be_overridden(write) -> None:
    path = write("rl:\n  algorithm: gspo\n  clip_high: 0.2\n")
    resolved = load_config(path, ["rl.advantage=rloo"])
    rl = resolved.config.rl
    assert (rl.surrogate, rl.aggregation, rl.clip_low, rl.clip_high, rl.advantage) == ("gspo", "seq_mean_token_mean", 3e-4, 0.2, "rloo")
    origins = [resolved.origins[f"rl.{part}"] for part in ("algorithm", "surrogate", "clip_low", "clip_high", "advantage", "kl_estimator")]
    assert origins == [f"{path}:2", "algorithm gspo", "algorithm gspo", f"{path}:3", "command line", "default"]
    assert re.search(r"^  surrogate: gspo +# algorithm gspo$", explain(resolved), re.MULTILINE)
    assert load_config(path, ["rl.algorithm=dapo"]).config.rl.surrogate == "clip", "the command line picks the algorithm"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_valid_and_is_its_parts(algorithm: str) -> None:
    assert load_config(None, [f"rl.algorithm={algorithm}"]).config.rl == RLConfig(algorithm=algorithm, **ALGORITHMS[algorithm])


def test_an_algorithm_that_does_not_exist_is_refused_with_those_that_do() -> None:
    (problem,) = problems(None, "rl.algorithm=gsop")
    assert "rl.algorithm (command line)" in problem and "gspo" in problem


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset: str) -> None:
    assert load_config(None, [f"model.preset={preset}"]).config.model.preset == preset


@pytest.mark.parametrize("path", sorted(path for path in Path("examples").rglob("*.yaml") if not path.stem.endswith("_study")))
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", ".0003", "0.0003"])
def test_numbers_are_read_as_people_write_them(write, text: str) -> None:
    assert load_config(write(f"sft:\n  optimizer: {{lr: {text}}}\n")).config.sft.optimizer.lr == 3e-4


@pytest.mark.parametrize("text", ["no", "012x", "1:30", "2026-01-01", "on"])
def test_words_that_yaml_1_1_would_turn_into_something_else_stay_words(write, text: str) -> None:
    assert load_config(write(f"name: {text}\n".replace("1:30", "'1:30'"))).config.name == text


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
)
@example("next\x85line")
@example(["\u2028"])
def test_a_value_written_on_one_line_is_read_back_as_it_was(value: object) -> None:
    assert parse_scalar(dump_inline(value)) == value


def test_explain_is_the_whole_configuration_and_reads_back_the_same(tmp_path: Path) -> None:
    resolved = load_config(None, ["rl.optimizer.lr=1e-5", "name='1e5'", "model.clvr.taps=[[0, 1], [1, 2]]"])
    path = tmp_path / "again.yaml"
    path.write_text(explain(resolved))
    assert load_config(path).config == resolved.config
    assert "lr: 1.0e-05" in path.read_text()
    assert re.search(r"^    taps: .*# command line$", path.read_text(), re.MULTILINE)
    assert yaml.safe_load(path.read_text())["rl"]["optimizer"]["lr"] == 1e-5  # any other YAML reader agrees


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("model.hiden_size=3", "did you mean model.hidden_size?"),
        ("modle.hidden_size=3", "did you mean model.hidden_size?"),
        ("sft.lr=1e-3", "did you mean sft.optimizer.lr?"),
        ("rl.optimizer.learning=1", "did you mean"),
        ("nonsense=1", "`--explain` prints every key"),
        ("rl.steps.more=1", "did you mean rl.steps?"),
    ],
)
def test_an_unknown_key_is_answered_with_what_was_probably_meant(override: str, remedy: str) -> None:
    (problem,) = problems(None, override)
    assert "is not a key of the configuration" in problem
    assert remedy in problem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.steps='60'", "rl.steps (command line): '60' is not a whole number"),
        ("rl.steps=1.5", "rl.steps (command line): 1.5 is not a whole number"),
        ("rl.steps=true", "rl.steps (command line): True is not a whole number"),
        ("rl.steps=-1", "rl.steps (command line): -1 must be at least 0"),
        ("rollout.top_p=2", "rollout.top_p (command line): 2 must be at most 1"),
        ("earl.enabled=yes", "earl.enabled (command line): 'yes' is not true or false; write true or false"),
        ("earl.bonus=.nan", "earl.bonus (command line): nan"),
        ("sft.optimizer.lr=.inf", "sft.optimizer.lr (command line): inf is not a finite number"),
        ("data.kind=josnl", "data.kind (command line): 'josnl' is not one of its values; use 'suite', 'jsonl', 'webdataset' or 'blend'"),
        ("rl.reward=3", "rl.reward (command line): 3 is not text"),
        ("data.path=3", "data.path (command line): 3 is not text"),
        ("model.clvr.taps=[[1]]", "model.clvr.taps.0 (command line): [1] has the wrong number of elements"),
        ("model.clvr.taps=1", "model.clvr.taps (command line): 1 is not a list"),
        ("sft.mix=1", "sft.mix (command line): 1 is not a mapping"),
        ("model=3", "model (command line): is a section, but a value stands there: 3"),
        ("model.preset=tyni", "model.preset (command line): there is no preset 'tyni'; did you mean tiny?"),
        ("rl.steps", "rl.steps (command line): is not an override"),
        ("rl.mix={", "rl.mix (command line): cannot read the value '{'"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_what_would_work(override: str, message: str) -> None:
    found = problems(None, override)
    assert found[0].startswith(message)
    assert all("; " in problem for problem in found), "every problem carries a remedy"


def test_the_line_of_a_wrong_value_is_named(write) -> None:
    path = write("# my run\nrl:\n  steps: many\n")
    assert problems(path) == [f"rl.steps ({path}:3): 'many' is not a whole number; write it without quotes, for example 4"]


def test_all_problems_are_reported_at_once(write) -> None:
    path = write("sft:\n  lr: 1\nrl:\n  steps: many\nmodle:\n  x: 1\n")
    found = problems(path, "rollout.top_p=2", "zzz=1")
    assert [text.split(" ")[0] for text in found] == ["sft.lr", "modle", "zzz", "rollout.top_p", "rl.steps"]


def test_rules_of_others_are_reported_beside_ours_with_their_origin(write) -> None:
    path = write("parallel:\n  tp: 3\nmodel:\n  vision:\n    patch_size: 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, checks=[lambda config: [UserError("parallel.tp", f"{config.parallel.tp} is odd", "use 2")]])
    assert [str(problem).split(":")[0] for problem in caught.value.problems] == [f"model.vision.patch_size ({path}", f"parallel.tp ({path}"]


def test_the_same_value_twice_is_an_error_not_a_silent_winner(write) -> None:
    assert "is given twice" in problems(None, "rl.steps=1", "rl.steps=2")[0]
    path = write("seed: 1\nseed: 2\n")
    assert problems(path) == [f"{path}:2: `seed` stands here and before it ({path}:1); keep one of the two"]


@pytest.mark.parametrize("text", ["a: [1, 2\n", "a: b: c\n", "\t- x\n", "a: *nowhere\n", "x: !!python/object:os.system {}\n"])
def test_a_malformed_file_names_file_and_line(write, text: str) -> None:
    path = write(text)
    (problem,) = problems(path)
    assert re.match(re.escape(str(path)) + r":\d+: is not valid YAML", problem)


def test_a_file_without_keys_or_that_is_missing_is_explained(write, tmp_path: Path) -> None:
    assert "holds no `key: value` lines" in problems(write("- 1\n"))[0]
    assert "did you mean" in problems(tmp_path / "my.yml")[0]
    assert "there is no such file" in problems(tmp_path / "absent" / "x.yaml")[0]


def test_an_empty_file_and_empty_sections_are_the_defaults(write) -> None:
    assert load_config(write("")).config == load_config(write("model:\nrl:\n")).config == load_config(None).config


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, megatron_ext.config.load as load; load.explain(load.load_config(None));"
        "heavy = {'torch', 'ray', 'megatron', 'deepspeed', 'transformers', 'numpy', 'rich', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_rows_and_tokens_of_a_micro_batch_are_not_both_given(tmp_path: Path) -> None:
    """In one place it is a mistake; a budget on the command line replaces the rows of a file; what was resolved so is read back."""
    budget = ["sft.packed=true", "sft.micro_batch_tokens=256"]
    words = r"sft.micro_batch \(command line\): 8 has no effect beside sft.micro_batch_tokens = 256 \(command line\)"
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*budget, "sft.micro_batch=8"])
    path = tmp_path / "run.yaml"
    path.write_text("sft: {micro_batch: 8}\n")
    resolved = load_config(path, budget)
    assert (resolved.config.sft.micro_batch, resolved.origins["sft.micro_batch"]) == (TrainConfig().micro_batch, "default")
    path.write_text(explain(resolved))
    assert load_config(path).config == resolved.config
    with pytest.raises(ConfigError, match=r"sft\.micro_batch_tokens=0 counts rows again"):
        load_config(path, ["sft.micro_batch=8"])
