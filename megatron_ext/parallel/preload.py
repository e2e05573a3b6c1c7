"""What the fork server imports once, so that every rank starts with it. Importing megatron.core takes seconds, forking milliseconds.

Loaded by name: some stand on higher floors, and one that cannot be imported is not an error here but in the rank that needs it.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from contextlib import suppress

_MODULES = (
    "torch",
    "torch.distributed",
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.transformer",
    "megatron.core.dist_checkpointing",
    "megatron_ext.model.assembly",
    "megatron_ext.device.patches",
)

logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _module in _MODULES:
        with suppress(Exception):
            importlib.import_module(_module)
logging.disable(logging.NOTSET)
