"""The survey before discovery: which experts do correct, on-policy answers use, prompt by prompt?

    train-split prompts of every skill -> sampled answers, in chunks that a stop does not lose (chunks.py) -> the correct ones
      -> gate mass [L, E] of each answer's positions, written as it is computed -> mass.npy, prompt_mass.npy, control.npy
      -> whose each row is -> survey.npz, last: what is there is whole

Spans are logged apart and never pooled: `mass` is the answer's, `image_mass` that of the prompt's image tokens (nan without an image), `question_mass` that
of the prompt's other tokens, and `prompt_mass` that of both. The prompt's last position, which chooses the answer's first token, is the answer's. `control`
is what the token ids alone explain (`earl/token_control.py`). The unit is the prompt: one answer each. Discovery reads the masses a few layers at a time
(`earl/masses.py`), so that neither here nor there do they have to fit in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.batch import Prompt, Rollout, RouteTrace, gate_mass, gate_mass_at
from megatron_ext.checkpoint.folder import find_checkpoint
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import draw_skills, num_prompts
from megatron_ext.data.rewards import correctness
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.device import session
from megatron_ext.durable import remove_drafts
from megatron_ext.earl.masses import MassFile, mass_file
from megatron_ext.earl.token_control import TokenTable
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.inference.chunks import NEVER, Chunks, Facts, answer_chunks, facts_of, open_chunks
from megatron_ext.inference.phases import chunk_profiler
from megatron_ext.inference.replica import all_replicas, load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.stopping import StopRequest

SURVEY_FILE = "survey.npz"
CONTROL = "control"
SPANS = {"image": "image_mass", "question": "question_mass"}
"""Spans of the prompt, and what their masses are called."""
_VERSION = 3
"""Of the files; 1 knew no spans of the prompt, 2 had all masses in survey.npz."""
TOKEN_TABLE_BYTES = 1 << 30
"""Of the sums and means of token control that are in memory at once."""
PROMPT_SEED = 1_000_003
"""Train-split prompts that training streams and RL do not draw with their own seeds."""


@dataclass(frozen=True)
class Correct:
    """A correct answer, as far as the survey needs it. `tokens_S`: prompt and response; `rows`: [start, stop) of the positions that chose the response."""

    key: str
    skill: str
    template: str
    rows: tuple[int, int]
    tokens_S: np.ndarray
    routes: RouteTrace

    @property
    def asked_S(self) -> np.ndarray:
        """The prompt, up to the position that chooses the answer's first token."""
        return self.tokens_S[: self.rows[0]]

    @classmethod
    def of(cls, rollout: Rollout) -> Correct:
        prompt = rollout.prompt
        tokens_S = np.concatenate([prompt.tokens_S, rollout.response_T])
        return cls(prompt.key, prompt.skill, str(prompt.meta["template"]), rollout.response_rows, tokens_S, rollout.routes)


MASSES: dict[str, Callable[[Correct, int, int], np.ndarray]] = {
    "mass": lambda answer, experts, _: gate_mass(answer.routes, experts, *answer.rows),
    "prompt_mass": lambda answer, experts, _: gate_mass(answer.routes, experts, 0, answer.rows[0]),
    SPANS["image"]: lambda answer, experts, image_id: gate_mass_at(answer.routes, experts, answer.asked_S == image_id),
    SPANS["question"]: lambda answer, experts, image_id: gate_mass_at(answer.routes, experts, answer.asked_S != image_id),
}
"""Of which positions each file of masses tells: of an answer, the number of experts and the token of images."""


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A finished survey. `mass(name)`: the masses `name`, of `MASSES` or `CONTROL`, on disk."""

    folder: Path
    skill_N: list[str]
    template_N: list[str]

    @classmethod
    def read(cls, path: Path) -> Surveyed:
        """`path` is survey.npz."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(path.parent, arrays["skill_N"].tolist(), arrays["template_N"].tolist())

    def mass(self, name: str) -> MassFile:
        return MassFile(self.folder / f"{name}.npy")


def run_discovery_survey(config: RunConfig, checkpoint: Path, folder: Path, stop: StopRequest = NEVER) -> Path:
    """Answers `discover.prompts_per_skill` prompts of every skill, keeps the correct answers, and writes `folder/survey.npz` with its masses. Starts its own
    ranks.

    A file that is there and depends on the same facts is returned as it is. Raises UserError when no answer was correct: there is nothing to find clusters of.
    Raises StoppedForRequeue when asked to stop; run again it goes on.
    """
    count, step = num_prompts("train", config.discover.prompts_per_skill, config.data), find_checkpoint(checkpoint)
    settings = ["discover.prompts_per_skill", "discover.token_control_kappa", "discover.survey_dtype"]
    facts = facts_of(config, settings, step) | {"the survey's version": _VERSION}
    path, draft = folder / SURVEY_FILE, folder / f"partial-{SURVEY_FILE}"
    if path.exists() and _facts(path) == facts:
        return path
    chunks = open_chunks("discover", folder / "chunks", count, config, facts)
    answer_chunks("discover", chunks, config, survey_rank, step, stop=stop)

    def answers() -> Iterator[Correct]:
        for content in chunks.contents():
            if stop.asked:
                raise StoppedForRequeue("stopped after the last answer: run again to resume")
            yield from unpacked(content)

    found = any(True for _ in answers())
    if found:
        path.unlink(missing_ok=True)
        remove_drafts(folder)
        labels = write_tables(answers, config, load_tokenizer(config.tokenizer_dir).image_id, folder)
        np.savez_compressed(draft, allow_pickle=False, **labels, asked=np.array(count), facts=np.array(json.dumps(facts)))
        draft.replace(path)
    chunks.discard()
    if not found:
        raise UserError("discover", f"none of {count} sampled answers of {checkpoint} was correct", "fine-tune longer, or lower data.level")
    return path


