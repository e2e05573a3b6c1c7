"""The vocabulary: SentencePiece with the pieces of the chat template, of tags and of answers fixed in advance, and text to ids and back.

Text is cut at special pieces and newlines; each part between them is encoded as a line of its own, so that a word is the same piece at the start of an
answer, after a tag and in the middle of a sentence: `red`, `a red`, `<color>red` all hold the piece "▁red". Every digit is a piece of its own.
Printable ASCII round-trips exactly; other characters do if the training text held them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece

from megatron_ext.data.pieces import IMAGE_CONTEXT, SPECIALS, TAGS, TURN_END, TURN_START, UNKNOWN, Tokenizer, count_slots, slot_pieces
from megatron_ext.errors import DataError

PAD = "<pad>"
MODEL_FILE = "tokenizer.model"

_SPACE = "\u2581"  # how SentencePiece writes a space
_DIGITS = tuple("0123456789")
_ASCII = "".join(character for character in map(chr, range(33, 127)) if character not in _DIGITS)


def _cut_at(specials: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(re.escape(special) for special in specials) + ")")


class SentencePieceTokenizer(Tokenizer):
    """The vocabulary that this project trains. `decode(encode(text)) == text` for all text of known characters."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._unknown_id: int = processor.unk_id()
        self.vocab_size = processor.vocab_size()
        self.pad_id = processor.piece_to_id(PAD)
        self.eos_id = processor.piece_to_id(TURN_END)
        self.turn_id = processor.piece_to_id(TURN_START)
        self.image_id = processor.piece_to_id(IMAGE_CONTEXT)
        self.tag_ids = {tag: (processor.piece_to_id(f"<{tag}>"), processor.piece_to_id(f"</{tag}>")) for tag in TAGS}
        slots = slot_pieces(count_slots(lambda piece: processor.piece_to_id(piece) != processor.unk_id()))
        self.slot_ids = tuple(map(processor.piece_to_id, slots))
        self._special_ids = {special: processor.piece_to_id(special) for special in (*SPECIALS, *slots)}
        self._cut = _cut_at(tuple(self._special_ids))
        self._special_texts = {index: special for special, index in self._special_ids.items()} | {self.pad_id: ""}
        self._encode = lru_cache(maxsize=65536)(self._encode_uncached)  # conversations repeat their phrases

    @classmethod
    def read(cls, path: Path) -> SentencePieceTokenizer:
        """A `tokenizer.model`. Raises DataError when it is missing, damaged or made for another template."""
        if not path.is_file():
            raise DataError(str(path), "there is no tokenizer here", "train one first: megatron-ext tokenizer CONFIG")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise DataError(str(path), f"not a SentencePiece model ({error})", "train the tokenizer again") from error
        missing = [piece for piece in (PAD, *SPECIALS) if processor.piece_to_id(piece) == processor.unk_id()]
        if missing:
            raise DataError(str(path), f"lacks the pieces {missing}", "train the tokenizer again")
        return cls(processor)

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids beyond the vocabulary read as unknown."""
        parts: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if index in self._special_texts:
                parts += [self._decode_run(run), self._special_texts[index]]
                run = []
            else:
                run.append(index if 0 <= index < self.vocab_size else self._unknown_id)
        return "".join([*parts, self._decode_run(run)])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """With "▁" for a space."""
        return [self._processor.id_to_piece(index) if 0 <= index < self.vocab_size else UNKNOWN for index in map(int, ids)]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part in self._cut.split(text):
            special = self._special_ids.get(part)
            if special is not None:
                ids.append(special)
            elif part:
                ids += self._processor.encode(part)
        return tuple(ids)

    def _decode_run(self, run: list[int]) -> str:
        return self._processor.decode(run) if run else ""


def train_vocabulary(lines: Sequence[str], words: Sequence[str], vocab_size: int, slots: int = 0) -> bytes:
    """A serialized SentencePiece (BPE) model of at most `vocab_size` pieces: the specials, `slots` memory tokens, every digit, every one of `words` after a
    space, printable ASCII, and what merges best in the lines. Deterministic: one thread, no paths inside.

    Raises DataError when `vocab_size` cannot hold the fixed pieces and the characters of the lines.
    """
    cut = _cut_at(SPECIALS)
    parts = [part for line in lines for part in cut.split(line) if part and part not in SPECIALS]
    characters = set().union(*parts) | set(_ASCII)
    fixed = [*SPECIALS, *slot_pieces(slots), *_DIGITS, *(_SPACE + word for word in (*_DIGITS, *words))]
    needed = len(fixed) + len(characters - set(_DIGITS) - {" "}) + 3  # padding, unknown, space
    if vocab_size < needed:
        raise DataError(
            "data.vocab_size", f"{vocab_size} pieces cannot hold {len(fixed)} fixed pieces and {len(characters)} characters", f"ask for at least {needed}"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(parts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # text may support fewer pieces
        user_defined_symbols=fixed,
        required_chars=_ASCII,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece=PAD,
        unk_piece=UNKNOWN,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
