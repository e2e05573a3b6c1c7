"""Prompts answered in chunks: a stop, whenever it comes, loses the chunks under way and no more.

    what the answers depend on -> folder/begun.json      anything else than before, and what is there is discarded
    chunk c of C: prompts c, c + C, c + 2C, ... -> one replica -> folder/<c>, by one rename, once it has reached the disk
    stop asked -> the ranks are ended at once -> StoppedForRequeue      run again -> the chunks that are missing -> all contents, in order

Who stands beside whom decides the last bits of an answer, so the chunks are the same whether or not there was a stop, and the result is too, bit for bit.
Nothing has to be agreed on for a stop: which chunks are left is read once, by the process that starts the ranks.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_ext.batch import Prompt
from megatron_ext.checkpoint.folder import MANIFEST, describe_file
from megatron_ext.config.load import leaves
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.tokenizer import tokenizer_digest
from megatron_ext.durable import sync
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.inference.replica import all_replicas
from megatron_ext.observe.progress import stage_progress
from megatron_ext.parallel.local import run_ranks
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.stopping import StopRequest

BEGUN = "begun.json"
NEVER = StopRequest()
"""Nobody asks to stop."""
Answer = TypeVar("Answer")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Chunks:
    """The chunks of one piece of work. `rounds`: in each of them every data-parallel rank answers one chunk. `together`: ranks share experts, so that a chunk's
    last bits depend on the others of its round. `finished`: the chunks that were there when the work was taken up."""

    folder: Path
    num_prompts: int
    rounds: int
    dp: int
    together: bool
    finished: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        return self.rounds * self.dp

    def left_to(self, dp_rank: int) -> list[int]:
        """The chunks that this data-parallel rank has to answer. Equally many for all ranks that share experts."""
        rounds = [range(first, first + self.dp) for first in range(0, self.count, self.dp)]
        return [chunks[dp_rank] for chunks in rounds if not self.finished.issuperset(chunks if self.together else {chunks[dp_rank]})]

    def prompts_of(self, chunk: int, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        return prompts[chunk :: self.count]

    def save(self, chunk: int, content: bytes) -> None:
        """Whole or not at all."""
        draft = self.folder / f"{chunk}.draft"
        draft.write_bytes(content)
        sync(draft)
        draft.replace(self.folder / str(chunk))

    def saved(self) -> frozenset[int]:
        return frozenset(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def num_answered(self) -> int:
        return sum(len(range(chunk, self.num_prompts, self.count)) for chunk in self.saved())

    def contents(self) -> Iterator[bytes]:
        """One after the other, as each is asked for."""
        return ((self.folder / str(chunk)).read_bytes() for chunk in range(self.count))

    def discard(self) -> None:
        """What was made of the contents is where it belongs."""
        shutil.rmtree(self.folder)


def open_chunks(name: str, folder: Path, num_prompts: int, config: RunConfig, facts: Facts) -> Chunks:
    """The chunks in `folder`, with whatever was finished before and depends on the same facts; anything else there is discarded, which is printed.

    A chunk is about `rollout.batch_size` prompts, and the same number for each replica.
    """
    layout = Layout.of(all_replicas(config))
    rounds = max(1, math.ceil(num_prompts / (layout.dp * config.rollout.batch_size)))
    begun = folder / BEGUN
    if begun.exists() and (changed := _differences(json.loads(begun.read_text()), facts)):
        print(f"{name}: the answers in {folder} are discarded: {'; '.join(changed)}", flush=True)
        begun.unlink()
    if not begun.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        draft = begun.with_suffix(".draft")
        draft.write_text(json.dumps(facts, indent=1, sort_keys=True))
        sync(draft)
        draft.replace(begun)
    chunks = Chunks(folder, num_prompts, rounds, layout.dp, layout.ep > 1)
    return replace(chunks, finished=chunks.saved())


def facts_of(config: RunConfig, parts: Sequence[str], checkpoint: Path, clusters: Path | None = None) -> Facts:
    """What answers depend on: the settings in `parts` (sections, or single fields by their dotted names) and those of every answer; contents of files, by their
    SHA-256. `checkpoint` is a step's folder."""
    wanted = {*parts, "seed", "data", "model", "rollout", "rl.reward", "earl"}
    files = {"the checkpoint": checkpoint / MANIFEST, "data.path": config.data.path, "the expert clusters": clusters}
    return {
        **{name: value for name, value in leaves(config.model_dump(mode="json")).items() if name in wanted or name.split(".")[0] in wanted},
        "the tokenizer": tokenizer_digest(config.tokenizer_dir),
        **{name: None if path is None else describe_file(path)["sha256"] for name, path in files.items()},
    }


def answer_chunks(name: str, chunks: Chunks, config: RunConfig, fn: Callable[..., None], *arguments: Any, stop: StopRequest) -> Iterator[bytes]:
    """Calls `fn(rank, world size, init method, config, chunks, *arguments)` on every rank of every replica, to save what is left of the chunks; the contents
    of all, in order. Shows progress.

    Raises StoppedForRequeue within a second of `stop`, whatever the ranks are doing.
    """
    parallel = all_replicas(config)
    with stage_progress(name, chunks.num_prompts, chunks.num_answered()) as progress:

        def watch() -> None:
            progress.update(answered := chunks.num_answered())
            if stop.asked:
                raise StoppedForRequeue(f"stopped with {answered} of {chunks.num_prompts} prompts answered: run again to resume")

        if len(chunks.finished) < chunks.count:
            run_ranks(fn, parallel.num_ranks, config, chunks, *arguments, timeout_s=math.inf, threads_per_rank=parallel.threads_per_rank, watch=watch)
        watch()
    return chunks.contents()


def in_order(answers: Sequence[Sequence[Answer]]) -> Iterator[Answer]:
    """The answers of all chunks in the order of their prompts, one answer a prompt."""
    for index in range(sum(map(len, answers))):
        yield answers[index % len(answers)][index // len(answers)]


def _differences(old: Facts, new: Facts) -> list[str]:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name} was {_short(old.get(name))}, is now {_short(new.get(name))}" for name in names]


def _short(value: Any) -> str:
    """A setting as it is; of a SHA-256 as much as people compare."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
