"""How a role's network is wrapped: one module whose forward runs any function of the network, inside DDP or bare.

Everything that a step does with a trained network happens inside one entry of the wrapper (`Held`), so several passes,
BatchNorm, sub-modules and gradient penalties are all exact under DDP. (DDP reads its hook's annotations as they stand:
no `from __future__ import annotations` here.)
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from t2idist.engine.world import World


@dataclass(frozen=True)
class Precision:
    """What weights are kept in, and what matrix products run in. The one place that knows autocast."""

    name: str

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "float64" else torch.float32

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.name == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16)
        return contextlib.nullcontext()


class Held(nn.Module):
    """A module whose forward runs ``fn(net, *args)`` under the run's precision."""

    def __init__(self, net: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.precision, self.device = precision, device

    def forward(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.precision.autocast(self.device):
            return fn(self.net, *args, **kwargs)


def wrap(net: nn.Module, precision: Precision, world: World) -> nn.Module:
    """The role's distributed wrapper; enter it once an update."""
    held = Held(net, precision, world.device)
    if world.group is None:
        return held
    wrapped = DistributedDataParallel(
        held,
        process_group=world.group,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=25,
    )
    if world.device.type == "cpu" and world.size > 2:
        wrapped.register_comm_hook(world, _mean_in_rank_order)
    return wrapped


def _mean_in_rank_order(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """The mean of a bucket over workers, each element summed in the order of ranks.

    A ring adds an element's parts in an order that depends on where the element lies in the bucket, and DDP lays its
    buckets out anew after the first step: a resumed run would round differently. Same bytes as a ring.
    """
    gradient = bucket.buffer()
    length = -(-gradient.numel() // world.size)
    padded = torch.nn.functional.pad(gradient, (0, length * world.size - gradient.numel()))
    mine = torch.empty_like(padded)
    dist.all_to_all_single(mine, padded, group=world.group)
    parts = mine.view(world.size, length).unbind()
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    dist.all_gather_single(padded, total.div_(world.size), group=world.group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(padded[: gradient.numel()])
    return done
