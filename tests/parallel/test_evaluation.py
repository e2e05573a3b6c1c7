"""Evaluation, discovery survey and single questions from a real checkpoint, on two ranks; and the engine under tensor and expert parallelism."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.data.suite import ALL_SKILLS
from megatron_ext.errors import CheckpointError, UserError
from megatron_ext.inference.ask import MOST_LIKELY, answers
from megatron_ext.inference.evaluate import Outcome, run_evaluation, summarise
from megatron_ext.inference.looks import Look
from megatron_ext.inference.survey import run_discovery_survey
from megatron_ext.observe.trace import AnswerTrace, read_traces
from megatron_ext.parallel.local import run_ranks
from tests.support.generation import Answers, answers_of_a_rank, slices_of_a_rank
from tests.support.rl_run import prepare, rl_config, save_clusters


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config = rl_config(tmp_path_factory.mktemp("run"))
    evaluate = config.evaluate.model_copy(update={"prompts_per_skill": 12, "samples": 3, "sampled_prompts_per_skill": 4})
    config = config.model_copy(update={"evaluate": evaluate, "discover": config.discover.model_copy(update={"prompts_per_skill": 10})})
    return config, prepare(config)


def test_an_evaluation_has_a_row_for_every_skill_and_writes_what_it_returns(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, checkpoint = run
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"clvr": True})})
    clusters = save_clusters(config, tmp_path / "expert_clusters.json")
    table = run_evaluation(config, checkpoint, tmp_path / "sft.json", clusters)
    assert json.loads((tmp_path / "sft.json").read_text()) == table
    assert list(table["skills"]) == list(ALL_SKILLS) and table["split"] == "test"
    for row in table["skills"].values():
        assert row["n"] == 12 and 0 <= row["greedy"] <= 1 and row["pass@3"] >= row["mean@3"] and row["blind"] is not None
    traces = [AnswerTrace.of_json(found) for found in read_traces(tmp_path / "sft" / "traces.json")]
    assert [trace.skill for trace in traces] == [skill for skill in ALL_SKILLS for _ in range(4)]
    assert all(trace.taps[0].inside_T is not None and trace.clusters["count"] for trace in traces)
    samples = [json.loads(line) for line in (tmp_path / "sft" / "samples.jsonl").read_text().splitlines()]
    assert [sample["key"] for sample in samples] == [trace.key for trace in traces]
    assert len(list((tmp_path / "sft").glob("events.*"))) == 1, "TensorBoard has their pictures"
    assert 0 < table["skills"]["count"]["cluster_mass"] < 1 and table["skills"]["composite"]["cluster_mass"] is None
    assert table["macro"]["greedy"] == pytest.approx(np.mean([row["greedy"] for row in table["skills"].values()]))
    looks = table["clvr"]
    assert looks["n"] == 12 * len(ALL_SKILLS) and len(looks["taps"]) == len(config.model.clvr.taps)
    assert 0 < looks["pointing_chance"] < 0.5 and all(0 < tap["pointing"] < 1 and 0 < tap["attention_entropy"] <= 1.001 for tap in looks["taps"])
    assert looks["zeroed_drop"] == pytest.approx(looks["greedy"] - looks["zeroed"])
    assert {skill: row["greedy"] for skill, row in looks["skills"].items()} == {skill: row["greedy"] for skill, row in table["skills"].items()}
    assert sum(row["pointing_n"] for row in looks["skills"].values()) == looks["pointing_n"] > 0


def test_two_ranks_and_one_rank_give_the_same_evaluation(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, checkpoint = run
    alone = config.model_copy(update={"rollout": config.rollout.model_copy(update={"replicas": 1})})
    assert run_evaluation(alone, checkpoint, tmp_path / "one.json") == run_evaluation(config, checkpoint, tmp_path / "two.json")


def test_ranks_that_share_experts_see_where_taps_look(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Eighteen prompts, as one rank sees them."""
    config, checkpoint = run
    few = config.evaluate.model_copy(update={"clvr": True, "prompts_per_skill": 3, "samples": 0, "blind": False})
    found = []
    for parallel in (ParallelConfig(), ParallelConfig(num_ranks=2, ep=2)):
        rollout = config.rollout.model_copy(update={"parallel": parallel, "replicas": 1})
        table = run_evaluation(config.model_copy(update={"evaluate": few, "rollout": rollout}), checkpoint, tmp_path / f"{parallel.num_ranks}.json")
        found.append(table["clvr"])
    alone, shared = found
    assert shared["n"] == 18 and shared["skills"].keys() == alone["skills"].keys()
    assert [tap["pointing"] for tap in shared["taps"]] == pytest.approx([tap["pointing"] for tap in alone["taps"]], abs=1e-4)
    assert (shared["zeroed"], shared["other"]) == (alone["zeroed"], alone["other"])


