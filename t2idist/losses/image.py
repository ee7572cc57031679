"""Losses of images and of the conditioning Gaussian."""

from __future__ import annotations

from torch import Tensor

from t2idist.nn.precision import no_autocast, upcast


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), mean over samples and dimensions (N, D).

    StackGAN (section 3.2) sums over dimensions; the released code of all these systems takes the mean.
    """
    mean, log_variance = upcast(mean), upcast(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def colour_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, 3) and covariance (N, 3, 3) of the pixels of each image (N, 3, H, W)."""
    with no_autocast(images):
        pixels = upcast(images).flatten(2)
        mean = pixels.mean(dim=2, keepdim=True)
        centred = pixels - mean
        return mean.squeeze(2), centred @ centred.transpose(1, 2) / pixels.shape[2]


def colour_consistency(high: Tensor, low: Tensor, compat: str = "") -> Tensor:
    """Colour-consistency loss of two branches of StackGAN++ (section 4.3, eq. 7), mean over samples.

    The squared distance of the mean colours plus 5 times the squared Frobenius distance of the colour covariances.

    Args:
        high: (N, 3, H, W) of the higher branch.
        low: (N, 3, H', W') of the lower branch.
        compat: "authors" takes means instead of sums (3 and 9 times smaller) and passes no gradient to `low`.
    """
    high_mean, high_covariance = colour_statistics(high)
    low_mean, low_covariance = colour_statistics(low.detach() if compat == "authors" else low)
    means = (high_mean - low_mean).square()
    covariances = (high_covariance - low_covariance).square()
    if compat == "authors":
        return means.mean() + 5 * covariances.mean()
    return means.sum(1).mean() + 5 * covariances.sum((1, 2)).mean()
