"""What the driver and the ranks of a supervised stage agree on."""

from __future__ import annotations

from typing import Literal

Stage = Literal["pretrain", "sft"]
