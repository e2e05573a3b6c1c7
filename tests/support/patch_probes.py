"""For every patch of a device session: something Megatron does that fails without it. Run by two gloo ranks, in `tests/parallel/test_patches.py`."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import all_to_all, checkpoint, gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.moe import token_dispatcher

from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.device import patches, session
from megatron_ext.model.assembly import build_model
from megatron_ext.model.decoder import transformer_config
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from megatron_ext.training.step import optimizer_step
from tests.support.models import IMAGE, small_config
from tests.support.training import own_microbatches

SEED = 5


def training_step(context: ParallelContext) -> MegatronEngine:
    model = build_model(small_config(num_layers=1, clvr={"enabled": False, "taps": ()}), IMAGE, context)
    state = build_engine([model], OptimizerConfig(), 10, context)
    optimizer_step(state, own_microbatches(0, 2, context), NextToken(), context)
    return state


def optimizer_states_are_gathered(context: ParallelContext) -> None:
    training_step(context).optimizer.chained_optimizers[0].get_parameter_state_dp_zero(use_gloo_comm=False)


def regions_draw_from_their_own_seeds(context: ParallelContext) -> None:
    """Megatron seeds the tensor-parallel region with seed + 2718 + tp rank."""
    with get_cuda_rng_tracker().fork():
        drawn = torch.rand(4)
    assert drawn.equal(torch.rand(4, generator=torch.Generator().manual_seed(SEED + 2718 + context.tp_rank)))


def a_region_leaves_the_outer_random_numbers_alone(_: ParallelContext) -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with get_cuda_rng_tracker().fork():
        torch.rand(7)
    assert torch.rand(4).equal(expected)


def recompute_draws_the_same_numbers_again(_: ParallelContext) -> None:
    x = torch.ones(4, requires_grad=True)
    y = checkpoint(lambda x: x * torch.rand(4), False, x)
    y.sum().backward()
    assert x.grad is not None and x.grad.equal(y.detach())


def a_saved_random_state_comes_back(_: ParallelContext) -> None:
    state = torch.cuda.get_rng_state()
    expected = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.rand(4).equal(expected)


def tokens_travel_in_unequal_parts(context: ParallelContext) -> None:
    """Rank 0 keeps 1 of its 3 tokens and sends 2; rank 1 sends 2 and keeps 1."""
    send = torch.tensor([1, 2]) if context.rank == 0 else torch.tensor([2, 1])
    receive = torch.tensor([1, 2]) if context.rank == 0 else torch.tensor([2, 1])
    send, receive = (token_dispatcher.maybe_move_tensor_to_cpu(splits, as_numpy=True) for splits in (send, receive))
    arrived = all_to_all(context.pgs.ep, torch.full((3,), float(context.rank)), receive, send)
    assert arrived.tolist() == ([0.0, 1.0, 1.0] if context.rank == 0 else [0.0, 0.0, 1.0])


def unequal_parts_are_gathered(context: ParallelContext) -> None:
    part = torch.full((1 + context.rank,), float(context.rank))
    assert gather_from_sequence_parallel_region(part, group=context.pgs.dp, output_split_sizes=[1, 2]).tolist() == [0.0, 1.0, 1.0]


def stages_exchange_tensors(context: ParallelContext) -> None:
    """Any group may be a pipeline: rank 0 sends three rows to rank 1, which learns their number from the message."""
    config = transformer_config(small_config(), replace(context.layout, pp=2, ep=1, dp=1))
    stages = P2PCommunicator(context.pgs.ep, config)
    if context.rank == 0:
        stages.send_forward(torch.ones(3, 1, 2), is_last_stage=False)
    else:
        assert stages.recv_forward([1, 1, 1], is_first_stage=False).tolist() == [[[1.0, 1.0]]] * 3


_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
PROBES: dict[str, Callable[[ParallelContext], object]] = {
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": training_step,
    "torch.cuda.current_device": training_step,
    "torch.cuda.current_stream": training_step,
    "torch.cuda.get_rng_state": regions_draw_from_their_own_seeds,
    "torch.cuda.set_rng_state": a_saved_random_state_comes_back,
    "torch.cuda.manual_seed": regions_draw_from_their_own_seeds,
    "torch.cuda.synchronize": stages_exchange_tensors,
    "torch:Tensor.cuda": optimizer_states_are_gathered,
    "torch.tensor": training_step,
    "torch.zeros": training_step,
    "torch:Tensor.type": training_step,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": recompute_draws_the_same_numbers_again,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": a_region_leaves_the_outer_random_numbers_alone,
    f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.cuda_dtoh_stream": training_step,
    f"{_DISPATCHER}.maybe_move_tensor_to_cpu": tokens_travel_in_unequal_parts,
    "megatron.core.tensor_parallel.mappings._gather_along_first_dim": unequal_parts_are_gathered,
}


def run_probes(rank: int, world_size: int, init_method: str) -> dict[str, tuple[str, str]]:
    """For every patch: what its probe raised with all patches applied ("" when nothing), and without this one."""
    every = patches.WITHOUT_CUDA
    with_all = {probe: _attempt(probe, every, rank, world_size, f"{init_method}-{index}") for index, probe in enumerate(dict.fromkeys(PROBES.values()))}
    outcomes = {}
    for name, probe in PROBES.items():
        without = tuple(patch for patch in every if patch.name != name)
        outcomes[name] = with_all[probe], _attempt(probe, without, rank, world_size, f"{init_method}-without-{name.rpartition('.')[2]}")
    return outcomes


def _attempt(probe: Callable[[ParallelContext], object], table: tuple[patches.Patch, ...], rank: int, world_size: int, init_method: str) -> str:
    patches.WITHOUT_CUDA = table
    try:
        with session(), open_parallel(ParallelConfig(num_ranks=world_size, ep=world_size), rank, world_size, init_method, SEED, timeout_s=20) as context:
            probe(context)
    except Exception:
        return traceback.format_exc()
    return ""
