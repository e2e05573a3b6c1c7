"""A small real model with CLVR, and batches with images for it."""

from __future__ import annotations

import numpy as np
import torch

from megatron_ext.batch import NO_TILES, Prompt, Tiles
from megatron_ext.batch.tiles import WHOLE, grid_places
from megatron_ext.config.schema import ClvrConfig, ModelConfig, VisionConfig
from megatron_ext.model.inputs import ModelInputs, model_inputs

IMAGE, EOS, USABLE = 5, 7, 60
TOKENS_PER_TILE = 4
TANH_GATE = ClvrConfig(taps=((0, 1), (1, 2)), num_heads=4, num_kv_heads=2, head_dim=8, gate="tanh_gate")


def small_config(**changes: object) -> ModelConfig:
    """Three layers, eight experts, two taps, 16 x 16 images of 16 patches and 4 image tokens; weights large enough that everything matters."""
    vision = VisionConfig(image_size=16, patch_size=4, num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=48)
    settings = {
        "vocab_size": 64,
        "num_layers": 3,
        "hidden_size": 32,
        "head_dim": 8,
        "expert_ffn_hidden_size": 32,
        "init_std": 0.2,
        "vision": vision,
        "clvr": TANH_GATE,
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def open_gates(model: torch.nn.Module, value: float = 0.7) -> None:
    """Opens the tanh gates, which start shut, so that CLVR takes part, and whatever else of an adapter starts at 0."""
    for tap in model.decoder.taps:
        tap.gate.data.fill_(value / 10 if tap.clvr.gate_kind == "dynamic" else value)
        for name, parameter in tap.named_parameters():
            if name.endswith(("lora_out", "linear_down.weight")):
                parameter.data.fill_(value / 20)


def small_batch(rows: int = 3, length: int = 24, seed: int = 0) -> ModelInputs:
    """Rows of text with one tile each at positions 2 .. 5, whole pictures and thumbnails among them; the last row shares the first row's tile."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, USABLE, size=(rows, length))
    tokens[:, 2 : 2 + TOKENS_PER_TILE] = IMAGE
    tiles = rng.integers(0, 256, size=(max(rows - 1, 1), 16, 16, 3), dtype=np.uint8)
    row_tiles = np.arange(rows)[:, None] % len(tiles)
    places = np.resize([WHOLE, grid_places(1, 2)[-1], grid_places(1, 2)[0]], (len(tiles), 5)).astype(np.float32)
    return model_inputs(tokens, Tiles(tiles, places), row_tiles, torch.device("cpu"))


def small_batch_of_text(rows: int = 2, length: int = 16, seed: int = 1) -> ModelInputs:
    """Rows without images."""
    tokens = np.random.default_rng(seed).integers(8, USABLE, size=(rows, length))
    return model_inputs(tokens, NO_TILES, np.full((rows, 1), -1), torch.device("cpu"))


def small_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of different lengths; every third has no image."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        tiles = NO_TILES if index % 3 == 2 else Tiles.whole(rng.integers(0, 256, size=(1, 16, 16, 3), dtype=np.uint8))
        text = rng.integers(8, USABLE, size=int(rng.integers(3, 9)))
        tokens = np.concatenate([[8], [IMAGE] * TOKENS_PER_TILE * len(tiles), text]).astype(np.int32)
        prompts.append(Prompt(f"prompt/{index}", "ocr", tokens, tiles, "", {"template": "plain"}))
    return prompts


class Words:
    """The least that the engine needs of a tokenizer."""

    eos_id, vocab_size = EOS, USABLE

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Pieces(Words):
    """And what traces need of it."""

    slot_ids: tuple[int, ...] = ()

    def pieces(self, ids: list[int]) -> list[str]:
        return [f"<{number}>" for number in ids]
