"""Who is read when: requests wait, of those asked together the longest prompts first, and join as places become free. Who was asked before is read before, so
that nobody waits for ever.

Prompts of similar length stand side by side in the memory, so that little of it is padding. Few large readings cost less than many small ones: places are left
free until a quarter of them is, or until all that wait can be seated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_ext.batch import Prompt

REFILL = 0.25


@dataclass(frozen=True)
class Request:
    """A prompt, its number (whatever whoever asks knows it by), and the answers asked of it: (sample, seed) each. `greedy`: the most likely token each time.
    `drawn_layers`: those with experts whose routes are drawn by chance, for the tokens that are written; everywhere else they are the most likely ones."""

    number: int
    prompt: Prompt
    samples: tuple[tuple[int, int], ...]
    greedy: bool = False
    drawn_layers: tuple[int, ...] = ()


class WaitingRoom:
    """`places`: rows that are written side by side; more only where one request asks for more. `most_tokens`: positions of one reading, padding included; a
    prompt that has more is read alone, in parts."""

    def __init__(self, places: int, most_tokens: int) -> None:
        self._waiting = deque[Request]()
        self._places, self._most_tokens = places, most_tokens

    def add(self, requests: Iterable[Request]) -> None:
        self._waiting.extend(sorted(requests, key=lambda request: -len(request.prompt.tokens_S)))

    def put_back(self, requests: Iterable[Request]) -> None:
        """Requests that could not stay; they come before all others."""
        self._waiting.extendleft(requests)

    def next(self, taken: int, fits: Callable[[Sequence[Request]], bool] = lambda joining: True) -> list[Request]:
        """The requests that are read now, with `taken` places in use; `fits` says whether there is memory for them."""
        free = self._places - taken
        if taken and free < REFILL * self._places and sum(len(request.samples) for request in self._waiting) > free:
            return []
        joining: list[Request] = []
        while self._waiting:
            more = [*joining, self._waiting[0]]
            too_many = (taken or joining) and (sum(len(request.samples) for request in more) > free or not fits(more))
            too_long = joining and max(len(request.prompt.tokens_S) for request in more) * len(more) > self._most_tokens
            if too_many or too_long:
                break
            self._waiting.popleft()
            joining = more
        return joining
