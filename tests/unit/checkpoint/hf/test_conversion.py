"""A checkpoint from Hugging Face computes here what it computes there, and comes back bit for bit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_ext.batch.tiles import grid_places
from megatron_ext.checkpoint.dist import load_checkpoint, save_checkpoint
from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.hf.from_megatron import MANIFEST, megatron_to_hf
from megatron_ext.checkpoint.hf.shapes import full_shape
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import ClvrConfig, ModelConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.errors import CheckpointError
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.groups import ParallelContext
from tests.support import hf

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "tied, one group of queries": {"tied": True, "num_key_value_heads": 1},
    "as many keys as queries, top 3 of 5": {"num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 3},
    "gates over all experts": {"norm_topk_prob": False},
    "InternViT-6B style, two layers": {"style_6b": True, "num_hidden_layers": 2},
    "heads wider than hidden / heads": {"head_dim": 16},
    "every other layer dense": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "one layer named dense": {"mlp_only_layers": [0]},
    "positions stretched": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "YaRN": {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
    "YaRN, all of it": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
            "truncate": False,
        },
    },
    "dense": {"model_type": "qwen3"},
    "dense and tied": {"model_type": "qwen3", "tied": True},
}
TEXT: dict[str, dict[str, Any]] = {
    "experts": {},
    "experts, tied": {"tie_word_embeddings": True},
    "dense": {"model_type": "qwen3"},
    "dense, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
}


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of one image each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 64, (2, 20), generator=generator)
    tokens[:, 2:6] = hf.IMAGE_TOKEN
    return tokens, torch.randn(2, 3, 16, 16, generator=generator)


def loaded(folder: Path, model: ModelConfig, context: ParallelContext, seed: int = 7) -> VisionLanguageModel:
    built = build_model(model, hf.IMAGE_TOKEN, context, seed=seed).eval()
    load_checkpoint(folder, built, context=context, model_config=model)
    return built


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_agree_with_transformers_and_every_tensor_comes_back(context: ParallelContext, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = hf.build(**options)
    theirs.save_pretrained(tmp_path / "hf")
    described = hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    ours = loaded(tmp_path / "ours", described.model, context)
    tokens, pixels = rows(0)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=pixels).logits
        found = ours(ModelInputs(tokens, pixels, torch.tensor([[0], [1]]))).transpose(0, 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    megatron_to_hf(tmp_path / "ours", tmp_path / "back", tmp_path / "hf")
    before, after = hf.tensors(tmp_path / "hf"), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(tensor.dtype == after[name].dtype and tensor.equal(after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("options", TEXT.values(), ids=TEXT.keys())
def test_a_language_model_alone_computes_transformers_logits_and_comes_back(context: ParallelContext, tmp_path: Path, options: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    theirs = hf.build_text(**options)
    theirs.save_pretrained(tmp_path / "hf")
    described = hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    assert not described.model.vision.enabled and described.model.tie_embeddings == options.get("tie_word_embeddings", False)
    ours = loaded(tmp_path / "ours", described.model, context)
    tokens, _ = rows(0)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        found = ours(ModelInputs(tokens, torch.zeros(0, 3, 16, 16), torch.full((2, 1), -1))).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    megatron_to_hf(tmp_path / "ours", tmp_path / "back", tmp_path / "hf")
    before, after = hf.tensors(tmp_path / "hf"), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_text_alone_and_several_tiles_agree_too(context: ParallelContext, tmp_path: Path) -> None:
    theirs = hf.build()
    theirs.save_pretrained(tmp_path / "hf")
    ours = loaded(tmp_path / "ours", hf_to_megatron(tmp_path / "hf", tmp_path / "ours").model, context)
    tokens, pixels = rows(1)
    two = tokens.clone()
    two[:, 10:14] = hf.IMAGE_TOKEN
    pixels = torch.cat([pixels, pixels.flip(0)])
    text = tokens.clone()
    text[text == hf.IMAGE_TOKEN] = 9
    with torch.no_grad():
        many = ours(ModelInputs(two, pixels, torch.tensor([[0, 1], [2, 3]]))).transpose(0, 1)
        plain = ours(ModelInputs(text, torch.zeros(0, 3, 16, 16), torch.full((2, 1), -1))).transpose(0, 1)
        torch.testing.assert_close(many, theirs(input_ids=two, pixel_values=pixels).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(plain, theirs(input_ids=text).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"mlp_only_layers": [1]}, {"model_type": "qwen3"}], ids=["experts", "one layer dense", "dense"])
def test_hidden_states_and_experts_agree_layer_by_layer(context: ParallelContext, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = hf.build(seed=3, **options)
    theirs.save_pretrained(tmp_path / "hf")
    ours = loaded(tmp_path / "ours", hf_to_megatron(tmp_path / "hf", tmp_path / "ours").model, context)
    tokens, pixels = rows(2)
    chosen: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []
    for layer in theirs.model.language_model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[-1]))
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output[0] if isinstance(output, tuple) else output))
    mine: list[torch.Tensor] = []
    for layer in ours.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: mine.append(output[0]))
    with torch.no_grad(), ours.router_tap.record() as routes:
        theirs(input_ids=tokens, pixel_values=pixels)
        ours(ModelInputs(tokens, pixels, torch.tensor([[0], [1]])))
    for found, expected in zip(mine, layers, strict=True):
        torch.testing.assert_close(found.transpose(0, 1), expected, rtol=0, atol=1e-4)
    experts = routes.experts(40).unflatten(0, (20, 2)).transpose(0, 1)
    assert experts.shape[2] == len(chosen) == len(expert_layers(ours.model_config))
    for number, expected in enumerate(chosen):
        assert torch.equal(experts[:, :, number].sort(-1).values, expected.view(2, 20, -1).sort(-1).values)


def test_shards_their_index_and_the_names_in_memory_are_read(context: ParallelContext, tmp_path: Path) -> None:
    """Three spellings of one checkpoint: one file, shards, and the fused names that a model has in memory."""
    theirs = hf.build()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert any("gate_up_proj" in name for name in state)
    safetensors.torch.save_file(state, tmp_path / "memory" / "model.safetensors")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    weights = []
    for name in ("one", "shards", "memory"):
        described = hf_to_megatron(tmp_path / name, tmp_path / f"ours-{name}")
        weights.append(loaded(tmp_path / f"ours-{name}", described.model, context).state_dict())
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items() if isinstance(tensor, torch.Tensor))


def original_names(folder: Path, destination: Path) -> None:
    """The same weights as `InternVLChatModel` has them, with its configuration."""
    values = json.loads((folder / "config.json").read_text())
    vision, text = values["vision_config"], dict(values["text_config"])
    text["num_experts"], text["rope_theta"] = text.pop("num_local_experts"), text.pop("rope_parameters")["rope_theta"]
    renamed: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    plain = {"attention.projection_layer": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2"}
    ends = {"cls_token": "class_embedding", "position_embeddings": "position_embedding", "patch_embeddings.projection": "patch_embedding"}
    for name, tensor in hf.tensors(folder).items():
        new = name.replace("vision_tower.encoder.layer.", "vision_model.encoder.layers.").replace("vision_tower.", "vision_model.")
        for theirs, original in {**plain, **ends}.items():
            new = new.replace(theirs, original)
        for number, part in enumerate(("layer_norm", "linear_1", "linear_2")):
            new = new.replace(f"multi_modal_projector.{part}", f"mlp1.{(0, 1, 3)[number]}")
        if new.startswith("vision_model.") and any(f"attention.{x}_proj" in new for x in "qkv"):
            letter = new.split("attention.")[1][0]
            stacks.setdefault(new.replace(f"attention.{letter}_proj", "attn.qkv"), {})[letter] = tensor
        else:
            renamed[new] = tensor
    renamed |= {name: torch.cat([parts[x] for x in "qkv"]) for name, parts in stacks.items()}
    destination.mkdir()
    safetensors.torch.save_file(renamed, destination / "model.safetensors")
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": 16,
        "img_context_token_id": hf.IMAGE_TOKEN,
        "llm_config": text,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "image_size": 16,
            "patch_size": 4,
            **{key: vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")},
        },
    }
    (destination / "config.json").write_text(json.dumps(config))


def test_the_original_names_give_the_same_checkpoint_and_come_back_as_they_were(context: ParallelContext, tmp_path: Path) -> None:
    hf.save(tmp_path / "hf")
    original_names(tmp_path / "hf", tmp_path / "original")
    first = hf_to_megatron(tmp_path / "hf", tmp_path / "a")
    second = hf_to_megatron(tmp_path / "original", tmp_path / "b")
    assert first.model == second.model and second.spelling == "original"
    one, other = (loaded(tmp_path / name, first.model, context).state_dict() for name in "ab")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items() if isinstance(tensor, torch.Tensor))
    megatron_to_hf(tmp_path / "b", tmp_path / "back", tmp_path / "original")
    before, after = hf.tensors(tmp_path / "original"), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


def test_transformers_loads_what_we_export_with_nothing_missing_and_nothing_unexpected(tmp_path: Path) -> None:
    from transformers import InternVLForConditionalGeneration

    hf.save(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    megatron_to_hf(tmp_path / "ours", tmp_path / "back", tmp_path / "hf", max_shard_bytes=60_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    _, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "back" / MANIFEST).read_text()).keys() >= {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fresh_clvr_adapters_change_no_logit_of_a_converted_checkpoint(context: ParallelContext, tmp_path: Path, dtype: str) -> None:
    hf.save(tmp_path / "hf")
    described = hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    plain = described.model.model_copy(update={"dtype": dtype})
    looking = plain.model_copy(update={"clvr": ClvrConfig(taps=((0, 1), (1, 2)), head_dim=8)})
    tokens, pixels = rows(4)
    inputs = ModelInputs(tokens, pixels, torch.tensor([[0], [1]]))
    with torch.no_grad():
        logits = [loaded(tmp_path / "ours", model, context)(inputs) for model in (plain, looking)]
    assert (logits[0] - logits[1]).abs().max() == 0


def looking_again(context: ParallelContext, folder: Path, gate: str, inject: str = "text", **options: Any) -> tuple[VisionLanguageModel, ModelConfig]:
    """A converted checkpoint with CLVR adapters that do something, saved as if it had been trained, in `folder / "trained"`."""
    hf.save(folder / "hf")
    described = hf_to_megatron(folder / "hf", folder / "ours")
    clvr = ClvrConfig(taps=((0, 1), (0, 2)), num_heads=4, num_kv_heads=2, head_dim=8, gate=gate, inject=inject, **options)  # type: ignore[arg-type]
    looking = described.model.model_copy(update={"clvr": clvr})
    model = loaded(folder / "ours", looking, context)
    with torch.no_grad():
        for name, parameter in model.decoder.taps.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    save_checkpoint(folder / "trained", 3, model, None, {"stage": "sft"}, context, looking, keep=1)
    return model, looking


MORE = {"inner_iterations": 2, "ffn_hidden": 16}


@pytest.mark.parametrize(
    ("gate", "inject", "options"),
    [
        ("zero_out", "text", {}),
        ("tanh_gate", "all", {}),
        ("tanh_gate", "text", {"kv_layers": (0,), "kv_tokens": "unshuffled", "gate_kind": "dynamic", "query_source": "input_embedding", **MORE}),
        ("zero_out", "text", {"kv_tokens": "projected", "gate_kind": "channel", "query_source": "same_layer"}),
    ],
    ids=["as published", "gates", "layers, folded, asked first", "projected"],
)
def test_an_exported_clvr_model_computes_our_logits_in_transformers_and_generates_with_its_cache(
    context: ParallelContext, tmp_path: Path, gate: str, inject: str, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForImageTextToText

    ours, _ = looking_again(context, tmp_path, gate, inject, **options)
    megatron_to_hf(tmp_path / "trained", tmp_path / "exported", tmp_path / "hf", max_shard_bytes=60_000)
    theirs, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "exported", trust_remote_code=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, pixels = rows(5)
    with torch.no_grad():
        expected = ours(ModelInputs(tokens, pixels, torch.tensor([[0], [1]]))).transpose(0, 1)
        found = theirs.eval()(input_ids=tokens, pixel_values=pixels).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        written = theirs.generate(input_ids=tokens, pixel_values=pixels, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        again = theirs(input_ids=written[:, :-1], pixel_values=pixels).logits[:, tokens.shape[1] - 1 :].argmax(-1)
        blind = ours(ModelInputs(tokens, -pixels, torch.tensor([[0], [1]]))).transpose(0, 1)
    assert torch.equal(written[:, tokens.shape[1] :], again), "greedy answers with a cache are those of full forward passes"
    assert (blind - expected).abs().max() > 1e-2


def test_an_exported_clvr_model_knows_where_the_tiles_of_a_picture_lie(context: ParallelContext, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    ours, _ = looking_again(context, tmp_path, "zero_out")
    megatron_to_hf(tmp_path / "trained", tmp_path / "exported", tmp_path / "hf")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", trust_remote_code=True, attn_implementation="eager").eval()
    tile_places = sys.modules[type(theirs).__module__].tile_places
    places = tile_places([(16, 32), (16, 16)], tile_size=16, max_tiles=4)
    assert torch.equal(places, torch.from_numpy(np.concatenate([grid_places(1, 2), grid_places(1, 1)])))
    tokens = torch.randint(8, 64, (1, 30), generator=torch.Generator().manual_seed(6))
    tokens[:, 2:14] = tokens[:, 20:24] = hf.IMAGE_TOKEN
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    inputs = ModelInputs(tokens, pixels, torch.tensor([[0, 1, 2, 3]]), places_I5=places)
    with torch.no_grad():
        expected = ours(inputs).transpose(0, 1)
        torch.testing.assert_close(theirs(input_ids=tokens, pixel_values=pixels, tile_places=places).logits, expected, rtol=0, atol=1e-4)
        assert (ours(replace(inputs, places_I5=None)).transpose(0, 1) - expected).abs().max() > 1e-2
        theirs.generate(input_ids=tokens, pixel_values=pixels, tile_places=places, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        with pytest.raises(ValueError, match="4 tiles of 2 pictures: CLVR needs tile_places"):
            theirs(input_ids=tokens, pixel_values=pixels)


def test_options_that_transformers_would_compute_otherwise_are_refused(context: ParallelContext, tmp_path: Path) -> None:
    looking_again(context, tmp_path, "zero_out", memory="shuffled")
    with pytest.raises(CheckpointError, match="the code for transformers does not compute: memory = shuffled"):
        megatron_to_hf(tmp_path / "trained", tmp_path / "back", tmp_path / "hf")


def test_adapters_are_left_out_when_asked(context: ParallelContext, tmp_path: Path) -> None:
    looking_again(context, tmp_path, "zero_out")
    with pytest.raises(CheckpointError, match="was not converted from a Hugging Face checkpoint; name one of the same architecture with --like"):
        megatron_to_hf(tmp_path / "trained", tmp_path / "back", without_clvr=True)
    megatron_to_hf(tmp_path / "trained", tmp_path / "back", tmp_path / "hf", without_clvr=True)
    before, after = hf.tensors(tmp_path / "hf"), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    hf.save(tmp_path / "hf")

    def interrupt(unit: str, done: int, total: int) -> None:
        if unit == "layer_0001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(tmp_path / "hf", tmp_path / "ours", interrupt)
    assert latest_step(tmp_path / "ours") is None
    draft = tmp_path / "ours" / "step_000000.tmp"
    kept = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.distcp")}
    assert len(kept) == 5
    hf_to_megatron(tmp_path / "hf", tmp_path / "ours")
    assert latest_step(tmp_path / "ours") == 0 and not draft.exists()
    final = tmp_path / "ours" / "step_000000"
    assert {name: (final / name).stat().st_mtime_ns for name in kept} == kept


def test_shapes_by_arithmetic_are_those_of_the_built_model(context: ParallelContext, tmp_path: Path) -> None:
    for options in ({}, {"style_6b": True}, {"model_type": "qwen3"}, {"mlp_only_layers": [1]}):
        hf.save(tmp_path / str(options), **options)
        model = hf_to_megatron(tmp_path / str(options), tmp_path / f"ours{options}").model
        for name, parameter in build_model(model, hf.IMAGE_TOKEN, context).named_parameters():
            assert full_shape(name, model) == tuple(parameter.shape), name
