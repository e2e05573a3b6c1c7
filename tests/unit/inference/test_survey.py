"""The survey's tables: one row an answer, masses that sum to one, the answer's positions and nobody else's; answers wait for them as bytes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.batch import gate_mass
from megatron_ext.config.schema import DiscoverConfig, RolloutConfig, RunConfig
from megatron_ext.earl.masses import MassFile
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.survey import Correct, packed, survey_table, unpacked, write_tables
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, Words, small_config, small_prompts


@pytest.fixture
def answers(context: ParallelContext) -> list[Correct]:
    engine = Engine(build_model(small_config(), IMAGE, context, seed=5), context, Words(), RolloutConfig(max_new_tokens=6))
    return [Correct.of(rollout) for rollout in engine.generate(small_prompts(9), 1, seeds=lambda index, _: index, version=0)]


def masses(folder: Path, *spans: str) -> dict[str, np.ndarray]:
    return {name: MassFile(folder / f"{name}.npy").layers(0, 3) for name in ("mass", "prompt_mass", "control", *spans)}


def test_rows_come_in_the_order_of_their_keys_whatever_rank_answered_and_however_many_layers_fit(
    answers: list[Correct], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(model=small_config())
    shuffled = unpacked(packed(random.Random(0).sample(answers, len(answers))))
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    labels = write_tables(lambda: iter(answers), config, IMAGE, tmp_path / "one")
    monkeypatch.setattr("megatron_ext.inference.survey.TOKEN_TABLE_BYTES", 1)
    again = write_tables(lambda: iter(shuffled), config, IMAGE, tmp_path / "other")
    assert labels["key_N"].tolist() == sorted(answer.key for answer in answers) == again["key_N"].tolist()
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    first = min(range(len(answers)), key=lambda index: answers[index].key)
    for name, mass_NLE in masses(tmp_path / "one").items():
        assert mass_NLE.shape == (9, 3, 8), name
        np.testing.assert_allclose(mass_NLE.sum(-1), 1, atol=2e-3)
    routes, (start, stop) = answers[first].routes, answers[first].rows
    np.testing.assert_array_equal(masses(tmp_path / "one")["mass"][0], gate_mass(routes, 8, start, stop))
    np.testing.assert_array_equal(masses(tmp_path / "one")["prompt_mass"][0], gate_mass(routes, 8, 0, start))
    plain = survey_table(answers, config, IMAGE)
    for name, mass_NLE in masses(tmp_path / "one", "image_mass", "question_mass").items():
        np.testing.assert_array_equal(mass_NLE, plain[f"{name}_NLE"])
    for name, values in labels.items():
        assert values.tolist() == plain[name].tolist()


def test_masses_may_be_stored_in_two_bytes(answers: list[Correct], tmp_path: Path) -> None:
    config = RunConfig(model=small_config(), discover=DiscoverConfig(survey_dtype="float16"))
    write_tables(lambda: iter(answers), config, IMAGE, tmp_path)
    assert np.load(tmp_path / "mass.npy").dtype == np.float16
    np.testing.assert_allclose(masses(tmp_path)["mass"].sum(-1), 1, atol=3e-3)


def test_image_and_question_are_logged_apart_from_each_other_and_from_the_answer(context: ParallelContext) -> None:
    """The prompt's mass is the mean of both over their tokens; its last position is the answer's. A prompt without an image has no mass there."""
    engine = Engine(build_model(small_config(), IMAGE, context, seed=5), context, Words(), RolloutConfig(max_new_tokens=3))
    rollouts = engine.generate(small_prompts(3), 1, seeds=lambda index, _: index, version=0)
    table = survey_table([Correct.of(rollout) for rollout in rollouts], RunConfig(model=small_config()), IMAGE)
    for row, rollout in enumerate(rollouts):
        tokens = rollout.prompt.tokens_S[:-1]
        images, texts = int((tokens == IMAGE).sum()), int((tokens != IMAGE).sum())
        image, question, prompt = (table[f"{name}_mass_NLE"][row] for name in ("image", "question", "prompt"))
        assert np.isnan(image).all() == (images == 0)
        np.testing.assert_allclose((images * np.nan_to_num(image) + texts * question) / (images + texts), prompt, atol=1e-12)
    first = rollouts[0]
    np.testing.assert_allclose(table["image_mass_NLE"][0], gate_mass(first.routes, 8, 1, 5), atol=1e-12)
