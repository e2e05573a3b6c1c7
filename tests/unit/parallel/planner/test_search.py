"""Which layouts are found, and that whoever is refused is told why with both numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.hardware import Cluster, find_gpu, read_gpus
from megatron_ext.parallel.planner.layout_names import parse_name
from megatron_ext.parallel.planner.search import Found, Search
from megatron_ext.parallel.planner.workload import Assumed, workload

ROOT = Path(__file__).parents[4]
SFT = ROOT / "examples" / "internvl3_5_30b_a3b" / "sft.yaml"
TINY = ["name=t"]


def search(gpus: int, *overrides: str, source: Path | None = SFT, gpu: str = "h100", per_node: int = 8, **more: Any) -> Search:
    config = load_config(source, overrides).config
    return Search(config, workload(config, "sft", more.pop("assumed", Assumed())), Cluster(find_gpu(gpu, read_gpus()), gpus, per_node), **more)


def layout(gpus: int, name: str) -> Layout:
    axes = {"tp": 1, "cp": 1, "pp": 1, "vpp": 1, "ep": 1} | dict(parse_name(name).axes)
    axes.pop("dp", None)
    etp = axes.pop("etp", 1 if axes["ep"] > 1 else axes["tp"])
    return Layout(sp=axes["tp"] > 1, etp=etp, dp=gpus // (axes["tp"] * axes["cp"] * axes["pp"]), num_ranks=gpus, **axes)


REFUSED = {
    # the model does not divide
    "TP8": (64, [], "parallel.tp: 8 does not divide model.num_query_groups = 4; use 1, 2 or 4"),
    "TP8xEP8": (64, [], "parallel.tp: 8 does not divide model.clvr.num_kv_heads = 4; use 1, 2 or 4"),
    "TP3": (3, [], "parallel.tp: 3 does not divide model.num_attention_heads = 32; use 1, 2, 4, 8, 16 or 32"),
    "TP2": (64, ["model.vocab_size=151944", "model.num_query_groups=1"], "parallel.tp: 2 does not divide model.num_query_groups = 1; use 1"),
    "TP4xPP2": (8, ["model.clvr.num_heads=2", "model.clvr.num_kv_heads=2"], "parallel.tp: 4 does not divide model.clvr.num_heads = 2; use 1 or 2"),
    "EP3": (12, [], "parallel.ep: 3 does not divide model.num_experts = 128; use 1, 2, 4, 8, 16, 32, 64 or 128"),
    "EP256": (256, [], "parallel.ep: 256 does not divide model.num_experts = 128; use 1, 2, 4, 8, 16, 32, 64 or 128"),
    "EP2xETP5": (10, [], "parallel.etp: 5 does not divide model.expert_ffn_hidden_size = 768; use 1, 2, 3, 4, 6, 8, 12 or 16"),
    # the grid does not fill
    "PP3": (64, [], "parallel.num_ranks: 64 ranks do not divide by tp * pp * cp = 3; use a multiple of 3, or tp = 1, 2, 4, 8, 16, 32 or 64"),
    "EP128": (64, [], "parallel.ep: 64 ranks do not divide by etp * ep = 1 * 128; use ep = 1, 2, 4, 8, 16, 32 or 64"),
    "PP8xEP16": (64, [], "parallel.ep: the 8 ranks of a pipeline stage do not divide by etp * ep = 1 * 16; use ep = 1, 2, 4 or 8"),
    "TP2xEP32xETP4": (64, [], "parallel.ep: 64 ranks do not divide by etp * ep = 4 * 32; use ep = 1, 2, 4, 8 or 16"),
    "TP2xETP1": (
        64,
        [],
        "parallel.etp: experts split 1 ways over a tensor-parallel group of 2, without expert parallelism, would learn from a part of",
    ),
    # the pipeline has more stages than layers, or chunks than stages
    "PP64": (64, [], "parallel.pp: 64 pipeline stages do not fit model.num_layers = 48; use at most 48"),
    "PP8xVPP8": (64, [], "parallel.vpp: 64 pipeline stages do not fit model.num_layers = 48; use at most 6"),
    "VPP2xEP8": (64, [], "parallel.vpp: 2 chunks a rank interleave stages, but parallel.pp = 1; use 1, or pp above 1"),
    # the batch does not divide
    "DP3xEP1": (3, [], "sft.global_batch: 512 cannot be shared by 3 data-parallel ranks; use a multiple of 3"),
    "EP64": (1024, [], "sft.global_batch: 512 cannot be shared by 1024 data-parallel ranks; use a multiple of 1024"),
    "TP4xPP4xVPP3xEP8": (1024, ["sft.global_batch=128"], "which parallel.vpp = 3 needs in groups of parallel.pp = 4"),
    "EP8-mb3": (64, [], "sft.micro_batch: 3 does not divide the 8 conversations of a rank (sft.global_batch = 512 over 64 ranks); use 1, 2, 4 or 8"),
    "EP4": (
        8,
        ["model.moe_capacity_factor=1.0", "model.moe_pad_to_capacity=true", "parallel.ep=1"],
        "model.moe_pad_to_capacity: true with parallel.ep = 4: the 8 data-parallel ranks bring micro-batches of different lengths",
    ),
    "TP2xEP2": (
        2,
        ["sft.packed=true", "sft.micro_batch_tokens=40959", "data.max_length=40959"],
        "sft.micro_batch_tokens: 40959 does not hold the longest conversation, data.max_length = 40959, as a multiple of 2 40960; use at least 40960",
    ),
    "PP2xVPP2xEP2": (
        4,
        ["sft.packed=true", "sft.micro_batch_tokens=40960", "sft.global_batch=6", "parallel.num_ranks=2", "parallel.ep=2"],
        "sft.global_batch: 6 gives a rank 3 conversations, of which",
    ),
    # memory
    "EP2": (64, [], "memory: pipeline rank 0 needs 123.1 GiB and h100-80gb has 79.1 GiB; the most goes to gradients (61.0 GiB); spread the experts (ep)"),
    "EP8-none": (64, [], "the most goes to decoder (82.3 GiB); recompute, split the sequence (tp, cp), or shorten rows"),
    "TP4xPP2xEP2-none-mb8": (64, ["sft.train_vision=false"], "recompute, split the sequence (tp, cp), or shorten rows"),
    "CP1xEP16-full-mb4": (
        64,
        ["sft.train_vision=false", "data.max_length=40960", "model.clvr.enabled=false"],
        "split the vocabulary (tp) or the sequence (cp)",
    ),
    "PP4xEP16xVPP2": (64, ["sft.train_vision=true"], "freeze the ViT (train_vision=false), or show fewer tiles a micro-batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_cannot_be_is_refused_with_the_rule_and_both_numbers(name: str) -> None:
    gpus, overrides, sentence = REFUSED[name]
    named = parse_name(name)
    judged = search(gpus, *overrides, per_node=gpus).judge(layout(gpus, name), named.recompute, named.micro_rows)
    assert isinstance(judged, list)
    assert any(sentence in str(problem) for problem in judged), [str(problem) for problem in judged]


def test_at_least_25_broken_layouts_are_refused() -> None:
    assert len(REFUSED) >= 25


@pytest.mark.parametrize("gpus", [6, 8])
def test_what_is_found_are_the_layouts_that_the_rules_of_training_accept_and_no_others(gpus: int) -> None:
    """All grids of a small model that memory does not restrict, against `check_layout` and `check_rules` one by one."""
    asked = search(gpus, "model.num_layers=4", "sft.global_batch=24", "sft.micro_batch=2", source=None, gpu="h200")
    found = {(one.layout.tp, one.layout.cp, one.layout.pp, one.layout.ep, one.layout.etp) for one in asked.run().found if one.layout.vpp == 1}
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    expected = set()
    for tp, cp, pp, ep in ((tp, cp, pp, ep) for tp in sizes for cp in sizes for pp in sizes for ep in sizes):
        for etp in {1, tp}:
            if gpus % (tp * cp * pp):
                continue
            grid = Layout(tp, tp > 1, pp, 1, cp, ep, etp, gpus // (tp * cp * pp), gpus)
            rows = asked.micro_rows(grid)
            if rows and not asked.problems(grid, rows[0]):
                expected.add((tp, cp, pp, ep, etp))
    assert found == expected
    assert len(expected) > 10


def test_layouts_that_others_have_published_are_among_the_legal_ones() -> None:
    """Megatron-Bridge trains Qwen3-30B-A3B on 8 H100 with TP4 PP2 EP4, on 16 with PP2 EP8 or EP16; slime runs it with TP4 EP8 on 8; see docs/plans.md."""
    short = ["sft.train_vision=false", "data.max_length=4096", "sft.micro_batch=1", "sft.global_batch=32", "pretrain.micro_batch=1"]
    eight = {one.name for one in search(8, *short).run().found}
    assert {"TP4xPP2xEP4", "TP4xEP8"} <= eight
    sixteen = {one.name for one in search(16, *short).run().found}
    assert {"EP16", "PP2xEP8"} <= sixteen


def test_more_recompute_is_taken_only_where_less_does_not_fit() -> None:
    asked = search(64, "sft.train_vision=false")
    found = asked.judge(layout(64, "TP2xEP8"))
    assert isinstance(found, Found)
    less = {"none": (), "selective": ("none",), "full": ("none", "selective")}[found.recompute]
    limit = asked.cluster.gpu.memory_bytes
    assert all(asked.sizer.memory(found.layout, kind, found.micro_rows).total_bytes > limit or found.micro_rows < 2 for kind in less)


BUDGET = ["sft.packed=true", "sft.micro_batch_tokens=40960", "data.max_length=8192", "sft.train_vision=false"]


def test_a_micro_batch_by_tokens_holds_its_budget_however_long_the_rows_are() -> None:
    """8192 tokens a row: 5 rows of 8192 positions. 2048 a row: 20 rows; but a rank has 16, in one micro-batch."""
    longest, short = (search(32, *BUDGET, assumed=Assumed(row_tokens=mean)) for mean in (None, 2048))
    assert (longest.work.micro_rows, longest.work.row_tokens) == (5, 8192)
    assert (short.work.micro_rows, short.work.row_tokens, short.work.mean_row_tokens) == (20, 2048, 2048)
    assert longest.micro_rows(layout(32, "EP8")) == [4], "16 rows over 4 micro-batches"
    assert short.micro_rows(layout(32, "EP8")) == [16]
    assert short.micro_rows(layout(32, "PP2xVPP2xEP8")) == [16], "32 rows over 2 micro-batches, a group of pp"


def test_memory_of_a_budget_is_that_of_as_many_packed_tokens_and_short_rows_take_less_time() -> None:
    grid = layout(64, "TP2xEP8")
    long, short = (search(64, *BUDGET, assumed=Assumed(row_tokens=mean)) for mean in (8000, 4000))
    parts = [asked.sizer.memory(grid, "full", asked.micro_rows(grid)[0]) for asked in (long, short)]
    assert parts[0].decoder_bytes == pytest.approx(parts[1].decoder_bytes, rel=0.15)
    times = [asked.judge(grid, "full") for asked in (long, short)]
    assert all(isinstance(found, Found) for found in times)
    assert times[1].times.total_s < times[0].times.total_s  # type: ignore[union-attr]


def test_axes_that_are_given_are_kept() -> None:
    found = search(64, "sft.train_vision=false", only={"tp": 2, "pp": 4, "vpp": 3}).run().found
    assert found
    assert all((one.layout.tp, one.layout.pp, one.layout.vpp) == (2, 4, 3) for one in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [("TP4xBANANA", "'banana' in 'TP4xBANANA' is no part of a layout"), ("TP", "'tp' in 'TP' is no part of a layout"), ("TP2xTP4", "is no part")],
)
def test_a_name_that_names_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_name(text)


def test_the_configuration_itself_is_left_alone() -> None:
    config = load_config(SFT).config
    before = config.model_dump()
    asked = Search(config, workload(config, "sft"), Cluster(find_gpu("h100", read_gpus()), 16, 8))
    asked.run()
    assert isinstance(asked.config, RunConfig)
    assert asked.config.model_dump() == before
