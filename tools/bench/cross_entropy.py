"""Log-probabilities of the targets, forward and backward: `python tools/bench/cross_entropy.py`, results in docs/benchmarks/cross_entropy.md.

Time: CPU seconds of one thread, the two interleaved, medians. Memory: the most that a fresh process held above what it held with the logits alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

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


def once(kernel: Kernel, logits: torch.Tensor, targets: torch.Tensor) -> float:
    began = time.process_time()
    kernel(logits, targets).sum().backward()
    return time.process_time() - began


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, positions, vocabulary, dtype = options.peak
        print_peak(name, int(positions), int(vocabulary), dtype)
        return
    print("| positions x vocabulary | dtype | plain, ms | chunked, ms | plain / chunked | plain, MiB | chunked, MiB |\n|---|---|---|---|---|---|---|")
    for positions, vocabulary in SIZES:
        for dtype in ("float32", "bfloat16"):
            logits, targets = draw(positions, vocabulary, getattr(torch, dtype))
            times: dict[str, list[float]] = {name: [] for name in KERNELS}
            for repeat in range(options.repeats + 1):
                for name, kernel in KERNELS.items():
                    seconds = once(kernel, logits.detach().clone().requires_grad_(), targets)  # ours overwrites them
                    if repeat:
                        times[name].append(seconds)
            plain, chunked = (1000 * statistics.median(times[name]) for name in KERNELS)
            memory = " | ".join(f"{peak_mib(name, positions, vocabulary, dtype):.0f}" for name in KERNELS)
            print(f"| {positions} x {vocabulary} | {dtype} | {plain:.1f} | {chunked:.1f} | {plain / chunked:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
