"""A trace for the terminal: a row for each token, with where the model looked as a small heat map, and the experts it went through.

    token   p      else            gaze (tap 0)   experts, gates
    3       0.91   4 0.06, 2 0.01  ░▒█            0: 6 .61, 2 .39   1: 3* .80, 1 .20

Of large pictures a heat map shows areas of several cells. Of many layers the cluster's are shown, else the first ones.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_ext.observe.trace import AnswerTrace, TapGaze

SHADES = " ░▒▓█"
LEAST = np.log(0.005)
"""Of an alternative's log-probability: what would be shown as 0.00 is left out."""
MOST_MAP, MOST_LAYERS, MOST_ROWS = 8, 4, 24


def print_trace(trace: AnswerTrace, console: Console) -> None:
    """The answer's table, and what its signs mean."""
    own = set(map(tuple, trace.clusters.get(trace.skill, ())))
    table = Table(title=f"answer: {trace.text}", title_justify="left", show_lines=bool(trace.taps))
    for name in ("token", "p", "else", *(f"tap {at}: {tap.source} -> {tap.target}" for at, tap in enumerate(trace.taps))):
        table.add_column(name, no_wrap=name.startswith("tap"))
    if trace.layers:
        table.add_column("layer: expert gate")
    for token in range(min(len(trace.tokens), MOST_ROWS)):
        others = [f"{text} {np.exp(logprob):.2f}" for text, logprob in trace.alternatives[token] if text != trace.tokens[token] and logprob > LEAST][:3]
        cells: list[RenderableType] = [Text(trace.tokens[token]), f"{np.exp(trace.logprobs_T[token]):.2f}", Text("\n".join(others))]
        cells += [_gaze(trace, tap, token) for tap in trace.taps]
        table.add_row(*cells, *([_experts(trace, token, own)] if trace.layers else []))
    console.print(table)
    hidden = max(0, len(trace.tokens) - MOST_ROWS) + trace.cut
    if hidden:
        console.print(f"and {hidden} tokens more")
    if trace.taps and trace.pictures:
        console.print("gaze: mean over heads, darkest to brightest cell of the answer; below it the brightest cell (row, column) and its share", style="dim")
    if own:
        console.print(f"*: in the expert cluster of {trace.skill}", style="dim")


def _gaze(trace: AnswerTrace, tap: TapGaze, token: int) -> Text:
    """The first picture's mean map."""
    if not trace.pictures:
        return Text("-")
    rows, columns = trace.pictures[0].rows, trace.pictures[0].columns
    map_RC = tap.maps_TNC[token, 0, : rows * columns].reshape(rows, columns)
    top = max(float(tap.maps_TNC[:, 0].max()), 1e-9)
    row, column = np.unravel_index(int(map_RC.argmax()), map_RC.shape)
    shades = np.rint(_small(map_RC) / top * (len(SHADES) - 1)).astype(int)
    lines = ["".join(2 * SHADES[shade] for shade in line) for line in shades.tolist()]
    within = "" if tap.inside_T is None else f", boxes {tap.inside_T[token]:.0%}"
    return Text("\n".join([*lines, f"({row + 1}, {column + 1}) {map_RC.max():.0%}{within}"]))


def _small(map_RC: np.ndarray) -> np.ndarray:
    """At most MOST_MAP cells either way: the largest of each area."""
    parts = [np.array_split(np.arange(size), min(size, MOST_MAP)) for size in map_RC.shape]
    return np.array([[map_RC[np.ix_(rows, columns)].max() for columns in parts[1]] for rows in parts[0]])


def _experts(trace: AnswerTrace, token: int, own: set[tuple[int, ...]]) -> Text:
    used = {layer for layer, _ in own}
    shown = sorted(sorted(range(len(trace.layers)), key=lambda layer: layer not in used)[:MOST_LAYERS])
    lines = []
    for layer in shown:
        pairs = zip(trace.experts_TLK[token, layer].tolist(), trace.gates_TLK[token, layer].tolist(), strict=True)
        lines.append(f"{trace.layers[layer]}: " + ", ".join(f"{expert}{'*' if (layer, expert) in own else ''} {gate:.2f}" for expert, gate in pairs))
    rest = len(trace.layers) - len(shown)
    return Text("\n".join(lines + ([f"{rest} layers more"] if rest else [])))
