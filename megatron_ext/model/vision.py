"""InternViT: the vision encoder of InternVL3.5.

    pixels_ICHW -> patches + class token + learned positions -> layers (pre-norm, layer scale) -> features_IVH, class token dropped, no final norm

Every tensor-parallel rank runs the whole encoder (25 heads of InternViT-6B divide by no useful number, and the official RL freezes it): its gradients
come out equal on all of them.
Names and order follow the original `modeling_intern_vit.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.config.schema import VisionConfig


def _norm(config: VisionConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Embeddings(nn.Module):
    """Patch embedding (a convolution whose stride is its size), class token, learned absolute positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))

    def forward(self, pixels_ICHW: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels_ICHW).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.position_embedding


class Attention(nn.Module):
    """Full attention; `qk_norm` is over the whole width, not per head (InternViT-6B)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_IVH: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x_IVH).chunk(3, dim=-1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_norm(query), self.k_norm(key), value)]
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """x += ls1 * attn(norm1(x));  x += ls2 * mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn, self.mlp = Attention(config), FeedForward(config)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class InternViT(nn.Module):
    """Pixels float [I, 3, image_size, image_size], normalised -> features [I, V, H_vit] in row-major patch order; those of `also` layers, numbered from 0,
    behind them along the last axis."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, pixels_ICHW: torch.Tensor, also: tuple[int, ...] = ()) -> torch.Tensor:
        x = self.embeddings(pixels_ICHW)
        kept: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in also:
                kept[number] = x[:, 1:]
        return torch.cat([x[:, 1:], *(kept[number] for number in also)], dim=-1) if also else x[:, 1:]
