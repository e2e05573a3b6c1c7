"""A checkpoint converted from Hugging Face computes transformers' logits in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.hf.configuration import Described
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.local import run_ranks
from tests.support import hf
from tests.support.converted import logits_of

LAYOUTS = {
    "TP2": ParallelConfig(num_ranks=2, tp=2),
    "EP2": ParallelConfig(num_ranks=2, ep=2),
    "TP2 EP2": ParallelConfig(num_ranks=2, tp=2, ep=2),
    "PP2": ParallelConfig(num_ranks=2, pp=2),
    "PP2 VPP2": ParallelConfig(num_ranks=2, pp=2, vpp=2),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Described, ModelInputs, torch.Tensor]:
    """The checkpoint, its description, a batch, and the logits that transformers computes for it."""
    folder = tmp_path_factory.mktemp("converted")
    theirs = hf.build(num_hidden_layers=4)
    theirs.save_pretrained(folder / "hf")
    tokens = torch.randint(8, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 2:6] = hf.IMAGE_TOKEN
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=pixels).logits
    described = hf_to_megatron(folder / "hf", folder / "ours")
    return folder / "ours", described, ModelInputs(tokens, pixels, torch.tensor([[0], [1]])), expected


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_computes_the_logits_of_transformers(converted: tuple[Path, Described, ModelInputs, torch.Tensor], parallel: ParallelConfig) -> None:
    checkpoint, described, inputs, expected = converted
    found = run_ranks(logits_of, parallel.num_ranks, parallel, checkpoint, described.model, described.image_token, inputs, timeout_s=100)
    logits = [part for part in found if part is not None]
    assert logits
    for part in logits:
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-4)
        assert torch.equal(part.argmax(-1), expected.argmax(-1))
