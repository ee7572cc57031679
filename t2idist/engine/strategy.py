"""How a role's network is wrapped and updated: one module whose forward runs any function of the network, and Adam.

Everything that a step does with a trained network happens inside one entry of the wrapper (`RoleModule`), so several passes,
BatchNorm, sub-modules and gradient penalties are all exact under DDP and DeepSpeed. Here are the plain worker and DDP;
engine/zero.py is DeepSpeed. (DDP reads its hook's annotations as they stand: no `from __future__ import annotations`
here.)
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adam import adam

from t2idist.contract import Adam, Role
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


class RoleModule(nn.Module):
    """A module whose forward runs ``fn(net, *args)`` under the run's precision."""

    def __init__(self, net: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.precision, self.device = precision, device

    def forward(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.precision.autocast(self.device):
            return fn(self.net, *args, **kwargs)


class Strategy(Protocol):
    """A role's network at work. An update is one `enter`, one `backward` and one `step`."""

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(net, *args)`` inside the distributed wrapper."""
        ...

    def backward(self, loss: Tensor) -> list[Tensor]:
        """Differentiate a scalar; gradients are averaged over workers.

        Gives tensors that are the same on every worker and all finite exactly where every averaged gradient is.
        """
        ...

    def step(self, lr: float, bad: Tensor) -> None:
        """Clip and update the weights; where `bad` (() float32 on the device) is 1, neither they nor moments change."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """``<parameter>/{exp_avg,exp_avg_sq,step}``, whole. May be a collective; `load_optimizer_state` ends what a load begins."""
        ...

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from what was loaded into the network and into the tensors that `moments` gave."""
        ...

    def optimizer_bytes(self) -> int:
        """Bytes of Adam's state that this worker keeps."""
        ...


class DDPStrategy:
    """Every worker holds the whole optimiser: DDP, or the bare network on one worker."""

    def __init__(self, name: str, role: Role, precision: Precision, world: World) -> None:
        self._name, self._role = name, role
        self._trained = trainable_parameters(role.net)
        self._wrapped = wrap_module(role.net, precision, world)
        self._optimizer = make_adam(self._trained.values(), role.optimizer)
        init_optimizer_state(self._optimizer)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(fn, *args, **kwargs)

    def backward(self, loss: Tensor) -> list[Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients: list[Tensor] = []
        for name, parameter in self._trained.items():
            assert parameter.grad is not None, f"{self._name}: {name} got no gradient"
            gradients.append(parameter.grad)
        return gradients

    def step(self, lr: float, bad: Tensor) -> None:
        if self._role.clip_norm is not None:
            clipped = [p for name, p in self._trained.items() if name.startswith(self._role.clip_prefix)]
            nn.utils.clip_grad_norm_(clipped, self._role.clip_norm)
        adam_step(self._optimizer, lr, bad)

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}/{moment}": value
            for name, parameter in self._trained.items()
            for moment, value in self._optimizer.state[parameter].items()
        }

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        """Nothing: they are the live tensors."""

    def optimizer_bytes(self) -> int:
        return state_bytes(self._optimizer)


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def make_adam(parameters: Iterable[Any], settings: Adam) -> torch.optim.Adam:
    """Fused Adam of parameters, or of groups of them, without any state."""
    return torch.optim.Adam(
        parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def init_optimizer_state(optimizer: torch.optim.Adam) -> None:
    """State of zeros, so that it is there, and has a name, before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def adam_step(optimizer: torch.optim.Adam, lr: float, bad: Tensor) -> None:
    """A step of fused Adam, on tensors as they lie in memory: it copies those that are laid out channels last."""
    for group in optimizer.param_groups:
        states = [optimizer.state[parameter] for parameter in group["params"]]
        kinds = [_contiguous(parameter, state) for parameter, state in zip(group["params"], states, strict=True)]
        parameters, gradients, means, squares = (list(column) for column in zip(*kinds, strict=True))
        with torch.no_grad():
            adam(
                parameters,
                gradients,
                means,
                squares,
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=bad,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=lr,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )


def _contiguous(parameter: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The parameter, its gradient and its two moments: contiguous where they lie channels last.

    All in the parameter's layout: on tensors of several, the fused kernel for CPUs silently computes something else.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    tensors = [parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"]]
    assert all(t.stride() == parameter.stride() for t in tensors), "Adam's moments lie as their parameter does"
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return [t.permute(0, 2, 3, 1) for t in tensors]
    return tensors


def state_bytes(optimizer: torch.optim.Adam) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def set_up_step(optimizer: torch.optim.Adam, lr: float, bad: Tensor) -> None:
    """Set what the next step of fused Adam goes by. Where `bad` is 1 it changes nothing, and nobody waits for that."""
    setattr(optimizer, "found_inf", bad)  # noqa: B010 (mypy does not know it)
    for group in optimizer.param_groups:
        group["lr"] = lr


def wrap_module(net: nn.Module, precision: Precision, world: World) -> nn.Module:
    """The role's distributed wrapper; enter it once an update."""
    held = RoleModule(net, precision, world.device)
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
        wrapped.register_comm_hook(world, _average_in_rank_order)
    return wrapped


def _average_in_rank_order(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
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
