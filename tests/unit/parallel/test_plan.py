"""Which layouts a model can have: worked examples, and the law that a remedy works."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schema import ClvrConfig, ModelConfig, ParallelConfig
from megatron_ext.parallel.plan import Layout, check_layout, check_rollout_layout

MODEL = ModelConfig(num_attention_heads=4, num_query_groups=2, num_experts=8, expert_ffn_hidden_size=64, vocab_size=256)


def problems(**parallel: Any) -> list[str]:
    return [str(problem) for problem in check_layout(MODEL, ParallelConfig(**parallel))]


def test_eight_ranks_with_tp_2_and_ep_4_have_four_replicas_of_dense_parameters_and_two_of_experts() -> None:
    layout = Layout.of(ParallelConfig(num_ranks=8, tp=2, ep=4))
    assert (layout.dp, layout.etp, layout.edp, layout.sp) == (4, 1, 2, True)
    assert problems(num_ranks=8, tp=2, ep=4) == []


def test_experts_are_split_like_everything_else_unless_they_are_spread() -> None:
    assert Layout.of(ParallelConfig(num_ranks=4, tp=2)).etp == 2
    assert Layout.of(ParallelConfig(num_ranks=4, tp=2, ep=2)).etp == 1
    assert Layout.of(ParallelConfig(num_ranks=4, tp=2, ep=2, etp=2)).etp == 2


def test_sequence_parallelism_comes_with_tensor_parallelism() -> None:
    assert not Layout.of(ParallelConfig(num_ranks=2)).sp
    assert Layout.of(ParallelConfig(num_ranks=2, tp=2)).sp


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"num_ranks": 4, "tp": 4}, "parallel.tp: 4 does not divide model.num_query_groups = 2; use 1 or 2"),
        ({"num_ranks": 3, "ep": 3}, "parallel.ep: 3 does not divide model.num_experts = 8; use 1, 2, 4 or 8"),
        ({"num_ranks": 3, "tp": 2}, "parallel.num_ranks: 3 ranks do not divide by tp * pp * cp = 2; use a multiple of 2, or tp = 1 or 3"),
        ({"num_ranks": 4, "ep": 8}, "parallel.ep: 4 ranks do not divide by etp * ep = 1 * 8; use ep = 1, 2 or 4"),
        ({"num_ranks": 4, "etp": 3}, "parallel.etp: 3 does not divide model.expert_ffn_hidden_size = 64; use 1, 2, 4, 8, 16, 32 or 64"),
        ({"num_ranks": 4, "pp": 4}, "parallel.pp: 4 pipeline stages do not fit model.num_layers = 3; use at most 3"),
        ({"num_ranks": 2, "pp": 2, "vpp": 2}, "parallel.vpp: 4 pipeline stages do not fit model.num_layers = 3; use at most 1"),
        ({"num_ranks": 2, "vpp": 2}, "parallel.vpp: 2 chunks a rank interleave stages, but parallel.pp = 1; use 1, or pp above 1"),
        ({"num_ranks": 4, "pp": 2, "ep": 4}, "parallel.ep: the 2 ranks of a pipeline stage do not divide by etp * ep = 1 * 4; use ep = 1 or 2"),
        ({"num_ranks": 3, "cp": 2}, "parallel.num_ranks: 3 ranks do not divide by tp * pp * cp = 2; use a multiple of 2, or tp = 1 or 3"),
        (
            {"num_ranks": 4, "tp": 2, "etp": 1},
            "parallel.etp: experts split 1 ways over a tensor-parallel group of 2, without expert parallelism, would learn from a part of their tokens; "
            "use 2, or ep above 1",
        ),
        (
            {"num_ranks": 2, "overlap_param_gather": True, "overlap_grad_reduce": False},
            "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce, which is false; set both, or neither",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_both_numbers_and_what_would_work(parallel: dict[str, Any], message: str) -> None:
    assert message in problems(**parallel)


def test_all_problems_are_told_at_once_under_the_name_of_the_section_that_asked() -> None:
    found = check_layout(MODEL, ParallelConfig(num_ranks=6, tp=3, ep=3), where="rollout.parallel")
    assert {problem.where for problem in found} == {"rollout.parallel.tp", "rollout.parallel.ep"}
    assert len(found) == 6, "tp = 3 divides neither heads, query groups, vocabulary nor the two CLVR head counts; ep = 3 not the experts"


def test_a_dense_model_has_no_experts_to_spread_and_splits_its_own_width() -> None:
    dense = MODEL.model_copy(update={"num_experts": 0, "ffn_hidden_size": 9, "expert_ffn_hidden_size": 7})
    assert [str(problem) for problem in check_layout(dense, ParallelConfig(num_ranks=2, ep=2))] == [
        "parallel.ep: 2 ranks for the experts of a model that has none (model.num_experts = 0); remove it"
    ]
    assert [str(problem) for problem in check_layout(dense, ParallelConfig(num_ranks=2, tp=2))] == [
        "parallel.tp: 2 does not divide model.ffn_hidden_size = 9; use 1, 3 or 9"
    ]
    mixed = MODEL.model_copy(update={"dense_layers": (0,), "ffn_hidden_size": 9})
    assert any("ffn_hidden_size = 9" in str(problem) for problem in check_layout(mixed, ParallelConfig(num_ranks=2, tp=2)))


def test_a_rollout_replica_has_neither_pipeline_stages_nor_shared_sequences() -> None:
    found = [str(problem) for problem in check_rollout_layout(MODEL, ParallelConfig(num_ranks=4, pp=2, cp=2))]
    assert len(found) == 2
    assert found[0].startswith("rollout.parallel.pp: 2: pipeline stages would wait for each other at every token; use 1")
    assert check_rollout_layout(MODEL, ParallelConfig(num_ranks=2, tp=2)) == []
    assert check_rollout_layout(MODEL, ParallelConfig(num_ranks=2, tp=2, etp=1)) == [], "whole experts on both ranks: nothing is learnt there"


def test_rows_divide_by_two_parts_a_context_parallel_rank_and_by_tp() -> None:
    assert [Layout.of(ParallelConfig(num_ranks=8, **sizes)).length_multiple for sizes in ({}, {"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2})] == [1, 2, 4, 8]


def test_clvr_heads_count_only_when_clvr_is_on() -> None:
    parallel = ParallelConfig(num_ranks=2, tp=2)
    odd = ClvrConfig(num_heads=3, num_kv_heads=3)
    assert len(check_layout(MODEL.model_copy(update={"clvr": odd}), parallel)) == 2
    assert check_layout(MODEL.model_copy(update={"clvr": odd.model_copy(update={"enabled": False})}), parallel) == []


@given(num_ranks=st.integers(1, 16), tp=st.integers(1, 4), pp=st.integers(1, 4), cp=st.integers(1, 3), ep=st.integers(1, 8), etp=st.none() | st.integers(1, 4))
def test_a_layout_without_problems_divides_everything(num_ranks: int, tp: int, pp: int, cp: int, ep: int, etp: int | None) -> None:
    parallel = ParallelConfig(num_ranks=num_ranks, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
    layout = Layout.of(parallel)
    if not check_layout(MODEL, parallel):
        assert layout.tp * layout.cp * layout.dp * layout.pp == num_ranks
        assert layout.etp * layout.ep * layout.edp * layout.pp == num_ranks
        assert MODEL.num_attention_heads % tp == MODEL.num_query_groups % tp == MODEL.num_experts % ep == 0


@given(num_ranks=st.sampled_from([1, 2, 4, 8]), field=st.sampled_from(["tp", "ep", "etp"]), value=st.integers(1, 9))
def test_what_a_message_offers_removes_that_message(num_ranks: int, field: str, value: int) -> None:
    parallel = ParallelConfig(num_ranks=num_ranks, **{field: value})
    for problem in check_layout(MODEL, parallel):
        if problem.where == f"parallel.{field}":
            for offer in map(int, re.findall(r"\d+", problem.remedy.removeprefix("use ep = "))):
                mended = parallel.model_copy(update={field: offer})
                assert problem.problem.split(" ", 1)[1] not in [other.problem.split(" ", 1)[1] for other in check_layout(MODEL, mended)]


def test_planning_needs_no_torch() -> None:
    code = "import sys, megatron_ext.parallel.plan, megatron_ext.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=".").returncode == 0
