"""Answers that are formulas: compared by what they mean, with Math-Verify (docs/decisions/0019-a-checker-for-mathematics.md).

Only LaTeX is read, by a grammar: the library's other reader evaluates text as Python, which an answer must never become.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType

from megatron_ext.batch.rollout import Prompt
from megatron_ext.rl.rewards.answers import same_text
from megatron_ext.rl.rewards.final import final_answer
from megatron_ext.rl.rewards.numbers import numeric

MOST_CHARACTERS = 400
MOST_BRACKETS = 40
MOST_CPU_S = 3.0
_WORKS_ON_INTEGERS = re.compile(r"!|\\(?:d|t)?binom|\\gcd|\\lcm|\\b?mod|\\pmod|\\sum|\\prod|\\int|\\lim|\\operatorname|\\lfloor|\\lceil|\\log")
_LARGE = re.compile(r"\d{5}|\^")


def maths(prompt: Prompt, response: str) -> dict[str, float]:
    r"""1 where the final answer (`final.py`) means what the prompt's does: 0.5 for \frac{1}{2}, 2\sqrt{2} for \sqrt{8}, 1+x for x+1, {2,1} for {1,2}.

    An answer that takes more than seconds to work out (towers of powers, factorials of millions) counts as wrong: nobody asked for it.
    """
    said, gold = final_answer(response), final_answer(prompt.answer)
    correct = same_text(said, gold) or (_plain(said) and _plain(gold) and numeric(prompt, response) == 1) or _same_formula(said, gold)
    return {"reward": float(correct), "correct": float(correct)}


def _plain(text: str) -> bool:
    """A number with what may stand around one."""
    return re.fullmatch(r"[-−$\\\s\d.,%]{1,40}", text) is not None


def _same_formula(said: str, gold: str) -> bool:
    if not said or _too_much(said):
        return False
    try:
        with _at_most(MOST_CPU_S):
            return _checker()(said, gold)
    except (TooLong, RecursionError, MemoryError):
        return False


def _too_much(said: str) -> bool:
    """What would keep the reader busy, or an operation on integers that no signal interrupts."""
    nested = max(said.count("{"), said.count("(")) > MOST_BRACKETS
    return len(said) > MOST_CHARACTERS or nested or bool(_WORKS_ON_INTEGERS.search(said) and _LARGE.search(said))


@lru_cache(maxsize=1)
def _checker() -> Callable[[str, str], bool]:
    """Whether an answer means another. Loading it takes about a second."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off: ours is around it
    latex = [LatexExtractionConfig()]

    def same(said: str, gold: str) -> bool:
        ours, theirs = (parse(f"${text.strip('$')}$", latex, parsing_timeout=None) for text in (said, gold))
        return bool(verify(theirs, ours, timeout_seconds=None))

    return same


class TooLong(BaseException):
    """Not an Exception, which the checker would swallow."""


@contextmanager
def _at_most(cpu_s: float) -> Iterator[None]:
    """Raises TooLong in what takes more processor time: time that a busy machine does not change. In threads, which get no signals, there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
