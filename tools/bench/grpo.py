"""A whole GRPO step against TRL's GRPOTrainer: `python tools/bench/grpo.py [--rounds 5]`, results in docs/benchmarks/grpo.md.

Eight prompts of 96 tokens, eight sampled answers of 64 tokens to each, a reward, advantages, one AdamW update, and new weights for the next step. Both sides
start from the same random mixture of experts (16 experts, top 2, float32), converted, and take steps in turns; elapsed times, medians.

    ours    `rl/loop.py` over a local fleet: a learner, a rollout and a reward process, which wait for each other; one thread each
    TRL     GRPOTrainer on the CPU in this process, one thread: transformers' generate, one batch of 64 answers, no recomputation, KL or auxiliary loss
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from generation import IMAGE, NEW, PROMPT, VOCABULARY, Case, checkpoint, prompts_of
from generation import Words as Endless
from interleave import machine

from megatron_ext.batch import Markers, Prompt
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import EarlConfig, OptimizerConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.rl import learner, learners, replicas, rollout_worker
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.deadlines import DEADLINES
from megatron_ext.rl.fleet import MegatronFleet
from megatron_ext.rl.hosts.local_host import local_host
from megatron_ext.rl.hosts.switchboard import Switchboard
from megatron_ext.rl.learners import MegatronLearner
from megatron_ext.rl.loop import Recipe, run_step
from megatron_ext.rl.scoring.pool import RewardPool
from megatron_ext.rl.stream import Questions, Stream
from megatron_ext.rl.turns import Turns

CASE = Case("8 prompts x 8", 16, 8, 8)
LEARNING_RATE = 1e-5
PHASES = ("generation", "update", "rest")


class Words(Endless):
    """Its words are the numbers of its tokens."""

    image_id, pad_id, tag_ids, slot_ids, placeholders, markers = IMAGE, 0, {}, (), (IMAGE,), Markers()

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def even(prompt: Prompt, response: str) -> float:
    """The share of even words."""
    words = response.split()
    return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


class BenchLearner(learner.LearnerRank):
    def open(self, *arguments: Any) -> Any:
        with patch.object(learner, "load_tokenizer", lambda folder: Words()):
            return super().open(*arguments)


class BenchRollout(rollout_worker.RolloutRank):
    def open(self, *arguments: Any) -> Any:
        with patch.object(rollout_worker, "load_tokenizer", lambda folder: Words()):
            return super().open(*arguments)


def configuration(model: Any, folder: Path) -> RunConfig:
    rl = RLConfig(
        prompts_per_step=CASE.prompts,
        rollouts_per_prompt=CASE.samples,
        micro_batch=CASE.prompts * CASE.samples,
        fleet="local",
        reward="tools.bench.grpo:even",
        router_lr_scale=1.0,
        probe=False,  # its prompts are the suite's, which this vocabulary cannot spell
        optimizer=OptimizerConfig(lr=LEARNING_RATE, warmup_steps=0, schedule="constant", weight_decay=0.0),
    )
    rollout = RolloutConfig(max_new_tokens=NEW, batch_size=CASE.prompts * CASE.samples, replicas=1)
    return RunConfig(output_dir=folder, model=model, rollout=rollout, rl=rl, earl=EarlConfig(enabled=False))


@contextmanager
def ours(source: Path, folder: Path) -> Iterator[Callable[[int], dict[str, float]]]:
    """A function that takes a step and returns its seconds by phase."""
    with redirect_stdout(StringIO()):
        described = hf_to_megatron(source, folder / "start")
    config, prompts = configuration(described.model, folder), prompts_of(CASE)
    with ExitStack() as stack:
        stack.enter_context(patch.object(learners, "LearnerRank", BenchLearner))
        stack.enter_context(patch.object(replicas, "RolloutRank", BenchRollout))
        scorer = stack.enter_context(RewardPool(config.rl.reward, 1, config.rl.reward_timeout_s))
        board = Switchboard(stack.enter_context(local_host()))
        turns = Turns(board, DEADLINES.sync_s, config.rl.offload)
        owner = MegatronLearner(board, config, folder / "rl", folder / "start", Words.pad_id, DEADLINES, turns)
        fleet = MegatronFleet(board, config, DEADLINES, turns)
        owner.wait_open()
        fleet.wait_open()
        asked = Questions(config.rl.steps, CASE.samples, lambda step: [replace(prompt, key=f"{step}/{prompt.key}") for prompt in prompts])
        stream = Stream(asked, fleet, scorer, open_bank(folder / "rollouts"), whole_draws=True)
        recipe = Recipe(config.rl.steps, Credit(config, None, Words.tag_ids, folder))
        stream.publish(owner.weights())

        def step(number: int) -> dict[str, float]:
            began = time.perf_counter()
            report = run_step(recipe, stream, owner, number)
            total = time.perf_counter() - began
            assert len(report.scored) == CASE.prompts * CASE.samples and all(len(answer.rollout.response_T) == NEW for answer in report.scored)
            generation, update = report.metrics["timing_s/generate"], report.metrics["timing_s/update"]
            return {"total": total, "generation": generation, "update": update, "rest": total - generation - update}

        yield step


def words_of_transformers() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    end = str(VOCABULARY - 1)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, padding_side="left")


def theirs(source: Path, folder: Path, rounds: int, after_step: Callable[[int, dict[str, float]], None]) -> None:
    """Trains for `rounds` steps; `after_step` gets each step's seconds by phase."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=CASE.prompts * CASE.samples,
        num_generations=CASE.samples,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        beta=0.0,
        router_aux_loss_coef=0.0,
        max_steps=rounds,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.float32)
    texts = [Words().decode(prompt.tokens_S.tolist()) for prompt in prompts_of(CASE)]
    data = Dataset.from_list([{"prompt": text} for text in texts] * rounds)
    seconds: dict[str, float] = {}

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert all(len(completion.split()) == NEW for completion in completions) and len(completions) == CASE.prompts * CASE.samples
        return [even(None, completion) for completion in completions]  # type: ignore[arg-type]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds.clear()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            total = time.perf_counter() - self.began
            spent = {"generation": seconds["_generate"], "update": total - seconds["_prepare_inputs"]}
            after_step(state.global_step - 1, {"total": total, **spent, "rest": total - sum(spent.values())})

    trainer = GRPOTrainer(model, reward, args=settings, train_dataset=data, processing_class=words_of_transformers(), callbacks=[Clock()])
    for name in ("_generate", "_prepare_inputs"):
        setattr(trainer, name, timed(getattr(trainer, name), name, seconds))
    trainer.train()


