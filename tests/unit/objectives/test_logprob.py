"""label_logprobs and label_logits against the float64 oracle; gradients; memory; errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpa.errors import UserError
from dpa.objectives import label_logits, label_logprobs, logprob
from tests.oracles import objectives as oracle

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def example(
    count: int, hidden: int, vocabulary: int, *, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(count, hidden, generator=draw, dtype=torch.float64) * scale
    weight_VH = torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64)
    labels_N = torch.randint(0, vocabulary, (count,), generator=draw)
    return hidden_NH.to(dtype), weight_VH.to(dtype), labels_N


def gradients(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, grad_N: Tensor, **options: Any) -> Any:
    """(logp, d/d hidden, d/d weight) of sum(grad * logp)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = function(hidden, weight, labels, **options)
    (logp * grad_N).sum().backward()
    return logp.detach(), hidden.grad, weight.grad


class Watch(TorchDispatchMode):
    """Sees every tensor that any operation makes, backward included, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        self.products += func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.addmm_.default,
        )
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("count", "hidden", "vocabulary", "chunk_size"),
    [
        (1, 1, 1, None),
        (1, 1, 2, 1),
        (7, 5, 11, 3),
        (8, 4, 12, 4),
        (13, 3, 29, 100),
        (33, 17, 257, 10),
        (5, 8, 3000, None),
    ],
)
def test_value_and_gradients_match_oracle(
    count: int, hidden: int, vocabulary: int, chunk_size: int | None, softcap: float | None, device: str
) -> None:
    hidden_NH, weight_VH, labels_N = example(count, hidden, vocabulary)
    grad_N = torch.linspace(-1, 2, count)
    expected = gradients(
        lambda h, w, y: oracle.label_logprobs(h, w, y, softcap),
        hidden_NH.double(),
        weight_VH.double(),
        labels_N,
        grad_N.double(),
    )
    moved = [tensor.to(device) for tensor in (hidden_NH, weight_VH, labels_N, grad_N)]
    got = gradients(label_logprobs, *moved, softcap=softcap, chunk_size=chunk_size)
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        # float32 rounding of sums of up to 257 terms of size 1 to 10
        torch.testing.assert_close(value.cpu().double(), reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
def test_gradcheck_in_float64(chunk_size: int | None, softcap: float | None) -> None:
    hidden_NH, weight_VH, labels_N = example(5, 3, 7, dtype=torch.float64)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: label_logprobs(h, w, labels_N, softcap=softcap, chunk_size=chunk_size), (hidden_NH, weight_VH)
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 9),
    hidden=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_float64(
    count: int, hidden: int, vocabulary: int, chunk_size: int, softcap: float | None, scale: float, seed: int
) -> None:
    hidden_NH, weight_VH, labels_N = example(count, hidden, vocabulary, dtype=torch.float64, scale=scale, seed=seed)
    got = label_logprobs(hidden_NH, weight_VH, labels_N, softcap=softcap, chunk_size=chunk_size)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, oracle.label_logprobs(hidden_NH, weight_VH, labels_N, softcap), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bfloat16_inputs_lose_nothing_but_their_own_rounding(softcap: float | None, device: str) -> None:
    hidden_NH, weight_VH, labels_N = example(40, 64, 500, dtype=torch.bfloat16, scale=0.3)
    grad_N = torch.linspace(0.05, 0.5, 40)
    expected = gradients(
        lambda h, w, y: oracle.label_logprobs(h, w, y, softcap),
        hidden_NH.double(),
        weight_VH.double(),
        labels_N,
        grad_N.double(),
    )
    moved = [tensor.to(device) for tensor in (hidden_NH, weight_VH, labels_N, grad_N)]
    logp, grad_hidden, grad_weight = gradients(label_logprobs, *moved, softcap=softcap, chunk_size=64)
    assert (logp.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(logp.cpu().double(), expected[0], rtol=1e-5, atol=1e-5)  # accumulated in float32
    for got, reference in ((grad_hidden, expected[1]), (grad_weight, expected[2])):
        scale = float(reference.abs().max())
        # the result's own rounding, 2^-9, and on CUDA that of the products' left operand
        torch.testing.assert_close(got.cpu().double(), reference, rtol=2**-7, atol=scale * 2**-8)


def test_bfloat16_against_unrounded_float32() -> None:
    hidden_NH, weight_VH, labels_N = example(200, 128, 1000, scale=0.1)
    got = label_logprobs(hidden_NH.bfloat16(), weight_VH.bfloat16(), labels_N)
    # 0.02 nat is what bf16 inputs alone cost (performance.md), whoever computes
    torch.testing.assert_close(got, label_logprobs(hidden_NH, weight_VH, labels_N), rtol=0, atol=0.02)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_sure_tokens_keep_their_small_log_probability_and_gradient(chunk_size: int | None) -> None:
    """1 - p = 1e-9 is far below float32's resolution at 1; relative accuracy must survive."""
    weight_VH = torch.eye(20)
    labels_N = torch.arange(20)
    hidden_NH = 24.0 * torch.eye(20)
    expected = gradients(
        oracle.label_logprobs, hidden_NH.double(), weight_VH.double(), labels_N, torch.ones(20).double()
    )
    got = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, torch.ones(20), chunk_size=chunk_size)
    assert -1e-8 < float(expected[0].min()) < -1e-10
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=0)


