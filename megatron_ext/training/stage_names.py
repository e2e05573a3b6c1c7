"""What the driver and the ranks of a supervised stage agree on."""

from __future__ import annotations

import signal
from typing import Literal

Stage = Literal["pretrain", "sft"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""They end a stage at a step boundary, with a checkpoint."""
