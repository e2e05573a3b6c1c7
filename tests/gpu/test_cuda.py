"""The same model on a GPU: skipped without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model.assembly import build_model
from megatron_ext.model.heads import token_logprobs
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.parallel.local import run_ranks
from tests.support.models import IMAGE, open_gates, small_batch, small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on(batch: ModelInputs, device: torch.device) -> ModelInputs:
    return dataclasses.replace(batch, **{name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})


def logprobs_of(context: ParallelContext, device: torch.device) -> torch.Tensor:
    """Log-probabilities of the batch under a model with weights that do not depend on the device."""
    model = build_model(small_config(), IMAGE, dataclasses.replace(context, device=device), seed=1).eval()
    open_gates(model)
    batch = on(small_batch(), device)
    with torch.no_grad():
        return token_logprobs(model(batch)[:-1], batch.tokens_BS[:, 1:], context.pgs.tp).cpu()


def compare_devices(rank: int, world_size: int, init_method: str) -> float:
    """The largest difference of a log-probability between the GPU and the CPU of one process."""
    with open_parallel(ParallelConfig(), rank, world_size, init_method, 0) as context:
        return float((logprobs_of(context, context.device) - logprobs_of(context, torch.device("cpu"))).abs().max())


def test_log_probabilities_on_the_gpu_equal_those_on_the_cpu() -> None:
    assert run_ranks(compare_devices, 1, timeout_s=300)[0] < 1e-3
