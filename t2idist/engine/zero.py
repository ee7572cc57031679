"""DeepSpeed: a role's optimiser state (ZeRO 1), and gradients (ZeRO 2), divided among the workers. The only file on it.

The mathematics is DDP's: same gradients, clipping, Adam and skipped updates, to float32 rounding. Weights stay whole on
every worker, so frozen use, averages and exports work as under DDP. What DeepSpeed cannot do exactly is refused, by the
config: stage 3 (gradient penalties fail, and no worker has a whole network) and float64 (its weights are float32). Its
own bf16 stays off; `RoleModule` is the one place of autocast. On one worker there is nothing to divide: the trainer then
takes the plain engine.

Attributes are read that DeepSpeed does not promise, hence one pinned version (config.DEEPSPEED).
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t2idist.contract import Role
from t2idist.engine.strategy import (Precision, RoleModule, init_optimizer_state, make_adam, set_up_step, state_bytes, trainable_parameters)
from t2idist.engine.world import World

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""Gradients are averaged so many at a time: 25 MiB, as under DDP."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _ParameterSlice:
    """Where a parameter lies: which flat group of DeepSpeed's, from which element."""

    name: str
    shape: torch.Size
    group: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


class ZeroStrategy:
    """A role's network in a DeepSpeed engine; implements `strategy.Engine`.

    name: the role's. stage: 1 or 2. Parameters under the role's clipping make the first group, all others the next, so
    that the clipped norm is one group's.
    """

    def __init__(self, name: str, role: Role, precision: Precision, world: World, stage: int) -> None:
        self._name, self._clip_norm, self._world = name, role.clip_norm, world
        role.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # DeepSpeed flattens weights
        self._trained = trainable_parameters(role.net)
        for key, parameter in role.net.named_parameters():
            if parameter.dim() == 0 or parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name}: '{key}' is {tuple(parameter.shape)} {parameter.dtype}; DeepSpeed takes float32 of at "
                    "least one dimension: use strategy: ddp"
                )
        prefix = role.clip_prefix if role.clip_norm is not None else ""
        groups = [
            [parameter for key, parameter in self._trained.items() if key.startswith(prefix) is clipped]
            for clipped in (True, False)
        ]
        assert groups[0], f"{name}: no parameter begins with the clip_prefix '{prefix}'"
        self._adam = make_adam([{"params": group} for group in groups if group], role.optimizer)
        self._engine = _initialize_deepspeed(RoleModule(role.net, precision, world.device), self._adam, world, stage)
        self._zero = self._engine.optimizer
        init_optimizer_state(self._adam)
        self._places = self._find()
        self._norms = torch.zeros(len(self._adam.param_groups), dtype=torch.float64, device=world.device)
        self._order = _FixedReductionOrder(self._zero) if stage == 2 else None
        self._reached: set[str] = set()
        hooks = [
            parameter.register_post_accumulate_grad_hook(_recorder(self._reached, key))  # type: ignore[no-untyped-call]
            for key, parameter in self._trained.items()
        ]
        weakref.finalize(self, _remove_hooks, [*hooks, *self._zero._grad_acc_hooks]).atexit = False

    def _find(self) -> list[_ParameterSlice]:
        names = {id(parameter): key for key, parameter in self._trained.items()}
        return [
            _ParameterSlice(names[id(parameter)], parameter.shape, group, start)
            for group, parameters in enumerate(self._zero.round_robin_bit16_groups)
            for parameter, start in zip(parameters, self._zero.round_robin_bit16_offsets[group], strict=True)
        ]

    # -------------------------------------------------------------------------------------------- updates
    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._engine(fn, *args, **kwargs)

    def backward(self, loss: Tensor) -> list[Tensor]:
        """Give the norm of each group's averaged gradients, the same on every worker."""
        self._reached.clear()
        if self._order is not None:
            self._order.begin()
        self._engine.backward(loss)
        for key in self._trained:
            assert key in self._reached, f"{self._name}: {key} got no gradient"
        squares = [
            torch.stack(torch._foreach_norm(self._gradients(group))).double().square().sum()
            for group in range(len(self._adam.param_groups))
        ]
        self._norms = self._world.sum(torch.stack(squares)).sqrt()
        return [self._norms]

    def step(self, lr: float, bad: Tensor) -> None:
        if self._clip_norm is not None:
            factor = (self._clip_norm / (self._norms[0] + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self._gradients(0), factor.float())
        set_up_step(self._adam, lr, bad)
        self._engine.step()

    def _gradients(self, group: int) -> list[Tensor]:
        """This worker's part of a group's averaged gradients, between backward and step."""
        return list(self._zero.averaged_gradients[group])

    # -------------------------------------------------------------------------------------------- state by name
    def moments(self) -> dict[str, Tensor]:
        """Gathered from all workers: tensors that live as long as the caller holds them."""
        whole = [self._gather(group) for group in range(len(self._adam.param_groups))]
        found: dict[str, Tensor] = {}
        for place in self._places:
            found[f"{place.name}/step"] = self._state(place.group)["step"].clone()
            for moment in MOMENTS:
                found[f"{place.name}/{moment}"] = whole[place.group][moment][place.start : place.end].view(place.shape)
        return found

    def load_optimizer_state(self, moments: Mapping[str, Tensor]) -> None:
        """Take this worker's part of the moments, and DeepSpeed's own copy of the weights, from what was loaded."""
        self._zero.refresh_fp32_params()
        steps = {float(moments[f"{place.name}/step"]) for place in self._places}
        if len(steps) != 1:
            raise ValueError(f"{self._name}: parameters took {sorted(steps)} steps; DeepSpeed counts one for all")
        (count,) = steps
        for place in self._places:
            state = self._state(place.group)
            state["step"].fill_(count)
            first = self._world.rank * state[MOMENTS[0]].numel()
            last = first + state[MOMENTS[0]].numel()
            start, end = max(place.start, first), min(place.end, last)
            if start < end:
                for moment in MOMENTS:
                    loaded = moments[f"{place.name}/{moment}"].flatten()[start - place.start : end - place.start]
                    state[moment][start - first : end - first].copy_(loaded)

    def optimizer_bytes(self) -> int:
        """Adam's only; DeepSpeed keeps a copy of this worker's part of the weights too, half as many bytes."""
        return state_bytes(self._adam)

    def _state(self, group: int) -> dict[str, Tensor]:
        """Adam's state of this worker's part of a group."""
        (part,) = self._adam.param_groups[group]["params"]
        state: dict[str, Tensor] = self._adam.state[part]
        return state

    def _gather(self, group: int) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for moment in MOMENTS:
            part = self._state(group)[moment]
            whole[moment] = part.new_empty(part.numel() * self._world.size)
            dist.all_gather_single(whole[moment], part, group=self._world.group)
        return whole


def _recorder(reached: set[str], key: str) -> Callable[[Tensor], None]:
    return lambda _: reached.add(key)


def _remove_hooks(hooks: Sequence[RemovableHandle]) -> None:
    """Take all hooks off: through them a parameter and its engine would hold each other in memory for ever."""
    for hook in hooks:
        hook.remove()


class _FixedReductionOrder:
    """Lets ZeRO 2 average gradients in one order on all workers: the last parameter's first.

    By itself it takes them in the order in which a worker's backward gives them. Where workers' graphs differ (another
    number of groups, captions of other lengths) so does the order, and then gradients of unlike parameters are
    averaged, without an error.
    """

    def __init__(self, zero: Any) -> None:
        groups = enumerate(zero.bit16_groups)
        self._all = [(parameter, group) for group, parameters in groups for parameter in parameters][::-1]
        self._zero, self._take = zero, zero.process_gradients
        self._ready: set[int] = set()
        self._taken = 0
        zero.process_gradients = self._process

    def begin(self) -> None:
        """A backward begins."""
        self._ready.clear()
        self._taken = 0
        self._zero.setup_buckets()

    def _process(self, parameter: nn.Parameter, group: int) -> None:
        self._ready.add(id(parameter))
        while self._taken < len(self._all) and id(self._all[self._taken][0]) in self._ready:
            self._take(*self._all[self._taken])
            self._taken += 1


class _DataParallelUnit:
    """The workers as DeepSpeed asks for them: one data-parallel group, no other kind of division."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._world.group

    def get_data_parallel_world_size(self) -> int:
        return self._world.size

    def get_data_parallel_rank(self) -> int:
        return self._world.rank

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _initialize_deepspeed(held: nn.Module, adam: torch.optim.Adam, world: World, stage: int) -> Any:
    """A DeepSpeed engine that averages gradients and divides Adam's state, and does nothing else."""
    deepspeed = _import_deepspeed(world.device)
    elements = sum(parameter.numel() for group in adam.param_groups for parameter in group["params"])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # where it is left out, DeepSpeed clips at 1
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it waits for the device at every step
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(elements, BUCKET_ELEMENTS),  # allocated whole at every backward
            "overlap_comm": False,
            "compute_grad_norm": False,  # it waits for the device, and knows one norm of all parameters only
        },
    }
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it there; device_rank is what counts
    engine, *_ = deepspeed.initialize(
        args=SimpleNamespace(device_rank=world.device.index or 0),
        model=held,
        optimizer=adam,
        mpu=_DataParallelUnit(world),
        dist_init_required=False,
        config=settings,
    )
    return engine


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this kind of device, without its minutes of compiling and its lines of progress."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's own call warns at every step
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    module: ModuleType = deepspeed
    return module
