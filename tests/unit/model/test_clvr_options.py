"""Every option of CLVR, and every ablation, keeps the laws of the default: causal, exact in its cache, no effect at first, alive in its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.batch import NO_TILES, Markers
from megatron_ext.config.clvr_schema import ClvrConfig
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import count_parameters
from megatron_ext.errors import UserError
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.model.generation import decode, read
from megatron_ext.model.inputs import ModelInputs, model_inputs
from megatron_ext.model.memory import Footprint, Memory
from megatron_ext.model.other_picture import other_pictures, picture_of
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, TOKENS_PER_TILE, small_batch, small_config

TURN, SLOTS = 9, (60, 61)
OPTIONS: dict[str, dict[str, Any]] = {
    "same layer": {"query_source": "same_layer"},
    "input embedding": {"query_source": "input_embedding"},
    "learned": {"memory": "learned"},
    "learned, projected": {"memory": "learned", "kv_tokens": "projected"},
    "shuffled": {"memory": "shuffled"},
    "shuffled, projected": {"memory": "shuffled", "kv_tokens": "projected"},
    "unshuffled": {"kv_tokens": "unshuffled"},
    "projected": {"kv_tokens": "projected"},
    "two ViT layers": {"kv_layers": (0, 1)},
    "two ViT layers, unshuffled": {"kv_layers": (1, 0), "kv_tokens": "unshuffled"},
    "a gate a channel": {"gate_kind": "channel"},
    "a gate a token": {"gate_kind": "dynamic"},
    "an MLP": {"ffn_hidden": 16},
    "three looks": {"inner_iterations": 3, "gate_kind": "dynamic", "ffn_hidden": 16},
    "responses": {"inject": "response"},
    "memory tokens": {"inject": "slots", "num_slots": 2},
    "memory tokens that ask with their embeddings": {"inject": "slots", "num_slots": 2, "query_source": "input_embedding", "inner_iterations": 2},
    "addition": {"fusion": "addition", "kv_tokens": "unshuffled"},
    "addition of projected tokens": {"fusion": "addition", "kv_tokens": "projected", "gate_kind": "channel"},
    "addition of a ViT layer each": {"fusion": "addition", "kv_tokens": "unshuffled", "kv_layers": (0, 1), "gate_kind": "dynamic"},
    "all at once": {"query_source": "same_layer", "kv_tokens": "unshuffled", "kv_layers": (0, 1), "gate_kind": "channel", "ffn_hidden": 8, "inject": "all"},
}
BOTH_GATES = pytest.mark.parametrize("gate", ["zero_out", "tanh_gate"])
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def looking(options: dict[str, Any], gate: str = "tanh_gate") -> ModelConfig:
    config = small_config(clvr=ClvrConfig(taps=((0, 1), (0, 2)), num_heads=4, num_kv_heads=2, head_dim=8, gate=gate, **options))  # type: ignore[arg-type]
    return config.model_copy(update={"vision": config.vision.model_copy(update={"num_layers": 2})})


def batch_with_turns() -> ModelInputs:
    """Three rows: a question with an image up to position 8, an answer to 14, another question and, from 18, another answer. Two memory tokens end each
    question."""
    batch = small_batch()
    batch.tokens_BS[batch.tokens_BS == TURN] += 1
    for place in (0, 9, 15, 18):
        batch.tokens_BS[:, place] = TURN
    for place in (7, 16):
        batch.tokens_BS[:, place : place + 2] = torch.tensor(SLOTS)
    return batch


def built(options: dict[str, Any], context: ParallelContext, trained: bool = True, gate: str = "tanh_gate") -> VisionLanguageModel:
    """`trained`: adapters that do something."""
    model = build_model(looking(options, gate), IMAGE, context, seed=1, markers=Markers(TURN, SLOTS)).eval()
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.decoder.taps.named_parameters():
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.4, generator=generator)
    return model


@EVERY
def test_what_was_read_is_computed_from_the_past_alone_and_a_cache_knows_all_of_it(context: ParallelContext, options: dict[str, Any]) -> None:
    """Another token at position 16 changes nothing before it; prompts of 9, 14 and 20 tokens, read in two parts and answered token by token, give the logits
    of the full forward pass."""
    model, batch = built(options, context), batch_with_turns()
    changed = batch.tokens_BS.clone()
    changed[:, 16] = 11
    lengths, rows = torch.tensor([9, 14, 20]), torch.arange(3)
    prompts = torch.where(torch.arange(20) < lengths[:, None], batch.tokens_BS[:, :20], 0)
    memory = Memory(most_new=3, device=torch.device("cpu"))
    with torch.no_grad():
        full = model(batch)
        torch.testing.assert_close(model(replace(batch, tokens_BS=changed))[:16], full[:16], rtol=0, atol=1e-5)
        logits = read(model, replace(batch, tokens_BS=prompts), lengths.numpy(), parts=2).seat(memory, [1, 1, 1])
        torch.testing.assert_close(logits, full[lengths - 1, rows], rtol=1e-5, atol=2e-5)
        tokens_T3 = torch.stack([batch.tokens_BS[rows, lengths], batch.tokens_BS[rows, lengths + 1]])
        answered = [decode(model, tokens_R, memory) for tokens_R in tokens_T3]
    for step, row in ((step, row) for step in range(2) for row in range(3)):
        # What is decoded belongs to an answer, which a row that goes on inside a question in `full` does not say.
        if options.get("inject") != "response" or int(lengths[row]) + step not in (15, 16, 17):
            torch.testing.assert_close(answered[step][row], full[lengths[row] + step, row], rtol=1e-5, atol=2e-5)


@EVERY
@BOTH_GATES
def test_it_has_no_effect_at_initialisation_learns_at_once_and_then_with_every_parameter(context: ParallelContext, options: dict[str, Any], gate: str) -> None:
    """The first step opens W_o, or the gate; after it every parameter of every tap has a gradient that is not 0."""
    model = built(options, context, trained=False, gate=gate)
    without = build_model(looking({}, gate).model_copy(update={"clvr": ClvrConfig(enabled=False, taps=())}), IMAGE, context, seed=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model.model_config).total
    batch = batch_with_turns()
    assert torch.equal(model(batch), without.eval()(batch))
    parameters = dict(model.decoder.taps.named_parameters())
    for _ in range(3):
        model.zero_grad()
        model(batch).log_softmax(-1)[..., 3].mean().backward()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.1 * parameter.grad / (parameter.grad.norm() + 1e-9)
    dead = [name for name, parameter in parameters.items() if not parameter.grad.abs().max() > 0]
    assert dead == []


@EVERY
def test_text_alone_touches_every_parameter(context: ParallelContext, options: dict[str, Any]) -> None:
    model = built(options, context)
    tokens = np.random.default_rng(0).integers(10, 60, size=(4, 64))
    model(model_inputs(tokens, NO_TILES, np.full((4, 1), -1), torch.device("cpu"))).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("memory", ["image", "learned", "shuffled"])
def test_taps_see_their_image_or_something_that_does_not_tell_it(context: ParallelContext, memory: str) -> None:
    """What a tap remembers of two pictures: their own features; the same vectors; the pictures that their pixels name, in whatever batch they stand."""
    model, batch = built({"memory": memory}, context), small_batch(rows=4)
    named = picture_of(batch.tiles_ICHW)
    assert torch.equal(other_pictures(batch.tiles_ICHW)[1:], other_pictures(batch.tiles_ICHW[1:]))

    def remembered(inputs: ModelInputs) -> torch.Tensor:
        frame = model.frame(inputs)
        looked = model.look(inputs, frame, model.embed(inputs, frame).sources_IVW)[0]
        assert looked is not None
        return looked.keys[0]

    with torch.no_grad():
        ours, theirs = remembered(replace(batch, places_I5=None)), remembered(replace(batch, places_I5=None, tiles_ICHW=batch.tiles_ICHW.roll(1, 0)))
    same = [torch.equal(one, other) for one, other in zip(ours[:3], theirs[:3], strict=True)]
    assert same == {"image": [False] * 3, "learned": [True] * 3, "shuffled": (named == named.roll(1)).tolist()}[memory]


def test_responses_alone_are_refined_from_the_assistants_header_on(context: ParallelContext) -> None:
    """Of the batch with two turns, and of the same samples packed one after another."""
    model, seen = built({"inject": "response"}, context), []
    model.decoder.injections[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].abs().amax(2) > 0))
    batch = batch_with_turns()
    with torch.no_grad():
        model(batch)
        model(ModelInputs(batch.tokens_BS[:2].reshape(1, -1), batch.tiles_ICHW, torch.tensor([[0, 1]]), bounds=(0, 24, 48)))
    padded, packed = (mask_SB.T.tolist() for mask_SB in seen)
    expected = [9 <= place < 15 or place >= 18 for place in range(24)]
    assert padded == [expected] * 3 and packed == [expected * 2]


def test_what_a_tap_saw_reaches_an_answer_through_memory_tokens_alone(context: ParallelContext) -> None:
    """Refinement stands at the four memory tokens of every row and nowhere else. Before the first of them the logits are those of a model whose taps are shown
    nothing, and so are all once the refinement of memory tokens is taken away; with it, every later one differs. Nothing is kept for answers to look at."""
    model, batch, seen = built({"inject": "slots", "num_slots": 2}, context), batch_with_turns(), []
    at_slots_SB = (batch.tokens_BS.T[..., None] == torch.tensor(SLOTS)).any(-1)
    memory = Memory(most_new=3, device=torch.device("cpu"))
    with torch.no_grad():
        with model.taps_shown(None):
            blind = model(batch)
        for injection in model.decoder.injections:
            injection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1].abs().amax(2) > 0))
        full = model(batch)
        read(model, replace(batch, tokens_BS=batch.tokens_BS[:, :12]), np.array([12, 12, 12])).seat(memory, [1, 1, 1])
        for injection in model.decoder.injections:
            injection.register_forward_hook(lambda module, inputs, output: output - at_slots_SB[..., None] * inputs[1])
        muted = model(batch)
    assert len(seen) >= 2 and all(torch.equal(mask_SB, at_slots_SB) for mask_SB in seen[:2])
    assert torch.equal(full[:7], blind[:7]) and (full - blind)[7:].abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(muted, blind, rtol=1e-5, atol=1e-5)
    assert memory.vision() is None and Footprint.of(model.model_config, 1).tile == 0


@pytest.mark.parametrize(("markers", "number"), [(Markers(TURN), 0), (Markers(TURN, (60, 61, 62)), 3)])
def test_a_tokenizer_without_the_memory_tokens_that_the_model_asks_for_is_refused(context: ParallelContext, markers: Markers, number: int) -> None:
    with pytest.raises(UserError, match=rf"model\.clvr\.num_slots: 2 memory tokens, and the tokenizer .* is built for has {number}; make the tokenizer"):
        build_model(looking({"inject": "slots", "num_slots": 2}), IMAGE, context, markers=markers)


def test_added_tokens_are_those_of_the_image_at_its_own_positions(context: ParallelContext) -> None:
    model, seen = built({"fusion": "addition", "kv_tokens": "projected"}, context), []
    model.decoder.injections[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    batch = small_batch(rows=2)
    with torch.no_grad():
        model(batch)
        tap = model.decoder.taps[0]
        images = model.projector(model.vision(batch.tiles_ICHW))
        expected = torch.tanh(tap.gate) * tap.linear_out(tap.vision_norm(images))
    added_BSH = seen[0].transpose(0, 1)
    torch.testing.assert_close(added_BSH[:, 2 : 2 + TOKENS_PER_TILE], expected[[0, 0]])
    assert added_BSH[:, :2].abs().max() == added_BSH[:, 2 + TOKENS_PER_TILE :].abs().max() == 0
    assert Footprint.of(model.model_config, 1).tile == 0
