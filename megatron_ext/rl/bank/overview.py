"""What a bank holds, for a report: counts, and the best and the worst answer of a few groups of the latest step. It only reads: a run may go on
meanwhile."""

from __future__ import annotations

import base64
import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_ext.batch import ScoredRollout, Tiles
from megatron_ext.batch.images import find_tiles
from megatron_ext.errors import StorageError
from megatron_ext.rl.bank.bank import ANSWERS, IMAGES, JOURNAL
from megatron_ext.rl.bank.journal import read_journal
from megatron_ext.rl.bank.ledger import Group, Ledger
from megatron_ext.rl.bank.segment import read_segment

GROUPS_SHOWN = 4


def overview(folder: Path) -> dict[str, Any] | None:
    """The template's variable `bank`: `rows` (what, how many), `step` and `groups` of the latest step, each a list of answers; `problem` where it is damaged.
    None without a bank."""
    if not (folder / JOURNAL).exists():
        return None
    found: dict[str, Any] = {"rows": [], "step": None, "groups": [], "problem": ""}
    try:
        ledger = _ledger(folder)
        found["rows"] = _rows(ledger, folder)
        if ledger.steps:
            found["step"] = max(ledger.steps)
            found["groups"] = [_group(ledger, group, folder) for group in ledger.steps[found["step"]][:GROUPS_SHOWN]]
    except StorageError as error:
        found["problem"] = str(error)
    return found


def _ledger(folder: Path) -> Ledger:
    ledger = Ledger()
    for entry in read_journal(folder / JOURNAL):
        ledger.add(entry)
    for put in list(ledger.files.values()):
        if not (folder / ANSWERS / put.file).exists():
            ledger.forget(put)
    return ledger


def _rows(ledger: Ledger, folder: Path) -> list[tuple[str, str]]:
    account = ledger.account()
    images = list((folder / IMAGES).glob("*.npy"))
    scored = sum(len(samples) for put in ledger.files.values() for samples in put.scored.values())
    rows = [("answers with a reward", f"{scored}"), ("groups trained on", f"{len(account.trained)}"), ("groups that wait", f"{len(account.waiting)}")]
    rows += [(f"groups dropped: {reason}", f"{count}") for reason, count in sorted(Counter(account.dropped.values()).items())]
    rows += [("groups without an answer", f"{len(account.failed)}")] if account.failed else []
    rows += [("groups whose file is gone", f"{len(account.lost)}")] if account.lost else []
    rows += [(f"failures: {reason}", f"{count}") for reason, count in sorted(account.failures.items())]
    answers_mb, images_mb = sum(put.bytes for put in ledger.files.values()) / 1e6, sum(path.stat().st_size for path in images) / 1e6
    return [*rows, ("answers, MB", f"{answers_mb:.1f}"), (f"{len(images)} images, MB", f"{images_mb:.1f}")]


def _group(ledger: Ledger, group: Group, folder: Path) -> list[dict[str, Any]]:
    """The best and the worst answer, or the only one; empty where the file is gone."""
    tiles = partial(find_tiles, folder / IMAGES)
    found = [
        rollout
        for put in ledger.puts.get(group, ())
        for rollout in read_segment(folder / ANSWERS / put.file, put, tiles, {group[1]})
        if isinstance(rollout, ScoredRollout)
    ]
    ends = sorted(found, key=lambda answer: -answer.reward)
    return [_shown(answer) for answer in {id(answer): answer for answer in (*ends[:1], *ends[-1:])}.values()]


def _shown(answer: ScoredRollout) -> dict[str, Any]:
    rollout, prompt = answer.rollout, answer.rollout.prompt
    return {
        "skill": prompt.skill,
        "text": rollout.text,
        "answer": prompt.answer,
        "reward": f"{answer.reward:.3g}",
        "version": rollout.version,
        "image": _picture(prompt.tiles) if len(prompt.tiles) else None,
    }


def _picture(tiles: Tiles) -> str:
    """The last tile: of several the thumbnail."""
    buffer = io.BytesIO()
    Image.fromarray(tiles.pixels_IHWC[-1]).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
