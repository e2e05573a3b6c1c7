"""What looking again and knowing the routes cost: `python tools/bench/clvr.py [--rounds 7]`, results in docs/benchmarks/clvr.md.

    a training step    of the model with three CLVR taps over 256 vision tokens, against the same model without
    a decode step      the same; the time of answers of 65 tokens less that of answers of one, by 64
    routes             recorded in generation, and replayed by the learner, against neither
    bonus              advantages with the EARL bonus, as a share of a step: answers and update

One process, one thread, float32, sides in turns; CPU times of the process, medians. The ViT is there in both and frozen: what is compared is the taps alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleave import machine, medians

from megatron_ext.batch import Prompt, Rollout, ScoredRollout, Tiles
from megatron_ext.config.schema import ClvrConfig, ModelConfig, OptimizerConfig, ParallelConfig, RLConfig, RolloutConfig, RunConfig, VisionConfig
from megatron_ext.config.sizes import count_parameters, tokens_per_tile, vision_tokens
from megatron_ext.data.collate import TokenBatch
from megatron_ext.device import session
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.rl.batching import microbatches as rollout_microbatches
from megatron_ext.rl.batching import unpack
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step

VOCABULARY, IMAGE, PAD = 4096, 5, 0
ROWS, LENGTH, PROMPT, NEW, SAMPLES = 4, 256, 96, 64, 8
VISION = VisionConfig(image_size=128, patch_size=8, num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=512)
LOOKS = ClvrConfig(taps=((2, 3), (5, 6), (8, 9)), num_heads=4, num_kv_heads=1, head_dim=64)
"""As many heads as the decoder's attention has, over a quarter as many keys: the shape of the 30B model."""
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=12,
    hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=64,
    num_experts=16,
    experts_per_token=2,
    expert_ffn_hidden_size=256,
    init_std=0.06,
    vision=VISION,
    clvr=LOOKS,
)
WITHOUT = MODEL.model_copy(update={"clvr": ClvrConfig(enabled=False)})
SIDES = {"none": WITHOUT, "three taps": MODEL}


class Words:
    """A vocabulary whose end never comes."""

    eos_id, vocab_size = VOCABULARY - 1, VOCABULARY - 1

    def decode(self, ids: list[int]) -> str:
        return ""


def images(rng: np.random.Generator, count: int) -> Tiles:
    return Tiles.whole(rng.integers(0, 256, size=(count, VISION.image_size, VISION.image_size, 3), dtype=np.uint8))


def build(model: ModelConfig, context: ParallelContext) -> Any:
    (chunk,) = build_chunks(model, IMAGE, context, vision_trains=False)
    return chunk


def training(model: ModelConfig, context: ParallelContext) -> Callable[[], float]:
    """Trains another step on rows with an image each, and returns its loss."""
    engine, steps = build_engine([build(model, context)], OptimizerConfig(lr=1e-5), 1000, context), itertools.count()

    def step() -> float:
        rng = np.random.default_rng(next(steps))
        tokens = rng.integers(8, VOCABULARY - 8, size=(ROWS, LENGTH)).astype(np.int32)
        tokens[:, : tokens_per_tile(VISION)] = IMAGE
        batch = TokenBatch(tokens, (tokens != IMAGE).astype(np.uint8), images(rng, ROWS), np.arange(ROWS, dtype=np.int32)[:, None])
        return optimizer_step(engine, microbatches(batch, ROWS, PAD, context.device), NextToken(), context)["loss"]

    return step


def alike(losses: dict[str, float]) -> None:
    assert max(losses.values()) - min(losses.values()) < 1e-2, losses


def prompts_of(count: int) -> list[Prompt]:
    rng, found = np.random.default_rng(1), []
    for number in range(count):
        tokens = rng.integers(8, VOCABULARY - 8, size=PROMPT).astype(np.int32)
        tokens[: tokens_per_tile(VISION)] = IMAGE
        found.append(Prompt(str(number), "ocr", tokens, images(rng, 1), ""))
    return found


def answering(model: Any, prompts: list[Prompt], samples: int, new: int, context: ParallelContext) -> Callable[[], list[Rollout]]:
    engine = Engine(model.eval(), context, Words(), RolloutConfig(max_new_tokens=new, batch_size=len(prompts) * samples))
    return lambda: engine.generate(prompts, samples, seeds=lambda prompt, sample: 100 * prompt + sample, version=0)


def decode_steps(samples: int, rounds: int, context: ParallelContext) -> dict[str, float]:
    """Seconds of a step of 8 prompts' answers."""
    models, prompts = {name: build(model, context) for name, model in SIDES.items()}, prompts_of(8)
    calls = {(name, new): answering(model, prompts, samples, new, context) for name, model in models.items() for new in (1, NEW + 1)}
    seconds = medians({f"{name} {new}": call for (name, new), call in calls.items()}, rounds)
    return {name: (seconds[f"{name} {NEW + 1}"] - seconds[f"{name} 1"]) / NEW for name in models}


