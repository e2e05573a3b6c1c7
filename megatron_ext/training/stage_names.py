"""What the driver and the ranks of a stage that learns from given examples agree on."""

from __future__ import annotations

from typing import Literal

Stage = Literal["pretrain", "sft", "mpo"]
