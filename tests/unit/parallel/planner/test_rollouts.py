"""Rollout replicas by hand, and how learner and rollouts share devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.parallel.planner.fleet import FleetSearch, splits
from megatron_ext.parallel.planner.hardware import Cluster, find_gpu, read_gpus
from megatron_ext.parallel.planner.rollouts import Answers, Replica, answers_of, rank_numels, refit_s, replica_layout
from megatron_ext.parallel.planner.search import Search
from megatron_ext.parallel.planner.workload import Assumed, prompt_tokens, workload

RL = Path(__file__).parents[4] / "examples" / "internvl3_5_30b_a3b" / "rl.yaml"
CONFIG = load_config(RL).config
H200 = Cluster(find_gpu("h200", read_gpus()), 64, 8)


def replica(tp: int, ep: int, batch: int) -> Replica:
    layout = replica_layout(tp, ep)
    return Replica(CONFIG.model, layout, rank_numels(CONFIG.model, layout), batch, Answers(512, 16, 512, 6000.0, 32768, 1, 16384), H200)


def test_a_replica_has_the_fewest_ranks_that_its_axes_allow() -> None:
    assert [replica_layout(tp, ep).num_ranks for tp, ep in ((1, 1), (4, 1), (1, 8), (4, 8), (2, 4))] == [1, 4, 8, 8, 4]
    assert replica_layout(4, 8).dp == 2


def test_a_token_takes_96_kib_and_a_prompt_is_held_once_for_its_answers() -> None:
    """48 layers x 2 x 4 heads x 128 x 2 bytes = 98304 bytes a token; a prompt of 512, answers of 32768; a quarter of it with TP4."""
    assert replica(1, 1, 1).memory().cache_bytes == 98304 * (512 + 32768)
    assert replica(4, 1, 1).memory().cache_bytes == 98304 * (512 + 32768) // 4
    assert replica(1, 1, 32).memory().cache_bytes == 98304 * (2 * 512 + 32 * 32768)
    assert replica(1, 1, 16).memory().vision_cache_bytes == 3 * 2 * 1024 * 4 * 128 * 2, "three taps, one tile, for one prompt"


@pytest.mark.parametrize("rows", [16, 48])
def test_the_cache_is_what_the_engine_counts(rows: int) -> None:
    """`need_bytes` of the memory that generation uses, with answers that have grown to the end."""
    from megatron_ext.model.memory import Footprint

    footprint, answers = Footprint.of(CONFIG.model, 1), replica(1, 1, rows).answers
    held = replica(1, 1, rows).memory()
    prompts = rows // answers.samples
    assert held.cache_bytes == footprint.token * (prompts * answers.prompt_tokens + rows * answers.most_tokens)
    assert held.vision_cache_bytes == footprint.tile * prompts * answers.tiles


def test_weights_are_those_of_the_whole_model_over_the_ranks() -> None:
    assert replica(1, 1, 1).memory().weights_bytes == pytest.approx(2 * 30.88e9, rel=1e-3)
    assert replica(4, 8, 1).memory().weights_bytes < replica(1, 8, 1).memory().weights_bytes < replica(1, 1, 1).memory().weights_bytes / 4


def test_more_rows_make_a_step_longer_but_the_answers_faster() -> None:
    few, many = (replica(4, 8, batch).times(1) for batch in (16, 64))
    assert many.step_memory_s > few.step_memory_s
    assert many.total_s < few.total_s
    assert few.turns == 4 * many.turns


def test_rollout_ranks_receive_their_own_parts_side_by_side_and_the_learners_ranks_share_the_sending() -> None:
    """6 GB each, at 3 GB/s: 2 s where as many ranks send as receive; a quarter as many send four times as much."""
    assert [refit_s(6e9, learners, 16, H200) for learners in (64, 16, 4)] == pytest.approx([2.0, 2.0, 8.0])


def test_devices_are_split_by_whole_nodes() -> None:
    assert splits(64, 8) == [8, 16, 32, 48]
    assert splits(8, 8) == [1, 2, 4, 6]
    assert splits(16, 8) == [8]


def test_colocated_memory_adds_up_and_apart_it_does_not() -> None:
    assumed = Assumed(response_tokens=6000)
    answers = answers_of(CONFIG, prompt_tokens(CONFIG, assumed), 6000, 1)
    short = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"max_new_tokens": 8192})})
    answers = replace(answers, most_tokens=8192)
    found = FleetSearch(Search(short, workload(short, "rl", assumed), H200), answers).run().found
    limit = H200.gpu.memory_bytes
    assert {one.colocated for one in found} == {True, False}
    for one in found:
        together = one.learner.memory.total_bytes + one.rollout.memory.total_bytes
        assert (together <= limit) if one.colocated else max(one.learner.memory.total_bytes, one.rollout.memory.total_bytes) <= limit
        assert one.gpus == 64
        assert one.overlapped_s <= one.step_s
        assert one.rollout.replicas * one.rollout.layout.num_ranks == one.rollout_gpus
