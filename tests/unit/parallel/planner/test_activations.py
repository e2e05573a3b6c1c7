"""The bytes that autograd keeps of a forward pass, by formula and by counting what torch really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.schema import ClvrConfig, ParallelConfig, VisionConfig
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.activations import CPU, Activations, Microbatch
from megatron_ext.parallel.planner.fit import in_flight
from megatron_ext.parallel.planner.layers import layer_kinds
from megatron_ext.training.microbatches import microbatches
from tests.support.layouts import batch_of
from tests.support.models import small_config
from tests.support.training import PAD, start, token_batch

ROWS = 4
ONE_TAP = ClvrConfig(taps=((0, 1),), num_heads=4, num_kv_heads=2, head_dim=8)
TWO_TAPS = ClvrConfig(taps=((0, 1), (1, 2)), num_heads=8, num_kv_heads=2, head_dim=16, gate="tanh_gate")
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"hidden_size": 64, "head_dim": 16, "clvr": ONE_TAP},
    "bf16": {"hidden_size": 64, "head_dim": 16, "clvr": ONE_TAP, "dtype": "bf16"},
    "wide taps": {"hidden_size": 64, "clvr": TWO_TAPS},
    "no CLVR, many experts": {"hidden_size": 64, "num_experts": 32, "experts_per_token": 4, "clvr": ONE_TAP.model_copy(update={"enabled": False})},
    "every head its own keys": {"hidden_size": 64, "num_query_groups": 4, "clvr": ONE_TAP, "expert_ffn_hidden_size": 96},
    "dense": {"hidden_size": 64, "clvr": ONE_TAP, "num_experts": 0, "ffn_hidden_size": 192},
    "dense, bf16": {"hidden_size": 64, "clvr": ONE_TAP, "num_experts": 0, "ffn_hidden_size": 192, "dtype": "bf16"},
    "a dense layer among experts": {"hidden_size": 64, "clvr": ONE_TAP, "dense_layers": (1,), "ffn_hidden_size": 256},
    "a language model alone": {"hidden_size": 64, "vision": VisionConfig(enabled=False), "clvr": ONE_TAP.model_copy(update={"enabled": False})},
}


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the distinct storages that autograd keeps, weights aside."""

    def __init__(self, weights: set[int]) -> None:
        self.storages: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.storages[storage.data_ptr()] = storage.nbytes()
                self._alive.append(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_within_eight_percent_of_what_torch_keeps(name: str, packed: bool, tmp_path: Path) -> None:
    model = small_config(**CASES[name])
    with open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path}/store", seed=0) as context:
        state = start(context, model)
        rows = token_batch(0, ROWS) if model.vision.enabled else batch_of(0, images=False)
        batch = microbatches(rows, ROWS, PAD, context.device, packed=packed)[0]
        kept = Kept({parameter.untyped_storage().data_ptr() for parameter in state.chunks[0].parameters()})
        with kept:
            state.wrapped[0](batch.inputs)
    count, length = batch.inputs.tokens_BS.shape
    tiles = len(batch.inputs.tiles_ICHW)
    shape = Microbatch(1, length, tiles, True) if packed else Microbatch(count, length, tiles // count, False)
    shapes = Activations(model, Layout.of(ParallelConfig()), shape, True, CPU)
    taps = len(model.clvr.taps) if model.clvr.enabled else 0
    predicted = sum(shapes.layer_bytes[kind] for kind in layer_kinds(model)) + taps * shapes.tap_bytes + shapes.head_bytes
    if model.vision.enabled:
        predicted += shapes.vision_bytes(True) + shapes.projector_bytes
    assert predicted == pytest.approx(sum(kept.storages.values()), rel=0.08)


def test_pipelines_hold_fewer_micro_batches_the_later_the_rank_and_more_when_interleaved() -> None:
    layout = Layout(tp=1, sp=False, pp=4, vpp=2, cp=1, ep=1, etp=1, dp=1, num_ranks=4)
    assert [sum(in_flight(layout, rank, 16)) for rank in range(4)] == [11, 9, 7, 5], "2 (pp - rank - 1) + (vpp - 1) pp + 1 passes"
    assert in_flight(layout, 0, 16) == [7, 4], "in groups of four by chunk"
    assert in_flight(layout, 0, 2) == [4, 0], "never more than there are"


def test_sequence_and_context_parallelism_divide_what_a_layer_keeps() -> None:
    model = small_config(hidden_size=64)
    batch = Microbatch(1, 4096, 1, False)

    def layer(**parallel: int) -> int:
        return Activations(model, Layout.of(ParallelConfig(**parallel)), batch, True).layer_bytes["experts"]

    whole = layer()
    assert layer(tp=2, ep=2, num_ranks=2) == pytest.approx(whole / 2, rel=0.01)
    assert layer(tp=2, num_ranks=2) > 0.55 * whole, "experts that are split get the tokens of both ranks"
    assert layer(cp=2, num_ranks=2) > 0.55 * whole, "keys are read whole"
