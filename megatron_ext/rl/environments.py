"""What answers a model before its answer counts: an environment goes on with a conversation, or ends it.

    act(prompt, turns) -> Observation(text, pictures)    the model sees it, and has another turn
                       -> None                           the conversation is over: its last turn is the answer

Any function of this form is one (`rl.environment=module:function`; docs/environments.md). It keeps nothing: all that was said is given to it each time. It runs
in the same kind of process as rewards do, under their limits of time and memory; what raises, hangs or returns nonsense fails its rollout with a reason:
`environment_raised`, `environment_timeout`, `environment_worker_died`, `environment_wrong_type`.

`zoom` comes with the program: the model writes <zoom>x0,y0,x1,y1</zoom>, shares of the picture's width and height from its upper left corner, and is shown that
part of the original picture as a new image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_ext.batch import Prompt, Tiles
from megatron_ext.config.schema import DataConfig
from megatron_ext.data.chat import IMAGE, RESERVED
from megatron_ext.data.images import fit
from megatron_ext.data.originals import original
from megatron_ext.data.pieces import SLOT
from megatron_ext.data.rewards import BadReward, load_function
from megatron_ext.rl.scoring.pool import Failure, WorkerPool

MOST_PICTURES = 8
LEAST_SIDE = 0.02
"""Of a box: a smaller one shows a few pixels, blown up."""
_NUMBER = r"\s*(\d*\.?\d+|\d+\.)\s*"
_CALL = re.compile(rf"<zoom>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</zoom>", re.ASCII)
_LIMITS = DataConfig()


class Turn(NamedTuple):
    """What the model wrote in one turn, and what it was shown then (None: it is the last so far)."""

    text: str
    observation: Observation | None = None


@dataclass(frozen=True)
class Observation:
    """`text` may hold no piece of the chat template. Each of `pictures` is uint8 [side, side, 3], of the side of the prompt's tiles, and becomes one image."""

    text: str
    pictures: tuple[np.ndarray, ...] = ()

    @property
    def tiles(self) -> Tiles:
        return Tiles.whole(np.stack(self.pictures)) if self.pictures else Tiles.whole(np.zeros((0, 1, 1, 3), np.uint8))


Environment = Callable[[Prompt, Sequence[Turn]], Observation | None]


def load_environment(path: str) -> Environment:
    """The function behind `rl.environment`. Raises UserError."""
    return load_function(path, "rl.environment", "megatron_ext.rl.environments:zoom", "act(prompt, turns)")  # type: ignore[return-value]


def read_observation(value: object, prompt: Prompt) -> Observation | None:
    """What an environment returned, if it is what one may return. Raises BadReward with the reason `environment_wrong_type`."""
    if value is None:
        return None
    if not isinstance(value, Observation) or not isinstance(value.text, str):
        raise _wrong(f"it returned a {type(value).__name__}, neither an Observation nor None")
    if mark := next((mark for mark in (*RESERVED, IMAGE) if mark in value.text), None):
        raise _wrong(f"the text of its observation holds {mark}, which belongs to the chat template")
    if slot := SLOT.search(value.text):
        raise _wrong(f"the text of its observation holds {slot[0]}, which is a memory token")
    if len(value.pictures) > MOST_PICTURES:
        raise _wrong(f"{len(value.pictures)} pictures in one observation, more than {MOST_PICTURES}")
    wanted = prompt.tiles.shape[1:] if len(prompt.tiles) else None
    for picture in value.pictures:
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != wanted:
            shown = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise _wrong(f"a picture is {shown}, not uint8 {wanted} as the prompt's tiles")
    return value


def _wrong(detail: str) -> BadReward:
    return BadReward("environment_wrong_type", detail)


class EnvironmentPool(WorkerPool):
    """Processes that run an environment; see `scoring/pool.py`."""

    kind = "environment"

    def act(self, talks: Sequence[tuple[Prompt, Sequence[Turn]]]) -> list[Observation | Failure | None]:
        """How each conversation goes on, in their order."""
        replies = self.run([(prompt, tuple(turns)) for prompt, turns in talks])
        return [reply if isinstance(reply, Failure) else reply[0] for reply in replies]


def zoom(prompt: Prompt, turns: Sequence[Turn]) -> Observation | None:
    """Where the latest turn calls for it, the part of the prompt's first picture that it names, scaled to a tile. A call that cannot be followed is told what
    is wrong with it; a turn without a call ends the conversation."""
    text = turns[-1].text
    if "<zoom>" not in text:
        return None
    if not len(prompt.tiles):
        return Observation("there is no picture to zoom into")
    call = _CALL.search(text)
    if call is None:
        return Observation("zoom takes four numbers: x0,y0,x1,y1")
    left, top, right, bottom = (float(number) for number in call.groups())
    if max(right, bottom) > 1:
        return Observation("zoom takes shares of the picture from 0 to 1")
    if right - left < LEAST_SIDE or bottom - top < LEAST_SIDE:
        return Observation("this part is empty: x0 is left of x1 and y0 above y1")
    picture = original(prompt, 0, _LIMITS)
    box = (int(left * picture.width), int(top * picture.height), -int(-right * picture.width // 1), -int(-bottom * picture.height // 1))
    return Observation("this is the part", (fit(picture.crop(box), prompt.tiles.shape[1], "the part"),))
