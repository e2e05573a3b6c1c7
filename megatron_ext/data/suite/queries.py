"""What can be asked about a scene: the five single skills. Each query knows its answer, its wording and the objects the answer rests on.

| skill   | asks                                         | answers              |
|---------|----------------------------------------------|----------------------|
| ocr     | the digits, in raster order                  | "4" or "4 2"         |
| count   | how many shapes have a form or a color       | "0" to "8"           |
| spatial | where an object is as seen from the centre, or another object | left right above below |
| color   | the color of the only shape of a form        | a color              |
| compare | which of two colors has more shapes          | a color              |

The answer is a function of the scene alone (`answer`), defined once; how scenes are drawn for a wanted answer is `skills.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from megatron_ext.data.suite.levels import COLORS, PLURALS
from megatron_ext.data.suite.scene import Item, Look, Scene, relation_of


class Query(Protocol):
    """A question about a scene. `answer` is None where the scene leaves the question without exactly one right answer."""

    @property
    def skill(self) -> str: ...
    def wordings(self) -> tuple[str, ...]: ...
    def answer(self, scene: Scene) -> str | None: ...
    def witnesses(self, scene: Scene) -> list[Item]: ...


def describe_group(target: str) -> str:
    """The plural a count names.

    >>> describe_group("circle"), describe_group("red")
    ('circles', 'red shapes')
    """
    return f"{target} shapes" if target in COLORS else PLURALS[target]


@dataclass(frozen=True, slots=True)
class ReadDigits:
    skill: ClassVar[str] = "ocr"

    def wordings(self) -> tuple[str, ...]:
        return "which digits are written", "what digits are there"

    def answer(self, scene: Scene) -> str | None:
        return " ".join([item.kind for item in scene.digits]) or None

    def witnesses(self, scene: Scene) -> list[Item]:
        return scene.digits


@dataclass(frozen=True, slots=True)
class Count:
    """How many shapes are of a form or color; digits are no shapes."""

    target: str
    skill: ClassVar[str] = "count"

    def wordings(self) -> tuple[str, ...]:
        group = describe_group(self.target)
        return f"how many {group} are there", f"what is the number of {group}"

    def answer(self, scene: Scene) -> str | None:
        return str(len(self.witnesses(scene)))

    def witnesses(self, scene: Scene) -> list[Item]:
        target = self.target
        return [item for item in scene.items if item.kind == target or item.color == target]


@dataclass(frozen=True, slots=True)
class Relation:
    """Where `subject` is as seen from `anchor`, or from the centre of the picture (None); both are looks that occur once."""

    subject: Look
    anchor: Look | None
    skill: ClassVar[str] = "spatial"

    def wordings(self) -> tuple[str, ...]:
        subject = " ".join(self.subject)
        if self.anchor is None:
            return f"where is the {subject} seen from the centre", f"which side of the picture is the {subject} on"
        anchor = " ".join(self.anchor)
        return f"where is the {subject} seen from the {anchor}", f"which side of the {anchor} is the {subject} on"

    def answer(self, scene: Scene) -> str | None:
        places = []
        for look in self._looks():
            found = [(item.row, item.column) for item in scene.items if item.look == look]
            if len(found) != 1:
                return None
            places += found
        seen_from = scene.level.centre if self.anchor is None else places[1]
        return relation_of(*places[0], *seen_from)

    def witnesses(self, scene: Scene) -> list[Item]:
        return [item for item in scene.items if item.look in self._looks()]

    def names_shapes(self) -> list[str]:
        """Shapes whose color the wording gives away."""
        return [shape for _, shape in self._looks()]

    def _looks(self) -> tuple[Look, ...]:
        return (self.subject,) if self.anchor is None else (self.subject, self.anchor)


@dataclass(frozen=True, slots=True)
class ColorOf:
    shape: str
    skill: ClassVar[str] = "color"

    def wordings(self) -> tuple[str, ...]:
        return f"what color is the {self.shape}", f"which color has the {self.shape}"

    def answer(self, scene: Scene) -> str | None:
        found = self.witnesses(scene)
        return found[0].color if len(found) == 1 else None

    def witnesses(self, scene: Scene) -> list[Item]:
        return [item for item in scene.items if item.kind == self.shape]


@dataclass(frozen=True, slots=True)
class Compare:
    """Which of two colors has more shapes; None when they have the same number."""

    first: str
    second: str
    skill: ClassVar[str] = "compare"

    def wordings(self) -> tuple[str, ...]:
        return f"are there more {self.first} or {self.second} shapes", f"which are there more of, {self.first} or {self.second} shapes"

    def answer(self, scene: Scene) -> str | None:
        colors = [item.color for item in scene.items]
        lead = colors.count(self.first) - colors.count(self.second)
        return None if lead == 0 else self.first if lead > 0 else self.second

    def witnesses(self, scene: Scene) -> list[Item]:
        return [item for item in scene.items if item.color in (self.first, self.second)]
