"""Pretraining turns: what a scene holds, cell by cell. They teach a model where things are before anyone asks why.

Maps name every cell in raster order with one word, a line per row, so that the n-th word belongs to the n-th image token:

    red empty empty white            circle empty empty 4
    empty blue empty empty           empty square empty empty

Tallies count every shape or every color: `circle 2 square 0 triangle 1 cross 0`. `find` turns give the row and column of an object, `look` turns the content of
a row and column, both counted from 1.
"""

from __future__ import annotations

from random import Random

from megatron_ext.data.suite.scene import Item, Scene

EMPTY = "empty"
Turn = tuple[str, str]

_MAP_QUESTIONS = {"color": ("name the color of every cell", "list all cells by color"), "kind": ("name the content of every cell", "list all cells by content")}
_TALLY_QUESTIONS = {"color": ("count the shapes of every color", "how many of each color"), "kind": ("count every kind of shape", "how many of each shape")}


def map_turn(aspect: str, scene: Scene, rng: Random) -> Turn:
    """A whole scene as words: the `color` or the `kind` (shape or digit) of every cell."""
    grid = scene.level.grid
    words = [[EMPTY] * grid for _ in range(grid)]
    for item in scene.items:
        words[item.row][item.column] = item.color if aspect == "color" else item.kind
    return rng.choice(_MAP_QUESTIONS[aspect]), "\n".join(map(" ".join, words))


def tally_turn(aspect: str, scene: Scene, rng: Random) -> Turn:
    """How many shapes there are of every `color` or every `kind`, in the level's order."""
    names = scene.level.colors if aspect == "color" else scene.level.shapes
    counts = [sum(name in item.look for item in scene.shapes) for name in names]
    return rng.choice(_TALLY_QUESTIONS[aspect]), " ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))


def place_turns(count: int, scene: Scene, rng: Random) -> list[Turn]:
    """`count` turns that tie objects to cells, every turn about another cell as long as the scene has more: `find` where the object's name singles it out,
    else `look`; one turn in eight looks at a random cell, which is mostly empty."""
    looks = [item.look for item in scene.items]
    order: list[Item] = []
    while len(order) < count:
        order += rng.sample(scene.items, len(scene.items))
    turns = []
    for item in order[:count]:
        if rng.random() < 1 / 8:
            turns.append(_look(rng.randrange(scene.level.grid), rng.randrange(scene.level.grid), scene))
        elif rng.random() < 0.5 and looks.count(item.look) == 1:
            turns.append((f"find the {describe(item)}", f"row {item.row + 1} column {item.column + 1}"))
        else:
            turns.append(_look(item.row, item.column, scene))
    return turns


def _look(row: int, column: int, scene: Scene) -> Turn:
    content = [describe(item) for item in scene.items if (item.row, item.column) == (row, column)]
    return f"what is at row {row + 1} column {column + 1}", content[0] if content else EMPTY


def describe(item: Item) -> str:
    """An object in words.

    >>> describe(Item(0, 0, "circle", "red", 1)), describe(Item(0, 0, "4", "white", 1))
    ('red circle', 'white 4')
    """
    return f"{item.color} {item.kind}"
