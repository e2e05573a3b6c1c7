"""What a Hugging Face `config.json` says of a model, as our `ModelConfig`. Every key is either used, or known to mean nothing here, or an error that names it.

Read are `InternVLForConditionalGeneration` (transformers), `InternVLChatModel` (the original, whose code is never run), and `Qwen3MoeForCausalLM` and
`Qwen3ForCausalLM`, the language models inside both, alone; each in the older and newer spellings of its keys. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config.schema import ClvrConfig, ModelConfig, VisionConfig
from megatron_ext.errors import CheckpointError

Spelling = Literal["transformers", "original", "text"]
_SILENT = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "output_router_logits", "output_attentions",
    "output_hidden_states", "initializer_range", "initializer_factor", "bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "use_flash_attn",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "router_aux_loss_coef", "attention_dropout", "hidden_dropout_prob",
    "projection_dropout", "drop_path_rate", "dropout", "use_mask_token", "use_mean_pooling", "vision_feature_select_strategy", "max_window_layers",
    "max_dynamic_patch", "min_dynamic_patch", "dynamic_image_size", "use_thumbnail", "template", "system_message", "pad2square", "image_fold", "layer_types",
    "use_backbone_lora", "use_llm_lora", "hidden_act_vision", "intermediate_size", "layer_scale_init_value", "image_seq_length", "output_dim",
}  # fmt: skip
"""Keys that do not change what the model computes at inference, or that follow from others."""
_GPT_OSS_NEEDS = "attention sinks, sliding window, biases, clamped SwiGLU and MXFP4 weights"
_NORMS: dict[str, Literal["layernorm", "rmsnorm"]] = {"layer_norm": "layernorm", "rms_norm": "rmsnorm"}


@dataclass(frozen=True)
class Described:
    """What `config.json` says. `spelling` names the column of the table in `names.py`. A language model alone has the image token -1, which no text holds."""

    model: ModelConfig
    image_token: int
    spelling: Spelling
    config: Mapping[str, Any]
    """All of it, as it stands there."""


class Keys:
    """A section of `config.json` that remembers what has been asked of it."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values, self._left = where, values, set(values) - _SILENT

    def get(self, *names: str, default: Any = ...) -> Any:
        """The value of the first of these names that is there. Raises CheckpointError when there is neither one nor a default."""
        for name in names:
            self._left.discard(name)
        for name in names:
            if name in self.values:
                return self.values[name]
        if default is ...:
            raise CheckpointError(f"{self.where}.{names[0]}", "is missing", "the checkpoint's config.json is incomplete")
        return default

    def must_be(self, name: str, *allowed: Any) -> None:
        """The key is absent or has one of the values that this project computes."""
        value = self.get(name, default=allowed[0])
        if value not in allowed:
            raise CheckpointError(f"{self.where}.{name}", f"is {value!r}, which is not supported", f"supported: {', '.join(map(repr, allowed))}")

    def section(self, *names: str) -> Keys:
        return Keys(f"{self.where}.{names[0]}", self.get(*names))

    def finish(self) -> None:
        """Raises CheckpointError for a key nobody asked for: it may change the model."""
        if self._left:
            raise CheckpointError(f"{self.where}.{min(self._left)}", "is not a key this version understands", "it may change what the model computes")


def read_config(folder: Path) -> Described:
    """The model that the folder's files describe, pixels included. Raises CheckpointError naming the key that is missing, unknown or unsupported."""
    return _with_normalisation(read_architecture(folder), folder)


def read_architecture(folder: Path) -> Described:
    """The same from `config.json` alone, which says nothing of pixels."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "give the folder of a Hugging Face checkpoint") from error
    return describe(values, str(path))


def _with_normalisation(described: Described, folder: Path) -> Described:
    """Mean and deviation of pixels stand in a file of their own; a checkpoint without it says nothing, and keeps the defaults."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(str(folder / name), f"cannot be read ({error})", "copy the whole checkpoint") from error
        values = values.get("image_processor", values)
        if "image_mean" in values:
            vision = described.model.vision.model_copy(update={"image_mean": tuple(values["image_mean"]), "image_std": tuple(values["image_std"])})
            return replace(described, model=described.model.model_copy(update={"vision": vision}))
    return described


