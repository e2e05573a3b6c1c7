"""Log-probabilities of the targets, forward and backward: `python tools/bench/cross_entropy.py`, results in docs/benchmarks/cross_entropy.md.

Time: CPU seconds of one thread, the two interleaved, medians. Memory: the most that a fresh process held above what it held with the logits alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from interleave import medians

from megatron_ext.model.token_scores import token_logprobs

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
SIZES = [(8192, 256), (1024, 4096), (512, 32000), (128, 151936)]
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
KERNELS: dict[str, Kernel] = {
    "plain": lambda logits, targets: -F.cross_entropy(logits.float(), targets, reduction="none"),
    "chunked": lambda logits, targets: token_logprobs(logits[:, None], targets[None], ALONE)[0],
}


def draw(positions: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(positions, vocabulary, dtype=dtype).requires_grad_(), torch.randint(0, vocabulary, (positions,))


def once(kernel: Kernel, logits: torch.Tensor, targets: torch.Tensor) -> None:
    logits = logits.detach().clone().requires_grad_()  # ours overwrites them: both start with a copy
    kernel(logits, targets).sum().backward()


def peak_mib(name: str, positions: int, vocabulary: int, dtype: str) -> float:
    """In a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(positions), str(vocabulary), dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, positions: int, vocabulary: int, dtype: str) -> None:
    once(KERNELS[name], *draw(8, 16, torch.float32))
    logits, targets = draw(positions, vocabulary, getattr(torch, dtype))
    before = high_water_mib()
    once(KERNELS[name], logits, targets)
    print(high_water_mib() - before)


def high_water_mib() -> float:
    """The most that this program has held (what getrusage says is inherited from the process that started it)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, positions, vocabulary, dtype = options.peak
        print_peak(name, int(positions), int(vocabulary), dtype)
        return
    found = {}
    print("| positions x vocabulary | dtype | plain, ms | chunked, ms | plain / chunked | plain, MiB | chunked, MiB |\n|---|---|---|---|---|---|---|")
    for positions, vocabulary in SIZES:
        for dtype in ("float32", "bfloat16"):
            case = f"{positions} x {vocabulary}, {dtype}"
            if options.only not in case:
                continue
            logits, targets = draw(positions, vocabulary, getattr(torch, dtype))
            seconds = medians({name: partial(once, kernel, logits, targets) for name, kernel in KERNELS.items()}, options.rounds)
            plain, chunked = (1000 * value for value in seconds.values())
            mib = {name: peak_mib(name, positions, vocabulary, dtype) for name in KERNELS}
            memory = " | ".join(f"{value:.0f}" for value in mib.values())
            print(f"| {positions} x {vocabulary} | {dtype} | {plain:.1f} | {chunked:.1f} | {plain / chunked:.2f} | {memory} |", flush=True)
            found[case] = {**{f"{name}, ms": 1000 * value for name, value in seconds.items()}, **{f"{name}, MiB": value for name, value in mib.items()}}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
