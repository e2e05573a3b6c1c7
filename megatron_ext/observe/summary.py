"""Accuracies as a table on the terminal: per skill, after fine-tuning and after reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ext.observe.results import NOTHING, Accuracy, Evaluation, read_evaluation

Column = tuple[str, Callable[[Accuracy], float | None], Callable[[Accuracy], float | None]]
COLUMNS: tuple[Column, ...] = (
    ("greedy", lambda row: row.greedy, lambda row: row.greedy_se),
    ("mean@k", lambda row: row.mean_at_k, lambda row: row.mean_at_k_se),
    ("pass@k", lambda row: row.pass_at_k, lambda row: None),
    ("cluster usage", lambda row: row.cluster_mass, lambda row: None),
)
"""What is measured both before and after RL: name, value, standard error."""


def print_summary(root: Path, console: Console | None = None) -> None:
    """The table of a run, as far as it was evaluated; nothing where it was not."""
    before, after = (read_evaluation(root / "evaluate" / f"{of}.json") for of in ("sft", "rl"))
    if before is not None or after is not None:
        (console or wide_console()).print(_table(before, after))


def print_evaluation(path: Path, console: Console | None = None) -> None:
    """The table of one evaluation."""
    found = read_evaluation(path)
    if found is not None:
        (console or wide_console()).print(_table(found, None))


def title(name: str, samples: int | None) -> str:
    """The name of a column with its k."""
    return name.replace("@k", f"@{samples}") if samples else name


def _table(before: Evaluation | None, after: Evaluation | None) -> Table:
    known = before or after
    table = Table(title=f"accuracy on the {known.split} split" if known else None, title_justify="left")
    table.add_column("skill")
    for name in ("chance", "blind", *(title(name, known.samples if known else None) for name, _, _ in COLUMNS)):
        table.add_column(name, justify="right", no_wrap=True)
    both = before is not None and after is not None
    names = list(dict.fromkeys([*(before.skills if before else ()), *(after.skills if after else ())]))
    for name in names:
        rows = [evaluation.skills.get(name, NOTHING) for evaluation in (before, after) if evaluation is not None]
        table.add_row(name, *_cells(rows), end_section=name == names[-1])
    table.add_row("mean", *_cells([evaluation.macro for evaluation in (before, after) if evaluation is not None]), style="bold")
    table.caption = "before -> after reinforcement learning; +- is a standard error" if both else "+- is a standard error"
    return table


def _cells(rows: list[Accuracy]) -> list[str]:
    return [number(rows[0].chance), number(rows[0].blind), *(" -> ".join(number(value(row), error(row)) for row in rows) for _, value, error in COLUMNS)]


def number(value: float | None, error: float | None = None) -> str:
    """Two digits, with the standard error where there is one; a dash where nothing was measured."""
    if value is None:
        return "-"
    return f"{value:.2f}" if error is None else f"{value:.2f}+-{error:.2f}"


def wide_console() -> Console:
    """A table needs its width also where the output is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