def describe(values: Mapping[str, Any], where: str = "config.json") -> Described:
    kind = (values.get("architectures") or [values.get("model_type")])[0]
    readers = {
        "InternVLForConditionalGeneration": _transformers_form,
        "InternVLChatModel": _original_form,
        "Qwen3MoeForCausalLM": _text_form,
        "Qwen3ForCausalLM": _text_form,
        "GptOssForCausalLM": _text_form,
        "internvl": _transformers_form,
        "qwen3_moe": _text_form,
        "qwen3": _text_form,
    }
    if kind not in readers:
        known = ", ".join(name for name in readers if name[0].isupper() and name != "GptOssForCausalLM")
        raise CheckpointError(f"{where}.architectures", f"{kind!r} is not an architecture this version converts", f"it converts {known}")
    return readers[kind](Keys(where, values))


def _transformers_form(keys: Keys) -> Described:
    keys.must_be("model_type", "internvl")
    keys.must_be("projector_hidden_act", "gelu")
    keys.must_be("vision_feature_layer", -1)
    tied = keys.get("tie_word_embeddings", default=True)
    downsample = _downsample(keys.get("downsample_ratio"))
    image_token = keys.get("image_token_id", "image_token_index")
    vision = _vision(keys.section("vision_config"), downsample)
    text = _text(keys.section("text_config"))
    keys.finish()
    return Described(_assemble(text, vision, tied), int(image_token), "transformers", keys.values)


def _original_form(keys: Keys) -> Described:
    """`InternVLChatModel`: the image token is not in its configuration; it is that of its tokenizer, 151671 for Qwen3."""
    keys.must_be("model_type", "internvl_chat")
    keys.must_be("ps_version", "v2")
    keys.must_be("select_layer", -1)
    downsample = _downsample(keys.get("downsample_ratio"))
    size = keys.get("force_image_size", default=None)
    vision_keys, text_keys = keys.section("vision_config"), keys.section("llm_config")
    tied = keys.get("tie_word_embeddings", default=False)
    image_token = keys.get("img_context_token_id", default=151671)
    vision = _vision(vision_keys, downsample, size)
    text = _text(text_keys)
    keys.finish()
    return Described(_assemble(text, vision, tied), int(image_token), "original", keys.values)


def _text_form(keys: Keys) -> Described:
    """A language model alone: what InternVL keeps in a section stands at the top."""
    tied = keys.get("tie_word_embeddings", default=False)
    text = _text(keys)
    return Described(_assemble(text, VisionConfig(enabled=False), tied), -1, "text", keys.values)


def _assemble(text: dict[str, Any], vision: VisionConfig, tied: bool) -> ModelConfig:
    """Without CLVR: a checkpoint from elsewhere has no adapters."""
    return ModelConfig(preset="hf", **text, tie_embeddings=tied, vision=vision, clvr=ClvrConfig(enabled=False, taps=()))


def _text(keys: Keys) -> dict[str, Any]:
    kind = keys.get("model_type")
    if kind == "gpt_oss":
        raise CheckpointError(f"{keys.where}.model_type", f"is {kind!r}, whose {_GPT_OSS_NEEDS} are missing here", "see docs/decisions/0011")
    if kind not in ("qwen3_moe", "qwen3"):
        raise CheckpointError(f"{keys.where}.model_type", f"is {kind!r}, which is not converted", "converted: 'qwen3_moe', 'qwen3'")
    keys.must_be("attention_bias", False)
    keys.must_be("hidden_act", "silu")
    keys.must_be("sliding_window", None)
    keys.must_be("use_sliding_window", False)
    keys.get("tie_word_embeddings", default=None)  # the top level decides (InternVL ignores this one)
    settings = {
        "vocab_size": keys.get("vocab_size"),
        "num_layers": keys.get("num_hidden_layers"),
        "hidden_size": keys.get("hidden_size"),
        "num_attention_heads": keys.get("num_attention_heads"),
        "num_query_groups": keys.get("num_key_value_heads"),
        "head_dim": keys.get("head_dim"),
        **(_experts(keys) if kind == "qwen3_moe" else {"num_experts": 0, "ffn_hidden_size": keys.get("intermediate_size")}),
        **_rope(keys),
        "norm_eps": keys.get("rms_norm_eps"),
        "max_positions": keys.get("max_position_embeddings"),
    }
    keys.finish()
    return settings


