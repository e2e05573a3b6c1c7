"""Rules about what becomes of clusters after they were found. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def cluster_rules(config: RunConfig) -> Iterator[UserError]:
    discover, earl, model = config.discover, config.earl, config.model
    if model.num_experts and discover.causal_gate != "off" and model.num_experts - discover.experts_per_layer < model.experts_per_token:
        left = f"{discover.experts_per_layer} masked of model.num_experts = {model.num_experts} leave fewer than experts_per_token = {model.experts_per_token}"
        most = model.num_experts - model.experts_per_token
        yield UserError("discover.experts_per_layer", f"{left}, which discover.causal_gate = {discover.causal_gate} needs", f"use at most {most}")
    if not earl.enabled:
        return
    if earl.force_correlational and discover.causal_gate != "enforce":
        problem = f"true, and discover.causal_gate = {discover.causal_gate} holds no bonus back"
        yield UserError("earl.force_correlational", problem, "remove it, or set discover.causal_gate=enforce")
    if earl.follow and not earl.reestimate_every:
        yield UserError("earl.follow", "true with earl.reestimate_every = 0: there is nothing to follow", "set earl.reestimate_every, for example to 50")
    if earl.follow and earl.mode != "score":
        problem = f"true with earl.mode = {earl.mode}: what its routers are taught is measured on the clusters that RL starts with"
        yield UserError("earl.follow", problem, "use earl.mode=score, or false")
    if earl.reestimate_every and config.rl.environment:
        problem = f"{earl.reestimate_every} with rl.environment = {config.rl.environment}: clusters are looked for in answers of one turn"
        yield UserError("earl.reestimate_every", problem, "set it to 0")
