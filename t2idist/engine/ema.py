"""The exponential moving average of a role's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from t2idist.engine.groups import running_statistics
from t2idist.nn.fast.torch_internals import foreach_add, foreach_add_, foreach_copy_, foreach_lerp_, foreach_mul_


class Average:
    """ema <- decay * ema + (1 - decay) * net, for parameters and floating buffers; all other buffers are copied.

    Tensors of both networks must then be written in place only: they are looked up once.

    Args:
        copies_statistics: whether to copy BatchNorm's running statistics too, instead of averaging them.
    """

    def __init__(self, ema: nn.Module, net: nn.Module, *, copies_statistics: bool = False) -> None:
        averages, values = ema.state_dict(), net.state_dict()
        statistics = set(running_statistics(ema))
        kept = statistics if copies_statistics else set()
        floating = [name for name, value in averages.items() if value.is_floating_point() and name not in kept]
        self._averaged = _pairs(averages, values, floating)
        self._without_statistics = _pairs(averages, values, [name for name in floating if name not in statistics])
        self._copied = _pairs(averages, values, [name for name in averages if name not in set(floating)])

    def update(self, weight: float | Tensor, *, with_statistics: bool) -> None:
        """Move the average.

        Args:
            weight: of the present values; a number, or () on the device.
            with_statistics: whether to average BatchNorm's running statistics too.
        """
        with torch.no_grad():
            averages, values = self._averaged if with_statistics else self._without_statistics
            if isinstance(weight, Tensor):  # torch has no lerp of lists with one weight for all
                steps = foreach_add(values, averages, alpha=-1)
                foreach_mul_(steps, weight)
                foreach_add_(averages, steps)
            else:
                foreach_lerp_(averages, values, weight)
            if self._copied[0]:
                foreach_copy_(*self._copied)


def _pairs(
    averages: Mapping[str, Tensor], values: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    return [averages[name] for name in names], [values[name] for name in names]
