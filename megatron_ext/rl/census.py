"""`ranks.json` in the stage's folder: which process is which rank, for whoever looks at a machine with `ps`, `py-spy` or a debugger.

{"learner rank 0": {"node": "127.0.0.1", "pid": 4711}, "rollout replica 0 rank 0": ...}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.ranks import Host, Rank

RANKS = "ranks.json"


class Census:
    """Told of ranks as they open; one of a name that was there before takes its place."""

    def __init__(self, stage_dir: Path, host: Host) -> None:
        self._path, self._host = stage_dir / RANKS, host
        self._found: dict[str, dict[str, str | int]] = {}

    def __call__(self, ranks: Sequence[Rank]) -> None:
        for rank in ranks:
            with suppress(RankFailed):  # it has ended since, which its next verb will say
                node, pid = self._host.whereabouts(rank)
                self._found[rank.name] = {"node": node, "pid": pid}
        draft = self._path.with_suffix(".partial")
        draft.write_text(json.dumps(self._found, indent=1))
        draft.replace(self._path)
