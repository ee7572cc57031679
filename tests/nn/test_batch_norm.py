"""Grouped batch normalisation: exact sums on CPUs, one operation elsewhere, equal to torch's group by group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.nn.fast import batch_norm as fast
from t2idist.nn.fast.batch_norm import batch_norm

EPS = 1e-5


def inputs(samples: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, size, size, generator=generator) * 2 + 1
    weight, bias = torch.rand(2, channels, generator=generator).add(0.5).unbind()
    return x.to(dtype, memory_format=torch.channels_last), weight, bias


def torch_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, EPS) for part in x.chunk(groups)])


def with_gradients(function: object, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias)]
    out = function(*leaves, groups)  # type: ignore[operator]
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    out.backward(gradient.contiguous(memory_format=torch.channels_last))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def ours(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return batch_norm(x, weight, bias, groups, EPS)[0]


def relative_errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((v.double() - e).abs().max() / e.abs().max()) for v, e in zip(values, exact, strict=True)]


@pytest.mark.parametrize(("samples", "channels", "size", "groups"), [(6, 16, 64, 1), (6, 16, 65, 2), (8, 7, 39, 4)])
def test_values_and_gradients_equal_float64(samples: int, channels: int, size: int, groups: int) -> None:
    x, weight, bias = inputs(samples, channels, size)
    exact = with_gradients(torch_batch_norm, x.double(), weight.double(), bias.double(), groups)
    errors = relative_errors(with_gradients(ours, x, weight, bias, groups), exact)
    assert max(errors) < 2e-6, errors
    _, means, variances = batch_norm(x, weight, bias, groups, EPS)
    parts = [part.double().transpose(0, 1).flatten(1) for part in x.chunk(groups)]
    torch.testing.assert_close(means.double(), torch.stack([part.mean(1) for part in parts]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variances.double(), torch.stack([part.var(1) for part in parts]), rtol=1e-6, atol=0)


def test_twenty_images_of_256_pixels_keep_six_digits_with_any_number_of_threads() -> None:
    x, weight, bias = inputs(20, 8, 256)
    exact = torch.stack([x[:, channel].double().var() for channel in range(8)])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(batch_norm(x, weight, bias, 1, EPS)[2][0].double())
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert float(((result - exact) / exact).abs().max()) < 1e-6
    x, weight, bias = inputs(20, 8, 256, torch.bfloat16)
    exact = torch.stack([x[:, channel].double().var() for channel in range(8)])
    assert float(((batch_norm(x, weight, bias, 1, EPS)[2][0] - exact) / exact).abs().max()) < 1e-6


def test_half_precision_rounds_as_torch_does() -> None:
    x, weight, bias = inputs(8, 16, 64, torch.bfloat16)
    exact = with_gradients(torch_batch_norm, x.double(), weight.double(), bias.double(), 2)
    errors = relative_errors(with_gradients(ours, x, weight, bias, 2), exact)
    torchs = relative_errors(with_gradients(torch_batch_norm, x, weight, bias, 2), exact)
    assert all(ours_ < 2 * theirs + 1e-5 for ours_, theirs in zip(errors, torchs, strict=True)), (errors, torchs)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_operation_for_all_groups_equals_group_by_group(layout: torch.memory_format) -> None:
    x, weight, bias = inputs(6, 5, 4)
    x = x.contiguous(memory_format=layout)
    joined = fast._groups_to_channels(x, 3)
    assert joined.shape == (2, 15, 4, 4) and joined.is_contiguous(memory_format=layout)
    out = F.batch_norm(joined, None, None, weight.repeat(3), bias.repeat(3), True, 0.0, EPS)
    result = fast._channels_to_groups(out, 3)
    assert result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(result, torch_batch_norm(x, weight, bias, 3))
    rows = x.flatten(1)
    assert torch.equal(fast._channels_to_groups(fast._groups_to_channels(rows, 3), 3), rows)


def test_gradient_of_the_gradient() -> None:
    x, weight, bias = inputs(4, 2, 48)
    penalties = []
    for function in (ours, torch_batch_norm):
        leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, scale, bias, 1).pow(3).sum(), leaf, create_graph=True)
        gradient.pow(2).sum().backward()
        penalties.append((leaf.grad, scale.grad))
    for got, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
