"""How long the driver waits for what, before it takes a rank to be lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """The longest that each verb may take. `slice_s`: a slice of generation, which is `SLICE_STEPS` tokens of every answer under way."""

    open_s: float = 600.0
    slice_s: float = 600.0
    update_s: float = 3600.0
    save_s: float = 1800.0
    sync_s: float = 120.0


DEADLINES = Deadlines()
