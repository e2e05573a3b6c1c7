"""Another picture in the place of a tile: for the ablation `model.clvr.memory = shuffled`, whose taps look at a picture, and at the wrong one, and for
evaluation, which shows a trained model's taps those of other prompts.

Which one depends on nothing but the tile's own pixels, through a hash. A tile of another sample in the batch would do for a training step alone: rollouts,
the learner, evaluation and a cached answer batch the same prompt with different others, and would disagree about what the model computes. The pictures are
mosaics of colours drawn once from a fixed seed, so they tell nothing about the tile but a hash of it.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

NUM_PICTURES, FIELDS = 64, 8


def other_pictures(tiles_ICHW: torch.Tensor, pictures_KCHW: torch.Tensor | None = None) -> torch.Tensor:
    """[I, 3, H, W] in [-1, 1], like the tiles, which come from bytes: one of the given pictures (None: the mosaics) for each, and never itself
    where there is another. The same for the same tile on every device and in every batch."""
    pictures_KCHW = (_mosaics() if pictures_KCHW is None else pictures_KCHW).to(tiles_ICHW)
    chosen_I = picture_of(tiles_ICHW, len(pictures_KCHW))
    if pictures_KCHW.shape[2:] == tiles_ICHW.shape[2:]:
        itself_I = (pictures_KCHW[chosen_I] == tiles_ICHW).flatten(1).all(1)
        chosen_I = torch.where(itself_I, (chosen_I + 1) % len(pictures_KCHW), chosen_I)
    return F.interpolate(pictures_KCHW[chosen_I], size=tiles_ICHW.shape[2:], mode="nearest")


def picture_of(tiles_ICHW: torch.Tensor, num_pictures: int = NUM_PICTURES) -> torch.Tensor:
    """Int64 [I]: which of the pictures stands for each tile. Integers alone, so that nothing rounds."""
    bytes_IX = ((tiles_ICHW.float() + 1) * 127.5).round().long().flatten(1)
    weights_X = torch.arange(bytes_IX.shape[1], device=bytes_IX.device) * 2654435761 % 65521 + 1
    return (bytes_IX * weights_X).sum(1) % 65521 % num_pictures


@cache
def _mosaics() -> torch.Tensor:
    return torch.rand(NUM_PICTURES, 3, FIELDS, FIELDS, generator=torch.Generator().manual_seed(0)) * 2 - 1
