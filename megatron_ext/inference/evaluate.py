"""Accuracy by skill: greedy, sampled (mean@k, pass@k) and blind, and how much of its expert cluster each skill uses.

    prompts of a split -> replicas answer them in chunks, which a stop does not lose (chunks.py) -> Outcome per prompt -> one JSON file a checkpoint
    the first few of every skill -> traces of their answers (traces.py), for the report

Greedy says what the model answers, mean@k how often a sampled answer is right, pass@k how often one of k is. Blind repeats the greedy evaluation with
the image replaced by
noise: it must be near chance, or the text gives answers away. Standard errors are over prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_ext.batch import Prompt, Rollout, Tiles
from megatron_ext.checkpoint.folder import find_checkpoint
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.chat import question_text
from megatron_ext.data.prompts import chance_of, draw_skills, num_prompts, skills_of
from megatron_ext.data.rewards import correctness
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.device import session
from megatron_ext.earl.bonus import EarlBonus
from megatron_ext.earl.files import read_paid_clusters
from megatron_ext.inference.chunks import NEVER, Chunks, answer_chunks, facts_of, in_order, open_chunks
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.looks import Instead, Look, instead_of, look, summarise_looks
from megatron_ext.inference.phases import chunk_profiler
from megatron_ext.inference.replica import all_replicas, load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.inference.trace import pairs_by_skill
from megatron_ext.inference.traces import TRACES, first_of_each_skill, traced_prompts, with_verdicts, write_traces
from megatron_ext.observe.board import board_traces
from megatron_ext.observe.results import write_verdicts
from megatron_ext.observe.trace import read_traces
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.stopping import StopRequest

PROMPT_SEED = 0
"""Every checkpoint of every run answers the same prompts, so that differences are paired."""
SAMPLES_PER_SKILL = 4


@dataclass(frozen=True)
class Outcome:
    """One prompt's verdicts. `samples`: of the sampled answers; `blind`: of the greedy answer without the image (None: not asked); `mass`: gate mass
    of the greedy answer on its skill's cluster, nan without one; `text`: the greedy answer; `question`: the prompt's text without its image; `look`: what
    CLVR's taps did, where that was asked and there is an image."""

    key: str
    skill: str
    greedy: bool
    samples: tuple[bool, ...]
    blind: bool | None
    mass: float
    text: str
    gold: str
    question: str
    look: Look | None = None


def run_evaluation(config: RunConfig, checkpoint: Path, out: Path, clusters: Path | None = None, stop: StopRequest = NEVER) -> dict[str, Any]:
    """Evaluates the checkpoint on `config.evaluate.split`, writes the table to `out` (JSON) and returns it. Starts its own ranks.

    Raises StoppedForRequeue when asked to stop; run again it goes on, from what it keeps in the folder of the same name as `out`.
    """
    settings, step = config.evaluate, find_checkpoint(checkpoint)
    folder, count = out.with_suffix(""), num_prompts(settings.split, settings.prompts_per_skill, config.data)
    chunks = open_chunks("evaluate", folder / "chunks", count, config, facts_of(config, ["evaluate"], step, clusters))
    traces = chunks.folder / TRACES
    contents = answer_chunks("evaluate", chunks, config, evaluate_rank, step, clusters, None if traces.exists() else traces, stop=stop)
    outcomes = list(in_order([[_outcome(row) for row in json.loads(content)] for content in contents]))
    table = {"checkpoint": str(checkpoint), "split": settings.split, **summarise(outcomes, config)}
    seen = [(outcome.look, outcome.greedy, outcome.skill) for outcome in outcomes if outcome.look is not None]
    if seen:
        table["clvr"] = summarise_looks(*zip(*seen, strict=True))
    _write_samples(folder, outcomes, config)
    write_verdicts(folder, [(o.key, o.skill, o.greedy, o.samples) for o in outcomes])
    traced = with_verdicts(read_traces(traces), {outcome.key: (outcome.text, outcome.greedy) for outcome in outcomes})
    (folder / TRACES).write_text(json.dumps(traced))
    board_traces(folder, traced)
    draft = out.with_suffix(".partial")
    draft.write_text(json.dumps(table, indent=1))
    draft.replace(out)
    chunks.discard()
    return table


