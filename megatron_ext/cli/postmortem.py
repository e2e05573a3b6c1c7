"""`postmortem LOGS`: which rank of a SLURM job failed first, and what it said last. Jobs run it when they fail.

    LOGS/rank-0003.log     what task 3 printed (srun writes it)
    LOGS/rank-0003.json    its own account: node, when it began or ended, its exit code
    LOGS/post-mortem.txt   what is said here

A task without an end in its account was killed, or lost with its node: it counts as the first, and what its peers say follows from it. So does one that hung
until SLURM ended it; the account of whoever failed before it stands right below.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ext.errors import EXIT_OK, EXIT_REQUEUE, UserError

NUM_TOLD = 3
"""Tasks whose last lines are shown."""


@dataclass(frozen=True)
class Ending:
    """How one task ended; `code` is None for one that never said."""

    rank: int
    node: str
    code: int | None
    at: float
    last: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", type=Path, metavar="LOGS", help="the folder with the logs of a job, such as runs/tiny/logs/1234.0")
    parser.add_argument("--lines", type=int, default=30, metavar="N", help="last lines to show of a rank (default 30)")


def run(args: argparse.Namespace) -> int:
    text = story(endings(args.logs, args.lines))
    (args.logs / "post-mortem.txt").write_text(text, encoding="utf-8")
    print(text, end="")
    return EXIT_OK


def endings(logs: Path, lines: int) -> list[Ending]:
    """Of every task that has a log, in the order in which they failed; those that did not fail come last."""
    found = []
    for log in sorted(logs.glob("rank-*.log")):
        account = _account(log.with_suffix(".json"))
        last = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        found.append(Ending(int(log.stem.removeprefix("rank-")), account.get("node", "?"), account.get("code"), account.get("at", 0.0), last))
    if not found:
        raise UserError(str(logs), "holds no rank-*.log", "give the folder that the job's log names in its first line")
    return sorted(found, key=lambda ending: (not _failed(ending), ending.code is not None, ending.at))


def story(found: list[Ending]) -> str:
    """For the person who finds the job failed."""
    failed = [ending for ending in found if _failed(ending)]
    rows = [f"post-mortem: {len(failed)} of {len(found)} tasks failed"]
    for number, ending in enumerate(failed[:NUM_TOLD]):
        rows.append(f"{'first' if number == 0 else 'then'}: rank {ending.rank} on {ending.node} {_end_words(ending)}; its last lines:")
        rows += [f"    {line}" for line in ending.last] or ["    (it printed nothing)"]
    if len(failed) > NUM_TOLD:
        rows.append(f"and rank {', '.join(str(ending.rank) for ending in failed[NUM_TOLD:])}")
    return "\n".join(rows) + "\n"


def _failed(ending: Ending) -> bool:
    return ending.code not in (EXIT_OK, EXIT_REQUEUE)


def _end_words(ending: Ending) -> str:
    if ending.code is None:
        return "never said that it ended: it was killed, or lost with its node"
    return f"ended with exit code {ending.code} at {datetime.fromtimestamp(ending.at).isoformat(sep=' ', timespec='milliseconds')}"


def _account(path: Path) -> dict[str, Any]:
    """Empty for a task that did not even begin, and for an account that was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
