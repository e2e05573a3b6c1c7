"""The tokens by which a model finds its way in a conversation: where turns begin, and its memory tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Markers:
    """Ids of a tokenizer. `turn`: begins a turn of the chat template, the user's and the assistant's alike (None: unknown). `slots`: the memory tokens that
    stand behind every question, in their order (none: there are none)."""

    turn: int | None = None
    slots: tuple[int, ...] = ()


NO_MARKERS = Markers()