def evaluate_rank(
    rank: int, world_size: int, init_method: str, config: RunConfig, chunks: Chunks, checkpoint: Path, clusters: Path | None, traces: Path | None
) -> None:
    """Saves the outcomes of this rank's chunks; before them, where `traces` names a file, traces of a few answers."""
    with session(), open_parallel(all_replicas(config), rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)
        settings = config.evaluate
        prompts = draw_skills(settings.split, settings.prompts_per_skill, PROMPT_SEED, config.data, tokenizer, config.model.vision)
        sampled = {prompt.key for prompt in first_of_each_skill(prompts, settings.sampled_prompts_per_skill)} if settings.samples else set()
        paid = None if clusters is None else read_paid_clusters(clusters, config)
        bonus = None if paid is None else EarlBonus(paid, config.earl, paid.sigmas())
        instead = instead_of(prompts) if settings.clvr else None
        if traces is not None and (chunks.together or context.dp_rank == 0):
            write_traces(traces, engine, tokenizer, traced_prompts(prompts), checkpoint, {} if paid is None else pairs_by_skill(paid))
        left = chunks.left_to(context.dp_rank)
        profiler = chunk_profiler(rank, config, chunks, len(left))
        for chunk in left:
            with profiler.step():
                outcomes = answer(engine, tokenizer, chunks.prompts_of(chunk, prompts), sampled, config, bonus, instead)
            if context.tp_rank == 0:
                chunks.save(chunk, json.dumps([asdict(outcome) for outcome in outcomes]).encode())


def _outcome(row: dict[str, Any]) -> Outcome:
    look = None if row["look"] is None else Look(**row["look"])
    return Outcome(**{**row, "samples": tuple(row["samples"]), "look": look})


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampled: set[str],
    config: RunConfig,
    bonus: EarlBonus | None,
    instead: Instead | None = None,
) -> list[Outcome]:
    """Answers each prompt greedily, some of them several times, and all of them blind. `rl.reward` says what is right. `instead`: also see what CLVR's taps
    look at, and whether the answer is right with them looking at nothing, and at what `instead` shows."""
    correct = correctness(config.rl.reward, config.earl.correct_threshold)

    def verdicts(asked: Sequence[Prompt], samples: int, greedy: bool) -> list[list[tuple[bool, Rollout]]]:
        def seeds(index: int, sample: int) -> int:
            return rollout_seed("evaluate", asked[index].key, sample)

        rollouts = engine.generate(asked, samples, seeds=seeds, version=0, greedy=greedy)
        judged = [(correct(rollout.prompt, rollout.text), rollout) for rollout in rollouts]
        return [judged[start : start + samples] for start in range(0, len(judged), samples)]

    greedy = [group[0] for group in verdicts(prompts, 1, greedy=True)]
    several = [prompt for prompt in prompts if prompt.key in sampled]
    by_key = {
        prompt.key: tuple(right for right, _ in group) for prompt, group in zip(several, verdicts(several, max(config.evaluate.samples, 1), False), strict=True)
    }
    blind = [group[0][0] for group in verdicts([_blinded(prompt) for prompt in prompts], 1, greedy=True)] if config.evaluate.blind else [None] * len(prompts)
    looks: dict[str, Look] = {}
    if instead is not None:
        with_image = [prompt for prompt in prompts if len(prompt.tiles)]
        with engine.model.taps_shown(None):
            zeroed = [group[0][0] for group in verdicts(with_image, 1, greedy=True)]
        with engine.model.taps_shown(instead):
            other = [group[0][0] for group in verdicts(with_image, 1, greedy=True)]
        found = look(engine, with_image, zeroed, other, config.data.image_size)
        looks = {prompt.key: one for prompt, one in zip(with_image, found, strict=True)}
    return [
        Outcome(
            prompt.key,
            prompt.skill,
            right,
            by_key.get(prompt.key, ()),
            unseen,
            math.nan if bonus is None else bonus.mass(rollout.routes, prompt.skill, *rollout.response_rows),
            rollout.text,
            prompt.answer,
            question_text(prompt.tokens_S, tokenizer),
            looks.get(prompt.key),
        )
        for prompt, (right, rollout), unseen in zip(prompts, greedy, blind, strict=True)
    ]


