"""Clusters that are looked for again in what the bank holds: drifts that were planted, and a run that is resumed reads what it had found."""

from __future__ import annotations

import json
from collections import namedtuple
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.schema import DiscoverConfig, EarlConfig, ModelConfig, RunConfig
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.rl.reestimation import ClusterWatch, WatchedCredit, Window, fresh_answers

EXPERTS = 6
IMAGE = 5


def answer(key: str, skill: str, expert: int, reward: float = 1.0, sample: int = 0, versions: tuple[int, int] = (0, 0)) -> ScoredRollout:
    """One layer; about 0.6 of its mass on one expert, the rest on another that the key decides."""
    rng = np.random.default_rng(crc32(key.encode()))
    main = 0.5 + 0.2 * rng.random()
    other = (expert + 1 + int(rng.integers(EXPERTS - 1))) % EXPERTS
    experts, gates = np.array([[[expert, other]]] * 5, np.uint8), np.array([[[main, 1 - main]]] * 5, np.float16)
    prompt = Prompt(key, skill, np.array([8, IMAGE, 9, 10], np.int32), NO_TILES, "", {"template": f"t{sum(map(ord, key)) % 2}"})
    routes = RouteTrace(experts, gates)
    return ScoredRollout(Rollout(prompt, sample, 0, np.array([1, 2]), np.zeros(2, np.float32), np.array(versions, np.int32), "stop", "", routes), reward, {})


Drawn = namedtuple("Drawn", "scored")


class Shelf:
    """A bank of what was drawn, by draw; step n trains on draw n."""

    def __init__(self, draws: dict[int, list[ScoredRollout]]) -> None:
        self.draws, self.read = draws, list[int]()

    def trained(self, step: int) -> tuple[tuple[int, str], ...] | None:
        return tuple((step, one.rollout.prompt.key) for one in self.draws[step])

    def drawn(self, draw: int) -> Drawn:
        self.read.append(draw)
        return Drawn(self.draws[draw])


def draw(number: int, ocr: int, count: int) -> list[ScoredRollout]:
    """Twenty prompts of either skill, which use these experts."""
    return [answer(f"{skill}{number}-{index}", skill, expert) for index in range(20) for skill, expert in (("ocr", ocr), ("count", count))]


def pair(expert: int) -> PairEffect:
    return PairEffect(0, expert, 0.1, 2.0, 9.0, 0.01, 1.0, 0.9, 0.3, 0.1, 9.0, 0.9, 0.3)


def clusters() -> ExpertClusters:
    """ocr has expert 0, count expert 1."""
    found = tuple(SkillCluster(skill, "ok", "", 9, (pair(e),), 0.5, 0.9, None, 1.0, None) for e, skill in enumerate(SKILLS))
    table = np.full((2, 1, EXPERTS), 1 / EXPERTS)
    return ExpertClusters(1, EXPERTS, found, table, table * 0, np.zeros(1), 4.0, DiscoverConfig(), 0, "sft")


SKILLS = ("ocr", "count")
DRIFTED = {step: draw(step, 0, 1) if step < 2 else draw(step, 3, 1) for step in range(6)}
"""After two steps ocr is served by expert 3."""


def config(**earl: Any) -> RunConfig:
    discover = DiscoverConfig(prompts_per_skill=30, permutations=50, bootstraps=10, committee_top=0, experts_per_layer=1)
    return RunConfig(model=ModelConfig(num_layers=1, num_experts=EXPERTS), discover=discover, earl=EarlConfig(reestimate_every=2, **earl))


