"""The trainer: a system's roles with their optimisers and averages, and `contract.Train` over them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2idist.contract import Adam, Role, System
from t2idist.engine.groups import convert
from t2idist.engine.guard import Guard
from t2idist.engine.noise import Noise
from t2idist.engine.schedule import ema_decay, factor
from t2idist.engine.strategy import Precision, wrap
from t2idist.engine.world import Share, World, mean_by_share

GRADIENTS = "gradients of "
"""Begins the name under which a role's flag of non-finite gradients stands among the reports."""


@dataclass
class _Live:
    """A role at work."""

    role: Role
    wrapped: nn.Module
    optimizer: torch.optim.Adam
    ema: nn.Module | None
    entered: bool = False


class Trainer:
    """Runs a system's steps on one worker; implements `contract.Train`.

    group_size x groups is the global batch; `share` says which groups this worker runs.
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
    ) -> None:
        self.system, self.world, self.share, self.precision = system, world, share, precision
        self.group_size = group_size
        self.step = 0
        self.noise_source = Noise(seed, stage, share.lanes, group_size, world.device, precision.weights)
        self._frozen = {name: self._place(f.net).eval().requires_grad_(False) for name, f in system.frozen.items()}
        self._live = {name: self._start(role) for name, role in system.roles.items()}
        trained = [live.role.net for live in self._live.values()]
        self.guard = Guard(trained, world.device)
        self._reports: list[tuple[int, str, Tensor]] = []
        self.first_bad = ""

    # -------------------------------------------------------------------------------------------- set-up
    def _place(self, net: nn.Module) -> nn.Module:
        return net.to(self.world.device, self.precision.weights)

    def _start(self, role: Role) -> _Live:
        self._place(role.net).train()
        convert(role.net, self.group_size, self.noise_source)
        ema = None
        if role.ema_half_life_images is not None:
            ema = copy.deepcopy(role.net).eval().requires_grad_(False)
        trained = [p for p in role.net.parameters() if p.requires_grad]
        return _Live(role, wrap(role.net, self.precision, self.world), _adam(trained, role.optimizer), ema)

    # -------------------------------------------------------------------------------------------- contract.Train
    @property
    def images(self) -> int:
        return self.step * self.group_size * self.share.groups

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        live = self._live[role]
        assert not live.entered, f"{role}: a second forward before apply"
        live.entered = True
        return live.wrapped(fn, *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
        live = self._live[role]
        assert live.entered, f"{role}: apply without forward"
        assert loss.dim() == 0, f"{role}: the loss has shape {tuple(loss.shape)}; it must be a scalar"
        live.entered = False
        live.optimizer.zero_grad(set_to_none=True)
        self.guard.weigh(loss, self.share.weight).backward()  # type: ignore[no-untyped-call]
        for name, parameter in live.role.net.named_parameters():
            assert parameter.grad is not None or not parameter.requires_grad, f"{role}: {name} got no gradient"
        gradients = [p.grad for p in live.role.net.parameters() if p.grad is not None]
        bad = self.guard.check(gradients)
        setattr(live.optimizer, "found_inf", bad)  # noqa: B010 (mypy does not know it): fused Adam then changes nothing
        self._reports.append((self.step, f"{GRADIENTS}{role}", torch.where(bad > 0, torch.nan, 0.0)))
        self._clip(live.role)
        for group in live.optimizer.param_groups:
            group["lr"] = live.role.optimizer.lr * factor(live.role.optimizer.schedule, self.images)
        live.optimizer.step()
        if live.ema is not None:
            assert live.role.ema_half_life_images is not None
            keep = ema_decay(live.role.ema_half_life_images, self.group_size * self.share.groups)
            _average(live.ema, live.role.net, keep)

    def update(self, role: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = self.forward(role, fn, *args, **kwargs)
        self.apply(role, loss)
        detached: Tensor = loss.detach()
        return detached

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        nets = [self._frozen[n] if n in self._frozen else self._bare(n) for n in names]
        weights = [p for net in nets for p in net.parameters() if p.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            with self.precision.autocast(self.world.device):
                yield nets[0] if len(nets) == 1 else tuple(nets)
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    def _bare(self, name: str) -> nn.Module:
        """The live network that ``role`` or ``role.part`` names."""
        role, _, part = name.partition(".")
        return self._live[role].role.net.get_submodule(part)

    def noise(self, *shape: int) -> Tensor:
        return self.noise_source.normal(*shape)

    def report(self, name: str, value: Tensor) -> None:
        self._reports.append((self.step, name, value.detach()))

    # -------------------------------------------------------------------------------------------- for the loop
    def run_step(self, batch: Any) -> None:
        """One step of the system on a host batch."""
        self.noise_source.start(self.step)
        self.guard.start_step()
        self.system.step(batch.to(self.world.device, self.precision.weights), self)
        pending = [name for name, live in self._live.items() if live.entered]
        assert not pending, f"{pending}: forward without apply"
        self.guard.end_step()
        self.step += 1

    def take_reports(self) -> dict[str, float]:
        """Means of what was reported since the last call, over steps and, by share, over workers. A collective.

        Values that are not finite are left out; `first_bad` names those of the first step that had any.
        """
        reports, self._reports = self._reports, []
        values = torch.stack([value.double() for _, _, value in reports]).tolist() if reports else []
        finite: dict[str, list[float]] = {}
        bad: list[tuple[int, bool, str]] = []
        for (step, name, _), value in zip(reports, values, strict=True):
            if not math.isfinite(value):
                bad.append((step, name.startswith(GRADIENTS), name))
            elif not name.startswith(GRADIENTS):
                finite.setdefault(name, []).append(value)
        mine = {name: math.fsum(of_name) / len(of_name) for name, of_name in finite.items()}
        parts = self.world.gather((self.share.fraction, mine, [entry for entry in bad if entry[0] == bad[0][0]]))
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

    def _clip(self, role: Role) -> None:
        if role.clip_norm is not None:
            clipped = [p for n, p in role.net.named_parameters() if n.startswith(role.clip_prefix) and p.requires_grad]
            nn.utils.clip_grad_norm_(clipped, role.clip_norm)

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
        return mean_by_share(self._float_buffers(), self.world, self.share)

    def state(self) -> dict[str, Tensor]:
        """The whole training state by name: live tensors, so that loading into them restores the trainer.

        ``<role>/net/<name>``, ``<role>/ema/<name>``, ``<role>/adam/<parameter>/{exp_avg,exp_avg_sq,step}``.
        """
        tensors: dict[str, Tensor] = {}
        for name, live in self._live.items():
            tensors |= {f"{name}/net/{key}": value for key, value in live.role.net.state_dict().items()}
            if live.ema is not None:
                tensors |= {f"{name}/ema/{key}": value for key, value in live.ema.state_dict().items()}
            for key, parameter in live.role.net.named_parameters():
                if parameter.requires_grad:
                    moments = live.optimizer.state[parameter]
                    tensors |= {f"{name}/adam/{key}/{moment}": value for moment, value in moments.items()}
        return tensors

    def own_buffers(self) -> dict[str, Tensor]:
        """This worker's own floating buffers, for a resume at the same number of workers that is bitwise the same."""
        if self.world.size == 1:
            return {}
        place = f"local/{self.world.rank}_of_{self.world.size}"
        return {f"{place}/{key}": buffer for key, buffer in self._float_buffers().items()}


def _mean(weighted: list[tuple[float, float]]) -> float:
    return math.fsum(weight * value for weight, value in weighted) / math.fsum(weight for weight, _ in weighted)


def _adam(parameters: list[nn.Parameter], settings: Adam) -> torch.optim.Adam:
    """Fused Adam whose state is there from the start, so that it has a name before the first step."""
    optimizer = torch.optim.Adam(
        parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _average(ema: nn.Module, net: nn.Module, keep: float) -> None:
    """ema <- keep * ema + (1 - keep) * net, for parameters and floating buffers; other buffers are copied."""
    with torch.no_grad():
        theirs, ours = ema.state_dict(), net.state_dict()
        floating = [key for key, value in theirs.items() if value.is_floating_point()]
        torch._foreach_lerp_([theirs[k] for k in floating], [ours[k] for k in floating], 1 - keep)
        for key in theirs.keys() - set(floating):
            theirs[key].copy_(ours[key])
