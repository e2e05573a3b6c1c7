"""Inside `batch_invariant()` a row's result is the same to the last bit in any company, and torch's own to rounding; outside, torch is as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_ext.device.batch_invariant import batch_invariant
from megatron_ext.device.batch_invariant.attention import BLOCK, attention
from megatron_ext.device.batch_invariant.products import TILE

NUMBER = st.integers(1, 100)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(rows=NUMBER, inner=NUMBER, columns=NUMBER, data=st.data())
def test_a_row_times_a_matrix_is_the_same_wherever_it_stands_and_whoever_stands_beside_it(rows: int, inner: int, columns: int, data: st.DataObject) -> None:
    x_TK, weight_NK = numbers(rows, inner), numbers(columns, inner, seed=1)
    some = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3 * TILE)))
    with batch_invariant():
        whole, part = F.linear(x_TK, weight_NK), F.linear(x_TK[some], weight_NK)
        out = torch.mm(x_TK[some], weight_NK.t(), out=torch.empty(len(some), columns))
        stored_otherwise = F.linear(x_TK, weight_NK.t().contiguous().t())
    assert torch.equal(part, whole[some]) and torch.equal(out, part) and torch.equal(stored_otherwise, whole)
    close(whole, F.linear(x_TK, weight_NK))


W24, W40, BIAS = numbers(24, 40, seed=1), numbers(40, 24, seed=2), numbers(24, seed=3)
EXPERTS, KERNELS = numbers(3, 40, 24, seed=4), numbers(6, 3, 2, 2, seed=5)
OPERATIONS = {
    "a product of three axes": (lambda x: torch.matmul(x, W24.t()), (7, 40)),
    "a product and a bias": (lambda x: F.linear(x, W24, BIAS), (5, 40)),
    "products of a batch": (lambda x: torch.bmm(x, W24.t().expand(len(x), -1, -1)), (19, 40)),
    "a convolution": (lambda x: F.conv2d(x, KERNELS, stride=2), (3, 8, 8)),
    "rms_norm": (lambda x: F.rms_norm(x, (40,), BIAS.new_ones(40)), (40,)),
    "rms_norm of heads that lie apart": (lambda x: F.rms_norm(x.view(-1, 3, 40)[:, 1], (40,)), (120,)),
    "layer_norm": (lambda x: F.layer_norm(x, (40,)), (40,)),
    "softmax": (lambda x: torch.softmax(x, -1), (3,)),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), (1003,)),
    "sum": (lambda x: x.sum(-1), (1003,)),
    "mean of a transposed tensor": (lambda x: x.transpose(1, 2).mean(-1), (40, 7)),
    "half of the channels through silu": (lambda x: F.silu(x.chunk(2, -1)[1]), (26,)),
    **{name: (getattr(torch, name), (5,)) for name in ("exp", "sigmoid", "tanh", "sin", "cos")},
    "exp in place": (lambda x: x.clone().exp_(), (5,)),
    "log": (lambda x: x.abs().log(), (5,)),
    "gelu": (F.gelu, (5,)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 70, 8)),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 70, 8)),
    "attention behind a mask": (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(torch.arange(70) >= 60)[None]), (2, 70, 8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_an_operation_gives_for_a_row_does_not_depend_on_the_others(name: str) -> None:
    operation, shape = OPERATIONS[name]
    x = numbers(67, *shape)
    with batch_invariant():
        whole = operation(x)
        for rows in ([0], [66], [3, 2], [*range(5, 22)], [*range(66)]):
            assert torch.equal(operation(x[rows]), whole[rows]), f"{len(rows)} rows"
    close(whole, operation(x))


def test_a_product_of_many_matrices_is_that_of_each_by_itself_however_it_is_asked_for() -> None:
    """One expert may be computed by a product of its own, in a batch of equally many tokens each, or in a group of any number of tokens each."""
    x_TK = numbers(40, 40)
    with batch_invariant():
        whole = F.grouped_mm(x_TK, EXPERTS, offs=torch.tensor([1, 1, 40], dtype=torch.int32))
        part = F.grouped_mm(x_TK[[0, 5, 7]], EXPERTS, offs=torch.tensor([1, 1, 3], dtype=torch.int32))
        batch = torch.bmm(x_TK[:39].view(3, 13, 40), EXPERTS)
        assert torch.equal(part, whole[[0, 5, 7]]) and torch.equal(part[:1], x_TK[:1] @ EXPERTS[0])
        assert torch.equal(batch[2], x_TK[26:39] @ EXPERTS[2]) and torch.equal(batch[2], whole[26:39])


@settings(max_examples=30)
@given(length=st.integers(1, 3 * BLOCK), more=st.integers(0, 2 * BLOCK), data=st.data())
def test_a_query_gets_the_same_over_its_row_as_alone_over_longer_memory(length: int, more: int, data: st.DataObject) -> None:
    """What generation asks (one query, keys behind it hidden) and what training asks (all queries, causally); two heads share their keys."""
    query, key, value = numbers(2, 4, length, 8), numbers(2, 2, length + more, 8, seed=1), numbers(2, 2, length + more, 8, seed=2)
    place = data.draw(st.integers(0, length - 1))
    shared = [x[:, :, :length].repeat_interleave(2, dim=1) for x in (key, value)]
    with batch_invariant():
        row = F.scaled_dot_product_attention(query, *shared, is_causal=True)
        alone, _ = attention(query[:1, :, place].unflatten(1, (2, 2)), key[:1], value[:1], torch.arange(length + more) <= place)
    assert torch.equal(alone.flatten(1, 2), row[:1, :, place])
    close(row, F.scaled_dot_product_attention(query, *shared, is_causal=True))


def model_of_everything(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    heads = F.silu(F.rms_norm(F.linear(x, weight, bias), (24,))).view(-1, 5, 3, 8).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return F.grouped_mm(attended.reshape(-1, 8), weight[:, :16].reshape(3, 8, 16), offs=ENDS)


ENDS = torch.tensor([10, 10, 60], dtype=torch.int32)


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_torchs_own_operations(recomputed: bool) -> None:
    def gradients() -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (numbers(20, 40), W24, BIAS)]
        made = checkpoint(model_of_everything, *inputs, use_reentrant=False) if recomputed else model_of_everything(*inputs)
        return list(torch.autograd.grad(made.square().sum(), inputs))

    with batch_invariant():
        found = gradients()
    for mine, ordinary in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, ordinary, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_product_are_those_of_the_ordinary_one_to_1e_5() -> None:
    def gradients() -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (numbers(33, 40), W24, BIAS)]
        return list(torch.autograd.grad(F.linear(*inputs).sin().sum(), inputs))

    with batch_invariant():
        found = gradients()
    for mine, ordinary in zip(found, gradients(), strict=True):
        close(mine, ordinary)


def test_leaving_gives_torch_back_as_it_was_and_the_inner_of_two_changes_nothing() -> None:
    def kernel() -> str:
        return str(torch.library.get_kernel("aten::mm", "CPU"))

    before, threads = kernel(), torch.get_num_threads()
    torch.set_num_threads(2)
    with batch_invariant():
        assert torch.get_num_threads() == 1
        with batch_invariant(), batch_invariant(on=False):
            pass
        inside = kernel()
    assert torch.get_num_threads() == 2 and kernel() == before != inside
    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError), batch_invariant():
        _ = 1 / 0
    assert kernel() == before


def test_where_nothing_is_asked_torch_stays_as_it_is() -> None:
    before = str(torch.library.get_kernel("aten::mm", "CPU"))
    with batch_invariant(on=False):
        assert str(torch.library.get_kernel("aten::mm", "CPU")) == before
