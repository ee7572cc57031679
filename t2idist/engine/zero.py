"""DeepSpeed: partition a role's optimizer state (ZeRO 1) and gradients (ZeRO 2) over the workers.

The only file that imports DeepSpeed. The mathematics is DDP's: the same gradients, clipping, Adam and skipped updates,
to float32 rounding. Weights stay whole on every worker, so frozen networks, EMA and exports work as under DDP. The
config refuses what DeepSpeed cannot do exactly: stage 3 (gradient penalties fail, and no worker has a whole network)
and float64 (its weights are float32). DeepSpeed's own bf16 stays off; `RoleModule` applies autocast. On a single worker
there is nothing to partition, and the trainer uses `DDPStrategy`.

This file reads private attributes of DeepSpeed, hence one pinned version (config.DEEPSPEED).
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
from t2idist.engine.strategy import (
    Precision,
    RoleModule,
    init_optimizer_state,
    make_adam,
    set_up_step,
    state_bytes,
    trainable_parameters,
)
from t2idist.engine.world import World
from t2idist.nn.fast.torch_internals import foreach_mul_, foreach_norm

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""Elements of a gradient bucket: 25 MiB, as under DDP."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _ParameterSlice:
    """The position of a parameter in one of DeepSpeed's flat parameter groups."""

    name: str
    shape: torch.Size
    group: int
    start: int
    """First element in the group."""

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


