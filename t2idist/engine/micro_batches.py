"""Micro-batches: a worker's groups in parts, one after another, so that it needs the memory of one part.

Every part runs the system's whole step, and waits in each `apply` until all parts are there; then the role is updated
once. The result is that of all groups at once, to rounding: a part is to a worker what a worker is to a run. Losses are
means over groups, so the gradient is the weighted mean of the parts' gradients. Running statistics are linear in the
groups' statistics, so they become the weighted mean of what each part makes of the same values.

The forward of a role that is updated after other roles, such as a generator's, is computed again for its backward, and
keeps no activations: those of all parts would be in memory at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2idist.contract import Batch, System, Train
from t2idist.engine.guard import Guard
from t2idist.engine.noise import Noise
from t2idist.engine.strategy import trainable_parameters
from t2idist.engine.world import Share
from t2idist.nn.fast.torch_internals import foreach_add

T = TypeVar("T")


class WholeTrainer(Train, Protocol):
    """What the parts need of the trainer of all of a worker's groups (engine/trainer.py)."""

    system: System
    share: Share
    noise_source: Noise
    guard: Guard

    def role_network(self, role: str) -> nn.Module: ...

    def run_unwrapped(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def scale_loss(self, role: str, loss: Tensor, fraction: float = 1.0) -> Tensor: ...

    def apply_gradients(self, role: str, gradients: Sequence[Tensor]) -> None: ...

    def has_ema_statistics(self, role: str) -> bool: ...

    def ema_network(self, role: str, momentum: float) -> contextlib.AbstractContextManager[nn.Module]: ...


class MicroBatches:
    """Runs the steps of a trainer's system in parts of at most `groups` groups."""

    def __init__(self, trainer: WholeTrainer, groups: int, nets: Sequence[nn.Module]) -> None:
        lanes = trainer.share.lanes
        self.trainer = trainer
        self.gradients: list[Tensor] = []
        """Sum of the parts' weighted gradients of the role that is updated next."""
        self.recomputed: set[str] = set()
        """Roles whose forward is computed again; known after the first part of the first step."""
        self._lanes = [lanes[first : first + groups] for first in range(0, len(lanes), groups)]
        self._counters = [buffer for net in nets for buffer in net.buffers() if not buffer.is_floating_point()]

    def run_step(self, batch: Batch, momentum: float) -> None:
        """Run a step; arguments as of `Trainer.run_step`, but the batch is on the device."""
        trainer = self.trainer
        parts = [_Part(self, lanes, batch) for lanes in self._lanes]
        while role := self._in_turn(parts, _Part.advance):
            trainer.apply_gradients(role, self.gradients)
            self.gradients = []
        for role in filter(trainer.has_ema_statistics, parts[0].forwards if momentum else ()):
            with trainer.ema_network(role, momentum) as ema:
                self._in_turn(parts, functools.partial(_Part.repeat_forward, role=role, net=ema))
        trainer.noise_source.lanes = trainer.share.lanes
        for name in dict.fromkeys(name for part in parts for name, _ in part.reports):
            values = [(part.fraction, value) for part in parts for each, value in part.reports if each == name]
            total = sum(fraction for fraction, _ in values)
            trainer.report(name, torch.stack([value * (fraction / total) for fraction, value in values]).sum())

    def add_gradients(self, role: str, loss: Tensor, fraction: float) -> None:
        """Add the gradients of a part's loss to `gradients`, weighted by its fraction of the worker's groups."""
        trained = trainable_parameters(self.trainer.role_network(role))
        scaled = self.trainer.scale_loss(role, loss, fraction)
        gradients = torch.autograd.grad(scaled, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            assert gradient is not None, f"{role}: {name} got no gradient"
        self.gradients = list(foreach_add(self.gradients, gradients)) if self.gradients else list(gradients)

    def _in_turn(self, parts: Sequence[_Part], action: Callable[[_Part], T]) -> T:
        """Let each part act from the same buffers, which become the mean of the results; return what all return."""
        restore = self.save_buffers()
        buffers = self.trainer.guard.buffers
        mean = torch.zeros_like(buffers)
        results = []
        for part in parts:
            restore()
            results.append(part.in_its_place(action))
            mean += part.fraction * buffers
        buffers.copy_(mean)
        assert len(set(results)) == 1, f"the groups of a step do not update the same roles: {results}"
        return results[0]

    def save_buffers(self) -> Callable[[], None]:
        """Save the buffers of the networks; return a function that restores them."""
        saved = [(buffer, buffer.clone()) for buffer in (self.trainer.guard.buffers, *self._counters)]

        def restore() -> None:
            for buffer, value in saved:
                buffer.copy_(value)

        return restore


class _Part:
    """A part of a worker's groups. Implements `contract.Train` for the system's step on them."""

    def __init__(self, whole: MicroBatches, lanes: range, batch: Batch) -> None:
        self._whole, self._trainer, self._lanes = whole, whole.trainer, lanes
        self._noise_calls = 0
        self._in_update: set[str] = set()
        self.fraction = len(lanes) / len(whole.trainer.share.lanes)
        """Fraction of the worker's groups."""
        self.reports: list[tuple[str, Tensor]] = []
        self.forwards: dict[str, Callable[[nn.Module], Any]] = {}
        """What the step ran of each role."""
        first = (lanes.start - whole.trainer.share.lanes.start) * batch.group_size
        rows = slice(first, first + len(lanes) * batch.group_size)
        part = replace(
            batch,
            images=tuple(images[rows] for images in batch.images),
            partners=tuple(images[rows] for images in batch.partners),
            captions=batch.captions[rows],
            class_ids=batch.class_ids[rows],
            attributes=batch.attributes[rows],
            ids=batch.ids[rows],
            groups=len(lanes),
        )
        self._step = greenlet(lambda: whole.trainer.system.step(part, self))

    # -------------------------------------------------------------------------------------------- for MicroBatches
    def in_its_place(self, action: Callable[[_Part], T]) -> T:
        """Let the part act, with the noise of its groups."""
        noise = self._trainer.noise_source
        noise.lanes, noise.calls = self._lanes, self._noise_calls
        result = action(self)
        self._noise_calls = noise.calls
        return result

    def advance(self) -> str | None:
        """Go on with the step until it applies gradients to a role; return its name, or None at the end."""
        role: str | None = self._step.switch()
        assert role is not None or not self._in_update, f"{self._in_update}: forward without apply"
        return role

    def repeat_forward(self, role: str, net: nn.Module) -> None:
        """Run the step's forward of a role with another network."""
        self.forwards[role](net)

    # -------------------------------------------------------------------------------------------- contract.Train
    def decide(self, rule: Callable[[int, int], T]) -> T:
        return self._trainer.decide(rule)

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert role not in self._in_update, f"{role}: a second forward before apply"
        self._in_update.add(role)
        self.forwards[role] = lambda net: fn(net, *args, **kwargs)
        run = functools.partial(self._trainer.run_unwrapped, role, fn)
        if role not in self._whole.recomputed:
            return run(*args, **kwargs)
        contexts = contextlib.nullcontext(), self._repeating(self._trainer.noise_source.calls)
        return checkpoint(
            run, *args, **kwargs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts
        )

    @contextlib.contextmanager
    def _repeating(self, calls: int) -> Iterator[None]:
        """Within the context, draw the noise after this many calls again, and leave no trace in the buffers."""
        noise = self._trainer.noise_source
        calls_before, noise.calls = noise.calls, calls
        restore = self._whole.save_buffers()
        try:
            yield
        finally:
            noise.calls = calls_before
            restore()

    def apply(self, role: str, loss: Tensor) -> None:
        assert role in self._in_update, f"{role}: apply without forward"
        self._in_update.remove(role)
        if self.fraction < 1:
            self._whole.recomputed |= self._in_update
        self._whole.add_gradients(role, loss, self.fraction)
        waiting = self._step.parent
        assert waiting is not None
        waiting.switch(role)

    def update(self, role: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = self.forward(role, fn, *args, **kwargs)
        self.apply(role, loss)
        return loss.detach()

    def frozen(self, *names: str) -> contextlib.AbstractContextManager[Any]:
        return self._trainer.frozen(*names)

    def noise(self, *shape: int) -> Tensor:
        return self._trainer.noise(*shape)

    def memory(self, name: str) -> Tensor:
        return self._trainer.memory(name)

    def report(self, name: str, value: Tensor) -> None:
        self.reports.append((name, value.detach()))
