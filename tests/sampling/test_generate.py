"""Noise sources of generated images."""

from __future__ import annotations

import math

import pytest
import torch

from t2idist.sampling.generate import FixedFirstNoise, GaussianNoise, InterpolatedNoise
from tests.sampling.conftest import ROUNDING

CPU = torch.device("cpu")


def test_noise_depends_on_seed_position_and_call_only() -> None:
    whole, part = GaussianNoise(3, range(6), CPU), GaussianNoise(3, [4, 1], CPU)
    first, second = whole(2, 5), whole(2, 5)
    assert first.shape == (6, 2, 5) and not torch.equal(first, second)
    assert torch.equal(part(2, 5), first[[4, 1]]) and torch.equal(part(2, 5), second[[4, 1]])
    assert not torch.equal(GaussianNoise(4, range(6), CPU)(2, 5), first)
    many = GaussianNoise(0, range(2000), CPU)(4)
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


@pytest.mark.parametrize("truncation", [0.02, 0.5, 1.0, 2.0])
def test_truncation_redraws_only_values_out_of_bounds(truncation: float) -> None:
    plain, truncated = GaussianNoise(3, range(8), CPU), GaussianNoise(3, range(8), CPU, truncation=truncation)
    for _ in range(2):
        whole, values = plain(5, 40), truncated(5, 40)
        assert values.abs().max() <= truncation
        inside = whole.abs() <= truncation
        assert torch.equal(values[inside], whole[inside]) and not inside.all()
    assert torch.equal(
        GaussianNoise(3, [4, 1], CPU, truncation=truncation)(7),
        GaussianNoise(3, range(8), CPU, truncation=truncation)(7)[[4, 1]],
    )


def test_truncated_noise_has_the_standard_deviation_of_the_truncated_normal() -> None:
    values = GaussianNoise(0, range(400), CPU, truncation=1.0)(50)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert float(values.std()) == pytest.approx(math.sqrt(1 - 2 * density / math.erf(math.sqrt(0.5))), rel=0.02)
    assert abs(float(values.mean())) < 0.02


def test_interpolated_noise_has_the_right_ends_and_middle_in_every_call() -> None:
    fractions = [0.0, 0.25, 0.5, 1.0]
    start, end = GaussianNoise(3, [0] * 4, CPU), GaussianNoise(3, [1] * 4, CPU)
    interpolated, part = InterpolatedNoise(start, end, fractions), InterpolatedNoise(start, end, fractions)[1:3]
    for call in range(2):
        first, second = (GaussianNoise(3, [position], CPU) for position in (0, 1))
        for _ in range(call):
            first(6), second(6)
        (a,), (b,) = first(6), second(6)
        rows = interpolated(6)
        assert torch.equal(rows[0], a) and torch.allclose(rows[3], b, rtol=0, atol=ROUNDING)
        assert torch.allclose(rows[2], (a + b) / math.sqrt(2), atol=ROUNDING)
        assert torch.equal(part(6), rows[1:3])
    many = InterpolatedNoise(GaussianNoise(0, [0], CPU), GaussianNoise(0, [1], CPU), [0.3])(20000)
    assert float(many.std()) == pytest.approx(1, rel=0.03)  # linear interpolation would give less


def test_fixed_first_noise_replaces_only_the_first_call() -> None:
    code = torch.arange(8.0).view(2, 4)
    rest = GaussianNoise(3, [5, 6], CPU)
    rest(4)
    draw = FixedFirstNoise(code, GaussianNoise(3, [5, 6], CPU))
    assert torch.equal(draw(4), code) and torch.equal(draw(7), rest(7))
    assert torch.equal(draw[1:](4), code[1:])
    with pytest.raises(AssertionError, match=r"fixed noise \(2, 4\), needed \(2, 3\)"):
        draw[:](3)
