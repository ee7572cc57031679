"""BatchNorm and dropout per group: a group is a virtual worker, and networks are written for one group.

A worker has whole groups, contiguous on dimension 0. `convert_layers` replaces the classes of the layers in place, so
parameter names do not change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.engine.noise import Noise
from t2idist.nn.fast.batch_norm import batch_norm, needs_exact_sums
from t2idist.nn.fast.torch_internals import BatchNormBase, DropoutBase


class GroupedBatchNorm(BatchNormBase):
    """BatchNorm that normalizes each group of `group_size` samples by its own statistics.

    Running statistics are updated with the mean over the groups. They are linear in the batch statistics, so their
    mean over workers, weighted by share, is what a single worker with all groups would have.
    """

    group_size: int
    """Samples of each group; `nn.blocks.samples_per_group` changes it for a pass."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert input.shape[0] % self.group_size == 0, (
            f"{input.shape[0]} samples are not a multiple of the group size {self.group_size}"
        )
        groups = input.shape[0] // self.group_size
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            if groups == 1:
                return super().forward(input)
            raise ValueError(
                "BatchNorm without running statistics, or with a cumulative average, is not supported in groups"
            )
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if groups == 1 and not needs_exact_sums(input, groups):
            # .data: torch keeps the statistics for a backward, which in training does not read them
            mean, variance = self.running_mean.data, self.running_var.data
            return F.batch_norm(input, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
        out, means, variances = batch_norm(input, self.weight, self.bias, groups, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return out


@contextlib.contextmanager
def track_statistics(net: nn.Module, momentum: float) -> Iterator[None]:
    """Within the context, run the BatchNorm layers of `net` in training mode, with this momentum."""
    norms = [module for module in net.modules() if isinstance(module, BatchNormBase)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, momentum
    try:
        yield
    finally:
        for norm, (training, own_momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, own_momentum


def running_statistics(net: nn.Module) -> list[str]:
    """Return the names of BatchNorm's running means and variances."""
    return [
        f"{name}.{key}" if name else key
        for name, module in net.named_modules()
        if isinstance(module, BatchNormBase)
        for key in ("running_mean", "running_var")
    ]


class GroupedDropout(nn.Dropout):
    """Dropout whose mask is a function of (seed, step, group, position in the group)."""

    noise: Noise

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        keep = self.noise.uniform(*input.shape[1:]) >= self.p
        return input * keep.to(input.dtype) / (1 - self.p)


def convert_layers(net: nn.Module, group_size: int, noise: Noise) -> None:
    """Make every BatchNorm and Dropout layer of a trained network work per group, in place.

    Raises:
        ValueError: a layer couples samples or draws random values in a way that is not supported.
    """
    for name, module in net.named_modules():
        unsupported = nn.SyncBatchNorm | nn.AlphaDropout | DropoutBase
        if isinstance(module, unsupported) and not isinstance(module, nn.Dropout):
            raise ValueError(f"{name}: {type(module).__name__} is not supported in groups; use BatchNorm or Dropout")
        if isinstance(module, nn.RNNBase) and module.dropout > 0:
            raise ValueError(
                f"{name}: dropout inside a recurrent layer has its own random draws; use nn.Dropout around it"
            )
        if isinstance(module, BatchNormBase):
            module.__class__ = GroupedBatchNorm
            module.group_size = group_size  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.__class__ = GroupedDropout
            module.noise = noise  # type: ignore[assignment]
