"""The trainer: a system's roles with their optimisers and averages, and `contract.Train` over them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.contract import Role, System
from t2idist.engine.groups import convert_layers, running_statistics, track_statistics
from t2idist.engine.guard import Guard
from t2idist.engine.noise import Noise
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.engine.strategy import DDPStrategy, Precision, Strategy
from t2idist.engine.world import Share, World, weighted_mean
from t2idist.engine.zero import ZeroStrategy
from t2idist.nn.fast.layers import clear_cached_casts, use_fast_layers

GRADIENTS = "gradients of "
"""Begins the name under which the norm of a role's gradients stands among the reports where it is not finite..."""
NORM = "norm/"
"""...and where it is."""


@dataclass
class _RoleState:
    """A role at work."""

    role: Role
    engine: Strategy
    ema: nn.Module | None
    entered: bool = False
    again: Callable[[nn.Module], Any] | None = None


class Trainer:
    """Runs a system's steps on one worker; implements `contract.Train`.

    group_size x groups is the global batch; `share` says which groups this worker runs. zero: 1 or 2: DeepSpeed's
    stage, where there are several workers; 0: DDP.
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
    ) -> None:
        self.system, self.world, self.share, self.precision, self.zero = system, world, share, precision, zero
        self.group_size = group_size
        self.step = 0
        self._momentum = 0.0
        self.noise_source = Noise(seed, stage, share.lanes, group_size, world.device, precision.weights)
        self._frozen = {name: self._place(f.net).eval().requires_grad_(False) for name, f in system.frozen.items()}
        self._live = {name: self._start(name, role) for name, role in system.roles.items()}
        nets = [net for live in self._live.values() for net in (live.role.net, live.ema) if net is not None]
        self.guard = Guard(nets, world.device)
        self._reports: list[tuple[int, str, Tensor]] = []
        self.first_bad = ""

    # -------------------------------------------------------------------------------------------- set-up
    def _place(self, net: nn.Module) -> nn.Module:
        return use_fast_layers(net.to(self.world.device, self.precision.weights))

    def _start(self, name: str, role: Role) -> _RoleState:
        self._place(role.net).train()
        convert_layers(role.net, self.group_size, self.noise_source)
        ema = None
        if role.ema_half_life_images is not None:
            ema = copy.deepcopy(role.net).eval().requires_grad_(False)
        return _RoleState(role, self._engine(name, role), ema)

    def _engine(self, name: str, role: Role) -> Strategy:
        if self.zero and self.world.group is not None:
            return ZeroStrategy(name, role, self.precision, self.world, self.zero)
        return DDPStrategy(name, role, self.precision, self.world)

    # -------------------------------------------------------------------------------------------- contract.Train
    @property
    def images(self) -> int:
        return self.step * self.group_size * self.share.groups

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        live = self._live[role]
        assert not live.entered, f"{role}: a second forward before apply"
        live.entered = True
        if live.ema is not None and self._momentum:
            live.again = lambda net: fn(net, *args, **kwargs)
        return live.engine.run(fn, *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
        live = self._live[role]
        assert live.entered, f"{role}: apply without forward"
        assert loss.dim() == 0, f"{role}: the loss has shape {tuple(loss.shape)}; it must be a scalar"
        live.entered = False
        bad, norm = self.guard.check(live.engine.backward(self.guard.weigh(loss, self.share.weight)))
        self._reports.append((self.step, f"{GRADIENTS}{role}", norm))
        live.engine.step(live.role.optimizer.lr * lr_factor(live.role.optimizer.schedule, self.images), bad)
        clear_cached_casts(live.role.net)
        if live.ema is not None:
            assert live.role.ema_half_life_images is not None
            keep = ema_decay(live.role.ema_half_life_images, self.group_size * self.share.groups)
            _update_ema(live.ema, live.role.net, keep, statistics=not self._momentum)

    def update(self, role: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = self.forward(role, fn, *args, **kwargs)
        self.apply(role, loss)
        detached: Tensor = loss.detach()
        return detached

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        nets = self._bare(names)
        with frozen_parameters(nets), self.precision.autocast(self.world.device):
            yield nets[0] if len(nets) == 1 else tuple(nets)

    def _bare(self, names: Sequence[str]) -> list[nn.Module]:
        """Frozen networks, and the live ones that ``role`` or ``role.part`` names."""
        return select_networks(names, self._frozen, {name: live.role.net for name, live in self._live.items()})

    def noise(self, *shape: int) -> Tensor:
        return self.noise_source.normal(*shape)

    def report(self, name: str, value: Tensor) -> None:
        self._reports.append((self.step, name, value.detach()))

    # -------------------------------------------------------------------------------------------- for the loop
    def run_step(self, batch: Any, momentum: float = 0.0) -> None:
        """One step of the system on a host batch.

        momentum: by how much the BatchNorm statistics of averaged networks move to what these networks themselves see
        in this step (0: they are averages of the live networks' statistics, which are those of other weights).
        """
        self._momentum = momentum
        self.noise_source.start(self.step)
        self.guard.start_step()
        self.system.step(batch.to(self.world.device, self.precision.weights), self)
        pending = [name for name, live in self._live.items() if live.entered]
        assert not pending, f"{pending}: forward without apply"
        for live in self._live.values():
            if live.ema is not None and live.again is not None:
                with torch.no_grad(), self.precision.autocast(self.world.device), track_statistics(live.ema, momentum):
                    live.again(live.ema)
                live.again = None
        self.guard.end_step()
        self.step += 1

    def reduce_reports(self) -> dict[str, float]:
        """Means of what was reported since the last call, over steps and, by share, over workers. A collective.

        With "norm/<role>", the 2-norm of the role's averaged gradients before they are clipped. Values that are not
        finite are left out; `first_bad` names those of the first step that had any.
        """
        reports, self._reports = self._reports, []
        values = torch.stack([value.double() for _, _, value in reports]).tolist() if reports else []
        finite: dict[str, list[float]] = {}
        bad: list[tuple[int, bool, str]] = []
        for (step, name, _), value in zip(reports, values, strict=True):
            if not math.isfinite(value):
                bad.append((step, name.startswith(GRADIENTS), name))
            else:
                finite.setdefault(name.replace(GRADIENTS, NORM, 1), []).append(value)
        mine = {name: math.fsum(of_name) / len(of_name) for name, of_name in finite.items()}
        parts = self.world.all_gather_object(
            (self.share.fraction, mine, [entry for entry in bad if entry[0] == bad[0][0]])
        )
        firsts = sorted({entry for part in parts for entry in part[2]})
        if firsts:
            step = firsts[0][0]
            self.first_bad = ", ".join(name for at, _, name in firsts if at == step) + f" in step {step}"
        names = dict.fromkeys(name for _, means, _ in parts for name in means)
        return {name: _mean([(share, means[name]) for share, means, _ in parts if name in means]) for name in names}

    def evaluation_nets(self) -> dict[str, nn.Module]:
        """Copies of the networks to export or to look at: EMA where a role has it, settled buffers, eval mode.

        A collective. Keys are the system's `exports`, each by the last part of its name.
        """
        settled = self.settled_buffers()
        nets: dict[str, nn.Module] = {}
        for name in self.system.exports:
            if name in self._frozen:
                nets[name] = self._frozen[name]
                continue
            role, _, part = name.partition(".")
            live = self._live[role]
            kind, source = ("net", live.role.net) if live.ema is None else ("ema", live.ema)
            whole = copy.deepcopy(source).eval().requires_grad_(False)
            prefix = f"{role}/{kind}/"
            own = {k.removeprefix(prefix): v for k, v in settled.items() if k.startswith(prefix)}
            whole.load_state_dict(own, strict=False)
            nets[part.rpartition(".")[2] or role] = whole.get_submodule(part)
        return nets

    # -------------------------------------------------------------------------------------------- state by name
    def _float_buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}/{kind}/{key}": buffer
            for name, live in self._live.items()
            for kind, net in (("net", live.role.net), ("ema", live.ema))
            if net is not None
            for key, buffer in net.named_buffers()
            if buffer.is_floating_point()
        }

    def settled_buffers(self) -> dict[str, Tensor]:
        """Floating buffers' means over workers by share: what one worker with all groups would hold. A collective."""
        return weighted_mean(self._float_buffers(), self.world, self.share)

    def state(self) -> dict[str, Tensor]:
        """The whole training state by name: load into these tensors, then call `finish_load`.

        ``<role>/net/<name>``, ``<role>/ema/<name>``, ``<role>/adam/<parameter>/{exp_avg,exp_avg_sq,step}``. Live
        tensors; under DeepSpeed the moments are gathered from all workers, a collective.
        """
        tensors: dict[str, Tensor] = {}
        for name, live in self._live.items():
            tensors |= {f"{name}/net/{key}": value for key, value in live.role.net.state_dict().items()}
            if live.ema is not None:
                tensors |= {f"{name}/ema/{key}": value for key, value in live.ema.state_dict().items()}
            tensors |= {f"{name}/adam/{key}": value for key, value in live.engine.moments().items()}
        return tensors

    def finish_load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was loaded into the tensors that `state` gave."""
        for name, live in self._live.items():
            prefix = f"{name}/adam/"
            live.engine.load_optimizer_state(
                {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            )
            clear_cached_casts(live.role.net)

    def optimizer_bytes(self) -> int:
        """Bytes of optimiser state that this worker keeps."""
        return sum(live.engine.optimizer_bytes() for live in self._live.values())

    def own_buffers(self) -> dict[str, Tensor]:
        """This worker's own floating buffers, for a resume at the same number of workers that is bitwise the same."""
        if self.world.size == 1:
            return {}
        place = f"local/{self.world.rank}_of_{self.world.size}"
        return {f"{place}/{key}": buffer for key, buffer in self._float_buffers().items()}


def select_networks(
    names: Sequence[str], frozen: Mapping[str, nn.Module], live: Mapping[str, nn.Module]
) -> list[nn.Module]:
    """Networks by name: a frozen one's, else ``role`` or ``role.part`` of the live ones."""
    found = []
    for name in names:
        role, _, part = name.partition(".")
        found.append(frozen[name] if name in frozen else live[role].get_submodule(part))
    return found


@contextlib.contextmanager
def frozen_parameters(nets: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, no gradient goes to the weights of these networks."""
    weights = [p for net in nets for p in net.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _mean(weighted: list[tuple[float, float]]) -> float:
    return math.fsum(weight * value for weight, value in weighted) / math.fsum(weight for weight, _ in weighted)


def _update_ema(ema: nn.Module, net: nn.Module, keep: float, *, statistics: bool) -> None:
    """ema <- keep * ema + (1 - keep) * net, for parameters and floating buffers; other buffers are copied.

    statistics: whether those of BatchNorm are among them.
    """
    with torch.no_grad():
        theirs, ours = ema.state_dict(), net.state_dict()
        kept = set() if statistics else set(running_statistics(ema))
        floating = [key for key, value in theirs.items() if value.is_floating_point() and key not in kept]
        torch._foreach_lerp_([theirs[k] for k in floating], [ours[k] for k in floating], 1 - keep)
        for key in theirs.keys() - set(floating) - kept:
            theirs[key].copy_(ours[key])