def timed(work: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*arguments, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side, after a first that does not count (default 5)")
    parser.add_argument("--only", default="", help="the case, if its name contains this")
    parser.add_argument("--json", type=Path, help="where to write the medians: new tokens a second, and seconds by phase")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
    if options.only not in CASE.name:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = checkpoint(CASE, folder / "hf")
        with ours(source, folder) as our_step:

            def after_step(number: int, seconds: dict[str, float]) -> None:
                steps["TRL"].append(seconds)
                steps["ours"].append(our_step(number))

            theirs(source, folder, options.rounds + 1, after_step)
    middle = {side: {phase: statistics.median(step[phase] for step in taken[1:]) for phase in taken[0]} for side, taken in steps.items()}
    print(f"{machine()}, float32, {CASE.name}, {PROMPT} prompt tokens, {NEW} new ones, median of {options.rounds}\n")
    print("| | a step, s | generation | update | rest |\n|---|---|---|---|---|")
    for side, spent in middle.items():
        print(f"| {side} | {spent['total']:.2f} | {' | '.join(f'{spent[phase]:.2f}' for phase in PHASES)} |")
    print(f"\nTRL / ours: {middle['TRL']['total'] / middle['ours']['total']:.2f}")
    if options.json:
        rates = {side: CASE.prompts * CASE.samples * NEW / spent["total"] for side, spent in middle.items()}
        shares = {f"{phase} of {side}, s": spent[phase] for side, spent in middle.items() for phase in PHASES}
        options.json.write_text(json.dumps({CASE.name: rates | shares}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    from tools.bench.grpo import main as run  # ranks import their roles from a module that has a name

    run()
