"""How far rollout and learner are apart, and what it costs that they are not: `python tools/bench/exactness.py [--rounds 5]`, results in
docs/benchmarks/exactness.md.

One process, one thread, float32. The same model, with random weights, answers prompts with an image each, and takes the policy's step (forward, loss, backward,
Adam) on them, in the fast mode and with `rollout.deterministic=true`, in turns. The gap is |learner's - rollout's log-prob| over the answers' tokens, under the
same weights and replayed routes. Times are CPU times of the process (the machine may be shared), medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleave import machine, medians

from megatron_ext.batch import Prompt, Rollout, ScoredRollout, Tiles
from megatron_ext.config.load import load_config
from megatron_ext.config.schema import ClvrConfig, ModelConfig, OptimizerConfig, ParallelConfig, RLConfig, RolloutConfig, RunConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, PolicyBatch, policy_batch
from megatron_ext.training import engine as training
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.step import optimizer_step

IMAGE, PAD = 5, 0
SIDES = {"fast": False, "deterministic": True}


@dataclass(frozen=True)
class Case:
    """`prompts` x `samples` answers of `new` tokens to prompts of `text_tokens` (from, to) besides their image."""

    name: str
    model: ModelConfig
    prompts: int
    samples: int
    text_tokens: tuple[int, int]
    new: int
    micro_batch: int


def cases() -> list[Case]:
    """Weights larger than at the start of training, so that some tokens are likely and others not."""
    tiny = load_config(Path("examples/tiny.yaml"), []).config.model.model_copy(update={"init_std": 0.1})
    vision = VisionConfig(image_size=64, patch_size=8, num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=512)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 64, "num_experts": 16, "expert_ffn_hidden_size": 512}
    wide = ModelConfig(vocab_size=4096, num_layers=4, hidden_size=256, init_std=0.06, max_positions=1024, vision=vision, clvr=ClvrConfig(), **sizes)
    return [
        Case("examples/tiny.yaml", tiny, 32, 8, (8, 40), 24, 128),
        Case("4 layers, hidden 256", wide, 8, 8, (48, 96), 64, 32),
    ]


class Words:
    """A vocabulary whose end never comes: it is beyond what may be sampled."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = self.eos_id = vocab_size - 1

    def decode(self, ids: list[int]) -> str:
        return ""


class Run:
    """A case in one of the modes."""

    def __init__(self, case: Case, deterministic: bool, model: VisionLanguageModel, engine: training.Engine, context: ParallelContext) -> None:
        rollout = RolloutConfig(max_new_tokens=case.new, batch_size=case.prompts * case.samples // 2, deterministic=deterministic)
        config = RunConfig(model=case.model, rollout=rollout, rl=RLConfig(max_logprob_diff=1.0))
        words = Words(case.model.vocab_size)
        self._case, self._deterministic, self._context, self._learner = case, deterministic, context, engine
        self._engine = Engine(model, context, words, rollout)
        self._policy = Policy(engine.wrapped, [], config, words.vocab_size, context)
        self.batches: list[PolicyBatch] = []

    def answer(self) -> list[Rollout]:
        return self._engine.generate(prompts_of(self._case), self._case.samples, seeds=lambda prompt, sample: 1000 * prompt + sample, version=0)

    def keep(self, rollouts: list[Rollout]) -> None:
        scored = [ScoredRollout(rollout, 0.0, {}) for rollout in rollouts]
        advantages = np.random.default_rng(0).normal(size=len(scored))
        (parcel,) = plan_parcels(scored, advantages, minibatches=1, dp_size=1, multiple=1, pad_id=PAD)[0]
        self.batches = [policy_batch(part, self._context.device, 0) for part in microbatches(unpack(parcel), self._case.micro_batch, 1)]

    def gap(self) -> np.ndarray:
        """|difference| of every token."""
        wrapped, gaps = self._learner.wrapped[0], []
        with torch.no_grad(), batch_invariant(self._deterministic):
            for batch in self.batches:
                frame = wrapped.module.frame(batch.inputs)
                logprobs_BS, _ = self._policy.scores(self._policy.forward(wrapped, batch), batch, frame)
                gaps.append((logprobs_BS[:, :-1] - batch.rollout_BS[:, 1:])[batch.mask_BS[:, 1:]].abs().numpy())
        return np.concatenate(gaps)

    def learn(self) -> float:
        """A step at a learning rate of next to nothing, so that the weights stay those that answered."""
        with batch_invariant(self._deterministic):
            return optimizer_step(self._learner, self.batches, self._policy, self._context)["loss"]


def prompts_of(case: Case) -> list[Prompt]:
    rng, vision, prompts = np.random.default_rng(1), case.model.vision, []
    for number in range(case.prompts):
        tile = Tiles.whole(rng.integers(0, 256, size=(1, vision.image_size, vision.image_size, 3), dtype=np.uint8))
        text = rng.integers(8, case.model.vocab_size - 8, size=rng.integers(*case.text_tokens))
        prompts.append(Prompt(str(number), "none", np.concatenate([[IMAGE] * tokens_per_tile(vision), text]).astype(np.int32), tile, ""))
    return prompts


def measure(case: Case, rounds: int, context: ParallelContext) -> dict[str, float]:
    learner, rollout = (build_model(case.model, IMAGE, context) for _ in range(2))
    for tap in learner.decoder.taps:
        torch.nn.init.normal_(tap.linear_out.weight, std=case.model.init_std)
    rollout.load_state_dict(learner.state_dict())
    store_for_generation(rollout)
    engine = build_engine([learner], OptimizerConfig(lr=1e-30, min_lr=0.0, weight_decay=0.0, warmup_steps=0, schedule="constant"), 1000, context)
    runs = {name: Run(case, deterministic, rollout, engine, context) for name, deterministic in SIDES.items()}
    found: dict[str, float] = {}
    for name, run in runs.items():
        run.keep(run.answer())
        gap = run.gap()
        found |= {"tokens": len(gap), f"gap max, {name}": float(gap.max()), f"gap mean, {name}": float(gap.mean()), f"equal, {name}": float((gap == 0).mean())}
    assert found["gap max, deterministic"] == 0
    actions: dict[str, Callable[[Run], Any]] = {"generate": Run.answer, "learn": Run.learn}
    for action, call in actions.items():
        seconds = medians({name: lambda run=run, call=call: call(run) for name, run in runs.items()}, rounds)  # type: ignore[misc]
        found |= {f"{action}, {name}": value for name, value in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, float32, median of {options.rounds}\n")
    print("| model | tokens | fast: largest gap | mean | equal | deterministic: largest gap |\n|---|---|---|---|---|---|")
    found, times = {}, []
    with tempfile.TemporaryDirectory() as folder, open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for case in cases():
            if options.only not in case.name:
                continue
            found[case.name] = it = measure(case, options.rounds, context)
            fast = f"{it['gap max, fast']:.1e} | {it['gap mean, fast']:.1e} | {it['equal, fast']:.0%}"
            print(f"| {case.name} | {it['tokens']:.0f} | {fast} | {it['gap max, deterministic']:g} |", flush=True)
            pairs = ((it[f"{action}, fast"], it[f"{action}, deterministic"]) for action in ("generate", "learn"))
            times.append(f"| {case.name} | {' | '.join(f'{fast:.2f} | {slow:.2f} | {slow / fast:.2f}' for fast, slow in pairs)} |")
    print("\n| model | generate, fast, s | deterministic, s | ratio | learner's step, fast, s | deterministic, s | ratio |\n|---|---|---|---|---|---|---|")
    print("\n".join(times))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
