"""The ChatML template: how a conversation about images becomes tokens, and which of them are learnt.

    <|im_start|>user
    <img><IMG_CONTEXT>...<IMG_CONTEXT></img>
    which digits are written?<|im_end|>
    <|im_start|>assistant
    4 2<|im_end|>

Every `<image>` in a question stands for one image and becomes `tokens_per_tile` image-context tokens for each of its tiles between `<img>` and `</img>`.
Where the tokenizer has memory tokens (`model.clvr.inject = slots`), all of them stand behind the text of every question: `written?<vmem0><vmem1><|im_end|>`.
Loss falls on the assistant's text and its `<|im_end|>`, nowhere else. A prompt ends after `<|im_start|>assistant` and its newline, where the response begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from megatron_ext.data.pieces import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END, TURN_START, Tokenizer, slot_pieces
from megatron_ext.errors import DataError

IMAGE = "<image>"
ROLES = ("user", "assistant")
RESERVED = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
"""Pieces that only the template may write: in a question or an answer they would forge a turn or an image."""

Turn = tuple[str, str]  # (question, answer)


@dataclass(frozen=True)
class Conversation:
    """Images (uint8 [height, width, 3], in the order of their `<image>` placeholders) and what was asked and answered about them."""

    images: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer, tokens_per_tile: int, tiles: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and, for each, 1 where it is learnt (assistant text and its end) or 0. `tiles`: of each image in turn; unset, one."""
    counts = iter(tiles) if tiles is not None else repeat(1)
    tokens: list[int] = []
    mask: list[int] = []
    for question, answer in turns:
        _refuse((answer,), slot_pieces(len(tokenizer.slot_ids)), "conversation")
        asked = _question(question, tokenizer, tokens_per_tile, counts)
        answered = [*tokenizer.encode(answer), tokenizer.eos_id]
        tokens += asked + answered + _newline(tokenizer)
        mask += [0] * len(asked) + [1] * len(answered) + [0]
    return tokens, mask


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, tokens_per_tile: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_S int32, loss_mask_S uint8) of a conversation; mask 1: this token is a target. Raises DataError where placeholders and images disagree."""
    check_placeholders(conversation.turns, len(conversation.images))
    tokens, mask = encode_turns(conversation.turns, tokenizer, tokens_per_tile)
    return np.array(tokens, np.int32), np.array(mask, np.uint8)


def encode_prompt(question: str, tokenizer: Tokenizer, tokens_per_tile: int, history: Sequence[Turn] = (), tiles: Sequence[int] | None = None) -> np.ndarray:
    """tokens_S int32 of the earlier turns and the question, ending where the response begins. `tiles`: of each image in turn; unset, one."""
    before = sum(text.count(IMAGE) for text, _ in history)
    tokens, _ = encode_turns(history, tokenizer, tokens_per_tile, None if tiles is None else tiles[:before])
    asked = _question(question, tokenizer, tokens_per_tile, iter(tiles[before:]) if tiles is not None else repeat(1))
    return np.array(tokens + asked, np.int32)


def encode_observation(text: str, tokenizer: Tokenizer, tokens_per_tile: int, tiles: Sequence[int], ended: bool) -> list[int]:
    """What follows an answer where the conversation goes on: a user turn that shows images, `tiles` of each, and says `text`, up to where the next answer
    begins. `ended`: whether the answer has its end token already. Raises DataError where the text holds a piece of the template."""
    turn = (IMAGE + "\n") * len(tiles) + text
    check_placeholders([(turn, "")], len(tiles), "an observation")
    return [*([] if ended else [tokenizer.eos_id]), *_newline(tokenizer), *_question(turn, tokenizer, tokens_per_tile, iter(tiles))]


def question_text(tokens_S: np.ndarray, tokenizer: Tokenizer) -> str:
    """The last question of a prompt, for people to read: without template, image, memory tokens and history."""
    words = [token for token in tokens_S.tolist() if token not in tokenizer.slot_ids]
    last = tokenizer.decode(words).rpartition(f"{TURN_START}user\n")[2].partition(TURN_END)[0]
    return last.rpartition(IMAGE_END)[2].strip()


def check_placeholders(turns: Sequence[Turn], num_images: int, where: str = "conversation") -> None:
    """Raises DataError unless questions hold exactly one `<image>` per image and no text holds a piece of the template."""
    placed = sum(question.count(IMAGE) for question, _ in turns)
    if placed != num_images:
        raise DataError(where, f"{placed} {IMAGE} placeholders for {num_images} images", f"write {IMAGE} once per image, in the questions")
    _refuse((text for turn in turns for text in turn), RESERVED, where)


def _refuse(texts: Iterable[str], pieces: Sequence[str], where: str) -> None:
    for text in texts:
        for piece in pieces:
            if piece in text:
                raise DataError(where, f"the text holds {piece}, which belongs to the chat template", f"remove it; images are written {IMAGE}")


def _newline(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n")


def _question(question: str, tokenizer: Tokenizer, tokens_per_tile: int, tiles: Iterator[int]) -> list[int]:
    """One user turn up to where the response begins. Text between two special pieces is encoded as a whole, as a tokenizer would that saw all of it."""
    slots = slot_pieces(len(tokenizer.slot_ids))
    _refuse((question,), slots, "conversation")
    first, *rest = question.split(IMAGE)
    texts = [f"{TURN_START}user\n{first}", *rest]
    texts[-1] += f"{''.join(slots)}{TURN_END}\n{TURN_START}assistant\n"
    if rest and tokenizer.image_id < 0:
        raise DataError("the tokenizer", f"has no {IMAGE_CONTEXT}, which stands for images", "use the tokenizer of a checkpoint with vision")
    tokens = tokenizer.encode(texts[0])
    for text in texts[1:]:
        context = [tokenizer.image_id] * (tokens_per_tile * next(tiles))
        tokens += [*tokenizer.encode(IMAGE_START), *context, *tokenizer.encode(IMAGE_END), *tokenizer.encode(text)]
    return tokens
