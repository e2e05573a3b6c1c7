"""What can be said about a run without training: sizes, layout, batches, files. Raises ConfigError when a file or function it names is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from megatron_ext.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.config.sizes import count_parameters, patches_per_side, tokens_per_tile, vision_tokens
from megatron_ext.data.shard_names import shards_of
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.stages import Stage, pipeline_stages


def describe(config: RunConfig) -> str:
    """The facts, one a line, for a person to check."""
    problems = missing_files(config)
    if problems:
        raise ConfigError(problems)
    rows = [("run folder", str(config.run_dir)), *_model(config), *_layouts(config), *_batches(config), *_files(config)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows) + "\nThe configuration is valid. Nothing was trained."


def missing_files(config: RunConfig) -> list[UserError]:
    """Files, checkpoints and functions that the configuration names and this machine does not have."""
    problems = [UserError(field, f"there is no {path}", "give a path that exists") for field, path in _named_paths(config) if not path.exists()]
    problems += _missing_shards(config)
    module = config.rl.reward.partition(":")[0]
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        problems.append(UserError("rl.reward", f"there is no module {module}", "install it, or put its folder on PYTHONPATH"))
    return problems


def _named_paths(config: RunConfig) -> list[tuple[str, Path]]:
    named = (
        ("data.path", None if config.data.kind == "webdataset" else config.data.path),
        ("data.tokenizer", config.data.tokenizer),
        ("pretrain.init_from", config.pretrain.init_from),
        ("sft.init_from", config.sft.init_from),
        ("mpo.pairs", config.mpo.pairs),
        ("mpo.init_from", config.mpo.init_from),
        ("rl.init_from", config.rl.init_from),
    )
    text = [(f"{stage}.text", Path(f"{prefix}.idx")) for stage in ("pretrain", "sft") for prefix in getattr(config, stage).text]
    return [(field, path) for field, path in named if path is not None] + text


def _missing_shards(config: RunConfig) -> list[UserError]:
    try:
        _shards(config)
    except UserError as error:
        return [error]
    return []


def _shards(config: RunConfig) -> list[tuple[str, str]]:
    if config.data.kind != "webdataset":
        return []
    return [("data.path", f"{len(shards_of(config.data.path))} shards of {config.data.path}")]


def _model(config: RunConfig) -> list[tuple[str, str]]:
    model, vision = config.model, config.model.vision
    parameters = count_parameters(model)
    parts = ("vision", "projector", "embeddings", "attention", "router", "experts", "dense", "norms", "clvr")
    side = patches_per_side(vision)
    small = side // vision.downsample
    pixels = f"{vision.image_size} x {vision.image_size} pixels"
    tokens = f"{side} x {side} = {vision_tokens(vision)} ViT tokens -> {small} x {small} = {tokens_per_tile(vision)} image tokens"
    taps = ", ".join(f"{'embeddings' if source < 0 else source} -> {target}" for source, target in model.clvr.active_taps) or "off"
    return [
        ("parameters", f"{parameters.total:,} ({parameters.active:,} active per token)"),
        *((f"  {part}", f"{getattr(parameters, part):,}") for part in parts if getattr(parameters, part)),
        ("image", f"{pixels} -> {tokens}" if vision.enabled else "none: a language model alone"),
        ("decoder", f"{model.num_layers} layers, hidden {model.hidden_size}, {_feed_forward(model)}"),
        ("CLVR taps", taps),
    ]


def _feed_forward(model: ModelConfig) -> str:
    if not model.num_experts:
        return f"dense, {model.ffn_hidden_size} wide"
    dense = f"; {len(model.dense_layers)} of the layers dense" if model.dense_layers else ""
    return f"{model.num_experts} experts, {model.experts_per_token} per token{dense}"


def _layouts(config: RunConfig) -> list[tuple[str, str]]:
    rollouts = f"{config.rollout.replicas} replicas, each {_layout(config.rollout.parallel, config.model)}"
    return [("learner ranks", _layout(config.parallel, config.model)), *_stages(config), ("rollout ranks", rollouts)]


def _layout(parallel: ParallelConfig, model: ModelConfig) -> str:
    layout = Layout.of(parallel)
    dense = f"tp {layout.tp} x cp {layout.cp} x dp {layout.dp} x pp {layout.pp}"
    interleaved = f", {layout.vpp} chunks a rank" if layout.vpp > 1 else ""
    recompute = "" if parallel.recompute == "none" else f"; recompute {parallel.recompute}"
    engine = "" if parallel.deepspeed is None else f"; DeepSpeed by {parallel.deepspeed}"
    experts = f"; experts: ep {layout.ep} x etp {layout.etp} x edp {layout.edp}" if model.num_experts else ""
    return f"{layout.num_ranks} = {dense}{interleaved}{experts}{recompute}{engine}"


def _stages(config: RunConfig) -> list[tuple[str, str]]:
    """What each pipeline stage of the learner holds, and what its neighbours send it for CLVR."""
    parallel = config.parallel
    stages = pipeline_stages(config.model, parallel.pp, parallel.vpp)
    return [(f"  stage {stage.number}", _stage(stage)) for stage in stages] if len(stages) > 1 else []


def _stage(stage: Stage) -> str:
    holds = ", ".join(f"tap {tap}" for tap in stage.asks)
    arrives = [f"the refinement of tap {tap}" for tap in stage.receives] + (["ViT features, unless the ViT is frozen"] if stage.receives_features else [])
    first, last = stage.layers.start, stage.layers.stop - 1
    return (
        (f"layer {first}" if first == last else f"layers {first} to {last}")
        + (f"; {holds}" if holds else "")
        + (f"; receives {' and '.join(arrives)}" if arrives else "")
    )


def _batches(config: RunConfig) -> list[tuple[str, str]]:
    dp = Layout.of(config.parallel).dp

    def supervised(stage: TrainConfig) -> str:
        rows = stage.global_batch // dp
        by_tokens = f"a rank: {rows}, in micro-batches of at most {stage.micro_batch_tokens} tokens"
        share = by_tokens if stage.micro_batch_tokens else f"a rank: {rows // stage.micro_batch} x {stage.micro_batch}"
        return f"{stage.steps} steps of {stage.global_batch} rows of at most {config.data.max_length} tokens; {share}"

    rl, mpo = config.rl, config.mpo
    share = f"a rank: {mpo.global_batch // dp // mpo.micro_batch} x {mpo.micro_batch} pairs"
    rollouts = rl.prompts_per_step * rl.rollouts_per_prompt
    return [
        ("pretrain", supervised(config.pretrain)),
        ("sft", supervised(config.sft)),
        *([("mpo", f"{mpo.steps} steps of {mpo.global_batch} pairs of rows of at most {config.data.max_length} tokens; {share}")] if mpo.steps else []),
        ("rl", f"{rl.steps} steps of {rl.prompts_per_step} prompts x {rl.rollouts_per_prompt} = {rollouts} rollouts, {rl.minibatches} updates each"),
    ]


def _files(config: RunConfig) -> list[tuple[str, str]]:
    return [(field, f"{path} (found)") for field, path in _named_paths(config)] + _shards(config)
