"""How often ranks meet, by the planner's formulas and by counting: where waiting costs more than sending, this is what a layout costs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.hardware import Cluster, find_gpu, read_gpus
from megatron_ext.parallel.planner.search import Search
from megatron_ext.parallel.planner.workload import workload
from tests.parallel.test_layouts import CP2, DENSE, DP2, EP2, PP2, TP2
from tests.support.collectives import collectives_by_rank
from tests.support.layouts import TAPS, Case, model_of

NO_CLVR = {"clvr": TAPS.model_copy(update={"enabled": False})}
CASES = {
    "DP2": Case(DP2),
    "TP2": Case(TP2),
    "EP2": Case(EP2),
    "TP2 EP2": Case(ParallelConfig(num_ranks=2, tp=2, ep=2)),
    "CP2": Case(CP2),
    "PP2": Case(PP2, changes=NO_CLVR),
    "TP2, dense": Case(TP2, changes={**DENSE, **NO_CLVR}),
    "TP2 EP2, not balanced": Case(ParallelConfig(num_ranks=2, tp=2, ep=2), changes={"moe_balancing": "none"}),
}
COUNTS = [1, 2]


@cache
def _counted() -> list[list[list[int]]]:
    return run_ranks(collectives_by_rank, 2, list(CASES.values()), COUNTS, timeout_s=100)


def predicted(case: Case, count: int) -> float:
    """A world where a collective costs a second whatever it carries, and nothing else costs anything."""
    model = model_of(case.changes)
    base = find_gpu("cpu-core", read_gpus())
    rates = dict.fromkeys(("fp32_flops", "memory_bytes_per_s", "node_bytes_per_s", "network_bytes_per_s"), 1e30)
    gpu = base.model_copy(update={**rates, "node_latency_s": 1.0, "layer_overhead_s": 0.0, "step_overhead_s": 0.0})
    layout = Layout.of(case.parallel)
    batch: dict[str, Any] = {"global_batch": count * layout.dp, "micro_batch": 1}
    config = load_config(None).config
    config = config.model_copy(update={"model": model, "parallel": case.parallel, "pretrain": config.pretrain.model_copy(update=batch)})
    search = Search(config, workload(config, "pretrain"), Cluster(gpu, layout.num_ranks, layout.num_ranks))
    times = search.evaluate(layout, "none", 1, search.sizer.memory(layout, "none", 1)).times
    return times.total_s - times.bubble_s


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_more_is_as_many_collectives_more_as_the_formulas_say(name: str) -> None:
    case, number = CASES[name], list(CASES).index(name)
    for of_rank in _counted():
        few, more = of_rank[number]
        assert more - few == pytest.approx(predicted(case, 2) - predicted(case, 1), abs=0.01)


def test_a_step_meets_for_gradients_weights_and_to_agree_that_it_was_sound() -> None:
    """Of two data-parallel ranks: one reduce-scatter, one gather, and five more."""
    assert predicted(CASES["DP2"], 1) == pytest.approx(7, abs=0.01)
    assert [of_rank[0][0] for of_rank in _counted()] == [7, 7]
