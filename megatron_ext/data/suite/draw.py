"""Draws conversations and prompts from the suite: pure functions of (split, kind or skill, seed, index).

draw_dialogue       scene and turns, no pixels yet: the training stream renders a whole batch at once
draw_conversation   the same with its picture
draw_prompts        single questions for evaluation, discovery and RL, with uniformly distributed answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_ext.batch import Prompt, Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import IMAGE, Conversation, Turn, encode_prompt
from megatron_ext.data.digits import Split
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.suite import skills as single
from megatron_ext.data.suite.captions import map_turn, place_turns, tally_turn
from megatron_ext.data.suite.composite import COMPOSITES, Composite, composite_chance, offer_composite, propose_composite
from megatron_ext.data.suite.levels import level_of
from megatron_ext.data.suite.queries import Query
from megatron_ext.data.suite.render import item_box, render
from megatron_ext.data.suite.scene import Scene, build_in_split

Kind = Literal["caption", "qa", "composite"]
KINDS: tuple[Kind, ...] = ("caption", "qa", "composite")
ALL_SKILLS = (*single.SKILLS, "composite")

FRAMES = {"plain": "{}?", "question": "question: {}?", "look": "look: {}?"}
"""Every skill is asked in the same frames, so the format of a prompt does not tell its skill. The frame is the prompt's `template`."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A scene and what is said about it; the first question holds the image."""

    scene: Scene
    turns: tuple[Turn, ...]


def draw_dialogue(split: Split, kind: str, seed: int, index: int, config: DataConfig) -> Dialogue:
    """The index-th conversation of its kind: `questions_per_image` turns (half as many composites) about one scene."""
    rng = Random(f"{split} {kind} {seed} {index}")
    match kind:
        case "caption":
            scene, turns = _caption(rng, split, config)
        case "qa":
            scene, turns = _questions(rng, split, config)
        case "composite":
            scene, turns = _composites(rng, split, config)
        case _:
            raise ValueError(f"there is no kind of conversation {kind!r}, only {KINDS}")
    (question, answer), *rest = turns
    return Dialogue(scene, ((f"{IMAGE}\n{question}", answer), *rest))


def draw_conversation(split: Split, kind: str, seed: int, index: int, config: DataConfig) -> Conversation:
    """The index-th conversation of its kind with its picture."""
    dialogue = draw_dialogue(split, kind, seed, index, config)
    return Conversation((render([dialogue.scene], config.image_size)[0],), dialogue.turns)


def draw_prompts(
    split: Split, skills: Sequence[str], count_per_skill: int, seed: int, config: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, start: int = 0
) -> list[Prompt]:
    """Prompts `start` to `start + count_per_skill` of every skill (`SKILLS` or "composite"), skill by skill.

    `Prompt.meta`, made of JSON values: `skill`, `template` (the frame), `phrasing`, `level`, `answer`, `boxes` ([top, left, bottom, right] of the objects
    the answer rests on), `handwritten`, and `parts` for composites: the [skill, answer] of every step, the final "ans" last.
    """
    prompts = []
    for skill in skills:
        for index in range(start, start + count_per_skill):
            prompts.append(_draw_prompt(split, skill, seed, index, config, tokenizer, tokens_per_tile(vision)))
    return prompts


def chance(skill: str, config: DataConfig) -> float:
    """Accuracy that a model reaches which reads the question but does not see the image."""
    level = level_of(config)
    return composite_chance(level) if skill == "composite" else single.chance(skill, level)


def _draw_prompt(split: Split, skill: str, seed: int, index: int, config: DataConfig, tokenizer: Tokenizer, tile_tokens: int) -> Prompt:
    rng = Random(f"prompt {split} {skill} {seed} {index}")
    query, scene = lead(rng, skill, split, config)
    wordings = query.wordings()
    phrasing, template = rng.randrange(len(wordings)), rng.choice(list(FRAMES))
    answer = query.answer(scene)
    if answer is None:
        raise RuntimeError(f"{query} has no answer in a scene that was drawn for it: {scene}")
    meta: dict[str, object] = {
        "skill": skill,
        "template": template,
        "phrasing": f"{query.kind if isinstance(query, Composite) else skill}/{phrasing}",
        "level": scene.level.number,
        "answer": answer,
        "boxes": [list(item_box(item, scene, config.image_size)) for item in query.witnesses(scene)],
        "handwritten": scene.is_handwritten,
    }
    if isinstance(query, Composite):
        meta["parts"] = [list(step) for step in query.steps(scene) or ()]
    text = f"{IMAGE}\n{FRAMES[template].format(wordings[phrasing])}"
    tiles = Tiles.whole(render([scene], config.image_size))
    return Prompt(f"suite/{split}/{skill}/{seed}/{index}", skill, encode_prompt(text, tokenizer, tile_tokens), tiles, answer, meta)


def lead(rng: Random, skill: str, split: Split, config: DataConfig) -> tuple[Query, Scene]:
    """A question whose answer is drawn first, and a scene of the split in which it is true."""
    level = level_of(config)
    query, blueprint = propose_composite(rng.choice(COMPOSITES), rng, level) if skill == "composite" else single.propose(skill, rng, level)
    return query, build_in_split(blueprint, rng, level, split, config.real_digits)


def _ask(query: Query, scene: Scene, rng: Random) -> Turn:
    """A turn in a random frame and wording."""
    answer = query.answer_in_some_order(scene, rng) if isinstance(query, Composite) else query.answer(scene)
    return rng.choice(list(FRAMES.values())).format(rng.choice(query.wordings())), answer or ""


def _caption(rng: Random, split: Split, config: DataConfig) -> tuple[Scene, list[Turn]]:
    """Places first, then tallies, maps last: an answer that a map has already given would be read off the text."""
    _, scene = lead(rng, rng.choice(ALL_SKILLS), split, config)
    tables = [make(aspect, scene, rng) for make in (tally_turn, map_turn) for aspect in rng.sample(("color", "kind"), 2)][-config.questions_per_image :]
    return scene, place_turns(config.questions_per_image - len(tables), scene, rng) + tables


def _questions(rng: Random, split: Split, config: DataConfig) -> tuple[Scene, list[Turn]]:
    """Single-skill questions in random order, the first with its scene drawn for it, the others as the scene offers them. A skill that the scene does
    not offer gives way to the next that it does; where nothing new is left to ask, the first question is asked again."""
    deck = [skill for skill, weight in single.SKILL_WEIGHTS.items() for _ in range(weight)]
    rng.shuffle(deck)
    query, scene = lead(rng, deck[0], split, config)
    asked = [query]
    for turn in range(1, config.questions_per_image):
        wanted = deck[turn % len(deck)]
        offers = (single.offer(skill, rng, scene, asked) for skill in (wanted, "spatial", "color", "count", "compare"))
        asked.append(next((offer for offer in offers if offer is not None), query))
    return scene, [_ask(query, scene, rng) for query in asked]


def _composites(rng: Random, split: Split, config: DataConfig) -> tuple[Scene, list[Turn]]:
    kinds = rng.sample(COMPOSITES, len(COMPOSITES))
    level = level_of(config)
    query, blueprint = propose_composite(kinds[0], rng, level)
    scene = build_in_split(blueprint, rng, level, split, config.real_digits)
    offers = (offer_composite(kind, rng, scene) for kind in kinds[1:])
    asked = [query, *(offer for offer in offers if offer is not None)][: max(1, config.questions_per_image // 2)]
    return scene, [_ask(query, scene, rng) for query in asked]
