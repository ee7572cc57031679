"""Strategies: how a role's network is wrapped for distributed training and updated by Adam.

All that a step does with a trained network happens inside one forward of the wrapper (`RoleModule`), which runs any
function of the network. So several passes, BatchNorm, sub-modules and gradient penalties are exact under DDP and
DeepSpeed. This file has the single worker and DDP; engine/zero.py has DeepSpeed.
"""

# no `from __future__ import annotations`: DDP checks the annotations of its communication hook, and takes no strings

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adam import adam

from t2idist.contract import Adam, Role
from t2idist.engine.kernels import multiplies_bfloat16
from t2idist.engine.world import World


@dataclass(frozen=True)
class Precision:
    """The precision of a run. The only user of autocast."""

    name: str
    """float32, float64, or bfloat16 (float32 weights, matrix products in bfloat16)."""

    @classmethod
    def of(cls, name: str, device: torch.device) -> Self:
        """Return a precision by its name in a configuration: "auto" is what the device computes fast."""
        fast = "bfloat16" if multiplies_bfloat16(device) else "float32"
        return cls(fast if name == "auto" else name)

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
    """Trains a role's network. An update is one `run`, one `backward` and one `step`."""

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(net, *args)`` inside the distributed wrapper."""
        ...

    def backward(self, loss: Tensor) -> list[Tensor]:
        """Compute gradients of a scalar loss and average them over the workers.

        Returns:
            Tensors that are equal on every worker, and all finite if and only if every averaged gradient is.
        """
        ...

    def step(self, lr: float | Tensor, found_inf: Tensor) -> None:
        """Clip the gradients and update the weights.

        Args:
            found_inf: () float32 on the device. If it is 1, weights and optimizer state do not change.
        """
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return Adam's whole state as ``<parameter>/{exp_avg,exp_avg_sq,step}``. May be a collective.

        To load a state, write into these tensors, then call `load_optimizer_state`.
        """
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what was loaded into the network and into the tensors that `optimizer_state` returned."""
        ...

    def optimizer_bytes(self) -> int:
        """Return the bytes of Adam's state on this worker."""
        ...


class DDPStrategy:
    """Keeps the whole optimizer on every worker: DDP, or the bare network on a single worker."""

    def __init__(
        self, name: str, role: Role, precision: Precision, world: World, gradients: torch.dtype = torch.float32
    ) -> None:
        self._name, self._role = name, role
        self._trained = trainable_parameters(role.net)
        self._wrapped = wrap_module(role.net, precision, world, gradients)
        self._optimizer = make_adam(self._trained.values(), role.optimizer)
        init_optimizer_state(self._optimizer)
        self._adam = FusedAdam(self._optimizer)

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

    def step(self, lr: float | Tensor, found_inf: Tensor) -> None:
        if self._role.clip_norm is not None:
            clipped = [p for name, p in self._trained.items() if name.startswith(self._role.clip_prefix)]
            nn.utils.clip_grad_norm_(clipped, self._role.clip_norm)
        self._adam.step(lr, found_inf)

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self._trained.items()
            for key, value in self._optimizer.state[parameter].items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: `optimizer_state` returned the optimizer's own tensors."""

    def optimizer_bytes(self) -> int:
        return state_bytes(self._optimizer)


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