class ZeroStrategy:
    """Trains a role's network in a DeepSpeed engine; implements `strategy.Strategy`.

    The parameters that are clipped form the first parameter group, all others the second, so that the norm to clip is
    that of one group.

    Args:
        name: name of the role, for messages.
        stage: ZeRO stage, 1 or 2.
    """

    def __init__(self, name: str, role: Role, precision: Precision, world: World, stage: int) -> None:
        self._name, self._clip_norm, self._world = name, role.clip_norm, world
        role.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # DeepSpeed flattens weights
        self._trained = trainable_parameters(role.net)
        for key, parameter in role.net.named_parameters():
            if parameter.dim() == 0 or parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name}: '{key}' is {tuple(parameter.shape)} {parameter.dtype}; DeepSpeed takes only float32 "
                    "of at least one dimension: use strategy: ddp"
                )
        prefix = role.clip_prefix if role.clip_norm is not None else ""
        groups = [
            [parameter for key, parameter in self._trained.items() if key.startswith(prefix) is clipped]
            for clipped in (True, False)
        ]
        assert groups[0], f"{name}: no parameter name begins with the clip_prefix '{prefix}'"
        self._adam = make_adam([{"params": group} for group in groups if group], role.optimizer)
        self._engine = _initialize_deepspeed(RoleModule(role.net, precision, world.device), self._adam, world, stage)
        self._zero = self._engine.optimizer
        init_optimizer_state(self._adam)
        self._slices = self._parameter_slices()
        self._norms = torch.zeros(len(self._adam.param_groups), dtype=torch.float64, device=world.device)
        self._reduction_order = _FixedReductionOrder(self._zero) if stage == 2 else None
        self._got_grad: set[str] = set()
        hooks = [
            parameter.register_post_accumulate_grad_hook(_recorder(self._got_grad, key))  # type: ignore[no-untyped-call]
            for key, parameter in self._trained.items()
        ]
        weakref.finalize(self, _remove_hooks, [*hooks, *self._zero._grad_acc_hooks]).atexit = False

    def _parameter_slices(self) -> list[_ParameterSlice]:
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
        """Compute and average the gradients; return one tensor with the norm of each parameter group."""
        self._got_grad.clear()
        if self._reduction_order is not None:
            self._reduction_order.start_backward()
        self._engine.backward(loss)
        for key in self._trained:
            assert key in self._got_grad, f"{self._name}: {key} got no gradient"
        squares = [
            torch.stack(foreach_norm(self._gradients(group))).double().square().sum()
            for group in range(len(self._adam.param_groups))
        ]
        self._norms = self._world.sum(torch.stack(squares)).sqrt()
        return [self._norms]

    def step(self, lr: float | Tensor, found_inf: Tensor) -> None:
        if self._clip_norm is not None:
            factor = (self._clip_norm / (self._norms[0] + 1e-6)).clamp(max=1.0)
            foreach_mul_(self._gradients(0), factor.float())
        set_up_step(self._adam, lr, found_inf)
        self._engine.step()

    def _gradients(self, group: int) -> list[Tensor]:
        """Return this worker's partition of a group's averaged gradients, between backward and step."""
        return list(self._zero.averaged_gradients[group])

    # -------------------------------------------------------------------------------------------- state by name
    def optimizer_state(self) -> dict[str, Tensor]:
        """Gather the state from all workers, into new tensors."""
        whole = [self._gather(group) for group in range(len(self._adam.param_groups))]
        tensors: dict[str, Tensor] = {}
        for part in self._slices:
            tensors[f"{part.name}/step"] = self._partition_state(part.group)["step"].clone()
            for moment in MOMENTS:
                tensors[f"{part.name}/{moment}"] = whole[part.group][moment][part.start : part.end].view(part.shape)
        return tensors

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy this worker's partition of the loaded state, and refresh DeepSpeed's float32 copy of the weights."""
        self._zero.refresh_fp32_params()
        steps = {float(state[f"{part.name}/step"]) for part in self._slices}
        if len(steps) != 1:
            raise ValueError(f"{self._name}: parameters took {sorted(steps)} steps; DeepSpeed has one count for all")
        (count,) = steps
        for part in self._slices:
            own = self._partition_state(part.group)
            own["step"].fill_(count)
            first = self._world.rank * own[MOMENTS[0]].numel()
            last = first + own[MOMENTS[0]].numel()
            start, end = max(part.start, first), min(part.end, last)
            if start < end:
                for moment in MOMENTS:
                    loaded = state[f"{part.name}/{moment}"].flatten()[start - part.start : end - part.start]
                    own[moment][start - first : end - first].copy_(loaded)

    def optimizer_bytes(self) -> int:
        """Return the bytes of Adam's state on this worker.

        DeepSpeed also keeps a copy of this worker's partition of the weights, of half that size.
        """
        return state_bytes(self._adam)

    def _partition_state(self, group: int) -> dict[str, Tensor]:
        """Return Adam's state of this worker's partition of a group."""
        (partition,) = self._adam.param_groups[group]["params"]
        state: dict[str, Tensor] = self._adam.state[partition]
        return state

    def _gather(self, group: int) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for moment in MOMENTS:
            own = self._partition_state(group)[moment]
            whole[moment] = own.new_empty(own.numel() * self._world.size)
            dist.all_gather_single(whole[moment], own, group=self._world.group)
        return whole


def _recorder(keys: set[str], key: str) -> Callable[[Tensor], None]:
    return lambda _: keys.add(key)


def _remove_hooks(hooks: Sequence[RemovableHandle]) -> None:
    """Remove all hooks: through them a parameter and its engine would keep each other in memory."""
    for hook in hooks:
        hook.remove()


class _FixedReductionOrder:
    """Makes ZeRO 2 reduce gradients in the same order on all workers, from the last parameter to the first.

    DeepSpeed reduces them in the order of a worker's backward. If the workers' graphs differ (other numbers of groups,
    captions of other lengths), so does that order, and DeepSpeed silently averages gradients of different parameters.
    """

    def __init__(self, zero: Any) -> None:
        groups = enumerate(zero.bit16_groups)
        self._ordered = [(parameter, group) for group, parameters in groups for parameter in parameters][::-1]
        self._zero, self._reduce = zero, zero.process_gradients
        self._ready: set[int] = set()
        self._reduced = 0
        zero.process_gradients = self._process

    def start_backward(self) -> None:
        self._ready.clear()
        self._reduced = 0
        self._zero.setup_buckets()

    def _process(self, parameter: nn.Parameter, group: int) -> None:
        self._ready.add(id(parameter))
        while self._reduced < len(self._ordered) and id(self._ordered[self._reduced][0]) in self._ready:
            self._reduce(*self._ordered[self._reduced])
            self._reduced += 1


class _DataParallelUnit:
    """DeepSpeed's `mpu` interface for one data-parallel group without model parallelism."""

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


def _initialize_deepspeed(module: nn.Module, adam: torch.optim.Adam, world: World, stage: int) -> Any:
    """Create a DeepSpeed engine that averages gradients and partitions Adam's state, and does nothing else."""
    deepspeed = _import_deepspeed(world.device)
    elements = sum(parameter.numel() for group in adam.param_groups for parameter in group["params"])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # else it syncs the device in every step
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(elements, BUCKET_ELEMENTS),  # allocated whole at every backward
            "overlap_comm": False,
            "compute_grad_norm": False,  # it syncs the device, and computes only one norm of all parameters
        },
    }
    os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed, which then uses device_rank
    engine, *_ = deepspeed.initialize(
        args=SimpleNamespace(device_rank=world.device.index or 0),
        model=module,
        optimizer=adam,
        mpu=_DataParallelUnit(world),
        dist_init_required=False,
        config=settings,
    )
    return engine


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this type of device, without compiling its extensions for minutes, and without its log."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    # a call inside DeepSpeed warns at every step
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    module: ModuleType = deepspeed
    return module
