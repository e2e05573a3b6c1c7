"""What a study wrote down before its first run, and what was changed of it since.

    plan (endpoint, hypotheses, rule, seeds, every setting of every arm) -> preregistration.json, on disk before anything runs
    a later call with another plan  ->  refused  |  with a reason: an amendment, which the report shows

More seeds are an amendment, too: whoever adds seeds until something is significant finds something.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.durable import make_folder, write_text
from megatron_ext.errors import UserError
from megatron_ext.study.verdict import RULE

FILE = "preregistration.json"
DECIDING = ("endpoint", "secondary", "explored", "baseline", "seeds", "confidence", "smallest_effect", "until", "ends")
"""Fields of the study that decide what is concluded, besides the arms and their settings."""
_SHOWN = 6


@dataclass(frozen=True)
class Amendment:
    """`kind`: seeds were added, and nothing else; or the study deviates from what was registered. `changes`: in words."""

    at: str
    kind: str
    reason: str
    changes: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Registration:
    """`plan` is the one in force, `digest` its own; `first_digest` that of what was registered at first."""

    registered_at: str
    first_digest: str
    versions: dict[str, str]
    plan: dict[str, Any]
    amendments: tuple[Amendment, ...] = ()

    @property
    def digest(self) -> str:
        return digest_of(self.plan)

    @property
    def deviates(self) -> bool:
        return any(amendment.kind == "deviation" for amendment in self.amendments)


def plan_of(config: StudyConfig, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that decides what the study will say. `settings`: arm -> every setting, by dotted name, that changes what a run learns or measures."""
    said = {name: value for name, value in config.model_dump(mode="json").items() if name in DECIDING}
    pairs = [list(pair) for pair in config.pairs]
    plan = {"rule": RULE, **said, "hypotheses": pairs, "arms": {arm: dict(values) for arm, values in settings.items()}}
    return dict(json.loads(json.dumps(plan, sort_keys=True)))


def digest_of(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def register(folder: Path, plan: dict[str, Any], versions: dict[str, str], amend: str | None) -> Registration:
    """The registration in force: read, where there is one that says the same; else written, so that it has reached the disk on return.

    Raises UserError where the plan is another one than was registered, and `amend` gives no reason for it.
    """
    before = read_registration(folder)
    if before is None:
        return _write(folder, Registration(_now(), digest_of(plan), versions, plan))
    changes = differences(before.plan, plan)
    if not changes:
        return before
    if not amend:
        listed = "; ".join(changes[:_SHOWN]) + (f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else "")
        raise UserError(
            str(folder / FILE),
            f"was registered {before.registered_at} with another plan ({listed})",
            'take the change back, choose another name=..., or give --amend "REASON", which the report will show',
        )
    added = set(before.plan["seeds"]) < set(plan["seeds"])
    kind = "seeds" if added and {**before.plan, "seeds": plan["seeds"]} == plan else "deviation"
    amendment = Amendment(_now(), kind, amend, tuple(changes), digest_of(plan))
    return _write(folder, Registration(before.registered_at, before.first_digest, before.versions, plan, (*before.amendments, amendment)))


def read_registration(folder: Path) -> Registration | None:
    """Raises UserError where the file is damaged or was changed by hand."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        amendments = tuple(Amendment(**{**one, "changes": tuple(one["changes"])}) for one in content.pop("amendments"))
        found = Registration(**content, amendments=amendments)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(str(path), f"is no registration of a study ({error!r})", "restore it, or choose another name=...") from None
    if found.digest != digest:
        raise UserError(str(path), "does not have the digest that it names: it was changed by hand", "restore it, or choose another name=...")
    return found


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two plans, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name} was {_short(old)}, is now {_short(new)}"]


def _write(folder: Path, registration: Registration) -> Registration:
    make_folder(folder)
    write_text(folder / FILE, json.dumps({"digest": registration.digest, **asdict(registration)}, indent=1) + "\n")
    return registration


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
