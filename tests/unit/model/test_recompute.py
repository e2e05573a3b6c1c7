"""Recompute changes what is kept, and nothing else: gradients, recorded routes and counts are those of a model that keeps everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, open_gates, small_batch, small_config

KINDS = [ParallelConfig(recompute="selective"), ParallelConfig(recompute="full"), ParallelConfig(recompute="full", recompute_layers=2)]


def name(parallel: ParallelConfig) -> str:
    return f"{parallel.recompute}-{parallel.recompute_layers}"


def built(context: ParallelContext, parallel: ParallelConfig) -> VisionLanguageModel:
    model = build_model(small_config(), IMAGE, replace(context, parallel=parallel), seed=1)
    open_gates(model)
    return model


def kept_bytes(model: VisionLanguageModel, batch: ModelInputs) -> int:
    """What the forward pass leaves for the backward pass, weights left out, every storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).sum()
    del loss
    return sum(kept.values())


def test_less_is_kept_the_more_is_computed_again(context: ParallelContext) -> None:
    batch = small_batch(rows=4)
    none, selective, full, blocks = (kept_bytes(built(context, parallel), batch) for parallel in [ParallelConfig(), *KINDS])
    print(f"kept: {none:,} bytes, selective {selective:,}, full {full:,}, full in blocks of two layers {blocks:,}")
    assert blocks < full < selective < none


@pytest.mark.parametrize("parallel", KINDS, ids=name)
def test_gradients_are_those_without_recompute(context: ParallelContext, parallel: ParallelConfig) -> None:
    plain, saving = built(context, ParallelConfig()), built(context, parallel)
    for model in (plain, saving):
        model(small_batch()).square().mean().backward()
    for (where, expected), parameter in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=where)  # the order of a sum may differ


@pytest.mark.parametrize("parallel", KINDS, ids=name)
def test_the_backward_pass_routes_as_its_own_forward_pass_did(context: ParallelContext, parallel: ParallelConfig) -> None:
    """Two micro-batches in flight with other routes replayed: by the time of the first one's backward pass, the routers have seen the second."""
    plain, saving = built(context, ParallelConfig()), built(context, parallel)
    first, second = small_batch(seed=0), small_batch(seed=1)
    rows, length = first.tokens_BS.shape
    given = [torch.randint(0, 4, (rows, length, 3, 1), generator=torch.Generator().manual_seed(seed)) * 2 for seed in (0, 1)]
    routes = [torch.cat([even, even + 1], dim=-1) for even in given]  # two different experts a token
    for model in (plain, saving):
        losses = []
        for batch, experts in zip((first, second), routes, strict=True):
            with model.router_tap.replay(experts) as replayed:
                losses.append(model(batch).square().mean())
                assert torch.equal(replayed.experts(length * rows).unflatten(0, (length, rows)).transpose(0, 1), experts)
        for loss in losses:
            loss.backward()
    for (where, expected), parameter in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-6, atol=1e-7, msg=where)


def test_weights_behind_a_frozen_input_still_learn(context: ParallelContext) -> None:
    """With all that comes before the first layer frozen, its input has no gradient; the adapters inside a recomputed block must get theirs all the same."""
    model = built(context, ParallelConfig(recompute="full"))
    for where, parameter in model.named_parameters():
        parameter.requires_grad_(where.startswith("decoder.taps."))
    model(small_batch()).sum().backward()
    gradients = {where: parameter.grad for where, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
