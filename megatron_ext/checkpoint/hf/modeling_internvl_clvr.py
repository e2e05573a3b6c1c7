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
    """InternVL's configuration and `clvr`: taps, num_heads, num_kv_heads, head_dim, gate, inject."""

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


class ClvrTap(nn.Module):
    """The adapter of one tap."""

    def __init__(self, config: InternVLClvrConfig) -> None:
        super().__init__()
        clvr, text = config.clvr, config.text_config
        hidden, vision_hidden, dim = text.hidden_size, config.vision_config.hidden_size, clvr["head_dim"]
        self.dim, self.groups = dim, clvr["num_heads"] // clvr["num_kv_heads"]
        self.vision_norm = nn.LayerNorm(vision_hidden, eps=1e-6)
        self.thumbnail = nn.Parameter(torch.zeros(vision_hidden))
        self.query_norm = nn.RMSNorm(hidden, eps=text.rms_norm_eps)
        self.linear_q = nn.Linear(hidden, clvr["num_heads"] * dim, bias=False)
        self.linear_k = nn.Linear(vision_hidden, clvr["num_kv_heads"] * dim, bias=False)
        self.linear_v = nn.Linear(vision_hidden, clvr["num_kv_heads"] * dim, bias=False)
        self.q_layernorm = nn.RMSNorm(dim, eps=text.rms_norm_eps)
        self.k_layernorm = nn.RMSNorm(dim, eps=text.rms_norm_eps)
        self.linear_out = nn.Linear(clvr["num_heads"] * dim, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(())) if clvr["gate"] == "tanh_gate" else None

    def memory(self, features: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tiles, tokens, kv heads, dim] of ViT features [tiles, tokens, width]."""
        z = self.vision_norm(features)
        placed = z + patch_positions(z.shape[1], z.shape[2], places).to(z.dtype)
        told = z + places[:, 4, None, None].to(z.dtype) * self.thumbnail
        keys, values = (linear(x).unflatten(-1, (-1, self.dim)) for linear, x in ((self.linear_k, placed), (self.linear_v, told)))
        return self.k_layernorm(keys), values

    def forward(self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, until: torch.Tensor, inject: torch.Tensor) -> torch.Tensor:
        """`hidden` [rows, positions, width]; keys and values [rows, kv heads, tokens, dim]; positions see the vision tokens before `until` [rows,
        positions]."""
        query = self.q_layernorm(self.linear_q(self.query_norm(hidden)).unflatten(-1, (-1, self.dim))).transpose(1, 2)
        keys, values = keys.repeat_interleave(self.groups, dim=1), values.repeat_interleave(self.groups, dim=1)
        seen = (torch.arange(keys.shape[2], device=keys.device) < until[..., None]) | (until[..., None] == 0)
        answer = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None])
        answer = answer * (inject & (until > 0))[:, None, :, None].to(answer.dtype)
        out = self.linear_out(answer.transpose(1, 2).flatten(2))
        return out if self.gate is None else torch.tanh(self.gate) * out


class InternVLClvrForConditionalGeneration(InternVLForConditionalGeneration):
    """Looks at the image again while it reads and writes. What belongs to the rows of a call is kept from prefill to the decoding steps that follow it."""

    config_class = InternVLClvrConfig

    def __init__(self, config: InternVLClvrConfig) -> None:
        super().__init__(config)
        taps = config.clvr.get("taps", [])
        self.clvr = nn.ModuleList(ClvrTap(config) for _ in taps)
        self._memory: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._sight: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last: torch.Tensor | None = None
        self._tiles = torch.zeros(0, dtype=torch.int64)
        self._answers: dict[int, torch.Tensor] = {}
        self._features: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        self.model.vision_tower.register_forward_hook(self._keep_features)
        for tap, (source, target) in enumerate(taps):
            self.model.language_model.layers[source].register_forward_hook(self._ask(tap))
            self.model.language_model.layers[target].register_forward_pre_hook(self._inject(tap))
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
            until = torch.cumsum(is_image, 1) // per_tile * side**2
            inject = torch.ones_like(is_image) if self.config.clvr.get("inject") == "all" else ~is_image
            self._sight, self._last = (until, inject), until[:, -1]
            self._tiles, self._places = is_image.sum(1) // per_tile, tile_places
            pictures = int((is_image & ~F.pad(is_image[:, :-1], (1, 0))).sum())
            if tile_places is None and self._tiles.sum() > pictures:
                raise ValueError(f"{int(self._tiles.sum())} tiles of {pictures} pictures: CLVR needs tile_places to know where each lies")
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, past_key_values=past_key_values, **kwargs)

    def _keep_features(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._features = output.last_hidden_state[:, 1:]

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

    def _ask(self, tap: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._memory is not None and self._sight is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                self._answers[tap] = self.clvr[tap](hidden, *self._memory[tap], *self._sight)

        return hook

    def _inject(self, tap: int) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            return (inputs[0] + self._answers.pop(tap), *inputs[1:]) if tap in self._answers else None

        return hook
