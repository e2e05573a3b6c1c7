"""The same model on a GPU: skipped without one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.device import kernels
from megatron_ext.model.assembly import build_model
from megatron_ext.model.attention import SdpaCore, over_samples
from megatron_ext.model.dispatch import sum_by_token
from megatron_ext.model.experts import swiglu_experts
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.token_scores import policy_scores, token_logprobs
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks
from megatron_ext.rl.turns import LearnerMemory
from megatron_ext.training.rank_work import WorkMeter, rank_metrics
from tests.support.models import IMAGE, open_gates, small_batch, small_config
from tests.support.training import run_steps, start
from tests.support.turns import updates_with_a_break

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class OneRank:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def on(batch: ModelInputs, device: torch.device) -> ModelInputs:
    return dataclasses.replace(batch, **{name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})


def logprobs(rank: int, world_size: int, init_method: str) -> tuple[str, torch.Tensor]:
    """The kind of device, and log-probabilities of a batch under a model with weights that do not depend on it."""
    with open_parallel(ParallelConfig(), rank, world_size, init_method, 0) as context:
        model = build_model(small_config(), IMAGE, context, seed=1).eval()
        open_gates(model)
        batch = on(small_batch(), context.device)
        with torch.no_grad():
            return context.device.type, token_logprobs(model(batch)[:-1], batch.tokens_BS[:, 1:], context.pgs.tp).cpu()


def test_packed_samples_in_one_call_are_attended_to_like_one_by_one() -> None:
    """Three samples of one row, four query heads on two of keys; 2^-8 is the rounding of bfloat16."""
    torch.manual_seed(0)
    stops = [5, 6, 17]
    query, key, value = (torch.randn(1, heads, 17, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    if not kernels.uses_varlen(True, True):
        pytest.skip("this GPU, or this torch, has no varlen_attn")
    runs = [slice(start, stop) for start, stop in pairwise([0, *stops])]
    plain = torch.cat([SdpaCore()(query[:, :, run], key[:, :, run], value[:, :, run], None) for run in runs], dim=2)
    torch.testing.assert_close(over_samples(query, key, value, stops), plain, rtol=2**-7, atol=2**-7)


def test_experts_through_grouped_mm_compute_what_they_do_in_place() -> None:
    torch.manual_seed(0)
    counts = [7, 0, 12]
    x, fc1, fc2 = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in [(19, 64), (3, 64, 64), (3, 64, 32)])
    gates = torch.rand(19, device="cuda")
    found = [swiglu_experts(x, gates, counts, list(fc1), list(fc2), grouped=grouped) for grouped in (True, False)]
    torch.testing.assert_close(found[0], found[1], rtol=2**-6, atol=2**-3)


def test_gradients_of_grouped_experts_are_those_in_place() -> None:
    """`counts` is a tensor for grouped_mm, as in training; one expert has no token."""
    torch.manual_seed(0)
    x, fc1, fc2 = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 4 for shape in [(24, 64), (3, 64, 64), (3, 64, 32)])
    gates = torch.rand(24, device="cuda")
    found = []
    for counts in (torch.tensor([16, 0, 8], device="cuda"), [16, 0, 8]):
        leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in (*fc1, *fc2))]
        swiglu_experts(leaves[0], leaves[1], counts, leaves[2:5], leaves[5:], grouped=isinstance(counts, torch.Tensor)).float().square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2**-5, atol=2**-5 * float(plain.abs().max()) + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_summed_by_token_as_on_the_cpu(dtype: torch.dtype) -> None:
    rows, token = torch.randn(12, 8, dtype=dtype), torch.tensor([0, 2, 3, 1, 2, 0, 3, 1, 4, 5, 4, 5])
    expected = sum_by_token(rows.float(), token, 6)
    torch.testing.assert_close(sum_by_token(rows.cuda(), token.cuda(), 6).cpu().float(), expected, rtol=0, atol=2**-6 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("policy", [False, True])
def test_scores_and_their_gradients_are_those_of_the_cpu(policy: bool) -> None:
    logits, targets = torch.randn(6, 2, 40), torch.randint(0, 39, (2, 6))
    found = []
    for device in ("cuda", "cpu"):
        own = logits.to(device, copy=True).requires_grad_()
        banned = torch.arange(40, device=device) == 39
        scores = policy_scores(own * 1, targets.to(device), 0.7, banned, OneRank()) if policy else (token_logprobs(own * 1, targets.to(device), OneRank()),)
        scores[0].sum().backward()
        found.append([x.detach().cpu() for x in (*scores, own.grad)])
    torch.testing.assert_close(found[0], found[1])


def test_log_probabilities_on_the_gpu_equal_those_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (kind, ours), *_ = run_ranks(logprobs, 1, timeout_s=300)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (plain_kind, plain), *_ = run_ranks(logprobs, 1, timeout_s=300)
    assert (kind, plain_kind) == ("cuda", "cpu")
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)


def test_a_gpu_is_measured_by_the_probe_and_by_its_memory() -> None:
    meter = WorkMeter(torch.device("cuda", 0))
    with meter.step(0.1):
        pass
    work = meter.take()
    assert 0 < work.probe_s < 0.1 and 0 < work.memory_share < 1
    assert rank_metrics([work, work])["perf/slowest_over_mean"] == 1.0


def leave_the_gpu(rank: int, world_size: int, init_method: str) -> tuple[bool, int, int, int]:
    """(whether updates are the same, bytes of an engine on the GPU, what it gives up, and what the GPU holds meanwhile)."""
    with open_parallel(ParallelConfig(), rank, world_size, init_method, 0) as context:
        kept, moved, left = updates_with_a_break(context, "bf16")
        empty = torch.cuda.memory_allocated()
        engine = start(context, small_config(dtype="bf16"))
        run_steps(engine, 0, 1, 4, context)
        memory = LearnerMemory(engine, [], moves=True)
        full = torch.cuda.memory_allocated() - empty
        memory.give()
        return kept == moved and left == 0, full, memory.num_bytes, torch.cuda.memory_allocated() - empty


def test_a_learner_that_leaves_the_gpu_gives_up_its_memory_and_goes_on_as_if_it_had_not() -> None:
    same, full, given, meanwhile = run_ranks(leave_the_gpu, 1, timeout_s=300)[0]
    assert same
    assert full - meanwhile >= given > 0.8 * full
