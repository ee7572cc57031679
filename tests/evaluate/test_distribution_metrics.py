"""Metrics compared with torch-fidelity and with values of the published code, and their edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2idist.evaluate.distribution_metrics import bootstrap_error, fid, inception_score, kid, precision_recall


def random_features(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + shift


def test_fid_equals_torch_fidelity(fidelity: None) -> None:
    from torch_fidelity import metric_fid

    for n, dim in ((500, 32), (40, 64)):  # with fewer images than dimensions the covariance is singular
        real, fake = random_features(n, dim, 1), random_features(n, dim, 2, shift=0.3)
        statistics = [metric_fid.fid_features_to_statistics(x) for x in (real, fake)]
        theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert fid(real, fake) == pytest.approx(theirs, rel=1e-3)
        assert abs(fid(real, real)) < 1e-6 * theirs


def test_kid_equals_torch_fidelity(fidelity: None) -> None:
    from torch_fidelity import metric_kid

    real, fake = random_features(300, 16, 1), random_features(300, 16, 2, shift=0.2)
    theirs = metric_kid.kid_features_to_metric(real, fake, kid_subsets=3, kid_subset_size=300, verbose=False)
    ours = kid(real, fake, seed=5, subsets=3, subset_size=300)  # the subset is the whole set
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    subsets = kid(real, fake, seed=5, subsets=50, subset_size=100)
    assert subsets.mean == pytest.approx(ours.mean, abs=3 * subsets.std / 50**0.5 + 0.1 * ours.mean) and subsets.std > 0
    with pytest.raises(ValueError, match="KID of subsets of 1000: 300 real and 300 generated images"):
        kid(real, fake, seed=5)


def test_inception_score_has_the_known_values(fidelity: None) -> None:
    from torch_fidelity import metric_isc

    torch.manual_seed(0)
    logits = torch.randn(1000, 10)
    ours = inception_score(logits)
    assert (ours.mean, ours.std) == (pytest.approx(1.4683613, abs=1e-6), pytest.approx(0.0258873, abs=1e-6))
    assert inception_score(logits, splits=1).mean == pytest.approx(1.4759283, abs=1e-6)
    theirs = metric_isc.isc_features_to_metric(logits, 10, shuffle=False)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert inception_score(torch.eye(10).repeat(100, 1) * 1e4).mean == pytest.approx(
        10.0
    )  # certain predictions of every class
    assert inception_score(torch.zeros(100, 10)).mean == pytest.approx(1.0)
    by_class = torch.eye(10).repeat_interleave(100, dim=0) * 1e4
    assert inception_score(by_class).mean == pytest.approx(1.0)  # every split has one class
    assert inception_score(by_class, order=torch.randperm(1000)).mean > 9
    with pytest.raises(ValueError, match="10 splits: 9 images"):
        inception_score(torch.zeros(9, 10))


def test_precision_and_recall_equal_torch_fidelity(fidelity: None) -> None:
    from torch_fidelity import metric_prc

    real, fake = random_features(2000, 6, 1), random_features(1500, 6, 1, shift=0.5)
    result = precision_recall(real, fake, k=3)
    precision, recall = metric_prc.calculate_precision_recall_part(fake, real, 3)
    assert (result.precision, result.recall) == (pytest.approx(precision, abs=2e-3), pytest.approx(recall, abs=2e-3))
    same = precision_recall(real, real.clone())
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0) and same.density == pytest.approx(1, abs=0.3)
    far = precision_recall(real, real + 1e3)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    collapsed = precision_recall(real, real[:1] + 1e-6 * torch.randn(1500, 6))
    assert collapsed.precision == 1.0 and collapsed.recall < 0.01 and collapsed.coverage < 0.02
    with pytest.raises(ValueError, match="by 5 neighbours: 5 real and 9 generated images"):
        precision_recall(real[:5], real[:9])


def test_bootstrap_error_of_a_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = bootstrap_error(lambda rows: float(values[rows].mean()), 400, seed=1, times=300)
    assert error == pytest.approx(float(values.std()) / 20, rel=0.15)
    assert error == bootstrap_error(lambda rows: float(values[rows].mean()), 400, seed=1, times=300)
