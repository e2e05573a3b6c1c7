"""The letters of our shapes, once for the whole project, and the check that values carry the shape they claim.

Tensors are named by their axes: `hidden_SBH`, `tokens_BS`, `advantages_B`. The letters:

    B sequences in a batch     S sequence positions      H hidden size        N attention heads     D head dimension
    V vision tokens            E experts                 K experts per token  L MoE layers          T response tokens
    P prompts                  G rollouts per prompt     I image tiles        M tiles of one row    X skills
"""

from __future__ import annotations

from typing import Any


def check_shape(name: str, value: Any, *expected: int | None) -> None:
    """Raises ValueError unless `value.shape` equals `expected`, where None matches any size.

    >>> import numpy as np
    >>> check_shape("tokens_BS", np.zeros((2, 3)), 2, None)
    >>> check_shape("tokens_BS", np.zeros((2, 3)), 2, 4)
    Traceback (most recent call last):
    ValueError: tokens_BS has shape (2, 3), expected (2, 4)
    """
    shape = tuple(value.shape)
    if len(shape) != len(expected) or any(want is not None and got != want for got, want in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has shape {shape}, expected ({wanted})")


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below the number.

    >>> round_up(5, 4)
    8
    """
    return -(-number // multiple) * multiple
