"""What the EARL bonus needs, and which of its ways cannot be together. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def earl_rules(config: RunConfig) -> Iterator[UserError]:
    earl, rl = config.earl, config.rl
    if not earl.enabled:
        return
    if earl.warmup + earl.cooldown > 1:
        yield UserError(
            "earl.warmup", f"{earl.warmup:g} and earl.cooldown = {earl.cooldown:g} are more than the whole run", "they are shares: keep their sum at most 1"
        )
    if earl.min_correct > rl.rollouts_per_prompt:
        yield UserError(
            "earl.min_correct", f"{earl.min_correct} is more than rl.rollouts_per_prompt = {rl.rollouts_per_prompt}: no group would ever get a bonus", "use 2"
        )
    yield from _combine(config)
    if earl.mode != "score" or earl.router_kl > 0:
        yield from _router_terms(config)
    if earl.mode == "router_pg":
        yield from _sampled_routes(config)


def _combine(config: RunConfig) -> Iterator[UserError]:
    earl, rl = config.earl, config.rl
    if earl.combine == "add" and rl.advantage == "gdpo":
        yield UserError("earl.combine", "add changes the total reward, and rl.advantage = gdpo takes its named parts", "use earl.combine=gdpo or bounded")
    if earl.combine == "gdpo" and rl.advantage != "grpo":
        problem = f"gdpo compares task reward and mass as rl.advantage = grpo does, and rl.advantage = {rl.advantage}"
        yield UserError("earl.combine", problem, "set rl.advantage=grpo, or use bounded")


def _router_terms(config: RunConfig) -> Iterator[UserError]:
    """Terms of the loss that hang on the routers' scores."""
    earl, rl, model = config.earl, config.rl, config.model
    name = f"earl.mode = {earl.mode}" if earl.mode != "score" else f"earl.router_kl = {earl.router_kl:g}"
    if model.moe_score_function != "softmax":
        yield UserError(
            "model.moe_score_function",
            f"{model.moe_score_function} with {name}, which takes the router's scores as a distribution over experts: sigmoids are none, and "
            "model.moe_expert_bias, which goes with them, chooses experts that their scores do not",
            "use earl.mode=score with earl.router_kl=0",
        )
    if not rl.replay_routes:
        yield UserError("rl.replay_routes", f"false with {name}, whose terms are of the very routes that answered", "set it to true")
    if rl.router_lr_scale == 0:
        yield UserError("rl.router_lr_scale", f"0 with {name}: the router it would teach is frozen", "use 0.1, or earl.mode=score")


def _sampled_routes(config: RunConfig) -> Iterator[UserError]:
    earl, rl = config.earl, config.rl
    if earl.subtask == "tags":
        yield UserError("earl.subtask", "tags with earl.mode = router_pg: where routes are sampled, a sub-task is not yet known", "use prompt")
    if rl.max_staleness:
        problem = f"{rl.max_staleness} with earl.mode = router_pg: a route's old probability is that of the learner's weights, and older ones chose it"
        yield UserError("rl.max_staleness", problem, "use 0")
    if rl.environment:
        yield UserError(
            "rl.environment", "is set with earl.mode = router_pg: what a turn reads again is routed anew, without sampling", "remove one of the two"
        )
