"""The shape of every tensor of a model, by its full name: arithmetic on the configuration, so that a checkpoint is checked before a byte is written."""

from __future__ import annotations

import re

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import vision_tokens


def full_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of the full tensor `name` of this model without CLVR. Raises KeyError for a name that no such model has."""
    kind = re.sub(r"\.(layers|local_experts)\.\d+\.", r".\1.", name)
    hidden, ffn, dim = model.hidden_size, model.expert_ffn_hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * dim, model.num_query_groups * dim
    vision = model.vision
    width, patch = vision.hidden_size, vision.patch_size
    folded = width * vision.downsample**2
    if kind.startswith("decoder.layers."):
        return {
            "input_layernorm.weight": (hidden,),
            "self_attention.linear_qkv.weight": (query + 2 * key_value, hidden),
            "self_attention.linear_proj.weight": (hidden, query),
            "self_attention.q_layernorm.weight": (dim,),
            "self_attention.k_layernorm.weight": (dim,),
            "pre_mlp_layernorm.weight": (hidden,),
            "mlp.linear_fc1.weight": (2 * model.ffn_hidden_size, hidden),
            "mlp.linear_fc2.weight": (hidden, model.ffn_hidden_size),
            "mlp.router.weight": (model.num_experts, hidden),
            "mlp.experts.local_experts.linear_fc1.weight": (2 * ffn, hidden),
            "mlp.experts.local_experts.linear_fc2.weight": (hidden, ffn),
        }[kind.removeprefix("decoder.layers.")]
    if kind.startswith("vision.layers."):
        tail = kind.removeprefix("vision.layers.")
        matrices = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (vision.ffn_hidden_size, width),
            "mlp.fc2": (width, vision.ffn_hidden_size),
        }
        linear, _, part = tail.rpartition(".")
        if linear in matrices:
            return matrices[linear] if part == "weight" else matrices[linear][:1]
        if tail in ("ls1", "ls2") or linear in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
            return (width,)
        raise KeyError(name)
    return {
        "vision.embeddings.class_embedding": (1, 1, width),
        "vision.embeddings.position_embedding": (1, vision_tokens(vision) + 1, width),
        "vision.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision.embeddings.patch_embedding.bias": (width,),
        "projector.layer_norm.weight": (folded,),
        "projector.layer_norm.bias": (folded,),
        "projector.linear_1.weight": (hidden, folded),
        "projector.linear_1.bias": (hidden,),
        "projector.linear_2.weight": (hidden, hidden),
        "projector.linear_2.bias": (hidden,),
        "embedding.word_embeddings.weight": (model.vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (model.vocab_size, hidden),
    }[kind]
