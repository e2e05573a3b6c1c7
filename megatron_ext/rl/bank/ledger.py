"""What the journal says of every group: stored, trained on by which step, dropped and why. A group is a prompt of a draw, with all of its answers.

                            +-> trained   by exactly one step
put -> waiting (some scored)-+
    -> failed  (none scored) +-> dropped   never trained on, with the reason
    -> lost    (its file is gone; until it is put again)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ext.rl.bank.journal import Entry

Group = tuple[int, str]
"""The number of the draw, and the key of the prompt."""


@dataclass(frozen=True)
class Account:
    """Every group that was ever put or dropped is in exactly one of these. `trained`: by which step. `dropped`: why. `failed`: nothing of it was scored.
    `lost`: its file is gone. `failures`: rollouts that failed, by reason."""

    trained: Mapping[Group, int]
    waiting: tuple[Group, ...]
    dropped: Mapping[Group, str]
    failed: tuple[Group, ...]
    lost: tuple[Group, ...]
    failures: Mapping[str, int]


@dataclass(frozen=True)
class Put:
    """What one segment holds: the samples of each prompt that were scored, and those that failed, with the reason."""

    file: str
    bytes: int
    digest: str
    draw: int
    scored: Mapping[str, Sequence[int]]
    failed: Mapping[str, Sequence[tuple[int, str]]]

    @property
    def groups(self) -> list[Group]:
        return [(self.draw, key) for key in dict.fromkeys([*self.scored, *self.failed])]

    def entry(self) -> Entry:
        return {"kind": "put", **vars(self)}


@dataclass
class Ledger:
    """Folds entries. `files`: segments by name; `draws`: those of a draw; `puts`: those that hold something of a group; all in order."""

    files: dict[str, Put] = field(default_factory=dict)
    draws: dict[int, list[Put]] = field(default_factory=dict)
    puts: dict[Group, list[Put]] = field(default_factory=dict)
    steps: dict[int, tuple[Group, ...]] = field(default_factory=dict)
    trained: dict[Group, int] = field(default_factory=dict)
    dropped: dict[Group, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        match entry:
            case {"kind": "put", **fields}:
                put = self.files[fields["file"]] = Put(**fields)
                self.draws.setdefault(put.draw, []).append(put)
                for group in put.groups:
                    self.puts.setdefault(group, []).append(put)
            case {"kind": "train", "step": step, "groups": groups}:
                self.steps[step] = as_groups(groups)
                self.trained.update((group, int(step)) for group in self.steps[step])
            case {"kind": "drop", "groups": groups, "reason": reason}:
                self.dropped.update((group, str(reason)) for group in as_groups(groups))
            case _:
                raise ValueError(f"the journal says {entry}, which this version does not know")

    def forget(self, put: Put) -> None:
        """Its file is gone: what it held is stored no more, and may be put again."""
        del self.files[put.file]
        self.draws[put.draw].remove(put)
        for group in put.groups:
            self.puts[group].remove(put)

    def scored(self, group: Group) -> set[int]:
        """The samples of a group that are stored with a reward."""
        return {sample for put in self.puts.get(group, ()) for sample in put.scored.get(group[1], ())}

    def waits(self, group: Group) -> bool:
        """Stored, and neither trained on nor dropped."""
        return group not in self.trained and group not in self.dropped and bool(self.scored(group))

    def account(self) -> Account:
        undecided = [group for group in self.puts if group not in self.trained and group not in self.dropped]
        failures = Counter(reason for put in self.files.values() for failed in put.failed.values() for _, reason in failed)
        return Account(
            trained=dict(self.trained),
            waiting=tuple(group for group in undecided if self.waits(group)),
            dropped=dict(self.dropped),
            failed=tuple(group for group in undecided if self.puts[group] and not self.scored(group)),
            lost=tuple(group for group in undecided if not self.puts[group]),
            failures=dict(failures),
        )


def as_groups(pairs: Sequence[Sequence[object]]) -> tuple[Group, ...]:
    """From the lists that JSON makes of groups."""
    return tuple((int(str(draw)), str(key)) for draw, key in pairs)
