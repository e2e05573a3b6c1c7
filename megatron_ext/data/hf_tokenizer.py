"""A tokenizer from Hugging Face: that of the checkpoint a run starts from, used as it is.

The chat template is ChatML in this family (Qwen3, InternVL3.5), which is what `chat.py` writes; the pieces it needs are looked up here, and one that is
missing is an error. Ids come from transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from megatron_ext.data.pieces import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END, TURN_START, UNKNOWN, Tokenizer
from megatron_ext.errors import DataError

HF_FILE = "tokenizer_config.json"
_PARTS = (HF_FILE, "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class HfTokenizer(Tokenizer):
    """Tags are ordinary text to it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            raise DataError(str(folder), f"holds no tokenizer that transformers can load ({error})", "give the folder of a Hugging Face checkpoint") from error
        known = self._tokenizer.get_vocab()
        images = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
        sees = any(piece in known for piece in images)
        missing = [piece for piece in (TURN_START, TURN_END, *(images if sees else ())) if piece not in known]
        if missing:
            raise DataError(str(folder), f"its vocabulary lacks {', '.join(missing)}", "it must be that of an InternVL or Qwen3 checkpoint, with ChatML turns")
        self.vocab_size = len(self._tokenizer)
        self.eos_id, self.turn_id, self.image_id = known[TURN_END], known[TURN_START], known.get(IMAGE_CONTEXT, -1)
        self.pad_id = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else known[TURN_START]
        self.tag_ids = {}
        self._encode = lru_cache(maxsize=65536)(self._encode_uncached)

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids beyond the vocabulary are left out."""
        return str(self._tokenizer.decode([index for index in map(int, ids) if index != self.pad_id and 0 <= index < self.vocab_size]))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._tokenizer.convert_ids_to_tokens(index) if 0 <= index < self.vocab_size else UNKNOWN for index in map(int, ids)]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def copy_tokenizer(source: Path, folder: Path) -> Path:
    """The tokenizer files of a Hugging Face folder become those of a run. Raises DataError when they make no tokenizer for this template."""
    HfTokenizer(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_PARTS[1:], _PARTS[0]):  # the one that says "complete" comes last
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return folder / HF_FILE
