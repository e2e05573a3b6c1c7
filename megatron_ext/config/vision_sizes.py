"""How many tokens a tile has, in the encoder and in the language model. Arithmetic only."""

from __future__ import annotations

from megatron_ext.config.schema import VisionConfig


def patches_per_side(vision: VisionConfig) -> int:
    return vision.image_size // vision.patch_size


def vision_tokens(vision: VisionConfig) -> int:
    """ViT tokens of a tile: what CLVR looks at."""
    return patches_per_side(vision) ** 2


def tokens_per_tile(vision: VisionConfig) -> int:
    """Image tokens of a tile in the language model, after pixel unshuffle; 0 without vision.

    >>> tokens_per_tile(VisionConfig(image_size=32, patch_size=4, downsample=2))
    16
    """
    return vision_tokens(vision) // vision.downsample**2 if vision.enabled else 0
