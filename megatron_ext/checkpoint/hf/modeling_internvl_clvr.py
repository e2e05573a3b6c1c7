"""InternVL with cross-layer vision refinement (CLVR), for transformers. Self-contained: exported beside the weights and loaded with `trust_remote_code=True`.

For a tap (i -> j): the output h of decoder layer i asks the original ViT features, and the answer is added to the residual stream before layer j.

    z = LayerNorm(vit)      k = RMSNorm((z + positions) W_k)      v = (z + thumbnail) W_v      q = RMSNorm(RMSNorm(h) W_q)
    answer_t = softmax(q_t . k / sqrt(D)) v W_o     over the vision tokens of the images that are complete at t; times tanh(gate) where there is a gate

Queries use their own token's state alone, so generation with a cache computes what a full forward pass computes.

Positions are those in the whole picture, so a picture that is cut into tiles needs to say how:

    places = tile_places([(picture.height, picture.width)], tile_size=448, max_tiles=12)
    model.generate(**inputs, tile_places=places)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration


class InternVLClvrConfig(InternVLConfig):
    """InternVL's configuration and `clvr`: what megatron_ext calls `model.clvr`, and `ends`, the layers between which each tap lies."""

    model_type = "internvl_clvr"

    def __init__(self, clvr: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.clvr = clvr or {}
        super().__init__(**kwargs)


WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)


