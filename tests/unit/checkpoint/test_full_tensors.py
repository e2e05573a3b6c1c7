"""Full tensors of a model on one rank: there and back, and what is refused. Other layouts are compared in `tests/parallel/test_layouts.py`."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.checkpoint.full_tensors import digest, full_tensors, load_full_tensors
from megatron_ext.errors import CheckpointError
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_config


@pytest.fixture
def model(context: ParallelContext) -> VisionLanguageModel:
    return build_model(small_config(), IMAGE, context, seed=1)


def weights(model: VisionLanguageModel, context: ParallelContext) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_tensors(model, context)}


def test_on_one_rank_full_tensors_are_the_parameters_under_their_own_names(model: VisionLanguageModel, context: ParallelContext) -> None:
    assert {name: tensor.data_ptr() for name, tensor in full_tensors(model, context)} == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_weights_loaded_into_another_model_make_it_the_same(model: VisionLanguageModel, context: ParallelContext) -> None:
    other = build_model(small_config(), IMAGE, context, seed=2)
    published = weights(model, context)
    assert digest(full_tensors(other, context)) != digest(published)
    load_full_tensors(other, published, context)
    assert digest(full_tensors(other, context)) == digest(published)


def test_tensors_of_another_dtype_are_converted(model: VisionLanguageModel, context: ParallelContext) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in weights(model, context).items()}
    load_full_tensors(model, halved, context)
    assert all(tensor.dtype == torch.float32 and tensor.equal(halved[name].float()) for name, tensor in full_tensors(model, context))


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_what_does_not_fit_is_named_and_nothing_is_changed(model: VisionLanguageModel, context: ParallelContext, damage: str) -> None:
    name = "decoder.layers.2.mlp.experts.local_experts.7.linear_fc1.weight"
    before = digest(full_tensors(model, context))
    tensors = {key: torch.zeros_like(tensor) for key, tensor in full_tensors(model, context)}
    match damage:
        case "missing":
            del tensors[name]
        case "unexpected":
            name = name.replace("experts.7", "experts.8")
            tensors[name] = torch.zeros(1)
        case "shape":
            tensors[name] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=name):
        load_full_tensors(model, tensors, context)
    assert digest(full_tensors(model, context)) == before


def test_a_split_parameter_without_its_mark_is_noticed(model: VisionLanguageModel, context: ParallelContext) -> None:
    """As left by `perform_initialization=False`: such a shard would pass for the whole tensor."""
    del model.decoder.layers[0].mlp.experts.local_experts[0].linear_fc2.weight.tensor_model_parallel
    with pytest.raises(RuntimeError, match=r"decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight is split over ranks but not marked"):
        list(full_tensors(model, context))


def test_a_digest_tells_values_shapes_and_dtypes_apart() -> None:
    zeros = torch.zeros(2, 3)
    variants = {"same": zeros.clone(), "value": zeros + 1, "shape": zeros.view(3, 2), "dtype": zeros.int(), "strides": torch.zeros(3, 2).T}
    digests = digest(variants)
    assert digests["same"] == digests["strides"] == digest({"x": zeros})["x"]
    assert len(set(digests.values())) == 4


def test_a_digest_is_that_of_the_bytes() -> None:
    """SHA-256 of "torch.uint8 (3,)" followed by the bytes 1 2 3, as any other tool computes it."""
    import hashlib

    assert digest({"x": torch.tensor([1, 2, 3], dtype=torch.uint8)})["x"] == hashlib.sha256(b"torch.uint8 (3,)\x01\x02\x03").hexdigest()
