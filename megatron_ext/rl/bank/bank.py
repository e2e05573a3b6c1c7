"""The bank: rollouts that count because they are on disk, and the ledger that has each group trained on exactly once.

    rollouts/
      journal.jsonl          what counts, in the order in which it came to count (`journal.py`): put, train, drop
      answers/*.parquet      a segment for each put (`columns.py` names its columns)
      images/<digest>.npy    the tiles of prompts, each once (`batch/images.py`)
      advantages/*.parquet   beside the bank, for people: what each answer of a step counted for (`advantages.py`)

    put(draw, scored, failed) -> images, segment -> on disk -> a line of the journal: they count
    train(step, groups)       -> a line of the journal -> the update; a step that is repeated after a lost learner trains on `groups(trained(step))`

Whatever ends the process, and whenever: what `put` or `train` returned for is there, and a segment without its line is removed at the next opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np

from megatron_ext.batch import FailedRollout, ScoredRollout, Tiles
from megatron_ext.batch.images import ImageStore, StoredTiles, find_tiles
from megatron_ext.durable import make_folder, remove_drafts
from megatron_ext.errors import StorageError
from megatron_ext.rl.bank.advantages import write_advantages
from megatron_ext.rl.bank.columns import failed_row, scored_row
from megatron_ext.rl.bank.journal import Journal, open_journal
from megatron_ext.rl.bank.ledger import Account, Group, Ledger, Put, as_groups
from megatron_ext.rl.bank.segment import check_segment, read_segment, write_segment

ROLLOUTS = "rollouts"
"""The folder of a stage that holds its bank."""
JOURNAL, ANSWERS, IMAGES, ADVANTAGES = "journal.jsonl", "answers", "images", "advantages"


@dataclass(frozen=True)
class Drawn:
    """Everything stored of a draw, in the order in which it was put."""

    scored: Sequence[ScoredRollout]
    failed: Sequence[FailedRollout]


def open_bank(folder: Path) -> Bank:
    """The bank in `folder`, for its one writer; an empty one where there is none. What a killed writer left is removed, and said.

    Verifies every line of the journal, and every segment with answers that are still to be trained on; of the others that they have their size: they are
    verified when they are read. Raises StorageError that names what is damaged, and which groups it held.
    """
    for part in (ANSWERS, ADVANTAGES):
        make_folder(folder / part)
        remove_drafts(folder / part)
    journal, entries, torn = open_journal(folder / JOURNAL)
    if torn:
        _say(folder, f"a last line that was not finished ({torn} bytes) is cut off the journal: it did not count")
    ledger = Ledger()
    for entry in entries:
        ledger.add(entry)
    puts = list(ledger.files.values())
    for path in sorted({*(folder / ANSWERS).glob("*.parquet")} - {folder / ANSWERS / put.file for put in puts}):
        path.unlink()
        _say(folder, f"{path.name} is removed: the run ended before it counted")
    for put in puts:
        path = folder / ANSWERS / put.file
        if not path.exists():
            ledger.forget(put)
            _say(folder, f"{put.file} is gone, and with it {len(put.groups)} groups of draw {put.draw}")
        elif any(ledger.waits(group) for group in put.groups) or path.stat().st_size != put.bytes:
            check_segment(path, put)
    return Bank(folder, journal, ledger)


class Bank:
    """See `open_bank`. Safe to use from several threads."""

    def __init__(self, folder: Path, journal: Journal, ledger: Ledger) -> None:
        self._answers, self._advantages, self._journal, self._ledger = folder / ANSWERS, folder / ADVANTAGES, journal, ledger
        self._lock = RLock()
        self._images = folder / IMAGES
        self.images = ImageStore(self._images)

    def put(self, draw: int, scored: Sequence[ScoredRollout], failed: Sequence[FailedRollout]) -> None:
        """On disk, and counting, when it returns. A draw may be put in several parts.

        Raises StorageError, with nothing of it counting, when the operating system refuses it; ValueError where one of the answers is there already: whoever
        resumes asks `drawn` first.
        """
        if not scored and not failed:
            return
        with self._lock:
            self._require_new(draw, scored)
            prompts = [answer.rollout.prompt for answer in scored] + [failure.prompt for failure in failed]
            images = {id(tiles): self._digest(tiles) for tiles in {id(prompt.tiles): prompt.tiles for prompt in prompts}.values()}
            rows = [scored_row(draw, answer, images[id(answer.rollout.prompt.tiles)], self._digest(answer.rollout.further)) for answer in scored]
            rows += [failed_row(draw, failure, images[id(failure.prompt.tiles)]) for failure in failed]
            name = f"draw_{draw:06d}_{self._journal.num_lines:06d}.parquet"
            size, digest = write_segment(self._answers / name, rows)
            samples: dict[str, list[int]] = {}
            for answer in scored:
                samples.setdefault(answer.rollout.prompt.key, []).append(answer.rollout.sample)
            reasons: dict[str, list[tuple[int, str]]] = {}
            for failure in failed:
                reasons.setdefault(failure.prompt.key, []).append((failure.sample, failure.reason))
            put = Put(name, size, digest, draw, samples, reasons)
            self._journal.append(put.entry())
            self._ledger.add(put.entry())

    def drawn(self, draw: int) -> Drawn:
        """Everything stored of a draw, restored whole; empty where nothing is. Raises StorageError for what is damaged."""
        with self._lock:
            puts = self._ledger.draws.get(draw, [])
            rollouts = [rollout for put in puts for rollout in read_segment(self._answers / put.file, put, self._tiles)]
        return Drawn(
            [rollout for rollout in rollouts if isinstance(rollout, ScoredRollout)], [rollout for rollout in rollouts if isinstance(rollout, FailedRollout)]
        )

    def train(self, step: int, groups: Sequence[Group]) -> None:
        """Step `step` trains on these groups: call it before the update. On disk when it returns. The same again is fine.

        Raises StorageError where one of them is not stored, was dropped, or belongs to another step, and where the step has trained on others.
        """
        chosen = as_groups(groups)
        with self._lock:
            if (before := self._ledger.steps.get(step)) is not None:
                if before != chosen:
                    raise self._refused(f"step {step} has trained on {_named(before)}; it cannot be repeated on {_named(chosen)}")
                return
            if taken := [group for group in chosen if group in self._ledger.trained]:
                raise self._refused(f"step {step} cannot train on {_named(taken)}: step {self._ledger.trained[taken[0]]} has, and a group is trained on once")
            if missing := [group for group in chosen if not self._ledger.waits(group)]:
                raise self._refused(f"step {step} cannot train on {_named(missing)}: it was dropped, or nothing scored of it is stored")
            if len(set(chosen)) != len(chosen):
                raise self._refused(f"step {step} names a group twice in {_named(chosen)}")
            self._write({"kind": "train", "step": step, "groups": chosen})

    def trained(self, step: int) -> tuple[Group, ...] | None:
        """The groups of a step, None where it has not begun its update."""
        with self._lock:
            return self._ledger.steps.get(step)

    def groups(self, groups: Iterable[Group]) -> list[ScoredRollout]:
        """The answers of these groups, restored whole: group by group in the order given, within each as they were put. Raises StorageError where one is not
        stored, or damaged."""
        chosen = as_groups(list(groups))
        with self._lock:
            if missing := [group for group in chosen if not self._ledger.scored(group)]:
                raise self._refused(f"nothing scored of {_named(missing)} is stored: a step that trained on it cannot be repeated")
            wanted: dict[str, tuple[Put, set[str]]] = {}
            for group in chosen:
                for put in self._ledger.puts[group]:
                    wanted.setdefault(put.file, (put, set()))[1].add(group[1])
            found: dict[Group, list[ScoredRollout]] = {group: [] for group in chosen}
            for file, (put, keys) in sorted(wanted.items(), key=lambda item: item[0]):
                for rollout in read_segment(self._answers / file, put, self._tiles, keys):
                    if isinstance(rollout, ScoredRollout):
                        found[put.draw, rollout.rollout.prompt.key].append(rollout)
        return [answer for group in chosen for answer in found[group]]

    def waiting(self) -> tuple[Group, ...]:
        """Groups with scored answers that no step has trained on and that were not dropped, in the order in which they were first put."""
        return self.account().waiting

    def drop(self, groups: Sequence[Group], reason: str) -> None:
        """These are accounted for and never trained on. On disk when it returns. Raises StorageError where a step has trained on one of them."""
        with self._lock:
            chosen = tuple(group for group in as_groups(groups) if group not in self._ledger.dropped)
            if taken := [group for group in chosen if group in self._ledger.trained]:
                raise self._refused(f"{_named(taken)} cannot be dropped ({reason}): step {self._ledger.trained[taken[0]]} has trained on it")
            if chosen:
                self._write({"kind": "drop", "groups": chosen, "reason": reason})

    def note_advantages(self, step: int, scored: Sequence[ScoredRollout], advantages_R: np.ndarray) -> None:
        """What the answers that step `step` trains on, which `train` was told of, count for."""
        with self._lock:
            write_advantages(self._advantages, step, self._ledger.steps[step], scored, advantages_R)

    def account(self) -> Account:
        with self._lock:
            return self._ledger.account()

    def _write(self, entry: dict[str, object]) -> None:
        self._journal.append(entry)
        self._ledger.add(entry)

    def _require_new(self, draw: int, scored: Sequence[ScoredRollout]) -> None:
        seen: set[tuple[str, int]] = set()
        for answer in scored:
            key, sample = answer.rollout.prompt.key, answer.rollout.sample
            if (key, sample) in seen or sample in self._ledger.scored((draw, key)):
                raise ValueError(f"sample {sample} of {key} in draw {draw} is in the bank already")
            seen.add((key, sample))

    def _digest(self, tiles: Tiles) -> str:
        kept = self.images.keep(tiles)
        return kept.digest if isinstance(kept, StoredTiles) else ""

    def _tiles(self, digest: str, shape: Sequence[int]) -> Tiles:
        """An image that is missing or damaged is found here, not in a rank."""
        tiles = find_tiles(self._images, digest, shape)
        tiles.loaded()
        return tiles

    def _refused(self, problem: str) -> StorageError:
        return StorageError(str(self._answers.parent), problem, "start the stage afresh in another folder if this run is no longer the one that filled it")


def _named(groups: Sequence[Group]) -> str:
    """A few of them.

    >>> _named([(3, "a"), (3, "b")])
    'a of draw 3 and 1 more'
    """
    draw, key = groups[0]
    return f"{key} of draw {draw}" + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")


def _say(folder: Path, words: str) -> None:
    print(f"{folder}: {words}", flush=True)
