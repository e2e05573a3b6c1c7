"""Reports as a supervised stage on GPUs and an RL step on CPUs would give them."""

from __future__ import annotations

SFT = {
    "loss": 0.31,
    "lr": 1e-3,
    "perf/tokens_per_s": 5200.0,
    "perf/tokens_per_s_per_gpu": 650.0,
    "perf/mfu": 0.343,
    "perf/peak_memory_bytes": 61.5 * 2**30,
    "perf/peak_memory_rank": 3.0,
    "perf/peak_memory_share": 0.78,
    "perf/slowest_rank": 5.0,
    "perf/slowest_over_mean": 1.04,
    "moe/max_vio": 1.3,
    "moe/ep_rank_load_max": 1.08,
    "timing_s/step": 1.24,
    "timing_s/data": 0.02,
    "timing_s/forward_backward": 1.1,
    "timing_s/optimizer": 0.12,
    "timing_s/save": 0.0,
}
RL = {
    "reward/mean": 0.4,
    "response_length/mean": 12.4,
    "rollout/failed_count": 0.0,
    "perf/tokens_per_s": 900.0,
    "perf/tokens_per_s_per_gpu": 225.0,
    "perf/mfu": 0.05,
    "perf/peak_memory_bytes": 2.0 * 2**30,
    "perf/peak_memory_rank": 1.0,
    "perf/slowest_rank": 0.0,
    "perf/slowest_over_mean": 1.01,
    "moe/max_vio": 0.5,
    "mismatch/logprob_abs_diff_max": 1e-6,
    "actor/ppo_kl": 1e-4,
    "timing_s/step": 5.0,
    "timing_s/generate": 3.0,
    "timing_s/reward": 0.1,
    "timing_s/update": 1.9,
    "timing_s/forward_backward": 1.5,
}