@contextmanager
def unrecorded(answer: Callable[[], Any], model: Any, engine: Engine) -> Iterator[None]:
    """Generation that asks no router what it did."""
    layers, top = MODEL.num_layers, MODEL.experts_per_token
    nothing = {"experts": np.zeros((1, layers, top), np.uint8), "gates": np.zeros((1, layers, top), np.float16)}

    def routes(_: Any, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.broadcast_to(one, (tokens, layers, top)) for one in nothing.values())  # type: ignore[return-value]

    plain, record = engine.passes.routes, model.router_tap.record
    engine.passes.routes, model.router_tap.record = routes, no_routes  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.passes.routes, model.router_tap.record = plain, record  # type: ignore[method-assign]


@contextmanager
def no_routes() -> Iterator[None]:
    yield


def routes_in_generation(rounds: int, context: ParallelContext) -> dict[str, float]:
    """Seconds of the answers of a step."""
    model = build(MODEL, context).eval()
    engine = Engine(model, context, Words(), RolloutConfig(max_new_tokens=NEW, batch_size=8 * SAMPLES))
    answer = partial(engine.generate, prompts_of(8), SAMPLES, seeds=lambda prompt, sample: 100 * prompt + sample, version=0)

    def silently() -> list[Rollout]:
        with unrecorded(answer, model, engine):
            return answer()

    return medians({"not recorded": silently, "recorded": answer}, rounds)


def learning(rounds: int, context: ParallelContext) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of an update that replays the rollouts' routes and of one that routes anew; and of answers, update and credit."""
    engine = build_engine([build(MODEL, context)], OptimizerConfig(lr=1e-9, min_lr=0.0, weight_decay=0.0), 1000, context, router_lr_scale=0.1)
    answer = answering(engine.chunks[0], prompts_of(8), SAMPLES, NEW, context)
    scored = [ScoredRollout(rollout, float(rollout.sample % 2), {"correct": float(rollout.sample % 2)}) for rollout in answer()]
    shard = unpack(plan_parcels(scored, np.linspace(-1, 1, len(scored)), minibatches=1, dp_size=1, multiple=1, pad_id=PAD)[0][0])
    configs = {name: RunConfig(model=MODEL, rl=RLConfig(replay_routes=on, max_logprob_diff=1.0)) for name, on in (("not recorded", False), ("recorded", True))}

    def update(config: RunConfig) -> float:
        engine.chunks[0].train()
        parts = [policy_batch(part, context.device, 0) for part in rollout_microbatches(shard, 32, 1)]
        return optimizer_step(engine, parts, Policy(engine.wrapped, [], config, VOCABULARY - 1, context), context)["loss"]

    updates = medians({name: partial(update, config) for name, config in configs.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        credit = Credit(RunConfig(model=MODEL, rl=RLConfig(rollouts_per_prompt=SAMPLES)), clusters(), {}, Path(folder))
        parts = medians({"answers": answer, "credit": partial(credit, scored, 30)}, rounds)
    whole = parts["answers"] + updates["recorded"] + parts["credit"]
    return updates, {"credit, s": parts["credit"], "step, s": whole, "share of a step": parts["credit"] / whole}


def clusters() -> ExpertClusters:
    """Two experts of every layer for the skill of the prompts."""
    layers, experts = MODEL.num_layers, MODEL.num_experts
    pairs = tuple(PairEffect(layer, expert, 0.1, 2.0, 9.0, 0.001, 1.0, 0.9, 0.3, 0.1, 9.0, 0.9, 0.3) for layer in range(layers) for expert in range(2))
    skill = SkillCluster("ocr", "ok", "", 9, pairs, 0.05, 0.9, None, 1.0, None)
    table = np.full((1, layers, experts), 1 / experts)
    return ExpertClusters(layers, experts, (skill,), table, np.zeros_like(table), np.zeros(layers), 4.0, RunConfig().discover, 0, "none")


def cases(rounds: int, context: ParallelContext) -> Iterator[tuple[str, Callable[[], dict[str, dict[str, float]]]]]:
    step, few, many = "a training step", "a decode step, 8 rows", f"a decode step, 8 x {SAMPLES} rows"
    recorded, replayed, bonus = "routes in generation", "routes in the learner", "bonus and advantages"
    yield step, lambda: {step: medians({name: training(model, context) for name, model in SIDES.items()}, rounds, alike, warm_up=2)}
    yield few, lambda: {few: decode_steps(1, rounds, context)}
    yield many, lambda: {many: decode_steps(SAMPLES, rounds, context)}
    yield recorded, lambda: {recorded: routes_in_generation(rounds, context)}
    yield f"{replayed}, {bonus}", lambda: dict(zip((replayed, bonus), learning(rounds, context), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as decode or routes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = count_parameters(MODEL).total / 1e6
    print(f"{machine()}, float32, {total:.1f} M parameters, {vision_tokens(VISION)} vision tokens, median of {options.rounds}\n")
    print("| case | without, ms | with, ms | with / without |\n|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, session(), open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for name, measure in cases(options.rounds, context):
            if options.only in name:
                for case, sides in measure().items():
                    found[case] = sides
                    print(row(case, sides), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def row(case: str, sides: dict[str, float]) -> str:
    if "share of a step" in sides:
        return f"| {case} | {1000 * (sides['step, s'] - sides['credit, s']):.1f} | {1000 * sides['step, s']:.1f} | {1 + sides['share of a step']:.4f} |"
    without, with_it = sides.values()
    return f"| {case} | {1000 * without:.2f} | {1000 * with_it:.2f} | {with_it / without:.3f} |"


if __name__ == "__main__":
    main()
