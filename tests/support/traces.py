"""Small traces of answers, as evaluation and `generate --trace` make them of real ones."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from megatron_ext.observe.trace import AnswerTrace, Picture, TapGaze

WORDS = ("<ocr>", "4", "</ocr>", "<", "2")


def picture(side: int = 4) -> Picture:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(file, format="PNG")
    return Picture("data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), side, side)


def small_trace(key: str = "suite/test/ocr/0/0", skill: str = "ocr", taps: int = 2, side: int = 4, heads: int = 2, seed: int = 0) -> AnswerTrace:
    """Five tokens, two layers of four experts. Token t of tap 0 looks at cell t alone, with every head; the other taps look anywhere."""
    rng, count = np.random.default_rng(seed), len(WORDS)
    at_one_TC = np.eye(side * side)[:count]
    gazes = [np.repeat(at_one_TC[:, None], 1 + heads, axis=1)]
    for _ in range(1, taps):
        weights_TNC = rng.dirichlet(np.ones(side * side), size=(count, heads))
        gazes.append(np.concatenate([weights_TNC.mean(axis=1, keepdims=True), weights_TNC], axis=1))
    return AnswerTrace(
        key,
        skill,
        "which digit & <b>letter</b>?",
        "4 </script> 2",
        "4 3",
        False,
        "runs/x/rl/checkpoints",
        0,
        list(WORDS),
        np.log(np.linspace(0.5, 0.9, count)),
        [[(word, -0.3), ("other", -1.5)] for word in WORDS],
        np.tile([[0, 1], [2, 3]], (count, 1, 1)),
        np.tile([[0.75, 0.25], [0.5, 0.5]], (count, 1, 1)),
        4,
        [0, 2],
        {"ocr": [(0, 1)]},
        [picture(side)],
        [(0.0, 0.0, 0.5, 0.25)],
        [TapGaze(tap, tap + 2, maps, np.full(count, 0.5), np.full(count, 0.4), 0.125) for tap, maps in enumerate(gazes)],
    )
