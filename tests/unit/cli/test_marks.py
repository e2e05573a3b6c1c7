"""Which settings decide the result of a stage, and what a changed one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.cli.marks import Mark, differences, read_mark, settings_of
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import STAGES, needs, recipe, sections
from megatron_ext.config.load import load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def mark(*overrides: str, stage: str = "sft", inputs: dict[str, str] | None = None) -> Mark:
    config = load_config(None, overrides).config
    return Mark(stage, settings_of(config, sections(STAGES[stage], config)), inputs or {}, "now")


@pytest.mark.parametrize(
    ("override", "first_affected"),
    [
        ("seed=1", "tokenizer"),
        ("data.level=1", "tokenizer"),
        ("model.hidden_size=128", "pretrain"),
        ("pretrain.steps=70", "pretrain"),
        ("sft.optimizer.lr=1e-4", "sft"),
        ("discover.min_lift=2", "discover"),
        ("rollout.temperature=0.7", "discover"),
        ("evaluate.samples=4", "evaluate-sft"),
        ("rl.steps=70", "rl"),
        ("earl.bonus=0.1", "rl"),
    ],
)
def test_a_changed_value_changes_its_stage_and_no_earlier_one(override: str, first_affected: str) -> None:
    changed = [name for name in STAGES if mark(stage=name).fingerprint != mark(override, stage=name).fingerprint]
    assert changed[0] == first_affected
    assert "evaluate-rl" in changed


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "output_dir=/tmp",
        "sft.log_every=1",
        "sft.save_every=5",
        "sft.async_save=false",
        "parallel.num_ranks=2",
        "rl.fleet=local",
        "rollout.replicas=1",
        "model.experts_kernel=in_place",
    ],
)
def test_how_a_stage_is_run_does_not_change_what_it_is(override: str) -> None:
    assert all(mark(stage=name).fingerprint == mark(override, stage=name).fingerprint for name in STAGES)


def test_neither_how_a_step_is_cut_nor_where_the_index_of_shards_lies_changes_what_is_learnt() -> None:
    shards = ["data.kind=webdataset", "data.path=shards"]
    cut = ["sft.packed=true", "sft.micro_batch_tokens=256", "data.index=elsewhere"]
    assert all(mark(*shards, stage=name).fingerprint == mark(*shards, *cut, stage=name).fingerprint for name in STAGES)


def test_what_changed_is_said_in_words() -> None:
    old, new = mark(inputs={"pretrain": "monday"}), mark("sft.steps=70", "seed=3", inputs={"pretrain": "tuesday"})
    assert differences(old, new) == ["seed was 0, is now 3", "sft.steps was 100, is now 70", "pretrain was run again since"]
    assert differences(old, old) == []


def test_a_mark_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = mark("sft.optimizer.lr=1e-5")
    written.write(tmp_path, "done.json")
    assert read_mark(tmp_path / "done.json") == written
    assert read_mark(tmp_path / "absent.json") is None
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_mark(tmp_path / "done.json")


def test_a_recipe_runs_what_its_last_stage_needs_in_order() -> None:
    names = [stage.name for stage in recipe(None, RunConfig())]
    assert names == ["tokenizer", "pretrain", "sft", "discover", "evaluate-sft", "rl", "evaluate-rl"]
    assert [stage.name for stage in recipe("discover", RunConfig())] == ["tokenizer", "pretrain", "sft", "discover"]
    with pytest.raises(UserError, match="did you mean pretrain"):
        recipe("pretain", RunConfig())


def test_a_given_checkpoint_stands_in_for_the_stages_that_would_have_made_it() -> None:
    config = load_config(None, ["rl.init_from=some/checkpoint"]).config
    assert [stage.name for stage in recipe("rl", config)] == ["tokenizer", "discover", "rl"]
    assert needs(STAGES["sft"], load_config(None, ["sft.init_from=x"]).config) == ("tokenizer",)
    assert "model" in sections(STAGES["rl"], config)


def test_the_tokenizer_depends_on_the_model_only_for_its_memory_tokens() -> None:
    assert sections(STAGES["tokenizer"], RunConfig()) == ("data", "seed")
    assert differences(mark(stage="tokenizer"), mark("model.clvr.gate=tanh_gate", stage="tokenizer")) == []
    four, eight = (("model.clvr.inject=slots", *more) for more in ((), ("model.clvr.num_slots=8",)))
    assert differences(mark(*four, stage="tokenizer"), mark(*eight, stage="tokenizer")) == ["model.clvr.num_slots was 4, is now 8"]


def test_what_follows_preferences_starts_from_their_result_and_without_steps_there_are_none() -> None:
    config = load_config(None, ["mpo.steps=5"]).config
    names = [stage.name for stage in recipe(None, config)]
    assert names == ["tokenizer", "pretrain", "sft", "mpo", "discover", "evaluate-sft", "rl", "evaluate-rl"]
    assert RunFolder(Path("runs/tiny")).start_of_rl(config) == Path("runs/tiny/mpo/checkpoints")
    assert {"mpo", "sft"} <= set(sections(STAGES["rl"], config)) and "mpo" not in sections(STAGES["rl"], RunConfig())
    assert needs(STAGES["mpo"], load_config(None, ["mpo.steps=5", "mpo.init_from=x"]).config) == ("tokenizer",)
    with pytest.raises(UserError, match=r"mpo\.steps: is 0"):
        recipe("mpo", RunConfig())
