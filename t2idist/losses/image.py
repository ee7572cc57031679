"""Losses of pictures and of the conditioning Gaussian."""

from __future__ import annotations

from torch import Tensor

from t2idist.nn.precision import upcast, no_autocast


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), mean over samples and dimensions (N, D).

    StackGAN, section 3.2, which sums over dimensions; the released code of the whole family takes the mean.
    """
    mean, log_variance = upcast(mean), upcast(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def colour_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, 3) and covariance (N, 3, 3) of the pixels of each picture (N, 3, H, W)."""
    with no_autocast(images):
        pixels = upcast(images).flatten(2)
        mean = pixels.mean(dim=2, keepdim=True)
        centred = pixels - mean
        return mean.squeeze(2), centred @ centred.transpose(1, 2) / pixels.shape[2]


def colour_consistency(high: Tensor, low: Tensor, compat: str = "") -> Tensor:
    """StackGAN++'s colour-consistency of two branches (section 4.3, eq. 7), mean over samples.

    Squared distance of the mean colours plus 5 times the squared Frobenius distance of their covariances; pictures
    (N, 3, H, W) of any two sizes. compat "authors": means instead of sums (3 and 9 times smaller), and no gradient to
    the lower branch.
    """
    high_mean, high_covariance = colour_statistics(high)
    low_mean, low_covariance = colour_statistics(low.detach() if compat == "authors" else low)
    means = (high_mean - low_mean).square()
    covariances = (high_covariance - low_covariance).square()
    if compat == "authors":
        return means.mean() + 5 * covariances.mean()
    return means.sum(1).mean() + 5 * covariances.sum((1, 2)).mean()