def tile_places(sizes: list[tuple[int, int]], tile_size: int, max_tiles: int) -> torch.Tensor:
    """Where the tiles of pictures of these (height, width) lie, [tiles, 5]: top, left, bottom and right in the picture, whose sides have length 1; then 1 for
    the thumbnail, which a picture of several tiles has at its end. The cut is that of InternVL's image processor."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    places = []
    for size in sizes:
        columns, rows = get_optimal_tiled_canvas(size, (tile_size, tile_size), 1, max_tiles)
        places += [(row / rows, column / columns, (row + 1) / rows, (column + 1) / columns, 0.0) for row in range(rows) for column in range(columns)]
        places += [(*WHOLE[:4], 1.0)] if rows * columns > 1 else []
    return torch.tensor(places)


def patch_positions(num_tokens: int, width: int, places: torch.Tensor) -> torch.Tensor:
    """2-D sin/cos embedding [tiles, tokens, width] of the centres of the tiles' patches, in their pictures."""
    side, device = int(num_tokens**0.5), places.device
    centres = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    frequencies = 2 * math.pi * 2.0 ** torch.linspace(0, math.log2(side), width // 4, device=device)

    def waves(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        angles = (start[:, None] + centres * (stop - start)[:, None])[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    top, left, bottom, right, _ = places.float().unbind(1)
    rows, columns = waves(top, bottom)[:, :, None, :].expand(-1, -1, side, -1), waves(left, right)[:, None, :, :].expand(-1, side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(1, 2)


def pixel_unshuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Folds factor x factor neighbouring tokens into one, as InternVL does before its projector."""
    images, tokens, channels = features.shape
    side = int(tokens**0.5)
    x = features.reshape(images, side, side // factor, channels * factor).transpose(1, 2)
    x = x.reshape(images, side // factor, side // factor, channels * factor**2).transpose(1, 2)
    return x.reshape(images, (side // factor) ** 2, channels * factor**2)


class LayerMixture(nn.Module):
    """Several ViT layers side by side become one: each normalised, turned by a low-rank map, and weighed."""

    def __init__(self, num_layers: int, width: int, rank: int = 8) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((num_layers,), 1 / num_layers))
        self.lora_in = nn.Parameter(torch.zeros(num_layers, width, rank))
        self.lora_out = nn.Parameter(torch.zeros(num_layers, rank, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = features.unflatten(-1, (len(self.share), -1))
        normed = F.layer_norm(layers, layers.shape[-1:]).movedim(2, 0)
        return torch.einsum("l,livh->ivh", self.share, normed + normed @ self.lora_in[:, None] @ self.lora_out[:, None])


class VisionSources(nn.Module):
    """What a tap looks at: the features as they are, folded, mixed of several layers, or learned vectors in their place."""

    def __init__(self, config: InternVLClvrConfig) -> None:
        super().__init__()
        clvr, vision = config.clvr, config.vision_config
        layers, self.fold = clvr.get("kv_layers", []), round(1 / config.downsample_ratio) if clvr.get("kv_tokens") == "unshuffled" else 1
        self.learned = nn.Parameter(torch.zeros(kv_shape(config))) if clvr.get("memory") == "learned" else None
        self.mixture = LayerMixture(len(layers), vision.hidden_size) if layers else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.learned is not None:
            return self.learned.expand(len(features), -1, -1)
        features = features if self.mixture is None else self.mixture(features)
        return features if self.fold == 1 else pixel_unshuffle(features, self.fold)


def kv_shape(config: InternVLClvrConfig) -> tuple[int, int]:
    """(tokens of a tile, width) of what taps look at."""
    side, width = config.vision_config.image_size[0] // config.vision_config.patch_size[0], config.vision_config.hidden_size
    kind = config.clvr.get("kv_tokens", "raw")
    if kind == "raw":
        return side**2, width
    small = int(side * config.downsample_ratio)
    return small**2, config.text_config.hidden_size if kind == "projected" else width * (side // small) ** 2


class RefinementFFN(nn.Module):
    """The MLP behind a tap's attention."""

    def __init__(self, hidden: int, ffn_hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.linear_up = nn.Linear(hidden, ffn_hidden, bias=False)
        self.linear_down = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, refined: torch.Tensor) -> torch.Tensor:
        return refined + self.linear_down(F.gelu(self.linear_up(self.norm(refined))))


class ClvrTap(nn.Module):
    """The adapter of one tap."""

    def __init__(self, config: InternVLClvrConfig) -> None:
        super().__init__()
        self.clvr, text, width = config.clvr, config.text_config, kv_shape(config)[1]
        clvr, hidden, eps = self.clvr, text.hidden_size, text.rms_norm_eps
        dim, ffn = clvr["head_dim"], clvr.get("ffn_hidden", 0)
        self.dim, self.groups = dim, clvr["num_heads"] // clvr["num_kv_heads"]
        self.sources = VisionSources(config)
        self.vision_norm = nn.LayerNorm(width, eps=1e-6)
        self.thumbnail = nn.Parameter(torch.zeros(width))
        self.query_norm = nn.RMSNorm(hidden, eps=eps)
        self.linear_q = nn.Linear(hidden, clvr["num_heads"] * dim, bias=False)
        self.linear_k = nn.Linear(width, clvr["num_kv_heads"] * dim, bias=False)
        self.linear_v = nn.Linear(width, clvr["num_kv_heads"] * dim, bias=False)
        self.q_layernorm, self.k_layernorm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.linear_out = nn.Linear(clvr["num_heads"] * dim, hidden, bias=False)
        kind = clvr.get("gate_kind", "scalar")
        sizes = {"scalar": (), "channel": (hidden,), "dynamic": (hidden + 1,)}
        self.gate = nn.Parameter(torch.zeros(sizes[kind])) if clvr["gate"] == "tanh_gate" or kind != "scalar" else None
        self.ffn = RefinementFFN(hidden, ffn, eps) if ffn else None

    def memory(self, features: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tiles, tokens, kv heads, dim] of ViT features [tiles, tokens, width]."""
        z = self.vision_norm(self.sources(features))
        placed = z + patch_positions(z.shape[1], z.shape[2], places).to(z.dtype)
        told = z + places[:, 4, None, None].to(z.dtype) * self.thumbnail
        keys, values = (linear(x).unflatten(-1, (-1, self.dim)) for linear, x in ((self.linear_k, placed), (self.linear_v, told)))
        return self.k_layernorm(keys), values

    def forward(self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, until: torch.Tensor, inject: torch.Tensor) -> torch.Tensor:
        """`hidden` [rows, positions, width]; keys and values [rows, kv heads, tokens, dim]; positions see the vision tokens before `until` [rows,
        positions]."""
        refined = self.look(hidden, keys, values, until, inject)
        for _ in range(self.clvr.get("inner_iterations", 1) - 1):
            refined = self.look(hidden + refined, keys, values, until, inject)
        return refined

    def look(self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, until: torch.Tensor, inject: torch.Tensor) -> torch.Tensor:
        query = self.q_layernorm(self.linear_q(self.query_norm(hidden)).unflatten(-1, (-1, self.dim))).transpose(1, 2)
        keys, values = keys.repeat_interleave(self.groups, dim=1), values.repeat_interleave(self.groups, dim=1)
        seen = (torch.arange(keys.shape[2], device=keys.device) < until[..., None]) | (until[..., None] == 0)
        answer = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None])
        answer = answer * (inject & (until > 0))[:, None, :, None].to(answer.dtype)
        out = self.linear_out(answer.transpose(1, 2).flatten(2))
        out = out if self.ffn is None else self.ffn(out)
        return out if self.gate is None else self.gate_values(self.gate, hidden) * out

    def gate_values(self, gate: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        dynamic = self.clvr.get("gate_kind") == "dynamic"
        if dynamic:
            gate = (F.rms_norm(hidden, hidden.shape[-1:]) * gate[:-1]).sum(-1, keepdim=True) + gate[-1]
        if self.clvr["gate"] == "tanh_gate":
            return torch.tanh(gate)
        return 2 * torch.sigmoid(gate) if dynamic else gate


class InternVLClvrForConditionalGeneration(InternVLForConditionalGeneration):
    """Looks at the image again while it reads and writes. What belongs to the rows of a call is kept from prefill to the decoding steps that follow it."""

    config_class = InternVLClvrConfig

    def __init__(self, config: InternVLClvrConfig) -> None:
        super().__init__(config)
        ends = config.clvr.get("ends", config.clvr.get("taps", []))
        self.clvr = nn.ModuleList(ClvrTap(config) for _ in ends)
        self._memory: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._sight: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last: torch.Tensor | None = None
        self._tiles = torch.zeros(0, dtype=torch.int64)
        self._answers: dict[int, torch.Tensor] = {}
        self._features: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        self._layers: dict[int, torch.Tensor] = {}
        for number in config.clvr.get("kv_layers", []):
            self.model.vision_tower.encoder.layer[number].register_forward_hook(self._keep_layer(number))
        shown = self.model.multi_modal_projector if config.clvr.get("kv_tokens") == "projected" else self.model.vision_tower
        shown.register_forward_hook(self._keep_features)
        layers = self.model.language_model.layers
        for tap, (source, target) in enumerate(ends):
            if source < 0:
                layers[0].register_forward_pre_hook(self._ask_first(tap))
            else:
                layers[source].register_forward_hook(self._ask(tap))
            layers[target].register_forward_pre_hook(self._inject(tap))
        self.model.language_model.register_forward_pre_hook(self._remember)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Any = None,
        tile_places: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As InternVL's. `input_ids` are needed: they say which positions stand behind which image. `tile_places` [tiles, 5] as the function of that name makes
        them; needed where a picture has several tiles."""
        if input_ids is None:
            raise ValueError("CLVR needs input_ids to know which positions may look at which image")
        self._answers = {}
        continues = past_key_values is not None and past_key_values.get_seq_length() > 0
        if continues and pixel_values is None:
            last = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device) if self._last is None else self._last
            if len(last) != len(input_ids):
                raise ValueError(f"{len(input_ids)} rows continue where {len(last)} were read")
            self._sight = last[:, None].expand(input_ids.shape), torch.ones_like(input_ids, dtype=torch.bool)
        else:
            self._memory = self._features = None
            is_image = input_ids == self.config.image_token_id
            side = self.config.vision_config.image_size[0] // self.config.vision_config.patch_size[0]
            per_tile = int(side * self.config.downsample_ratio) ** 2
            until = torch.cumsum(is_image, 1) // per_tile * kv_shape(self.config)[0]
            inject = torch.ones_like(is_image) if self.config.clvr.get("inject") == "all" else ~is_image
            self._sight, self._last = (until, inject), until[:, -1]
            self._tiles, self._places = is_image.sum(1) // per_tile, tile_places
            pictures = int((is_image & ~F.pad(is_image[:, :-1], (1, 0))).sum())
            if tile_places is None and self._tiles.sum() > pictures:
                raise ValueError(f"{int(self._tiles.sum())} tiles of {pictures} pictures: CLVR needs tile_places to know where each lies")
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, past_key_values=past_key_values, **kwargs)

    def _keep_layer(self, number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._layers[number] = (output[0] if isinstance(output, tuple) else output)[:, 1:]

        return hook

    def _keep_features(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        layers = self.config.clvr.get("kv_layers", [])
        if layers:
            self._features = torch.cat([self._layers[number] for number in layers], dim=-1)
        else:
            self._features = output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, 1:]

    def _remember(self, _module: nn.Module, _inputs: Any) -> None:
        """Keys and values of every tap, once per image, for the rows that show them."""
        if self._features is None or self._memory is not None:
            return
        counts = self._tiles.tolist()
        whole = torch.tensor([WHOLE], device=self._features.device).expand(len(self._features), -1)
        places = whole if self._places is None else self._places.to(self._features.device)
        made = [tap.memory(self._features, places) for tap in self.clvr if isinstance(tap, ClvrTap)]
        self._memory = [(self._rows(keys, counts), self._rows(values, counts)) for keys, values in made]

    @staticmethod
    def _rows(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """[tiles, tokens, heads, dim] -> [rows, heads, tokens of the row, dim], zero-padded."""
        rows = [part.flatten(0, 1) for part in x.split(counts)]
        longest = max(len(row) for row in rows)
        return torch.stack([F.pad(row, (0, 0, 0, 0, 0, longest - len(row))) for row in rows]).transpose(1, 2)

    def _look(self, tap: int, hidden: torch.Tensor) -> None:
        if self._memory is not None and self._sight is not None:
            self._answers[tap] = self.clvr[tap](hidden, *self._memory[tap], *self._sight)

    def _ask(self, tap: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._look(tap, output[0] if isinstance(output, tuple) else output)

        return hook

    def _ask_first(self, tap: int) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> None:
            self._look(tap, inputs[0])

        return hook

    def _inject(self, tap: int) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            return (inputs[0] + self._answers.pop(tap), *inputs[1:]) if tap in self._answers else None

        return hook