def summarise(outcomes: Sequence[Outcome], config: RunConfig) -> dict[str, Any]:
    """{"skills": {skill: row}, "macro": row}: every row a mean over prompts, the macro row a mean over skills with its standard error."""
    skills = {}
    for skill in [name for name in skills_of(config.data) if any(outcome.skill == name for outcome in outcomes)]:
        skills[skill] = {**_row([outcome for outcome in outcomes if outcome.skill == skill]), "chance": chance_of(skill, config.data)}
    rows = list(skills.values())
    macro: dict[str, float | None] = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if any(value is None for value in values):
            macro[name] = None
        elif name.endswith("_se"):
            macro[name] = math.sqrt(sum(value**2 for value in values)) / len(values)
        else:
            macro[name] = sum(values) if name == "n" else sum(values) / len(values)
    return {"skills": skills, "macro": macro}


def _row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    greedy = np.array([outcome.greedy for outcome in outcomes], dtype=float)
    sampled = [np.array(outcome.samples, dtype=float) for outcome in outcomes if outcome.samples]
    row: dict[str, Any] = {"n": len(outcomes), "greedy": float(greedy.mean()), "greedy_se": _standard_error(greedy)}
    if sampled:
        count = len(sampled[0])
        means = np.array([answers.mean() for answers in sampled])
        row |= {f"mean@{count}": float(means.mean()), f"mean@{count}_se": _standard_error(means), f"pass@{count}": float(np.mean([a.any() for a in sampled]))}
    blind = [outcome.blind for outcome in outcomes if outcome.blind is not None]
    masses = [outcome.mass for outcome in outcomes if math.isfinite(outcome.mass)]
    return {**row, "blind": float(np.mean(blind)) if blind else None, "cluster_mass": float(np.mean(masses)) if masses else None}


def _write_samples(folder: Path, outcomes: Sequence[Outcome], config: RunConfig) -> None:
    """`folder/samples.jsonl` and a picture for each line: the first few prompts of every skill with what was answered, for people to look at."""
    tokenizer = load_tokenizer(config.tokenizer_dir)
    count = min(SAMPLES_PER_SKILL, config.evaluate.prompts_per_skill)
    prompts = draw_skills(config.evaluate.split, count, PROMPT_SEED, config.data, tokenizer, config.model.vision)
    by_key = {outcome.key: outcome for outcome in outcomes}
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for prompt in prompts:
        outcome = by_key[prompt.key]
        picture = f"{prompt.key.replace('/', '-')}.png" if len(prompt.tiles) else ""
        if picture:
            Image.fromarray(prompt.tiles.pixels_IHWC[-1]).save(folder / picture)  # of several tiles the last: the thumbnail
        said = {"key": prompt.key, "question": outcome.question, "answer": outcome.gold, "response": outcome.text, "correct": outcome.greedy}
        lines.append(json.dumps({"skill": prompt.skill, **said, "image": picture}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _blinded(prompt: Prompt) -> Prompt:
    """The prompt with noise for an image, the same noise every time."""
    rng = np.random.default_rng(rollout_seed("blind", prompt.key))
    return replace(prompt, tiles=Tiles(rng.integers(0, 256, size=prompt.tiles.shape, dtype=np.uint8), prompt.tiles.places_I5))
