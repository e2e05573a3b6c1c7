"""Small random Hugging Face checkpoints, built and saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

IMAGE_TOKEN = 5


def build(seed: int = 0, *, tied: bool = False, style_6b: bool = False, **text: Any) -> Any:
    """An InternVL with a Qwen3-MoE language model, or a dense one (`model_type="qwen3"`): images of 16 patches and 4 image tokens, every weight random."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [16, 16],
        "patch_size": [4, 4],
        "norm_type": "rms_norm" if style_6b else "layer_norm",
        "attention_bias": not style_6b,
        "use_qk_norm": style_6b,
        "layer_norm_eps": 1e-6,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=_language(**text),
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    return _random(InternVLForConditionalGeneration, config, seed)


def build_text(seed: int = 0, **text: Any) -> Any:
    """The language model of `build` alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _language(**text)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return _random(AutoModelForCausalLM.from_config, config, seed)


def _language(model_type: str = "qwen3_moe", **changes: Any) -> dict[str, Any]:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True} if model_type == "qwen3_moe" else {}
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **experts,
        **changes,
    }


def _random(make: Callable[[Any], Any], config: Any, seed: int) -> Any:
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2)
    return model


def save(folder: Path, **options: Any) -> Path:
    """A saved checkpoint; `max_shard_size` cuts it into shards."""
    shard = options.pop("max_shard_size", "5GB")
    build(**options).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's weight files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found