def _rope(keys: Keys) -> dict[str, Any]:
    """Both spellings: `rope_parameters` holds theta and scaling; before, they stood apart."""
    theta, older = keys.get("rope_theta", default=1e6), keys.get("rope_scaling", default=None)
    newer = keys.get("rope_parameters", default=None)
    rope = Keys(f"{keys.where}.{'rope_scaling' if newer is None else 'rope_parameters'}", newer if newer is not None else older or {})
    settings: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", default=theta))}
    kind = rope.get("rope_type", "type", default="default")
    if kind in ("linear", "yarn"):
        settings["rope_scaling"] = {"kind": kind, "factor": rope.get("factor")}
    elif kind != "default":
        raise CheckpointError(f"{rope.where}.rope_type", f"is {kind!r}, which is not supported", "supported: 'default', 'linear', 'yarn'")
    if kind == "yarn":
        settings["rope_scaling"] |= {
            "original_positions": rope.get("original_max_position_embeddings"),
            "beta_fast": rope.get("beta_fast", default=None) or 32.0,
            "beta_slow": rope.get("beta_slow", default=None) or 1.0,
            "attention_factor": rope.get("attention_factor", default=None),
            "truncate": rope.get("truncate", default=True),
        }
    rope.finish()
    return settings


def _experts(keys: Keys) -> dict[str, Any]:
    """Layer n is dense where `mlp_only_layers` names it, or n + 1 is no multiple of `decoder_sparse_step` (transformers, modeling_qwen3_moe.py)."""
    named, step = keys.get("mlp_only_layers", default=[]), keys.get("decoder_sparse_step", default=1)
    dense = tuple(layer for layer in range(keys.get("num_hidden_layers")) if layer in named or (layer + 1) % step)
    return {
        "num_experts": keys.get("num_experts", "num_local_experts"),
        "experts_per_token": keys.get("num_experts_per_tok"),
        "expert_ffn_hidden_size": keys.get("moe_intermediate_size"),
        "norm_topk_prob": keys.get("norm_topk_prob", default=False),
        "dense_layers": dense,
        **({"ffn_hidden_size": keys.get("intermediate_size")} if dense else {}),
    }


def _vision(keys: Keys, downsample: int, image_size: int | None = None) -> VisionConfig:
    """Of either form: they differ in the names of three keys. `image_size` is what the original form says at its top."""
    keys.must_be("model_type", "internvl_vision", "intern_vit_6b")
    keys.must_be("hidden_act", "gelu")
    keys.must_be("num_channels", 3)
    keys.must_be("use_absolute_position_embeddings", True)
    keys.must_be("norm_type", *_NORMS)
    stored = _square(keys, "image_size")
    vision = VisionConfig(
        image_size=image_size or stored,
        patch_size=_square(keys, "patch_size"),
        num_layers=keys.get("num_hidden_layers"),
        hidden_size=keys.get("hidden_size"),
        num_attention_heads=keys.get("num_attention_heads"),
        ffn_hidden_size=keys.get("intermediate_size"),
        qk_norm=keys.get("use_qk_norm", "qk_normalization", default=False),
        norm=_NORMS[keys.get("norm_type")],
        qkv_bias=keys.get("attention_bias", "qkv_bias"),
        norm_eps=keys.get("layer_norm_eps"),
        downsample=downsample,
    )
    keys.finish()
    return vision


def _square(keys: Keys, name: str) -> int:
    value = keys.get(name)
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise CheckpointError(f"{keys.where}.{name}", f"is {value}, and only squares are supported", "resize the images of training instead")
    return int(sides[0])


def _downsample(ratio: float) -> int:
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-9:
        raise CheckpointError("config.json.downsample_ratio", f"{ratio} is not one over a whole number", "0.5 is InternVL's")
    return factor
