"""Where images meet text: which embedding an image position takes, and which vision tokens a position may look at.

A row's tiles stand in the order of their placeholders, so the r-th image-context token of a row belongs to tile r // n and is its (r mod n)-th token
(n tokens per tile). A position may look at a tile once it stands at or after the tile's last token: what it sees is an interval of the row's vision memory.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from megatron_ext.batch import Markers


def splice(
    text_BSH: torch.Tensor, image_INH: torch.Tensor, row_tiles_BM: torch.Tensor, is_image_BS: torch.Tensor, local_S: torch.Tensor | None = None
) -> torch.Tensor:
    """Puts image embeddings [I, n, H] into the image positions of [B, S, H]. `local_S`: `text_BSH` holds only these positions of the rows.

    Raises ValueError where a row's placeholders and tiles disagree.
    """
    tokens_per_tile = image_INH.shape[1]
    placed_B = is_image_BS.sum(1)
    expected_B = (row_tiles_BM >= 0).sum(1) * tokens_per_tile
    if not torch.equal(placed_B, expected_B):
        row = int((placed_B != expected_B).nonzero()[0, 0])
        raise ValueError(f"row {row} has {int(placed_B[row])} image-context tokens for {int(expected_B[row])} image embeddings")
    order_BS = order_of(is_image_BS).clamp(min=0)
    tile_BS = row_tiles_BM.gather(1, (order_BS // tokens_per_tile).clamp(max=row_tiles_BM.shape[1] - 1)).clamp(min=0)
    source_BS = tile_BS * tokens_per_tile + order_BS % tokens_per_tile
    if local_S is not None:
        source_BS, is_image_BS = source_BS[:, local_S], is_image_BS[:, local_S]
    return torch.where(is_image_BS[..., None], image_INH.flatten(0, 1)[source_BS], text_BSH)


def order_of(is_image_BS: torch.Tensor) -> torch.Tensor:
    """Int64 [B, S]: which of its row's image tokens a position holds, from 0; -1 elsewhere."""
    return torch.where(is_image_BS, is_image_BS.cumsum(1) - 1, -1)


def visible_until(is_image_BS: torch.Tensor, tokens_per_tile: int, vision_tokens: int) -> torch.Tensor:
    """Int64 [B, S]: position s may look at vision tokens [0, visible_until[b, s]) of its row, those of the tiles that are complete at s."""
    return is_image_BS.cumsum(1) // tokens_per_tile * vision_tokens


def visible_from(until_BS: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
    """Int64 [B, S]: the first vision token that position s may look at: none of the samples packed before its own."""
    return _before_the_sample(until_BS, bounds)


def inject_at(where: str, tokens_BS: torch.Tensor, is_image_BS: torch.Tensor, bounds: tuple[int, ...], markers: Markers) -> torch.Tensor:
    """Bool [B, S]: the positions to whose residual stream refinements are added, as `model.clvr.inject` says. Made from the tokens alone, so that a rollout,
    the learner and every later turn of a conversation agree.

    A response is an assistant's turn from its header on: turns of user and assistant alternate, so every second `markers.turn` of a sample begins one.
    """
    if where == "all":
        return torch.ones_like(is_image_BS)
    if where == "text":
        return ~is_image_BS
    if where == "slots":
        return torch.isin(tokens_BS, torch.tensor(markers.slots, device=tokens_BS.device))
    if markers.turn is None:
        raise ValueError("model.clvr.inject = response needs the id of the piece that begins a turn: build the model with markers")
    turns_BS = (tokens_BS == markers.turn).cumsum(1)
    turns_BS = turns_BS - _before_the_sample(turns_BS, bounds)
    return (turns_BS > 0) & (turns_BS % 2 == 0) & ~is_image_BS


def _before_the_sample(counts_BS: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
    """Of a running count, what it was before the sample that a position belongs to."""
    start_BS = torch.zeros_like(counts_BS)
    for start, stop in pairwise(bounds):
        if start:
            start_BS[:, start:stop] = counts_BS[:, start - 1 : start]
    return start_BS