class _GivenGradients(torch.autograd.Function):
    """Zero, with given gradients for its inputs."""

    @staticmethod
    def forward(ctx: Any, gradients: Iterable[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *ctx.gradients


def loss_with_gradients(net: nn.Module, gradients: Iterable[Tensor]) -> Tensor:
    """Return a loss whose gradients of the trainable parameters are the given ones."""
    loss: Tensor = _GivenGradients.apply(gradients, *trainable_parameters(net).values())  # type: ignore[no-untyped-call]
    return loss


def make_adam(parameters: Iterable[Any], settings: Adam) -> torch.optim.Adam:
    """Create fused Adam over parameters or parameter groups, without state."""
    return torch.optim.Adam(
        parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def init_optimizer_state(optimizer: torch.optim.Adam) -> None:
    """Create zero state for every parameter, so that it exists under its name before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class FusedAdam:
    """Steps of fused Adam on views in memory order: the kernel would copy channels-last tensors.

    Parameters and state must exist, and must then be written in place only: their views are made once.
    """

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        self._groups: list[tuple[dict[str, Any], list[list[Tensor]]]] = []
        for group in optimizer.param_groups:
            rows = []
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                tensors = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
                # with mixed layouts the fused CPU kernel silently computes wrong values
                assert all(t.stride() == parameter.stride() for t in tensors), (
                    "Adam's moments must have their parameter's layout"
                )
                rows.append([*(_in_memory_order(t, parameter) for t in tensors), state["step"]])
            self._groups.append((group, [list(column) for column in zip(*rows, strict=True)]))

    def step(self, lr: float | Tensor, found_inf: Tensor) -> None:
        """Update the parameters by their gradients.

        Args:
            found_inf: () float32. If it is 1, nothing changes.
        """
        for group, (parameters, means, squares, steps) in self._groups:
            with torch.no_grad():
                adam(
                    parameters,
                    [_gradient(parameter) for parameter in group["params"]],
                    means,
                    squares,
                    [],
                    steps,
                    fused=True,
                    found_inf=found_inf,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=lr,
                    weight_decay=0.0,
                    eps=group["eps"],
                    maximize=False,
                )


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter in its layout, as a contiguous view."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return _in_memory_order(gradient, parameter)


def _in_memory_order(tensor: Tensor, parameter: Tensor) -> Tensor:
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def state_bytes(optimizer: torch.optim.Adam) -> int:
    """Return the size of an optimizer's state."""
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def set_up_step(optimizer: torch.optim.Adam, lr: float | Tensor, found_inf: Tensor) -> None:
    """Set the learning rate and `found_inf` for the next step of fused Adam.

    If `found_inf` is 1, the step is skipped on the device, without a host sync.
    """
    setattr(optimizer, "found_inf", found_inf)  # noqa: B010 (mypy does not know it)
    for group in optimizer.param_groups:
        group["lr"] = lr


def wrap_module(
    net: nn.Module, precision: Precision, world: World, gradients: torch.dtype = torch.float32
) -> nn.Module:
    """Wrap a role's network for this world; call its forward once an update.

    Args:
        gradients: dtype in which gradients travel between the workers, if it is less exact than they are.
    """
    module = RoleModule(net, precision, world.device)
    if world.group is None:
        return module
    wrapped = DistributedDataParallel(
        module,
        process_group=world.group,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=25,
    )
    half = gradients == torch.bfloat16
    if world.device.type == "cpu" and (world.size > 2 or half):
        wrapped.register_comm_hook(world, _average_half_in_rank_order if half else _average_in_rank_order)
    elif half:
        wrapped.register_comm_hook(world.group, bf16_compress_hook)
    return wrapped


def _average_in_rank_order(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average a bucket over the workers, adding the summands of each element in rank order.

    A ring all-reduce adds them in an order that depends on the element's position in the bucket, and DDP rebuilds its
    buckets after the first step, so a resumed run would round differently. This sends as many bytes as a ring.
    """
    gradient = bucket.buffer()
    return _done(_rank_order_mean(world, gradient, gradient.dtype))


def _average_half_in_rank_order(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Do as `_average_in_rank_order`, with gradients that travel in bfloat16; they are added in their own dtype."""
    return _done(_rank_order_mean(world, bucket.buffer(), torch.bfloat16))


def _rank_order_mean(world: World, gradient: Tensor, sent: torch.dtype) -> Tensor:
    length = -(-gradient.numel() // world.size)
    padded = torch.nn.functional.pad(gradient.to(sent), (0, length * world.size - gradient.numel()))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded, group=world.group)
    parts = received.view(world.size, length).unbind()
    total = parts[0].to(gradient.dtype, copy=True)
    for part in parts[1:]:
        total += part
    dist.all_gather_single(padded, total.div_(world.size).to(sent), group=world.group)
    return padded[: gradient.numel()].to(gradient.dtype)


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(result)
    return done
