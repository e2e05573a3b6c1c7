"""What the parts of an RL step are called in a profile, on the ranks of the learner and on those that generate."""

from __future__ import annotations

from megatron_ext.inference.phases import GENERATION
from megatron_ext.model.phases import MODEL
from megatron_ext.observe.phases import Phase
from megatron_ext.rl import learner, rollout_worker
from megatron_ext.rl.learner import LearnerRank
from megatron_ext.rl.policy_step import Policy
from megatron_ext.rl.refit.staging import Staging
from megatron_ext.training.phases import OPTIMIZER

LEARNER = (
    *MODEL,
    *OPTIMIZER,
    Phase("head", Policy, "loss"),
    Phase("head", Policy, "scores"),
    Phase("data", LearnerRank, "_microbatches"),
    Phase("refit", learner, "send"),
)
ROLLOUTS = (
    *GENERATION,
    Phase("refit", rollout_worker, "receive"),
    Phase("refit", Staging, "load"),
)
