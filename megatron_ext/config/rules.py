"""Rules that relate two fields. Each broken rule names its field, both numbers and what would work; all are reported, not the first.

How a model is laid out over ranks has rules of its own (`parallel/plan.py`); they are checked beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePath

from megatron_ext.config.cluster_rules import cluster_rules
from megatron_ext.config.clvr_rules import clvr_rules
from megatron_ext.config.data_rules import image_rules
from megatron_ext.config.earl_rules import earl_rules
from megatron_ext.config.exact_rules import exact_rules
from megatron_ext.config.fleet_rules import fleet_rules
from megatron_ext.config.objective_rules import objective_rules
from megatron_ext.config.offload_rules import offload_rules
from megatron_ext.config.schema import ModelConfig, RunConfig
from megatron_ext.config.sizes import data_parallel, patches_per_side, tokens_per_tile
from megatron_ext.config.stage_rules import mix_rules, must_divide, optimizer_rules, stage_rules
from megatron_ext.config.staleness_rules import staleness_rules
from megatron_ext.errors import UserError
from megatron_ext.shapes import round_up

Problems = Iterator[UserError]


def check_rules(config: RunConfig) -> list[UserError]:
    """Every rule between fields that `config` breaks."""
    rules: tuple[Callable[[RunConfig], Problems], ...] = (
        _run,
        _vision,
        _decoder,
        _moe,
        clvr_rules,
        _data,
        stage_rules,
        _rollout,
        _discover,
        earl_rules,
        cluster_rules,
        _rl,
        _evaluate,
        _observe,
    )
    return [problem for rule in rules for problem in rule(config)]


def _run(config: RunConfig) -> Problems:
    if not config.name or PurePath(config.name).name != config.name or config.name.startswith("."):
        yield UserError("name", f"{config.name!r} cannot name a folder", "use letters, digits, - and _")


def _vision(config: RunConfig) -> Problems:
    vision, data = config.model.vision, config.data
    if not vision.enabled:
        yield from _text_only(config)
        return
    if data.image_size != vision.image_size:
        yield UserError(
            "data.image_size",
            f"{data.image_size} differs from model.vision.image_size = {vision.image_size}",
            "images and model must agree: change one of the two",
        )
    if min(vision.image_std) <= 0:
        yield UserError("model.vision.image_std", f"{vision.image_std} divides by zero or turns colours round", "use positive numbers")
    if vision.image_size % vision.patch_size:
        yield must_divide("model.vision.patch_size", vision.patch_size, "model.vision.image_size", vision.image_size)
    elif patches_per_side(vision) % vision.downsample:
        yield must_divide("model.vision.downsample", vision.downsample, "the patches per side", patches_per_side(vision))
    if vision.hidden_size % vision.num_attention_heads:
        yield must_divide("model.vision.num_attention_heads", vision.num_attention_heads, "model.vision.hidden_size", vision.hidden_size)


def _text_only(config: RunConfig) -> Problems:
    without = "needs images, and the model has no vision (model.vision.enabled = false)"
    if config.data.kind == "suite":
        yield UserError("data.kind", f"suite {without}", "use jsonl with conversations of text")
    if config.model.clvr.enabled:
        yield UserError("model.clvr.enabled", f"true {without}", "set it to false")


def _decoder(config: RunConfig) -> Problems:
    model = config.model
    if model.num_attention_heads % model.num_query_groups:
        yield must_divide("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.head_dim % 2:
        yield UserError("model.head_dim", f"{model.head_dim} is odd", "rotary positions turn pairs: use an even number")
    if model.num_experts == 1:
        yield UserError("model.num_experts", "1 expert has nothing to route to", "use 0 for a dense model, or at least 2")
    for layer in model.dense_layers:
        if not 0 <= layer < model.num_layers or not model.num_experts:
            where = f"among model.num_layers = {model.num_layers}" if model.num_experts else "that could be dense: with model.num_experts = 0 all are"
            yield UserError("model.dense_layers", f"{layer} is no layer {where}", "layers count from 0; leave the list empty where all layers are alike")
    if model.num_experts and set(model.dense_layers) >= set(range(model.num_layers)):
        yield UserError("model.dense_layers", f"names all {model.num_layers} layers, so that no layer has experts", "set model.num_experts=0 instead")
    if 0 < model.num_experts < model.experts_per_token:
        yield UserError("model.experts_per_token", f"{model.experts_per_token} is more than model.num_experts = {model.num_experts}", "choose fewer")
    if model.num_experts and model.experts_per_token == 1 and model.norm_topk_prob:
        yield UserError(
            "model.norm_topk_prob",
            "true with model.experts_per_token = 1 makes every gate 1, so the router never learns",
            "set it to false, or use 2 experts per token",
        )
    if model.vocab_size % 8:
        yield UserError("model.vocab_size", f"{model.vocab_size} is not a multiple of 8", f"use {round_up(model.vocab_size, 8)}")
    if config.data.tokenizer is None and config.data.vocab_size > model.vocab_size:
        yield UserError(
            "data.vocab_size",
            f"a tokenizer of {config.data.vocab_size} tokens does not fit model.vocab_size = {model.vocab_size}",
            f"set model.vocab_size={round_up(config.data.vocab_size, 8)} or ask for fewer tokens",
        )


def _moe(config: RunConfig) -> Problems:
    model = config.model
    if not model.num_experts:
        yield from _dense(config)
        return
    if model.moe_expert_bias and model.moe_score_function != "sigmoid":
        yield UserError(
            "model.moe_expert_bias",
            f"true with model.moe_score_function = {model.moe_score_function}, whose score of an expert depends on all the others: a step of the bias has no "
            "size of its own",
            "set model.moe_score_function=sigmoid, or balance with model.moe_balancing",
        )
    if model.moe_score_function == "sigmoid" and model.experts_per_token > 1 and not model.norm_topk_prob:
        yield UserError(
            "model.norm_topk_prob",
            f"false with model.moe_score_function = sigmoid, which divides the gates of model.experts_per_token = {model.experts_per_token} by their sum",
            "set it to true, or use softmax",
        )
    if not model.moe_pad_to_capacity:
        return
    never = model.num_experts / model.experts_per_token
    if model.moe_capacity_factor is None:
        yield UserError("model.moe_pad_to_capacity", "true without a capacity to pad to", "set model.moe_capacity_factor, for example to 1.25")
    elif model.moe_capacity_factor > never:
        yield UserError(
            "model.moe_capacity_factor",
            f"{model.moe_capacity_factor:g} with model.moe_pad_to_capacity pads beyond the tokens there are (num_experts / experts_per_token = {never:g})",
            f"use at most {never:g}, or no padding",
        )
    ep, dp = config.parallel.ep, data_parallel(config.parallel)
    if ep > 1 and dp > 1:
        yield UserError(
            "model.moe_pad_to_capacity",
            f"true with parallel.ep = {ep}: the {dp} data-parallel ranks bring micro-batches of different lengths, and padded experts exchange equal ones",
            "set it to false, or use ep = 1",
        )


def _dense(config: RunConfig) -> Problems:
    """What a model without experts cannot have."""
    model = config.model
    without = "needs experts, and the model has none (model.num_experts = 0)"
    if config.earl.enabled:
        yield UserError("earl.enabled", f"true {without}", "set it to false: RL works without the bonus")
    for field, on in (("moe_expert_bias", model.moe_expert_bias), ("moe_capacity_factor", model.moe_capacity_factor is not None)):
        if on:
            yield UserError(f"model.{field}", f"{getattr(model, field)} {without}".replace("True", "true"), "remove it")


def _data(config: RunConfig) -> Problems:
    data, model = config.data, config.model
    if data.kind != "suite" and data.path is None:
        what = {"jsonl": "the JSONL file", "webdataset": "the folder of shards", "blend": "the meta file"}[data.kind]
        yield UserError("data.path", f"is missing, but data.kind = {data.kind} reads files", f"give the path of {what}")
    if data.kind in ("suite", "jsonl") and data.index is not None:
        yield UserError("data.index", f"{str(data.index)!r} would be ignored: data.kind = {data.kind} has no shards", "remove it")
    yield from image_rules(data)
    if data.kind == "suite" and data.path is not None:
        yield UserError("data.path", f"{str(data.path)!r} would be ignored: data.kind = suite draws its data", "set data.kind=jsonl or remove the path")
    if data.tokenizer is not None and config.earl.enabled and config.earl.subtask == "tags":
        yield UserError("earl.subtask", "tags need pieces of their own, which a tokenizer from elsewhere (data.tokenizer) does not have", "use prompt")
    if data.max_length > model.max_positions:
        yield UserError(
            "data.max_length", f"{data.max_length} is more than model.max_positions = {model.max_positions}", "shorten the rows or raise the model's positions"
        )
    if tokens_per_tile(model.vision) + model.clvr.slots >= data.max_length:
        problem = f"{data.max_length} leaves no room for text: an image alone takes {tokens_per_tile(model.vision)} tokens{_slots(model)}"
        yield UserError("data.max_length", problem, "raise it, or model.vision.downsample")


def _rollout(config: RunConfig) -> Problems:
    rollout, model = config.rollout, config.model
    needed = tokens_per_tile(model.vision) + model.clvr.slots + rollout.max_new_tokens
    if needed >= model.max_positions:
        after = f"an image of {tokens_per_tile(model.vision)} tokens{_slots(model)}"
        problem = f"{rollout.max_new_tokens} after {after} exceeds model.max_positions = {model.max_positions}"
        yield UserError("rollout.max_new_tokens", problem, "generate fewer tokens or raise the model's positions")
    if rollout.parallel.engine != "megatron":
        yield UserError("rollout.parallel.engine", f"{rollout.parallel.engine} trains, and rollouts do not", "remove it; parallel.engine is the learner's")
    if rollout.top_k > model.vocab_size:
        yield UserError("rollout.top_k", f"{rollout.top_k} is more than model.vocab_size = {model.vocab_size}", "use 0 to keep every token")
    if rollout.temperature == 0 and config.rl.steps:
        yield UserError("rollout.temperature", "0 makes all rollouts of a prompt the same, so there is nothing to learn from", "use 1.0, or rl.steps=0")
    yield from exact_rules(config)


def _slots(model: ModelConfig) -> str:
    """What every question holds beside, in words."""
    return f" and {model.clvr.slots} memory tokens (model.clvr.num_slots)" if model.clvr.slots else ""


def _discover(config: RunConfig) -> Problems:
    discover, experts = config.discover, config.model.num_experts
    if not experts:
        return
    if discover.committee_top >= experts:
        yield UserError(
            "discover.committee_top",
            f"{discover.committee_top} of model.num_experts = {experts} makes every expert a committee member",
            f"use less than {experts}; experts_per_token = {config.model.experts_per_token} is a good start",
        )
    if discover.experts_per_layer >= experts:
        yield UserError(
            "discover.experts_per_layer", f"{discover.experts_per_layer} is not fewer than model.num_experts = {experts}", "a cluster is a part of the experts"
        )
    if (discover.permutations + 1) * discover.fwer < 1:
        yield UserError(
            "discover.permutations",
            f"{discover.permutations} cannot show significance at discover.fwer = {discover.fwer:g}",
            f"use at least {int(1 / discover.fwer)}",
        )


def _rl(config: RunConfig) -> Problems:
    rl, dp = config.rl, data_parallel(config.parallel)
    if rl.rollouts_per_prompt < 2 and (rl.advantage != "reinforce_pp" or rl.dynamic_sampling):
        yield UserError("rl.rollouts_per_prompt", f"{rl.rollouts_per_prompt} rollout has nothing to be compared with", "use at least 2; 8 is usual")
    if dp and (rl.prompts_per_step * rl.rollouts_per_prompt) % (rl.minibatches * dp):
        yield UserError(
            "rl.prompts_per_step",
            f"{rl.prompts_per_step} prompts x {rl.rollouts_per_prompt} rollouts do not divide into rl.minibatches = {rl.minibatches} over {dp} ranks",
            f"use a multiple of {rl.minibatches * dp} prompts",
        )
    rows = rl.prompts_per_step * rl.rollouts_per_prompt // max(1, rl.minibatches * dp)
    if config.parallel.vpp > 1 and rows < config.parallel.pp:
        yield UserError(
            "rl.prompts_per_step",
            f"a rank gets {rows} rollouts a minibatch, which parallel.vpp = {config.parallel.vpp} needs in at least parallel.pp = {config.parallel.pp} parts",
            "ask for more prompts, or fewer minibatches",
        )
    for field, path, example in (("reward", rl.reward, "rewards:skill_reward"), ("environment", rl.environment or "none:none", "environments:zoom")):
        module, colon, function = path.partition(":")
        if not (colon and module and function.isidentifier()):
            yield UserError(f"rl.{field}", f"{path!r} is not of the form module:function", f"for example megatron_ext.rl.{example}")
    yield from mix_rules("rl.mix", rl.mix, ("qa", "composite"))
    yield from optimizer_rules("rl.optimizer", rl.optimizer)
    yield from objective_rules(config)
    yield from offload_rules(config)
    yield from staleness_rules(config)
    yield from fleet_rules(config)


def _evaluate(config: RunConfig) -> Problems:
    evaluate = config.evaluate
    if evaluate.samples and evaluate.sampled_prompts_per_skill > evaluate.prompts_per_skill:
        yield UserError(
            "evaluate.sampled_prompts_per_skill",
            f"{evaluate.sampled_prompts_per_skill} is more than evaluate.prompts_per_skill = {evaluate.prompts_per_skill}",
            "the sampled prompts are the first of the others",
        )


def _observe(config: RunConfig) -> Problems:
    file = config.observe.prometheus_file
    if file is not None and file.suffix != ".prom":
        yield UserError("observe.prometheus_file", f"{str(file)!r} would not be read by the textfile collector", "use a name that ends in .prom")
