"""Full tensors of a model on one rank, and what is refused. Other layouts are compared in `tests/parallel/test_layouts.py`."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_config
from tests.support.weights import load_full_tensors


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
