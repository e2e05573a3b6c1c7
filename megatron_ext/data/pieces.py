"""The pieces of text that mean something to the program, and what every tokenizer does, whoever made its vocabulary."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import count

from megatron_ext.batch import Markers

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TAGS = ("ocr", "count", "spatial", "color", "compare", "ans")
SPECIALS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "\n", *(mark for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>")))
UNKNOWN = "<unk>"
SLOT = re.compile(r"<vmem\d+>")
"""A memory token of CLVR (`model.clvr.inject = slots`), in the text of a tokenizer that has them."""


def slot_pieces(count: int) -> tuple[str, ...]:
    """
    >>> slot_pieces(2)
    ('<vmem0>', '<vmem1>')
    """
    return tuple(f"<vmem{number}>" for number in range(count))


def count_slots(known: Callable[[str], bool]) -> int:
    """How many memory tokens a vocabulary has, numbered from 0 without a gap."""
    return next(number for number in count() if not known(f"<vmem{number}>"))


class Tokenizer(ABC):
    """Text to ids and back, whoever made the vocabulary. `decode` answers for any ids."""

    vocab_size: int
    pad_id: int
    eos_id: int
    """Ends an answer."""
    turn_id: int
    """Begins a turn of the template, the user's and the assistant's alike."""
    image_id: int
    """Stands for one image token; negative in the vocabulary of a language model alone."""
    tag_ids: dict[str, tuple[int, int]]
    """The ids of the opening and closing mark of every tag; empty where tags are ordinary text."""
    slot_ids: tuple[int, ...] = ()
    """Memory tokens, which stand behind every question; empty where the run has none."""

    @property
    def markers(self) -> Markers:
        """What a model is told of the vocabulary."""
        return Markers(self.turn_id, self.slot_ids)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """What the template alone may write and no model may say: image and memory tokens."""
        return (self.image_id, *self.slot_ids)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special pieces written out and padding left out."""

    @abstractmethod
    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for: for reports and plots."""
