"""Sizes by formula, against published numbers and against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.config.sizes import count_parameters, tokens_per_tile, vision_tokens

SHAPES = [
    [],
    ["model.tie_embeddings=true", "model.clvr.gate=tanh_gate", "model.clvr.taps=[[0, 1], [1, 2]]"],
    ["model.vision.norm=rmsnorm", "model.vision.qk_norm=true", "model.vision.qkv_bias=false", "model.clvr.enabled=false"],
    ["model.num_experts=0", "earl.enabled=false"],
    ["model.dense_layers=[1]"],
    ["model.vision.enabled=false", "model.clvr.enabled=false", "data.kind=jsonl", "data.path=mine.jsonl"],
]


def test_an_image_of_internvl_3_5_takes_256_tokens_and_the_tiny_one_16() -> None:
    big = load_config(None, ["model.preset=internvl3_5_30b_a3b"]).config.model
    assert (vision_tokens(big.vision), tokens_per_tile(big.vision)) == (1024, 256)
    assert tokens_per_tile(ModelConfig().vision) == 16


def test_internvl3_5_30b_a3b_has_the_published_number_of_parameters() -> None:
    """Published: 0.3 B vision + 30.5 B language; about 3 B active. CLVR adds 9.44 M a tap."""
    found = count_parameters(load_config(None, ["model.preset=internvl3_5_30b_a3b"]).config.model)
    assert found.vision == pytest.approx(0.304e9, rel=0.01)
    assert found.total - found.vision - found.projector - found.clvr == pytest.approx(30.5e9, rel=0.005)
    assert found.active == pytest.approx(3.7e9, rel=0.05)
    assert found.clvr / 3 == pytest.approx(9.44e6, rel=0.005)


def test_internvl3_5_241b_a28b_has_the_published_number_of_parameters() -> None:
    """Published: 5.5 B vision + 235.1 B language, 22 B of it active. Its vision count includes the projector."""
    found = count_parameters(load_config(None, ["model.preset=internvl3_5_241b_a28b"]).config.model)
    assert found.vision + found.projector == pytest.approx(5.5e9, rel=0.02)
    assert found.total - found.vision - found.projector - found.clvr == pytest.approx(235.1e9, rel=0.002)
    assert found.active - found.vision - found.projector - found.clvr == pytest.approx(22e9, rel=0.02)


@pytest.mark.parametrize("overrides", SHAPES)
def test_the_formula_counts_what_the_model_has(overrides: list[str], tmp_path: Path) -> None:
    from megatron_ext.device import session
    from megatron_ext.model.assembly import build_model
    from megatron_ext.parallel.groups import open_parallel

    model = load_config(None, overrides).config.model
    with session(), open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path}/store", seed=0) as context:
        built = build_model(model, image_token=5, context=context)
        assert sum(parameter.numel() for parameter in built.parameters()) == count_parameters(model).total