def test_products_that_read_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path, its one operation that the CPU lacks replaced by its definition."""
    plain_mm = torch.mm
    calls: list[int] = []

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        assert (left.dtype, right.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        calls.append(1)
        return plain_mm(left.float(), right.float())

    plan = logprob._plan
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(logprob, "_plan", lambda *args: dataclasses.replace(plan(*args), low_precision_products=True))
    hidden_NH, weight_VH, labels_N = example(30, 32, 200, dtype=torch.bfloat16)
    # Half of the tokens are nearly certain: there a rounded p would leave nothing of p - 1.
    hidden_NH[:15] += weight_VH[labels_N[:15]]
    grad_N = torch.linspace(0.05, 0.5, 30)
    for softcap in (None, 30.0):
        got = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, grad_N, softcap=softcap, chunk_size=50)
        expected = gradients(
            lambda h, w, y, cap=softcap: oracle.label_logprobs(h, w, y, cap),
            hidden_NH.double(),
            weight_VH.double(),
            labels_N,
            grad_N.double(),
        )
        torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        resolved = expected[0] < -1e-11  # below that the oracle's own p - 1 has too few digits
        per_token = expected[1][resolved].abs().amax(dim=1)
        assert float(per_token.min()) < 1e-3 * float(per_token.max())
        error = (got[1].double() - expected[1])[resolved].abs().amax(dim=1)
        assert float((error / per_token).max()) < 2**-6  # three roundings of 2^-9
        error = (got[2].double() - expected[2]).abs().max() / expected[2].abs().max()
        assert float(error) < 2**-7
    assert len(calls) == 2 * 4 * 4  # two soft-caps, four tiles, four products


def test_extreme_logits_stay_finite() -> None:
    hidden_NH, weight_VH, labels_N = example(6, 8, 50, scale=1e4)
    got = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, torch.ones(6), chunk_size=7)
    assert all(bool(value.isfinite().all()) for value in got)
    torch.testing.assert_close(
        got[0].double(), oracle.label_logprobs(hidden_NH, weight_VH, labels_N), rtol=1e-5, atol=1e-2
    )


def test_no_supervised_token() -> None:
    hidden_NH, weight_VH, labels_N = example(0, 4, 9)
    logp, grad_hidden, grad_weight = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, torch.ones(0))
    assert logp.shape == (0,)
    assert logp.dtype == torch.float32
    assert grad_hidden.shape == (0, 4)
    assert not bool(grad_weight.any())
    assert label_logits(hidden_NH, weight_VH, labels_N).shape == (0,)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_gradients_go_where_they_are_wanted(trained: tuple[bool, bool]) -> None:
    hidden_NH, weight_VH, labels_N = example(6, 4, 9)
    expected = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, torch.ones(6))
    for tensor, wanted in zip((hidden_NH, weight_VH), trained, strict=True):
        tensor.requires_grad_(wanted)
    logp = label_logprobs(hidden_NH, weight_VH, labels_N)
    assert logp.requires_grad == any(trained)
    if any(trained):
        logp.sum().backward()
    for tensor, wanted, reference in zip((hidden_NH, weight_VH), trained, expected[1:], strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, reference, rtol=0, atol=0)
        else:
            assert tensor.grad is None


def test_cost_in_matrix_products() -> None:
    """One per tile without gradient, two with a frozen head and none in its backward, four with a trained one."""
    hidden_NH, weight_VH, labels_N = example(10, 4, 20)
    tiles = 2 * 4
    with Watch() as watch, torch.no_grad():
        label_logprobs(hidden_NH.requires_grad_(), weight_VH.requires_grad_(), labels_N, chunk_size=5)
    assert watch.products == tiles
    with Watch() as watch:
        label_logprobs(hidden_NH, weight_VH.detach(), labels_N, chunk_size=5).sum().backward()
    assert watch.products == 2 * tiles
    with Watch() as watch:
        label_logprobs(hidden_NH, weight_VH, labels_N, chunk_size=5).sum().backward()
    assert watch.products == 4 * tiles


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("head_trained", [False, True])
def test_logits_are_never_materialised(head_trained: bool, softcap: float | None) -> None:
    count, hidden, vocabulary = 3000, 16, 5000
    hidden_NH, weight_VH, labels_N = example(count, hidden, vocabulary, scale=0.1)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_(head_trained)
    with Watch() as control:
        torch.log_softmax(hidden_NH @ weight_VH.T, dim=-1).gather(1, labels_N[:, None]).sum().backward()
    assert control.largest == count * vocabulary  # the watch sees what it is to see
    with Watch() as watch:
        label_logprobs(hidden_NH, weight_VH, labels_N, softcap=softcap).sum().backward()
    assert watch.largest <= logprob.CPU_TILE[0] * logprob.CPU_TILE[1]
    with Watch() as watch:
        label_logprobs(hidden_NH, weight_VH, labels_N, softcap=softcap, chunk_size=100).sum().backward()
    assert watch.largest <= vocabulary * hidden


def test_autocast_reads_its_type_and_writes_float32() -> None:
    hidden_NH, weight_VH, labels_N = example(20, 16, 70)
    expected = label_logprobs(hidden_NH.bfloat16(), weight_VH.bfloat16(), labels_N)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp = label_logprobs(hidden_NH, weight_VH, labels_N)
        logits = label_logits(hidden_NH, weight_VH, labels_N)
        logp.sum().backward()
    assert (logp.dtype, hidden_NH.grad.dtype, weight_VH.grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(logp, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        logits, label_logits(hidden_NH.bfloat16(), weight_VH.bfloat16(), labels_N), rtol=0, atol=0
    )


def test_mixed_types() -> None:
    """bf16 hidden states through a float32 master copy of the head."""
    hidden_NH, weight_VH, labels_N = example(20, 16, 70)
    hidden_NH = hidden_NH.bfloat16()
    logp, grad_hidden, grad_weight = gradients(label_logprobs, hidden_NH, weight_VH, labels_N, torch.ones(20))
    torch.testing.assert_close(logp, label_logprobs(hidden_NH.float(), weight_VH, labels_N), rtol=0, atol=0)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


def test_second_derivative_raises() -> None:
    hidden_NH, weight_VH, labels_N = example(3, 4, 5)
    hidden_NH.requires_grad_()
    logp = label_logprobs(hidden_NH, weight_VH, labels_N)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(logp.sum(), hidden_NH, create_graph=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_label_logits(softcap: float | None) -> None:
    hidden_NH, weight_VH, labels_N = example(50, 32, 90)
    got = label_logits(hidden_NH.requires_grad_(), weight_VH, labels_N, softcap=softcap)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    expected = oracle.logits(hidden_NH.detach(), weight_VH, softcap)[torch.arange(50), labels_N]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [label_logprobs, label_logits])
@pytest.mark.parametrize(("wrong", "index"), [(5, 2), (-100, 0), (99, 3)])
def test_label_outside_the_vocabulary(function: Any, wrong: int, index: int) -> None:
    hidden_NH, weight_VH, labels_N = example(4, 3, 5)
    labels_N[index] = wrong
    with pytest.raises(UserError, match=rf"label {wrong} at index {index} is outside \[0, 5\)"):
        function(hidden_NH, weight_VH, labels_N)
    assert issubclass(UserError, ValueError)


def test_wrong_arguments() -> None:
    hidden_NH, weight_VH, labels_N = example(4, 3, 5)
    with pytest.raises(UserError, match=r"hidden \(4, 3\), weight \(5, 2\)"):
        label_logprobs(hidden_NH, weight_VH[:, :2], labels_N)
    with pytest.raises(UserError, match=r"labels \(3,\)"):
        label_logprobs(hidden_NH, weight_VH, labels_N[:3])
    with pytest.raises(UserError, match=r"int64 labels; got .* labels torch.int32"):
        label_logprobs(hidden_NH, weight_VH, labels_N.int())
    with pytest.raises(UserError, match="softcap is 0"):
        label_logprobs(hidden_NH, weight_VH, labels_N, softcap=0.0)
    with pytest.raises(UserError, match="chunk_size is 0"):
        label_logprobs(hidden_NH, weight_VH, labels_N, chunk_size=0)
