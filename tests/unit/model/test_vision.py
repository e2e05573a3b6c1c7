"""The vision tower and projector compute what transformers' InternVL computes from the same weights."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.config.schema import VisionConfig
from megatron_ext.model.projector import Projector, pixel_unshuffle
from megatron_ext.model.vision import InternViT


def reference_tower(config: VisionConfig) -> torch.nn.Module:
    from transformers.models.internvl import InternVLVisionConfig, InternVLVisionModel

    settings = InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size,
        image_size=[config.image_size, config.image_size],
        patch_size=[config.patch_size, config.patch_size],
        use_qk_norm=config.qk_norm,
        norm_type="layer_norm" if config.norm == "layernorm" else "rms_norm",
        attention_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = InternVLVisionModel(settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def copy_weights(reference: torch.nn.Module, ours: InternViT) -> None:
    state = reference.state_dict()
    out = {
        "embeddings.class_embedding": state["embeddings.cls_token"],
        "embeddings.position_embedding": state["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    for index in range(len(ours.layers)):
        theirs, mine = f"encoder.layer.{index}.", f"layers.{index}."
        for kind in ("weight", "bias"):
            parts = [state.get(f"{theirs}attention.{x}_proj.{kind}") for x in "qkv"]
            if parts[0] is not None:
                out[f"{mine}attn.qkv.{kind}"] = torch.cat(parts)
            pairs = {
                "attn.proj": "attention.projection_layer",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
            }
            pairs |= {"attn.q_norm": "attention.q_norm", "attn.k_norm": "attention.k_norm"}
            out |= {f"{mine}{a}.{kind}": state[f"{theirs}{b}.{kind}"] for a, b in pairs.items() if f"{theirs}{b}.{kind}" in state}
        out |= {f"{mine}ls1": state[f"{theirs}lambda_1"], f"{mine}ls2": state[f"{theirs}lambda_2"]}
    ours.load_state_dict(out)


@pytest.mark.parametrize(
    ("qk_norm", "norm", "bias"), [(False, "layernorm", True), (True, "rmsnorm", False)], ids=["InternViT-300M style", "InternViT-6B style"]
)
def test_the_encoder_equals_transformers_internvl(qk_norm: bool, norm: str, bias: bool) -> None:
    config = VisionConfig(
        image_size=32, patch_size=8, num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=96, qk_norm=qk_norm, norm=norm, qkv_bias=bias
    )  # type: ignore[arg-type]
    reference, ours = reference_tower(config), InternViT(config)
    copy_weights(reference, ours)
    pixels = torch.randn(3, 3, 32, 32)
    expected = reference(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours(pixels), expected, rtol=1e-5, atol=1e-5)


def test_pixel_unshuffle_and_projector_equal_transformers_internvl() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    features = torch.randn(2, 16, 8)
    shuffled = InternVLModel.pixel_shuffle(None, features.reshape(2, 4, 4, 8), scale_factor=0.5).reshape(2, 4, 32)
    assert torch.equal(pixel_unshuffle(features, 2), shuffled)

    class Settings:
        class vision_config:
            hidden_size = 8

        class text_config:
            hidden_size = 24

        downsample_ratio = 0.5
        projector_hidden_act = "gelu"

    reference, ours = InternVLMultiModalProjector(Settings), Projector(VisionConfig(hidden_size=8, downsample=2), 24)
    ours.load_state_dict(reference.state_dict())
    torch.testing.assert_close(ours(features), reference(shuffled))


def test_pixel_unshuffle_joins_the_four_neighbours_of_a_square() -> None:
    """On a 4 x 4 grid of one channel, numbered row by row, the first image token holds patches 0, 1, 4 and 5."""
    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert sorted(pixel_unshuffle(grid, 2)[0, 0].tolist()) == [0, 1, 4, 5]
