"""Where in a response the answer is, whatever a model wrote around it."""

from __future__ import annotations

from megatron_ext.data.pieces import TURN_END

THINK_END = "</think>"
_OPEN, _CLOSE = "<answer>", "</answer>"


def final_answer(response: str) -> str:
    r"""What stands in the last \boxed{}; else between the last <answer> and </answer>; else all that follows </think>. Without white space at its ends.

    >>> final_answer(r"<think>3 + 4</think> It is \boxed{7}."), final_answer("so <answer> red </answer>"), final_answer("<think>hm</think> red\n")
    ('7', 'red', 'red')
    """
    said = response.removesuffix(TURN_END).rpartition(THINK_END)[2]
    if (inside := boxed(said)) is not None:
        return inside.strip()
    before, opened, after = said.rpartition(_OPEN)
    return (after.partition(_CLOSE)[0] if opened else before + after).strip()


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds, braces inside it included; None where there is none, or it is not closed.

    >>> boxed(r"so \boxed{2} and \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position]
    return None
