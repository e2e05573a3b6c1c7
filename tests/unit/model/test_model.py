"""The assembled model: causal, exact in its cache, unchanged by CLVR at the start, complete in its gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ext.batch import NO_TILES
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.generation import decode, read
from megatron_ext.model.heads import banned_tokens, policy_logits
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.memory import Memory
from megatron_ext.model.token_scores import token_logprobs
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, TOKENS_PER_TILE, open_gates, small_batch, small_config


@pytest.fixture(scope="module")
def model(context: ParallelContext) -> VisionLanguageModel:
    model = build_model(small_config(), IMAGE, context, seed=1).eval()
    open_gates(model)
    return model


@pytest.mark.parametrize("position", [1, 8, 23])
def test_a_future_token_changes_nothing_before_it(model: VisionLanguageModel, position: int) -> None:
    batch = small_batch()
    changed = batch.tokens_BS.clone()
    changed[:, position] = 9
    with torch.no_grad():
        before, after = model(batch), model(replace(batch, tokens_BS=changed))
    assert torch.equal(before[:position], after[:position])
    assert not torch.equal(before[position:], after[position:])


def test_an_image_changes_nothing_before_its_first_token_and_something_after(model: VisionLanguageModel) -> None:
    batch = small_batch()
    with torch.no_grad():
        before, after = model(batch), model(replace(batch, tiles_ICHW=-batch.tiles_ICHW))
    assert torch.equal(before[:2], after[:2])
    assert (before[6:] - after[6:]).abs().max() > 0.1


def test_clvr_itself_brings_the_image_to_the_text(context: ParallelContext, model: VisionLanguageModel) -> None:
    """With the gates shut the same weights give other logits from the first text token after the image on, and the same ones before."""
    batch = small_batch()
    with torch.no_grad():
        opened = model(batch)
        open_gates(model, 0.0)
        shut = model(batch)
        open_gates(model)
    first = 2 + TOKENS_PER_TILE
    assert torch.equal(opened[:first], shut[:first])
    assert (opened[first:] - shut[first:]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("gate", ["zero_out", "tanh_gate"])
def test_clvr_has_no_effect_at_initialisation_and_learns_at_once(context: ParallelContext, gate: str) -> None:
    clvr = small_config().clvr.model_copy(update={"gate": gate})
    with_clvr = build_model(small_config(clvr=clvr), IMAGE, context, seed=1)
    without = build_model(small_config(clvr=clvr.model_copy(update={"enabled": False})), IMAGE, context, seed=1)
    batch = small_batch()
    logits = with_clvr(batch)
    assert torch.equal(logits, without(batch))
    logits.square().mean().backward()
    opener = with_clvr.decoder.taps[0].linear_out.weight if gate == "zero_out" else with_clvr.decoder.taps[0].gate
    assert opener.grad.abs().max() > 0


def test_cached_decode_equals_the_full_forward(model: VisionLanguageModel) -> None:
    """Rows of different lengths are prefilled together and then fed their own next tokens; logits agree to 1e-5 at every step."""
    batch, lengths = small_batch(), torch.tensor([9, 14, 11])
    rows = torch.arange(3)
    prompts = torch.zeros(3, 14, dtype=torch.int64)
    for row, length in enumerate(lengths):
        prompts[row, :length] = batch.tokens_BS[row, :length]
    memory = Memory(most_new=10, device=torch.device("cpu"))
    with torch.no_grad():
        full = model(batch)
        logits = read(model, replace(batch, tokens_BS=prompts), lengths.numpy()).seat(memory, [1, 1, 1])
        torch.testing.assert_close(logits, full[lengths - 1, rows], rtol=1e-5, atol=1e-5)
        for step in range(10):
            logits = decode(model, batch.tokens_BS[rows, lengths + step], memory)
            torch.testing.assert_close(logits, full[lengths + step, rows], rtol=1e-5, atol=1e-5)


def test_rows_join_and_leave_while_others_are_written(model: VisionLanguageModel) -> None:
    """Two answers to prompt 2 and one to prompt 0 are begun; one to prompt 1 joins; the first leaves: every logit is that of the full forward."""
    batch = small_batch()
    memory = Memory(most_new=4, device=torch.device("cpu"))

    def seat(prompts: list[int], rows: list[int]) -> torch.Tensor:
        chosen = replace(batch, tokens_BS=batch.tokens_BS[prompts, :10], row_tiles_BM=batch.row_tiles_BM[prompts])
        return read(model, chosen, np.full(len(prompts), 10)).seat(memory, rows)

    def step(prompts: list[int], places: list[int]) -> None:
        logits = decode(model, batch.tokens_BS[prompts, torch.tensor(places)], memory)
        torch.testing.assert_close(logits, full[places, prompts], rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        full = model(batch)
        torch.testing.assert_close(seat([2, 0], [2, 1]), full[9, [2, 2, 0]], rtol=1e-5, atol=1e-5)
        step([2, 2, 0], [10, 10, 10])
        torch.testing.assert_close(seat([1], [1]), full[9, [1]], rtol=1e-5, atol=1e-5)
        step([2, 2, 0, 1], [11, 11, 11, 10])
        assert memory.retire(np.array([True, False, False, False])).tolist() == [3, 1, 2]
        step([1, 2, 0], [11, 12, 12])
        assert memory.retire(np.array([False, True, False])).tolist() == [0, 2]
        step([1, 0], [12, 13])


def test_padding_behind_a_row_does_not_change_it(model: VisionLanguageModel) -> None:
    batch = small_batch()
    padded = replace(batch, tokens_BS=torch.nn.functional.pad(batch.tokens_BS, (0, 8)))
    with torch.no_grad():
        torch.testing.assert_close(model(padded)[:24], model(batch), rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient_even_from_a_batch_without_images(context: ParallelContext) -> None:
    """A rank with text only must still touch the vision tower and the taps, or the gradient reduction of the others waits for it for ever."""
    model = build_model(small_config(), IMAGE, context)
    open_gates(model)
    tokens = np.random.default_rng(0).integers(8, 60, size=(4, 64))
    model(model_inputs(tokens, NO_TILES, np.full((4, 1), -1), torch.device("cpu"))).square().mean().backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not untouched


def test_weights_depend_on_the_seed_and_on_nothing_else(context: ParallelContext) -> None:
    one, again, other = (build_model(small_config(), IMAGE, context, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one if isinstance(one[name], torch.Tensor))
    assert not torch.equal(one["output_layer.weight"], other["output_layer.weight"])


def test_a_bf16_model_stays_close_to_its_fp32_twin(context: ParallelContext) -> None:
    """Every parameter is bf16; logits differ by rounding only (an expert may flip, so the median is compared)."""
    small, full = (build_model(small_config(dtype=dtype, init_std=0.05), IMAGE, context).eval() for dtype in ("bf16", "fp32"))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        difference = (small(small_batch()).float() - full(small_batch())).abs()
    assert difference.median() < 0.01


def test_tied_embeddings_share_one_weight(context: ParallelContext) -> None:
    model = build_model(small_config(tie_embeddings=True), IMAGE, context)
    assert model.output_layer.weight is None
    assert model(small_batch()).shape == (24, 3, 64)


def test_log_probabilities_are_those_of_the_policy(context: ParallelContext, model: VisionLanguageModel) -> None:
    """Temperature 2 halves the logits; placeholder and ids beyond the tokenizer have probability zero; the rest sums to one."""
    batch: ModelInputs = small_batch()
    banned = banned_tokens(64, 60, [IMAGE], context.pgs.tp, context.device)
    with torch.no_grad():
        logits = model(batch)
        policy = policy_logits(logits, 2.0, banned)
    probabilities = policy.softmax(-1)
    assert banned.nonzero()[:, 0].tolist() == [IMAGE, 60, 61, 62, 63]
    assert probabilities[..., banned].abs().max() == 0
    targets = torch.full_like(batch.tokens_BS, 11)
    torch.testing.assert_close(token_logprobs(policy, targets, context.pgs.tp), probabilities[..., 11].log().T, rtol=1e-5, atol=1e-5)
