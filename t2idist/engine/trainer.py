"""The trainer: a system's roles with their optimizers and EMA networks, and the engine that a system's step sees.

`Trainer` implements `contract.Train`: `run_step` calls ``system.step(batch, train)`` with the trainer as `train`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from t2idist.contract import Batch, Frozen, Role, System
from t2idist.engine.ema import Average
from t2idist.engine.groups import convert_layers, track_statistics
from t2idist.engine.guard import Guard
from t2idist.engine.memory import GroupMemory
from t2idist.engine.micro_batches import MicroBatches
from t2idist.engine.networks import for_evaluation, frozen_parameters, select_networks
from t2idist.engine.noise import Noise
from t2idist.engine.reports import GRADIENTS, StepReports
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.engine.step_graphs import Inputs, Recorder, StepGraphs
from t2idist.engine.strategy import DDPStrategy, Precision, Strategy, loss_with_gradients
from t2idist.engine.world import Share, World, weighted_mean
from t2idist.engine.zero import ZeroStrategy
from t2idist.nn.fast.layers import clear_cached_casts, use_fast_layers

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class _RoleState:
    """A role while it is trained."""

    role: Role
    strategy: Strategy
    ema: nn.Module | None
    average: Average | None = None
    """Made in the first update: the guard moves the buffers before."""
    in_update: bool = False
    """Whether `forward` was called and `apply` was not yet."""
    ema_forward: Callable[[nn.Module], Any] | None = None
    """The step's forward, to repeat with the EMA network so that its BatchNorm statistics follow."""


