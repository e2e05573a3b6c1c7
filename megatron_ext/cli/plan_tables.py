"""What `plan` prints: assumptions, the ranked table, refusals, and for `--why` memory and time by part."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext.config.sizes import count_parameters
from megatron_ext.parallel.planner.calibrate import Fitted
from megatron_ext.parallel.planner.fit import Memory
from megatron_ext.parallel.planner.fleet import FleetFound, FleetPlans, FleetSearch
from megatron_ext.parallel.planner.search import GIB, Found, Plans, Refusal, Search

MEMORY_PARTS = {
    "weights": "weights_bytes",
    "gradients, float32": "gradients_bytes",
    "optimizer (this rank's shard)": "optimizer_bytes",
    "reference model": "reference_bytes",
    "activations of the decoder": "decoder_bytes",
    "activations of the ViT": "vision_bytes",
    "activations of CLVR": "clvr_bytes",
    "rows of the step, pictures, routes": "inputs_bytes",
    "logits and loss": "logits_bytes",
    "backward pass of one layer": "workspace_bytes",
    "communication": "communication_bytes",
    "CUDA context": "context_bytes",
    "allowance: fragments, uneven experts": "allowance_bytes",
}
TIME_PARTS = {
    "arithmetic": "compute_s",
    "tensor parallel": "tp_s",
    "expert parallel": "ep_s",
    "context parallel": "cp_s",
    "pipeline sends": "pp_s",
    "signals": "signals_s",
    "launches": "launches_s",
    "pipeline bubble": "bubble_s",
    "data parallel, not hidden": "dp_s",
    "optimizer": "optimizer_s",
    "fixed": "fixed_s",
}


class Printer:
    """Writes to the terminal; lines that do not fit are cut in pipes at 160 columns."""

    def __init__(self, search: Search, fleet: FleetSearch | None, price: float | None) -> None:
        self.search, self.fleet, self.price = search, fleet, price
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else max(160, shutil.get_terminal_size((160, 40)).columns))

    def assumptions(self, fitted: Fitted | None) -> None:
        """What is planned, on what, and what was taken for granted."""
        work, cluster, gpu = self.search.work, self.search.cluster, self.search.cluster.gpu
        parameters = count_parameters(self.search.model)
        image = f"{work.row_tiles} image tile{'s' * (work.row_tiles != 1)}"
        self._say(f"{self.search.config.name}: {_count(parameters.total)} parameters, {_count(parameters.active)} active a token", "bold")
        self._say(f"  {work.stage}: {work.rows} rows a step, at most {work.row_tokens} and on average {work.mean_row_tokens:g} tokens, {image} each")
        if self.fleet is not None:
            answers = self.fleet.answers
            self._say(
                f"  {answers.prompts} prompts of {answers.prompt_tokens} tokens x {answers.samples} responses of {answers.response_tokens:g} tokens on average"
            )
        nodes = -(-cluster.gpus // cluster.per_node)
        self._say(f"  {cluster.gpus} x {gpu.name} ({gpu.memory_gib:g} GiB) on {nodes} node{'s' * (nodes != 1)}")
        constants = f"MFU {gpu.mfu:.0%} of {gpu.flops(self.search.model.dtype) / 1e12:g} TFLOP/s, links at {gpu.link_efficiency:.0%}, overlap {gpu.overlap:.0%}"
        source = f"fitted to {len(fitted.runs)} run{'s' * (len(fitted.runs) != 1)}" if fitted else "assumed, not measured: --calibrate fits them"
        self._say(f"  {constants} ({source})")
        if fitted:
            self._fit(fitted)

    def plans(self, plans: Plans | FleetPlans, top: int, all_refused: bool) -> None:
        self.console.print()
        if plans.found:
            shown = plans.found[:top]
            fleets, learners = [one for one in shown if isinstance(one, FleetFound)], [one for one in shown if isinstance(one, Found)]
            self.console.print(self._fleets(fleets) if fleets else self._learners(learners))
            self._say(
                f"{len(plans.found)} {'combinations' if fleets else 'layouts'} fit; {len(shown)} shown (--top, --json). `--why LAYOUT` says what one costs."
            )
        self._refusals(plans.refused, all_refused)

    def why(self, found: Found, plans: Plans) -> None:
        """Memory and time of one layout by part, and how it compares with the best."""
        same = [number for number, one in enumerate(plans.found, start=1) if one.layout == found.layout]
        self.console.print()
        recompute = "no recompute" if found.recompute == "none" else f"recompute {found.recompute}"
        self._say(f"{found.name}, DP{found.layout.dp}, {recompute}, {found.micro_rows} row{'s' * (found.micro_rows != 1)} a micro-batch", "bold")
        self.console.print(self._memory(found.memory))
        best = plans.found[0] if plans.found else found
        self.console.print(self._times(found, best))
        place = f"rank {same[0]} of {len(plans.found)}" if same else f"not among the {len(plans.found)} that were tried"
        slower = found.times.total_s / best.times.total_s - 1
        self._say(f"{place}: {_reason(found, best, slower)}")

    def _learners(self, found: Sequence[Found]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = ("#", "layout", "DP", "recompute", "rows", "memory", "", "step", "bubble", "traffic", "tokens/s", "a GPU", *self._cost_column())
        for name in columns:
            table.add_column(name, justify="left" if name in ("layout", "recompute", "") else "right", no_wrap=True)
        for number, one in enumerate(found, start=1):
            total, times = one.times.total_s, one.times
            traffic = (times.tp_s + times.ep_s + times.cp_s + times.pp_s + times.signals_s + times.dp_s) / total
            table.add_row(
                str(number), Text(one.name, "cyan"), str(one.layout.dp), one.recompute, str(one.micro_rows), f"{one.memory.total_bytes / GIB:.1f} GiB",
                self._bar(one.memory.total_bytes), _seconds(total), f"{times.bubble_s / total:.0%}", f"{traffic:.0%}", f"{one.tokens_per_s:,.0f}",
                f"{one.tokens_per_s / one.layout.num_ranks:,.0f}", *self._cost(total),
            )  # fmt: skip
        return table

    def _fleets(self, found: Sequence[FleetFound]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = (
            "#",
            "devices",
            "learner",
            "recompute",
            "memory",
            "rollouts",
            "rows",
            "memory",
            "answer",
            "update",
            "refit",
            "step",
            "overlapped",
            "tokens/s",
        )
        for name in (*columns, *self._cost_column()):
            table.add_column(name, justify="left" if name in ("devices", "learner", "recompute", "rollouts") else "right", no_wrap=True)
        for number, one in enumerate(found, start=1):
            share = f"{one.learner_gpus} shared" if one.colocated else f"{one.learner_gpus} + {one.rollout_gpus}"
            rollout = one.rollout
            table.add_row(
                str(number), share, Text(one.learner.name, "cyan"), one.learner.recompute, f"{one.learner.memory.total_bytes / GIB:.0f} GiB",
                Text(rollout.name, "cyan"), str(rollout.batch), f"{rollout.memory.total_bytes / GIB:.0f} GiB", _seconds(rollout.times.total_s),
                _seconds(one.learner.times.total_s), _seconds(one.refit_s), _seconds(one.step_s), _seconds(one.overlapped_s), f"{one.tokens_per_s:,.0f}",
                *self._cost(one.step_s),
            )  # fmt: skip
        return table

    def _refusals(self, refused: Sequence[Refusal], show_all: bool) -> None:
        """By what refuses: the rule, or memory with the one that nearly fits."""
        if not refused:
            return
        self.console.print()
        self._say("Refused", "bold")
        rules = [one for one in refused if one.memory is None]
        memory = sorted((one for one in refused if one.memory is not None), key=lambda one: one.memory.total_bytes if one.memory else 0)
        shown_rules, shown_memory = (rules, memory) if show_all else (_one_of_each(rules), memory[:4])
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for one in [*shown_rules, *shown_memory]:
            table.add_row(f"  {one.family}", f"{one.error}" + (f" ({one.layouts} layouts)" if one.layouts > 1 else ""))
        self.console.print(table)
        left = len(refused) - len(shown_rules) - len(shown_memory)
        if left > 0:
            self._say(f"  and {left} more families like these: --refused shows them all")

    def _memory(self, memory: Memory) -> Table:
        table = self._parts(f"memory of pipeline rank {memory.rank}", "GiB")
        for name, field in MEMORY_PARTS.items():
            if size := getattr(memory, field):
                beside = field == ("workspace_bytes" if memory.logits_bytes >= memory.workspace_bytes else "logits_bytes")
                table.add_row(
                    f"  {name}" + (", at another time" if beside and memory.logits_bytes else ""), f"{size / GIB:.2f}", _share(size, memory.total_bytes)
                )
        limit = self.search.cluster.gpu.memory_bytes
        table.add_row("  all", f"{memory.total_bytes / GIB:.2f}", f"of {limit / GIB:.1f}", style="bold")
        table.add_row("  host memory of the rank: save in the background, rows", f"{memory.host_bytes / GIB:.2f}", "")
        return table

    def _times(self, found: Found, best: Found) -> Table:
        table = self._parts("one step", "seconds", best.name)
        for name, field in TIME_PARTS.items():
            mine, theirs = getattr(found.times, field), getattr(best.times, field)
            if mine or theirs:
                table.add_row(f"  {name}", f"{mine:.3f}", _share(mine, found.times.total_s), f"{theirs:.3f}")
        table.add_row("  all", f"{found.times.total_s:.3f}", f"{found.tokens_per_s:,.0f} tokens/s", f"{best.times.total_s:.3f}", style="bold")
        hours = found.times.total_s * found.layout.num_ranks / 3600
        table.add_row("  GPU hours a step", f"{hours:.3f}", f"{hours * self.price:,.2f}" if self.price else "", "")
        return table

    def _parts(self, title: str, unit: str, other: str = "") -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title, no_wrap=True)
        for name in (unit, "", *([f"the fastest: {other}"] if other else [])):
            table.add_column(name, justify="right", no_wrap=True)
        return table

    def _fit(self, fitted: Fitted) -> None:
        table = self._parts("  fitted to", "measured")
        for name in ("predicted", "", "held out", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for run in fitted.runs:
            cells = [word for seconds in (run.predicted_s, run.held_out_s) for word in _against(seconds, run.measured_s)]
            table.add_row(f"  {run.name}", f"{run.measured_s:.4f} s", "", *cells)
        self.console.print(table)
        self._say("  held out: predicted from the runs of the other layouts alone")
        for line in fitted.yaml().splitlines():
            self._say(f"    {line}")

    def _bar(self, num_bytes: int) -> Text:
        share = num_bytes / self.search.cluster.gpu.memory_bytes
        return Text("█" * round(8 * share) + "░" * (8 - round(8 * share)), "red" if share > 0.95 else "yellow" if share > 0.85 else "green")

    def _cost_column(self) -> tuple[str, ...]:
        return ("GPU h", "cost") if self.price else ("GPU h",)

    def _cost(self, seconds: float) -> tuple[str, ...]:
        hours = seconds * self.search.cluster.gpus / 3600
        told = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
        return (told, f"{hours * self.price:,.2f}") if self.price else (told,)

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=True)


def _reason(found: Found, best: Found, slower: float) -> str:
    """What costs a layout the most against the fastest."""
    if found.layout == best.layout and found.recompute == best.recompute:
        return "the fastest"
    more = {name: getattr(found.times, field) - getattr(best.times, field) for name, field in TIME_PARTS.items()}
    worst = sorted(more, key=more.__getitem__, reverse=True)[:2]
    told = " and ".join(f"{more[name]:+.3f} s of {name}" for name in worst if more[name] > 0)
    return f"{slower:+.0%} against {best.name}" + (f", most of it {told}" if told else "")


def _one_of_each(rules: Sequence[Refusal]) -> list[Refusal]:
    """The first refusal of every kind of sentence; numbers aside, many are the same."""
    seen: dict[str, Refusal] = {}
    for one in rules:
        seen.setdefault("".join(letter for letter in f"{one.error.where} {one.error.problem}" if not letter.isdigit()), one)
    return list(seen.values())


def _count(number: int) -> str:
    """
    >>> _count(30_880_000_000), _count(474_000)
    ('30.88 G', '0.47 M')
    """
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _against(seconds: float | None, measured_s: float) -> tuple[str, str]:
    """
    >>> _against(1.1, 1.0)
    ('1.1000 s', '+10%')
    """
    return ("", "") if seconds is None else (f"{seconds:.4f} s", f"{seconds / measured_s - 1:+.0%}")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _seconds(seconds: float) -> str:
    """
    >>> _seconds(0.01234), _seconds(1.234), _seconds(12.34), _seconds(7384.0)
    ('12 ms', '1.23 s', '12.3 s', '2.05 h')
    """
    if seconds < 0.1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 600:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"
