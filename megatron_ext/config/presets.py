"""Named models. `model.preset` picks one; whatever the file or the command line says overrides it.

A preset is a part of a configuration: what follows from the model besides its own numbers (the size of an image, say) stands here too.
"""

from __future__ import annotations

from typing import Any

# What InternViT-300M and InternViT-6B, and Qwen3-30B-A3B and Qwen3-235B-A22B, have in common.
_INTERN_VIT: dict[str, Any] = {
    "image_size": 448,
    "patch_size": 14,
    "layer_scale_init": 0.1,
    "norm_eps": 1e-6,
    "downsample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_QWEN3_MOE: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_experts": 128,
    "experts_per_token": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "max_positions": 40960,
    "dtype": "bf16",
}

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough for a laptop without a GPU. The schema's defaults are this model's numbers; narrow layers want larger initial weights than 0.02.
    "tiny": {"model": {"init_std": 0.08}, "discover": {"committee_top": 2}},
    # InternVL3.5-30B-A3B: InternViT-300M, pixel unshuffle 2, Qwen3-30B-A3B. Taps at the middle layers, which carry object-specific image content.
    "internvl3_5_30b_a3b": {
        "model": {
            **_QWEN3_MOE,
            "num_layers": 48,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_query_groups": 4,
            "expert_ffn_hidden_size": 768,
            "vision": {
                **_INTERN_VIT,
                "num_layers": 24,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "ffn_hidden_size": 4096,
                "qk_norm": False,
                "norm": "layernorm",
                "qkv_bias": True,
            },
            "clvr": {"taps": [[12, 16], [20, 24], [28, 32]], "num_heads": 16, "num_kv_heads": 4, "head_dim": 128},
        },
        "data": {"image_size": 448, "max_length": 8192},
        "discover": {"committee_top": 8, "experts_per_layer": 8},
    },
    # InternVL3.5-241B-A28B: InternViT-6B (RMSNorm, q and k norms over the full width, no qkv bias), Qwen3-235B-A22B. Taps at the same depths as above.
    "internvl3_5_241b_a28b": {
        "model": {
            **_QWEN3_MOE,
            "num_layers": 94,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "num_query_groups": 4,
            "expert_ffn_hidden_size": 1536,
            "vision": {
                **_INTERN_VIT,
                "num_layers": 45,
                "hidden_size": 3200,
                "num_attention_heads": 25,
                "ffn_hidden_size": 12800,
                "qk_norm": True,
                "norm": "rmsnorm",
                "qkv_bias": False,
            },
            "clvr": {"taps": [[24, 32], [40, 48], [56, 64]], "num_heads": 16, "num_kv_heads": 4, "head_dim": 128},
        },
        "data": {"image_size": 448, "max_length": 8192},
        "discover": {"committee_top": 8, "experts_per_layer": 8},
    },
}