def _facts(survey: Path) -> Facts:
    with np.load(survey, allow_pickle=False) as arrays:
        return dict(json.loads(str(arrays["facts"]))) if "facts" in arrays else {}


def survey_rank(rank: int, world_size: int, init_method: str, config: RunConfig, chunks: Chunks, checkpoint: Path) -> None:
    """Saves the correct answers of this rank's chunks."""
    with session(), open_parallel(all_replicas(config), rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)
        prompts = draw_skills("train", config.discover.prompts_per_skill, PROMPT_SEED + config.seed, config.data, tokenizer, config.model.vision)
        right = correctness(config.rl.reward, config.earl.correct_threshold)
        left = chunks.left_to(context.dp_rank)
        profiler = chunk_profiler(rank, config, chunks, len(left))
        for chunk in left:
            asked = chunks.prompts_of(chunk, prompts)

            def seeds(index: int, sample: int, asked: Sequence[Prompt] = asked) -> int:
                return rollout_seed("survey", config.seed, asked[index].key, sample)

            with profiler.step():
                rollouts = engine.generate(asked, 1, seeds=seeds, version=0)
            correct = [Correct.of(rollout) for rollout in rollouts if right(rollout.prompt, rollout.text)]
            if context.tp_rank == 0:
                chunks.save(chunk, packed(correct))


def packed(answers: Sequence[Correct]) -> bytes:
    """The answers as the bytes of an npz file; `unpacked` takes them back."""
    words = [[answer.key, answer.skill, answer.template, answer.rows] for answer in answers]
    arrays = {"words": np.array(json.dumps(words))}
    for index, answer in enumerate(answers):
        arrays |= {f"tokens_{index}": answer.tokens_S, f"experts_{index}": answer.routes.experts_SLK, f"gates_{index}": answer.routes.gates_SLK}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def unpacked(content: bytes) -> list[Correct]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return [
            Correct(key, skill, template, (start, stop), arrays[f"tokens_{index}"], RouteTrace(arrays[f"experts_{index}"], arrays[f"gates_{index}"]))
            for index, (key, skill, template, (start, stop)) in enumerate(json.loads(str(arrays["words"])))
        ]


def write_tables(answers: Callable[[], Iterable[Correct]], config: RunConfig, image_id: int, folder: Path) -> dict[str, np.ndarray]:
    """Writes the masses of all answers to `folder`, a row an answer, in the order of their keys whatever rank answered; returns what to know of each row.

    `answers` is called several times: no more than one chunk of them, and TOKEN_TABLE_BYTES of token control, are in memory at once.
    """
    known = [(answer.key, answer.skill, answer.template, answer.routes.shape[1]) for answer in answers()]
    order = sorted(range(len(known)), key=lambda index: known[index][0])
    row_of = np.argsort(order).tolist()
    shape = (len(known), known[0][3], config.model.num_experts)
    with ExitStack() as files:
        writers = {name: files.enter_context(mass_file(folder / f"{name}.npy", shape, np.dtype(config.discover.survey_dtype))) for name in MASSES}
        for row, answer in zip(row_of, answers(), strict=True):
            for name, writer in writers.items():
                writer.write(row, 0, MASSES[name](answer, config.model.num_experts, image_id))
    _write_control(answers, row_of, shape, config, folder)
    names = ("key_N", "skill_N", "template_N")
    return {name: np.array([known[index][column] for index in order]) for column, name in enumerate(names)}


def _write_control(answers: Callable[[], Iterable[Correct]], row_of: list[int], shape: tuple[int, int, int], config: RunConfig, folder: Path) -> None:
    """What token ids explain of each answer: as many layers at a time as the table of token ids has room for."""
    words = set().union(*({(answer.skill, token) for token in answer.tokens_S[slice(*answer.rows)].tolist()} for answer in answers()))
    at_once = max(1, TOKEN_TABLE_BYTES // (16 * shape[2] * len(words)))
    with mass_file(folder / f"{CONTROL}.npy", shape, np.dtype(config.discover.survey_dtype)) as writer:
        for first in range(0, shape[1], at_once):
            table = TokenTable(shape[2], config.discover.token_control_kappa, slice(first, first + at_once))
            for row, answer in zip(row_of, answers(), strict=True):
                table.add(answer.routes, answer.tokens_S, *answer.rows, answer.skill, order=row)
            for row, answer in zip(row_of, answers(), strict=True):
                writer.write(row, first, table.expected(answer.tokens_S[slice(*answer.rows)]))


def survey_table(answers: Sequence[Correct], config: RunConfig, image_id: int) -> dict[str, np.ndarray]:
    """What `write_tables` writes and returns, in memory: for answers that fit there."""
    answers = sorted(answers, key=lambda answer: answer.key)
    experts = config.model.num_experts
    table = TokenTable(experts, config.discover.token_control_kappa)
    for answer in answers:
        table.add(answer.routes, answer.tokens_S, *answer.rows, answer.skill)
    return {
        **{f"{name}_NLE": np.stack([mass(answer, experts, image_id) for answer in answers]) for name, mass in MASSES.items()},
        f"{CONTROL}_NLE": np.stack([table.expected(answer.tokens_S[slice(*answer.rows)]) for answer in answers]),
        "skill_N": np.array([answer.skill for answer in answers]),
        "template_N": np.array([answer.template for answer in answers]),
        "key_N": np.array([answer.key for answer in answers]),
    }
