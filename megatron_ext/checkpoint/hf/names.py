"""One table of names for both directions: what each of our tensors is called in a Hugging Face checkpoint, and how it is made of its parts.

    ours                                              parts there                       made by
    decoder.layers.{n}.self_attention.linear_qkv      q_proj, k_proj, v_proj            `groups`: per query group its queries, its key, its value
    decoder.layers.{n}...local_experts.{e}.linear_fc1 gate_proj, up_proj                `stack`: one above the other
    vision.layers.{n}.attn.qkv                        q_proj, k_proj, v_proj            `stack` (the original keeps them stacked)
    decoder.layers.{n}.mlp.linear_fc1 (dense)         gate_proj, up_proj                `stack`
    everything else                                   one tensor                        `same`

Three spellings: `transformers` (what `save_pretrained` writes, and the names in memory, which differ in a prefix), `original` (`InternVLChatModel`), and
`text`, a language model alone, whose names are those inside InternVL without `language_model.` in front.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_ext.checkpoint.hf.configuration import Spelling
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers

Transform = Literal["same", "stack", "groups"]


@dataclass(frozen=True)
class Entry:
    """One of our tensors, by its full name, and its parts in the other spelling, by theirs."""

    ours: str
    parts: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class _Row:
    """A row of the table. `{n}` is a layer, `{e}` an expert; `original` is None where both spellings agree."""

    ours: str
    transformers: tuple[str, ...]
    original: tuple[str, ...] | None = None
    transform: Transform = "same"


_LM = "language_model.model."
_VIT, _VIT_ORIGINAL = "vision_tower.encoder.layer.{n}.", "vision_model.encoder.layers.{n}."

_DECODER = (
    _Row("decoder.layers.{n}.input_layernorm.weight", (_LM + "layers.{n}.input_layernorm.weight",)),
    _Row(
        "decoder.layers.{n}.self_attention.linear_qkv.weight",
        tuple(_LM + f"layers.{{n}}.self_attn.{x}_proj.weight" for x in "qkv"),
        transform="groups",
    ),
    _Row("decoder.layers.{n}.self_attention.linear_proj.weight", (_LM + "layers.{n}.self_attn.o_proj.weight",)),
    _Row("decoder.layers.{n}.self_attention.q_layernorm.weight", (_LM + "layers.{n}.self_attn.q_norm.weight",)),
    _Row("decoder.layers.{n}.self_attention.k_layernorm.weight", (_LM + "layers.{n}.self_attn.k_norm.weight",)),
    _Row("decoder.layers.{n}.pre_mlp_layernorm.weight", (_LM + "layers.{n}.post_attention_layernorm.weight",)),
)
_ROUTER = _Row("decoder.layers.{n}.mlp.router.weight", (_LM + "layers.{n}.mlp.gate.weight",))
_DENSE = (
    _Row("decoder.layers.{n}.mlp.linear_fc1.weight", tuple(_LM + f"layers.{{n}}.mlp.{x}_proj.weight" for x in ("gate", "up")), transform="stack"),
    _Row("decoder.layers.{n}.mlp.linear_fc2.weight", (_LM + "layers.{n}.mlp.down_proj.weight",)),
)
_EXPERTS = (
    _Row(
        "decoder.layers.{n}.mlp.experts.local_experts.{e}.linear_fc1.weight",
        tuple(_LM + f"layers.{{n}}.mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up")),
        transform="stack",
    ),
    _Row("decoder.layers.{n}.mlp.experts.local_experts.{e}.linear_fc2.weight", (_LM + "layers.{n}.mlp.experts.{e}.down_proj.weight",)),
)
_ENDS = (
    _Row("embedding.word_embeddings.weight", (_LM + "embed_tokens.weight",)),
    _Row("decoder.final_layernorm.weight", (_LM + "norm.weight",)),
)
_HEAD = (_Row("output_layer.weight", ("language_model.lm_head.weight",)),)
_PROJECTOR = tuple(
    _Row(f"projector.{ours}.{kind}", (f"multi_modal_projector.{ours}.{kind}",), (f"mlp1.{number}.{kind}",))
    for ours, number in (("layer_norm", 0), ("linear_1", 1), ("linear_2", 3))
    for kind in ("weight", "bias")
)
_VISION_EMBEDDINGS = (
    _Row("vision.embeddings.class_embedding", ("vision_tower.embeddings.cls_token",), ("vision_model.embeddings.class_embedding",)),
    _Row("vision.embeddings.position_embedding", ("vision_tower.embeddings.position_embeddings",), ("vision_model.embeddings.position_embedding",)),
    *(
        _Row(
            f"vision.embeddings.patch_embedding.{kind}",
            (f"vision_tower.embeddings.patch_embeddings.projection.{kind}",),
            (f"vision_model.embeddings.patch_embedding.{kind}",),
        )
        for kind in ("weight", "bias")
    ),
)
_VISION_LAYER = (
    _Row("vision.layers.{n}.ls1", (_VIT + "lambda_1",), (_VIT_ORIGINAL + "ls1",)),
    _Row("vision.layers.{n}.ls2", (_VIT + "lambda_2",), (_VIT_ORIGINAL + "ls2",)),
    *(
        _Row(f"vision.layers.{{n}}.{ours}.{kind}", (f"{_VIT}{theirs}.{kind}",), (f"{_VIT_ORIGINAL}{ours}.{kind}",))
        for ours, theirs in (("attn.proj", "attention.projection_layer"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
        for kind in ("weight", "bias")
    ),
)
_VISION_NORMS = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"))


def entries(model: ModelConfig, spelling: Spelling) -> Iterator[Entry]:
    """All tensors of a model, in the order of the data: vision, projector, embedding, decoder layers, output."""
    if model.vision.enabled:
        yield from (_entry(row, spelling) for row in _VISION_EMBEDDINGS)
        for n in range(model.vision.num_layers):
            yield from (_entry(row, spelling, n) for row in _vision_layer(model))
        yield from (_entry(row, spelling) for row in _PROJECTOR)
    yield _entry(_ENDS[0], spelling)
    with_experts = expert_layers(model)
    for n in range(model.num_layers):
        yield from (_entry(row, spelling, n) for row in _DECODER)
        if n in with_experts:
            yield _entry(_ROUTER, spelling, n)
            yield from (_entry(row, spelling, n, e) for e in range(model.num_experts) for row in _EXPERTS)
        else:
            yield from (_entry(row, spelling, n) for row in _DENSE)
    yield _entry(_ENDS[1], spelling)
    if not model.tie_embeddings:
        yield from (_entry(row, spelling) for row in _HEAD)


def canonical(name: str) -> str:
    """The name that `save_pretrained` writes, of one that a model has in memory: transformers 5 keeps `model.` in front and the language model flat.

    >>> canonical("model.language_model.layers.0.input_layernorm.weight")
    'language_model.model.layers.0.input_layernorm.weight'
    >>> canonical("lm_head.weight")
    'language_model.lm_head.weight'
    """
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    match = re.fullmatch(r"model\.(language_model|vision_tower|multi_modal_projector)\.(.*)", name)
    if match is None:
        return name
    return f"language_model.model.{match[2]}" if match[1] == "language_model" else f"{match[1]}.{match[2]}"


def in_memory(name: str) -> str:
    """The inverse of `canonical`.

    >>> in_memory("vision_tower.embeddings.cls_token")
    'model.vision_tower.embeddings.cls_token'
    """
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return f"model.language_model.{name.removeprefix(_LM)}" if name.startswith(_LM) else f"model.{name}"


def _vision_layer(model: ModelConfig) -> Iterator[_Row]:
    yield from _VISION_LAYER
    kinds = ("weight", "bias") if model.vision.norm == "layernorm" else ("weight",)
    for ours, theirs in _VISION_NORMS:
        yield from (_Row(f"vision.layers.{{n}}.{ours}.{kind}", (f"{_VIT}{theirs}.{kind}",), (f"{_VIT_ORIGINAL}{ours}.{kind}",)) for kind in kinds)
    for kind in ("weight", "bias") if model.vision.qkv_bias else ("weight",):
        parts = tuple(f"{_VIT}attention.{x}_proj.{kind}" for x in "qkv")
        yield _Row(f"vision.layers.{{n}}.attn.qkv.{kind}", parts, (f"{_VIT_ORIGINAL}attn.qkv.{kind}",), "stack")
    if model.vision.qk_norm:
        for x in "qk":
            yield _Row(f"vision.layers.{{n}}.attn.{x}_norm.weight", (f"{_VIT}attention.{x}_norm.weight",), (f"{_VIT_ORIGINAL}attn.{x}_norm.weight",))


def _entry(row: _Row, spelling: Spelling, n: int = 0, e: int = 0) -> Entry:
    parts = row.original if spelling == "original" and row.original is not None else row.transformers
    named = tuple(part.format(n=n, e=e) for part in parts)
    if spelling == "text":
        named = tuple(name.removeprefix("language_model.") for name in named)
    return Entry(row.ours.format(n=n, e=e), named, row.transform if len(named) > 1 else "same")