def test_a_survey_without_one_correct_answer_says_what_to_do(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """The random model never ends its answers in time."""
    with pytest.raises(UserError, match=r"none of 60 sampled answers .* was correct; fine-tune longer"):
        run_discovery_survey(*run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_question_is_answered_and_a_missing_checkpoint_is_named(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, checkpoint = run
    prompt = Prompt("ask", "none", np.array([9, 10, 11], np.int32), NO_TILES, "")
    (likely, *sampled), traces = answers(config, checkpoint, prompt, samples=2)
    assert likely.sample == MOST_LIKELY and [rollout.sample for rollout in sampled] == [0, 1] and traces == []
    with pytest.raises(CheckpointError, match="nowhere"):
        answers(config, tmp_path / "nowhere", prompt, samples=0)


def test_standard_errors_and_means_of_a_table_worked_by_hand(run: tuple[RunConfig, Path]) -> None:
    """Two of four greedy answers are right: 0.5, standard error sqrt(1/3) / 2. Sampled means are 1 and 0.5 of two prompts."""
    samples = [(True, True), (False, True), (), ()]
    outcomes = [Outcome(str(n), "ocr", n < 2, samples[n], n == 0, math.nan if n else 0.3, "", "", "") for n in range(4)]
    row = summarise(outcomes, run[0])["skills"]["ocr"]
    assert row["greedy"] == 0.5 and row["greedy_se"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert row["mean@2"] == 0.75 and row["pass@2"] == 1.0 and row["blind"] == 0.25 and row["cluster_mass"] == pytest.approx(0.3)


@pytest.fixture(scope="module")
def answers_of_one_rank() -> tuple[Answers, AnswerTrace, dict[str, Look]]:
    return run_ranks(answers_of_a_rank, 1, ParallelConfig(), timeout_s=120)[0]


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, ep=2), ParallelConfig(num_ranks=4, tp=2, ep=2)],
    ids=["TP2+SP", "EP2", "TP2 x EP2"],
)
def test_the_engine_gives_the_same_answers_in_every_layout(answers_of_one_rank: tuple[Answers, AnswerTrace, dict[str, Look]], parallel: ParallelConfig) -> None:
    """Five prompts, three samples: tokens and routes equal those of one rank, log-probs and the gaze to 1e-4. Under EP2 one rank has two prompts, or none, and
    keeps step."""
    expected, expected_trace, expected_looks = answers_of_one_rank
    parts = run_ranks(answers_of_a_rank, parallel.num_ranks, parallel, timeout_s=120)
    together = {key: answer for part, *_ in parts for key, answer in part.items()}
    assert together.keys() == expected.keys()
    for key, (tokens, logprobs, digest) in expected.items():
        assert together[key][0] == tokens and together[key][2] == digest
        np.testing.assert_allclose(together[key][1], logprobs, atol=1e-4)
    trace = parts[0][1]
    assert trace.tokens == expected_trace.tokens and len(trace.taps) == 2
    np.testing.assert_allclose(trace.logprobs_T, expected_trace.logprobs_T, atol=1e-4)
    for tap, other in zip(trace.taps, expected_trace.taps, strict=True):
        np.testing.assert_allclose(tap.maps_TNC, other.maps_TNC, atol=1e-4)
    looks = {key: one for *_, part in parts for key, one in part.items()}
    assert looks.keys() == expected_looks.keys() and len(looks) >= 3
    for key, one in looks.items():
        assert (*one.entropy, *one.divergence) == pytest.approx((*expected_looks[key].entropy, *expected_looks[key].divergence), abs=1e-4)


def test_a_worker_answers_in_slices_as_in_one_call_in_every_layout(run: tuple[RunConfig, Path]) -> None:
    """Under EP2 each rank is idle for a while, and keeps step: what the other one says does not change."""
    config = run[0].model_copy(update={"rollout": run[0].rollout.model_copy(update={"max_new_tokens": 24})})
    layouts = [ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, ep=2)]
    ranks = run_ranks(slices_of_a_rank, 2, config, layouts, timeout_s=120)
    for number, answering in enumerate((1, 2)):
        wholes, slices, failures = zip(*(rank[number] for rank in ranks), strict=True)
        whole, sliced = ({key: answer for part in parts for key, answer in part.items()} for parts in (wholes, slices))
        assert len(whole) == 16 and whole.keys() == sliced.keys()
        for key, (tokens, logprobs, digest) in whole.items():
            assert sliced[key][0] == tokens and sliced[key][2] == digest
            np.testing.assert_allclose(sliced[key][1], logprobs, atol=1e-4)
        assert [bool(part) for part in slices] == [True, answering == 2]
        assert [failure for part in failures for failure in part] == ["long#0 prompt_too_long", "long#1 prompt_too_long"] * answering
