"""What the parts of a training step are called in a profile."""

from __future__ import annotations

from megatron_ext.model.phases import MODEL
from megatron_ext.observe.phases import Phase
from megatron_ext.training import step
from megatron_ext.training.deepspeed_engine import DeepSpeedEngine
from megatron_ext.training.feed import Feed
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import MegatronEngine
from megatron_ext.training.mpo import MixedPreference, Preferences

OPTIMIZER = tuple(Phase("optimizer", engine, function) for engine in (MegatronEngine, DeepSpeedEngine) for function in ("begin", "gradient_norm", "update"))
TRAINING = (
    *MODEL,
    *OPTIMIZER,
    Phase("head", NextToken, "loss"),
    Phase("head", Preferences, "loss"),
    Phase("ref", MixedPreference, "prepared"),
    Phase("data", Feed, "microbatches"),
    Phase("metrics", step, "_reduce"),
)
