"""Which options of CLVR go together. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.clvr_sizes import kv_shape
from megatron_ext.config.schema import ClvrConfig, RunConfig
from megatron_ext.config.stage_rules import must_divide
from megatron_ext.errors import UserError

Problems = Iterator[UserError]


def clvr_rules(config: RunConfig) -> Problems:
    clvr, model = config.model.clvr, config.model
    if config.evaluate.clvr and not clvr.enabled:
        yield UserError("evaluate.clvr", "true, but the model has no taps (model.clvr.enabled = false)", "set it to false")
    for stage in ("pretrain", "sft"):
        if getattr(config, stage).image_context_dropout and not clvr.enabled:
            problem = "hides image tokens that nothing else looks at: model.clvr.enabled = false"
            yield UserError(f"{stage}.image_context_dropout", problem, "set it to 0")
    if not clvr.enabled:
        return
    if not clvr.taps:
        yield UserError("model.clvr.taps", "is empty", "name a pair of layers such as [[1, 2]], or set model.clvr.enabled=false")
    for source, target in clvr.taps:
        if not 0 <= source < target < model.num_layers:
            yield UserError(
                "model.clvr.taps",
                f"({source}, {target}) is no pair of layers with source < target among model.num_layers = {model.num_layers}",
                f"layers count from 0: use pairs between 0 and {model.num_layers - 1}",
            )
    if len(set(clvr.taps)) != len(clvr.taps):
        yield UserError("model.clvr.taps", "names a pair twice", "keep one of the two")
    elif len(set(clvr.active_taps)) != len(clvr.taps):
        alone = "fusion = addition" if clvr.fusion == "addition" else f"query_source = {clvr.query_source}"
        yield UserError("model.clvr.taps", f"has two taps with one target, which are the same under model.clvr.{alone}", "give every tap its own target")
    if clvr.num_heads % clvr.num_kv_heads:
        yield must_divide("model.clvr.num_kv_heads", clvr.num_kv_heads, "model.clvr.num_heads", clvr.num_heads)
    width = kv_shape(model)[1]
    if width % 4:
        field = "model.hidden_size" if clvr.kv_tokens == "projected" else "model.vision.hidden_size"
        yield UserError(field, f"{width} is not a multiple of 4", "CLVR's 2-D patch positions need four equal parts")
    if clvr.num_slots != ClvrConfig().num_slots and clvr.inject != "slots":
        problem = f"{clvr.num_slots} would be ignored with model.clvr.inject = {clvr.inject}, which has no memory tokens"
        yield UserError("model.clvr.num_slots", problem, "remove it, or set model.clvr.inject=slots")
    yield from _layers(config)
    if clvr.fusion == "addition":
        yield from _addition(clvr)


def _layers(config: RunConfig) -> Problems:
    """Which layers of the encoder are looked at."""
    clvr, vision = config.model.clvr, config.model.vision
    for layer in clvr.kv_layers:
        if not 0 <= layer < vision.num_layers:
            yield UserError("model.clvr.kv_layers", f"{layer} is none of model.vision.num_layers = {vision.num_layers} layers", "layers count from 0")
    if not clvr.kv_layers:
        return
    if clvr.fusion == "attention" and len(set(clvr.kv_layers)) != len(clvr.kv_layers):
        yield UserError("model.clvr.kv_layers", "names a layer twice", "keep one of the two")
    if clvr.kv_tokens == "projected":
        yield UserError("model.clvr.kv_layers", "cannot be chosen with kv_tokens = projected: the projector reads the last layer", "use raw or unshuffled")
    if clvr.memory == "learned":
        yield UserError("model.clvr.kv_layers", "would be ignored with memory = learned, which looks at no layer", "remove it")


def _addition(clvr: ClvrConfig) -> Problems:
    """What a fusion without a query cannot have."""
    why, default = "with fusion = addition", ClvrConfig()
    if clvr.kv_tokens == "raw":
        yield UserError("model.clvr.kv_tokens", f"raw {why}, which adds one vector to each image token", "use unshuffled or projected")
    if clvr.kv_layers and len(clvr.kv_layers) != len(clvr.taps):
        problem = f"names {len(clvr.kv_layers)} layers for {len(clvr.taps)} taps {why}, where each has its own"
        yield UserError("model.clvr.kv_layers", problem, "name one a tap, or none: all take the last")
    for field, meaning in (
        ("query_source", "nothing asks"),
        ("inner_iterations", "nothing asks"),
        ("ffn_hidden", "there is no attention to follow"),
        ("inject", "image tokens alone are added to"),
    ):
        value = getattr(clvr, field)
        if value != getattr(default, field):
            yield UserError(f"model.clvr.{field}", f"{value} would be ignored {why}: {meaning}", "remove it")
