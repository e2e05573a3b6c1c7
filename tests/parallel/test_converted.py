"""A checkpoint converted from Hugging Face computes transformers' logits in every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.hf.configuration import Described
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.parallel.local import run_ranks
from tests.support import hf
from tests.support.converted import logits_of

TP2, EP2, PP2 = ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, ep=2), ParallelConfig(num_ranks=2, pp=2)
TP2_EP2, VPP2 = ParallelConfig(num_ranks=2, tp=2, ep=2), ParallelConfig(num_ranks=2, pp=2, vpp=2)
CHECKPOINTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, ParallelConfig]]] = {
    "experts": (hf.build, {}, {"TP2": TP2, "EP2": EP2, "TP2 EP2": TP2_EP2, "PP2": PP2, "PP2 VPP2": VPP2}),
    "dense": (hf.build, {"model_type": "qwen3"}, {"TP2": TP2, "PP2": PP2}),
    "experts alone": (hf.build_text, {}, {"TP2 EP2": TP2_EP2}),
    "dense alone": (hf.build_text, {"model_type": "qwen3"}, {"PP2": PP2}),
}
LONG = {("experts", "TP2"), ("experts", "EP2"), ("experts", "PP2")}
"""Journeys: each of their features is in another case too."""


@cache
def converted(kind: str, folder: Path) -> tuple[Described, ModelInputs, torch.Tensor]:
    """What the checkpoint in `folder / "ours"` is, a batch, and the logits that transformers computes for it."""
    build, options, _ = CHECKPOINTS[kind]
    theirs = build(num_hidden_layers=4, **options)
    theirs.save_pretrained(folder / "hf")
    described = hf_to_megatron(folder / "hf", folder / "ours")
    tokens = torch.randint(8, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    if not described.model.vision.enabled:
        with torch.no_grad():
            return described, ModelInputs(tokens, torch.zeros(0, 3, 16, 16), torch.full((2, 1), -1)), theirs(input_ids=tokens).logits
    tokens[:, 2:6] = hf.IMAGE_TOKEN
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return described, ModelInputs(tokens, pixels, torch.tensor([[0], [1]])), theirs(input_ids=tokens, pixel_values=pixels).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp("converted") for kind in CHECKPOINTS}


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        pytest.param(kind, parallel, id=f"{kind}, {name}", marks=[pytest.mark.journey] if (kind, name) in LONG else [])
        for kind, (_, _, layouts) in CHECKPOINTS.items()
        for name, parallel in layouts.items()
    ],
)
def test_every_layout_computes_the_logits_of_transformers(folders: dict[str, Path], kind: str, parallel: ParallelConfig) -> None:
    described, inputs, expected = converted(kind, folders[kind])
    found = run_ranks(logits_of, parallel.num_ranks, parallel, folders[kind] / "ours", described.model, described.image_token, inputs, timeout_s=100)
    logits = [part for part in found if part is not None]
    assert logits
    for part in logits:
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-4)
        assert torch.equal(part.argmax(-1), expected.argmax(-1))