class Trainer:
    """Runs a system's steps on one worker. Implements `contract.Train`.

    - `decide` evaluates rules on the number of the step. `memory` holds what groups keep from step to step.
    - `forward` runs a function of a role's network inside its distributed wrapper; `apply` runs backward, clipping, the
      optimizer step and the EMA; `update` is both. Each role has one forward, then one apply, at a time.
    - `frozen` yields bare networks without gradients to their weights.
    - `noise` and `report` draw values and log scalars.

    All other methods are for the loop, for checkpoints and for exports.

    Args:
        stage: name of the stage; with `seed` it seeds the noise.
        group_size: samples in a group; the global batch is `share.groups` of them.
        share: the groups that this worker runs.
        zero: 0 for DDP; 1 or 2 for this ZeRO stage of DeepSpeed, if there are several workers.
        gradients: dtype in which DDP sends gradients between the workers, if it is less exact than they are.
        micro_batch_groups: groups that a worker computes at once (None: all).
        recorder: records steps as graphs, if this is the only worker and computes all groups at once.
    """

    def __init__(
        self,
        system: System,
        *,
        stage: str,
        seed: int,
        group_size: int,
        share: Share,
        world: World,
        precision: Precision,
        zero: int = 0,
        gradients: torch.dtype = torch.float32,
        micro_batch_groups: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._gradients = gradients
        self.system, self.world, self.share, self.precision, self.zero = system, world, share, precision, zero
        self.group_size = group_size
        self.step = 0
        self._momentum = 0.0
        self.noise_source = Noise(seed, stage, share.lanes, group_size, world.device, precision.weights)
        self._frozen = {name: self._start_frozen(frozen) for name, frozen in system.frozen.items()}
        self._role_states = {name: self._start_role(name, role) for name, role in system.roles.items()}
        self._memory = GroupMemory(system, share.lanes, world.device, precision.weights)
        nets = [net for _, net in self._nets_with_state()]
        self.guard = Guard(nets, world.device)
        self._micro_batches: MicroBatches | None = None
        if micro_batch_groups is not None and micro_batch_groups < share.largest:  # on all workers alike
            self._micro_batches = MicroBatches(self, micro_batch_groups, nets)
        self.reports = StepReports()
        self._noted: Inputs | None = None
        self._numbers: Iterator[Tensor] | None = None
        self._launched = False
        self.graphs = self._record_steps(recorder) if recorder is not None else None
        """None: every step is launched."""

    # -------------------------------------------------------------------------------------------- set-up
    def _record_steps(self, recorder: Recorder) -> StepGraphs | None:
        if self.world.group is not None:
            reason = f"it has {self.world.size} workers"
        elif self._micro_batches is not None:
            reason = "its groups are computed in parts"
        else:
            return StepGraphs(self, recorder)
        if self.world.is_main:
            logger.info("stage %s runs without CUDA graphs: %s", self.noise_source.stage, reason)
        return None

    def _prepare(self, net: nn.Module) -> nn.Module:
        return use_fast_layers(net.to(self.world.device, self.precision.weights))

    def _start_frozen(self, frozen: Frozen) -> nn.Module:
        net = self._prepare(frozen.net).train(frozen.train_mode).requires_grad_(False)
        if frozen.train_mode:
            convert_layers(net, self.group_size, self.noise_source)
        return net

    def _start_role(self, name: str, role: Role) -> _RoleState:
        self._prepare(role.net).train()
        convert_layers(role.net, self.group_size, self.noise_source)
        ema = None
        if role.ema_half_life_images is not None:
            ema = copy.deepcopy(role.net).eval().requires_grad_(False)
        return _RoleState(role, self._make_strategy(name, role), ema)

    def _make_strategy(self, name: str, role: Role) -> Strategy:
        if self.zero and self.world.group is not None:
            return ZeroStrategy(name, role, self.precision, self.world, self.zero)
        return DDPStrategy(name, role, self.precision, self.world, self._gradients)

    # -------------------------------------------------------------------------------------------- contract.Train
    @property
    def images(self) -> int:
        """Images seen by the run, over all workers."""
        return self.step * self.group_size * self.share.groups

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(net, *args, **kwargs)`` inside the role's distributed wrapper (`Train.forward`)."""
        state = self._role_states[role]
        assert not state.in_update, f"{role}: a second forward before apply"
        state.in_update = True
        if self.has_ema_statistics(role) and self._momentum:
            state.ema_forward = lambda net: fn(net, *args, **kwargs)
        return state.strategy.run(fn, *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
        """Update the role by a scalar loss: backward, clipping, optimizer step, EMA (`Train.apply`).

        If the loss or an averaged gradient is not finite on any worker, no weight and no moment changes.
        """
        state = self._role_states[role]
        assert state.in_update, f"{role}: apply without forward"
        state.in_update = False
        self._apply(role, self.scale_loss(role, loss))

    def _apply(self, role: str, scaled: Tensor) -> None:
        state = self._role_states[role]
        found_inf, norm = self.guard.check(state.strategy.backward(scaled))
        self.reports.add(self.step, f"{GRADIENTS}{role}", norm)
        optimizer = state.role.optimizer
        lr = self._number(lambda: optimizer.lr * lr_factor(optimizer.schedule, self.images))
        state.strategy.step(lr, found_inf)
        clear_cached_casts(state.role.net)
        if state.ema is not None:
            copies = state.role.ema_copies_statistics
            state.average = state.average or Average(state.ema, state.role.net, copies_statistics=copies)
            weight = self._number(lambda: 1 - self._ema_decay(state.role))
            state.average.update(weight, with_statistics=not self._momentum)

    def _ema_decay(self, role: Role) -> float:
        half_life, images_per_step = role.ema_half_life_images, self.group_size * self.share.groups
        assert half_life is not None
        return ema_decay(half_life, images_per_step, self.images, role.ema_rampup)

    def update(self, role: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """`forward` of a function that returns the loss, then `apply` (`Train.update`); return the detached loss."""
        loss: Tensor = self.forward(role, fn, *args, **kwargs)
        self.apply(role, loss)
        return loss.detach()

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        """Yield bare networks, without gradients to their weights, under autocast (`Train.frozen`)."""
        nets = self._select(names)
        with frozen_parameters(nets), self.precision.autocast(self.world.device):
            yield nets[0] if len(nets) == 1 else tuple(nets)

    def _select(self, names: Sequence[str]) -> list[nn.Module]:
        return select_networks(names, self._frozen, {name: s.role.net for name, s in self._role_states.items()})

    def noise(self, *shape: int) -> Tensor:
        """Draw (N, *shape) standard normal values, the same whatever the number of workers (`Train.noise`)."""
        return self.noise_source.normal(*shape)

    def memory(self, name: str) -> Tensor:
        """Return a tensor (groups, *shape) of the groups in turn, to write in place (`Train.memory`)."""
        return self._memory.of(name, self.noise_source.lanes)

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar; `reduce_reports` averages it (`Train.report`)."""
        self.reports.add(self.step, name, value)

    def decide(self, rule: Callable[[int, int], T]) -> T:
        """Return ``rule(step, images)`` (`Train.decide`)."""
        result = rule(self.step, self.images)
        if self._noted is not None:
            self._noted.decisions.append((rule, result))
        return result

    # -------------------------------------------------------------------------------------------- for recorded steps
    def _number(self, value: Callable[[], float]) -> float | Tensor:
        """Return a number that differs from step to step; in a recorded step, a tensor that holds it."""
        if self._noted is not None:
            self._noted.numbers.append(value)
        return value() if self._numbers is None else next(self._numbers)

    @contextlib.contextmanager
    def noting(self, inputs: Inputs) -> Iterator[None]:
        """Within the context, note what a step asks for."""
        self._noted, self.noise_source.noted = inputs, inputs.draws
        try:
            yield
        finally:
            self._noted, self.noise_source.noted = None, None

    @contextlib.contextmanager
    def given(self, noise: Sequence[Tensor], numbers: Tensor) -> Iterator[None]:
        """Within the context, a step gets these tensors in place of its draws and numbers."""
        self._numbers, self.noise_source.given = iter(numbers.unbind()), noise
        try:
            yield
        finally:
            self._numbers, self.noise_source.given = None, None

    def drop_casts(self) -> None:
        """Forget the copies of weights in the precision of the computation that launched steps have left."""
        if self._launched:
            self._launched = False
            for state in self._role_states.values():
                clear_cached_casts(state.role.net)

    def abandon_step(self) -> None:
        """Forget a step that ended with an error."""
        for state in self._role_states.values():
            state.in_update, state.ema_forward = False, None

    # -------------------------------------------------------------------------------------------- for micro-batches
    def role_network(self, role: str) -> nn.Module:
        """Return the network of a role."""
        return self._role_states[role].role.net

    def run_unwrapped(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(net, *args, **kwargs)`` as `forward` does, but outside the role's distributed wrapper."""
        with self.precision.autocast(self.world.device):
            return fn(self.role_network(role), *args, **kwargs)

    def scale_loss(self, role: str, loss: Tensor, fraction: float = 1.0) -> Tensor:
        """Return the loss to differentiate: weighted by this worker's share, and by a fraction of its groups."""
        assert loss.dim() == 0, f"{role}: the loss has shape {tuple(loss.shape)}; it must be a scalar"
        return self.guard.scale_loss(loss, self.share.weight * fraction)

    def apply_gradients(self, role: str, gradients: Sequence[Tensor]) -> None:
        """Update a role as `apply` does, by this worker's gradients of its trainable parameters."""
        self._apply(role, self._role_states[role].strategy.run(loss_with_gradients, gradients))

    def has_ema_statistics(self, role: str) -> bool:
        """Return whether a role's EMA network has BatchNorm statistics of its own."""
        state = self._role_states[role]
        return state.ema is not None and not state.role.ema_copies_statistics

    @contextlib.contextmanager
    def ema_network(self, role: str, momentum: float) -> Iterator[nn.Module]:
        """Yield a role's EMA network, to repeat a forward that moves its BatchNorm statistics."""
        ema = self._role_states[role].ema
        assert ema is not None
        with torch.no_grad(), self.precision.autocast(self.world.device), track_statistics(ema, momentum):
            yield ema

    # -------------------------------------------------------------------------------------------- for the loop
    def run_step(self, batch: Any, momentum: float = 0.0) -> None:
        """Run one step of the system on a host batch.

        Args:
            momentum: if not 0, the EMA networks repeat the step's forward, and their BatchNorm statistics move by this
                momentum. If 0, their statistics are averages of the live networks' statistics.
        """
        self._momentum = momentum
        on_device = batch.to(self.world.device, self.precision.weights)
        if self.graphs is not None and not momentum:
            self.graphs.run_step(on_device)
        else:
            self.launch_step(on_device)
        self.step += 1

    def launch_step(self, batch: Batch) -> None:
        """Run the operations of one step on a batch on the device."""
        self._launched = True
        self.noise_source.start(self.step)
        self.guard.start_step()
        if self._micro_batches is not None:
            self._micro_batches.run_step(batch, self._momentum)
        else:
            self._run_at_once(batch, self._momentum)
        self.guard.end_step()

    def _run_at_once(self, batch: Any, momentum: float) -> None:
        self.system.step(batch, self)
        pending = [name for name, state in self._role_states.items() if state.in_update]
        assert not pending, f"{pending}: forward without apply"
        for name, state in self._role_states.items():
            if state.ema_forward is not None:
                with self.ema_network(name, momentum) as ema:
                    state.ema_forward(ema)
                state.ema_forward = None

    def reduce_reports(self) -> dict[str, float]:
        """Average the reports since the last call, over steps and, weighted by share, over workers. A collective."""
        return self.reports.reduce(self.world, self.share)

    def evaluation_nets(self) -> dict[str, nn.Module]:
        """Copy the networks to export or to evaluate: EMA weights if the role has an EMA, averaged buffers, eval mode.

        A collective. Keys are the last parts of the names in the system's `exports`.
        """
        buffers, nets = self.averaged_buffers(), dict[str, nn.Module]()
        for name in self.system.exports:
            if name in self._frozen:
                net = self._frozen[name]
                nets[name] = for_evaluation(net, f"{name}/frozen/", buffers) if net.training else net
                continue
            role, _, part = name.partition(".")
            state = self._role_states[role]
            kind, source = ("net", state.role.net) if state.ema is None else ("ema", state.ema)
            net = for_evaluation(source, f"{role}/{kind}/", buffers)
            nets[part.rpartition(".")[2] or role] = net.get_submodule(part)
        return nets

    def close(self) -> None:
        """Release the memory of recorded steps, which refer to this trainer."""
        self.graphs = None

    # -------------------------------------------------------------------------------------------- state by name
    def _nets_with_state(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the networks whose buffers a step may write, with the prefix of their names in the state."""
        for name, state in self._role_states.items():
            yield f"{name}/net/", state.role.net
            if state.ema is not None:
                yield f"{name}/ema/", state.ema
        for name, frozen in self.system.frozen.items():
            if frozen.train_mode:
                yield f"{name}/frozen/", self._frozen[name]

    def _float_buffers(self) -> dict[str, Tensor]:
        return {
            f"{prefix}{key}": buffer
            for prefix, net in self._nets_with_state()
            for key, buffer in net.named_buffers()
            if buffer.is_floating_point()
        }

    def averaged_buffers(self) -> dict[str, Tensor]:
        """Average the floating buffers over workers by share: what one worker would have. A collective."""
        return weighted_mean(self._float_buffers(), self.world, self.share)

    def state(self) -> dict[str, Tensor]:
        """Return the whole training state by name. To load a state, write into these tensors, then call `finish_load`.

        Names are ``<role>/net/<name>``, ``<role>/ema/<name>``, ``<role>/adam/<parameter>/{exp_avg,exp_avg_sq,step}``,
        ``<network>/frozen/<buffer>`` of frozen networks in train mode and, for this worker's groups,
        ``memory/<group>/<name>``.
        The tensors are live; under DeepSpeed the moments are gathered from all workers, a collective.
        """
        tensors: dict[str, Tensor] = {}
        for prefix, net in self._nets_with_state():
            values = dict(net.named_buffers()) if prefix.endswith("/frozen/") else net.state_dict()
            tensors |= {f"{prefix}{key}": value for key, value in values.items()}
        for name, state in self._role_states.items():
            tensors |= {f"{name}/adam/{key}": value for key, value in state.strategy.optimizer_state().items()}
        return tensors | self._memory.state()

    def finish_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what was loaded into the tensors that `state` returned."""
        for name, state in self._role_states.items():
            prefix = f"{name}/adam/"
            state.strategy.load_optimizer_state(
                {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            )
            clear_cached_casts(state.role.net)

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on this worker."""
        return sum(each.strategy.optimizer_bytes() for each in self._role_states.values())

    def local_buffers(self) -> dict[str, Tensor]:
        """Return this worker's own floating buffers by name, so that the same number of workers resumes bitwise."""
        if self.world.size == 1:
            return {}
        prefix = f"local/{self.world.rank}_of_{self.world.size}"
        return {f"{prefix}/{key}": buffer for key, buffer in self._float_buffers().items()}
