"""Image-context dropout: in training, a share of the image tokens is hidden from self-attention, so that what they show must be found by CLVR's taps.

A hidden token is no key for any position but its own: it is still embedded, routed and refined, and taps see the whole picture as ever. Which ones are hidden
is drawn from (seed, step, row of the global batch): a resumed run and every layout hide the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_ext.data.collate import TokenBatch


def with_hidden(batch: TokenBatch, share: float, image_id: int, seed: int, step: int, first_row: int) -> TokenBatch:
    """The batch with `hidden_BS`. `first_row`: the place of its first row in the global batch. 0 hides none, and costs nothing."""
    if share == 0:
        return batch
    hidden_BS = batch.tokens_BS == image_id
    for row, is_image_S in enumerate(hidden_BS):
        drawn = np.random.default_rng((seed, step, first_row + row)).random(int(is_image_S.sum()))
        is_image_S[is_image_S] = drawn < share
    return replace(batch, hidden_BS=hidden_BS)
