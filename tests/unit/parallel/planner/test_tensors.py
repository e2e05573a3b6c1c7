"""A rank's parameters against the totals of the whole model: what all ranks hold, each parameter once, is the model."""

from __future__ import annotations

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.config.sizes import count_parameters
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.tensors import PARTS, chunk_runs
from megatron_ext.parallel.stages import pipeline_stages


@pytest.mark.parametrize("preset", ["tiny", "internvl3_5_30b_a3b"])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.clvr.enabled=false"],
        ["model.clvr.gate=tanh_gate"],
        ["model.clvr.gate_kind=dynamic", "model.clvr.kv_tokens=projected", "model.clvr.memory=learned", "model.clvr.ffn_hidden=64"],
        ["model.clvr.kv_layers=[0, 1]", "model.clvr.query_source=input_embedding"],
        ["model.clvr.fusion=addition", "model.clvr.kv_tokens=unshuffled", "model.clvr.gate_kind=channel"],
        ["model.vision.qk_norm=true", "model.vision.norm=rmsnorm"],
        ["model.num_experts=0", "earl.enabled=false"],
        ["model.dense_layers=[0, 2]"],
        ["model.vision.enabled=false", "model.clvr.enabled=false", "data.kind=jsonl", "data.path=x"],
    ],
)
@pytest.mark.parametrize("pp", [1, 3])
def test_all_stages_of_one_rank_each_hold_the_whole_model(preset: str, changes: list[str], pp: int) -> None:
    model = load_config(None, [f"model.preset={preset}", *changes]).config.model
    layout = Layout.of(ParallelConfig(num_ranks=pp, pp=pp))
    runs = [run for stage in pipeline_stages(model, pp) for run in chunk_runs(model, layout, stage).all()]
    expected = count_parameters(model)
    assert {part: sum(run.numel for run in runs if run.part == part) for part in PARTS} == {part: getattr(expected, part) for part in PARTS}


def test_what_is_split_is_split_and_what_is_not_is_whole() -> None:
    """TP2 EP4 of InternVL3.5-30B-A3B: half of attention and embeddings, a quarter of the experts, all of the router, the norms and the ViT."""
    model = load_config(None, ["model.preset=internvl3_5_30b_a3b"]).config.model
    layout = Layout.of(ParallelConfig(num_ranks=4, tp=2, ep=4))
    runs = chunk_runs(model, layout, pipeline_stages(model, 1)[0]).all()
    whole = count_parameters(model)
    for part, share in {"attention": 2, "embeddings": 2, "experts": 4, "router": 1, "norms": 1, "vision": 1, "projector": 1}.items():
        assert sum(run.numel for run in runs if run.part == part) * share == getattr(whole, part), part