def test_a_drift_that_was_planted_is_reported_every_few_steps_and_changes_nothing(tmp_path) -> None:
    before = clusters()
    watch = ClusterWatch(config(), before, Shelf(DRIFTED), tmp_path, IMAGE)
    metrics = [watch.after(step) for step in range(4)]
    assert metrics[0] == metrics[2] == {}
    assert (metrics[1]["earl/drift/ocr/jaccard"], metrics[1]["earl/drift/count/jaccard"], metrics[1]["earl/cluster_stale"]) == (1, 1, 0)
    assert (metrics[3]["earl/drift/ocr/jaccard"], metrics[3]["earl/drift/count/jaccard"], metrics[3]["earl/cluster_stale"]) == (0, 1, 0.5)
    assert metrics[1]["earl/drift/ocr/mass"] > 0.45 and metrics[3]["earl/drift/ocr/mass"] < 0.15 and metrics[3]["earl/drift/information"] > 0.1
    assert all(watch.in_use(step) is before for step in range(6))
    records = [json.loads(line) for line in (tmp_path / "drift.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4] and records[0]["answers"] == 60, "thirty of a skill"
    assert [path.name for path in sorted((tmp_path / "drift").iterdir())] == ["step_000002.json", "step_000004.json"]


def test_clusters_that_were_found_again_are_followed_from_the_next_step_on(tmp_path) -> None:
    watch = ClusterWatch(config(follow=True), clusters(), Shelf(DRIFTED), tmp_path, IMAGE)
    paid = []
    credit = WatchedCredit(lambda of: paid.append(of) or (lambda scored, step: (np.zeros(0), {"step": float(step)})), watch)
    metrics = [credit([], step)[1] for step in range(6)]
    assert [watch.in_use(step).pairs("ocr") for step in range(6)] == [((0, 0),)] * 4 + [((0, 3),)] * 2
    assert watch.in_use(4).sigmas()["ocr"] != 0.5 and watch.in_use(4).pairs("count") == ((0, 1),)
    assert [one.pairs("ocr") for one in paid] == [((0, 0),), ((0, 0),), ((0, 3),)], "a credit is made when clusters change"
    assert metrics[3]["earl/drift/ocr/jaccard"] == 0 and metrics[5]["earl/drift/ocr/jaccard"] == 1, "those in use"


def test_a_resumed_run_reads_what_it_had_found_and_finds_the_same_where_that_was_lost(tmp_path) -> None:
    first = ClusterWatch(config(follow=True), clusters(), Shelf(DRIFTED), tmp_path, IMAGE)
    metrics = [first.after(step) for step in range(4)]
    shelf = Shelf(DRIFTED)
    resumed = ClusterWatch(config(follow=True), clusters(), shelf, tmp_path, IMAGE)
    assert [resumed.after(step) for step in range(2, 4)] == metrics[2:] and not shelf.read
    assert resumed.in_use(5).skills == first.in_use(5).skills and resumed.in_use(3).pairs("ocr") == ((0, 0),)
    (tmp_path / "drift.jsonl").unlink()
    afresh = ClusterWatch(config(follow=True), clusters(), Shelf(DRIFTED), tmp_path, IMAGE)
    assert afresh.in_use(5).skills == first.in_use(5).skills and afresh.after(3) == metrics[3]


def test_fresh_answers_are_right_of_one_version_one_a_prompt_and_the_newest() -> None:
    answers = [
        answer("wrong", "ocr", 0, reward=0.5),
        answer("mixed", "ocr", 0, versions=(0, 1)),
        answer("twice", "ocr", 0, sample=2),
        answer("twice", "ocr", 0, sample=1),
    ]
    shelf = Shelf({0: [answer("old", "ocr", 0)], 1: answers})
    assert [one.key for one in fresh_answers(shelf, Window(0, 2), config())] == ["1/twice", "0/old"]
    few = config().model_copy(update={"discover": config().discover.model_copy(update={"prompts_per_skill": 2})})
    many = Shelf({0: draw(0, 0, 1), 1: draw(1, 0, 1)})
    assert {one.key[:2] for one in fresh_answers(many, Window(0, 2), few)} == {"1/"}


@pytest.mark.parametrize("answers", [[], [answer("one", "ocr", 0)]], ids=["no correct answer", "of one skill"])
def test_where_there_is_nothing_to_compare_it_says_so_and_goes_on(tmp_path, answers) -> None:
    watch = ClusterWatch(config(follow=True), clusters(), Shelf({0: answers, 1: answers}), tmp_path, IMAGE)
    assert watch.after(1) == {} and watch.in_use(2).pairs("ocr") == ((0, 0),)
    (record,) = [json.loads(line) for line in (tmp_path / "drift.jsonl").read_text().splitlines()]
    assert record["found"] is False and record["answers"] == 2 * len(answers)
