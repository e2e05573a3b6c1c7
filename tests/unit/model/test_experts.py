"""All experts in one function compute what one Megatron module after another does: outputs, gradients, training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.model.assembly import build_model
from megatron_ext.model.experts import swiglu_experts
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_batch, small_config
from tests.support.training import run_steps, start

KERNELS = ("in_place", "grouped_mm")


def plain(x_TH: torch.Tensor, gates_T: torch.Tensor, counts: list[int], fc1: list[torch.Tensor], fc2: list[torch.Tensor]) -> torch.Tensor:
    """The formula, expert by expert, left to autograd."""
    parts = []
    for x, gates, first, second in zip(x_TH.split(counts), gates_T.split(counts), fc1, fc2, strict=True):
        u, v = (x @ first.T).chunk(2, dim=-1)
        parts.append((F.silu(u) * v * gates[:, None]) @ second.T)
    return torch.cat(parts)


def test_one_expert_of_one_channel_as_by_hand() -> None:
    """u = 2, v = 3, gate 0.5: fc2 = 4 times silu(2) * 3 * 0.5."""
    fc1, fc2 = torch.tensor([[2.0], [3.0]]), torch.tensor([[4.0]])
    out = swiglu_experts(torch.ones(1, 1), torch.tensor([0.5]), [1], [fc1], [fc2], grouped=False)
    assert float(out) == pytest.approx(4 * (2 / (1 + 2.718281828**-2)) * 3 * 0.5, rel=1e-6)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.booleans(), st.integers(0, 2**31))
def test_outputs_and_every_gradient_are_those_of_the_formula_also_for_experts_without_tokens(counts: list[int], grouped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x_TH, gates_T = draw(sum(counts), 16), draw(sum(counts))
    fc1, fc2 = [draw(16, 16) for _ in counts], [draw(16, 8) for _ in counts]
    tensors, grad_TH = [x_TH, gates_T, *fc1, *fc2], torch.randn(sum(counts), 16, generator=generator)
    ours = swiglu_experts(x_TH, gates_T, counts, fc1, fc2, grouped=grouped)
    theirs = plain(x_TH, gates_T, counts, fc1, fc2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for got, expected in zip(torch.autograd.grad(ours, tensors, grad_TH), torch.autograd.grad(theirs, tensors, grad_TH), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_derivative_is_right_by_finite_differences_in_double_precision() -> None:
    torch.manual_seed(0)
    x_TH, gates_T, *weights = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in [(5, 3), (5,), (4, 3), (4, 3), (3, 2), (3, 2)])
    assert torch.autograd.gradcheck(lambda x, g, a, b, c, d: swiglu_experts(x, g, [2, 3], [a, b], [c, d], grouped=False), (x_TH, gates_T, *weights))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_model_has_the_same_output_and_gradients_with_every_kernel(context: ParallelContext, kernel: str, dtype: str) -> None:
    """In bfloat16 within its rounding, 2^-8, of the largest entry."""
    found = []
    for name in ("sequential", kernel):
        model = build_model(small_config(experts_kernel=name, dtype=dtype), IMAGE, context, seed=1)
        output = model(small_batch()).float()
        output.square().mean().backward()
        found.append((output, {key: parameter.grad.float() for key, parameter in model.named_parameters()}))
    (expected, gradients), (output, ours) = found
    tolerance = 1e-5 if dtype == "fp32" else 0.1
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, key


def test_gradients_go_straight_into_megatrons_buffer_once_a_micro_batch(context: ParallelContext) -> None:
    """Two micro-batches through data parallelism's buffers against autograd's own sum; Megatron's flag says that the product was added."""
    engines = [start(context, small_config(experts_kernel=kernel)) for kernel in ("sequential", "in_place")]
    for engine in engines:
        engine.begin()
        for seed in (0, 1):
            engine.wrapped[0](small_batch(seed=seed)).square().mean().backward()
    plain, ours = (dict(engine.chunks[0].named_parameters()) for engine in engines)
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name].main_grad, parameter.main_grad, rtol=1e-4, atol=1e-5, msg=name)
        assert ours[name].grad_added_to_main_grad == ("local_experts" in name) and not parameter.grad_added_to_main_grad


def test_parameters_have_the_names_and_values_of_megatrons_experts(context: ParallelContext) -> None:
    models = [build_model(small_config(experts_kernel=kernel), IMAGE, context, seed=1) for kernel in ("sequential", *KERNELS)]
    expected, *others = ({name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None} for model in models)
    for other in others:
        assert other.keys() == expected.keys()
        assert all(other[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_takes_the_same_course(context: ParallelContext, kernel: str) -> None:
    curves = [[step["loss"] for step in run_steps(start(context, small_config(experts_kernel=name)), 0, 4, 4, context)] for name in ("sequential", kernel)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_frozen_experts_pass_gradients_on_and_get_none(context: ParallelContext) -> None:
    def frozen(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    for grouped in (False, True):
        x_TH, fc1, fc2 = frozen(3, 16).requires_grad_(), frozen(16, 16), frozen(16, 8)
        swiglu_experts(x_TH, torch.ones(3), [3], [fc1], [fc2], grouped=grouped).square().sum().backward()
        assert x_TH.grad is not None and fc1.grad is None and fc2.grad is None
