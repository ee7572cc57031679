"""Steps recorded as CUDA graphs: the launches of a whole step are repeated by one call.

A step of these systems is some thousand short kernels, and Python may need longer to launch them than a fast GPU to run
them. A recorded step reads its batch, its noise, its learning rates and the weights of its averages from tensors of its
own, which are filled before it is repeated. What else a step depends on is the shape of its batch and its decisions
(`Train.decide`): there is a graph for each combination that comes again, of `_MOST` the latest ones.

No graph is trusted because it could be recorded: its first two repetitions are compared with the step as it is launched
without one, from the same state. If a step cannot be recorded, or a graph moves the state elsewhere, the run goes on
without graphs, and the log says why.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from t2idist.contract import Batch, Captions
from t2idist.engine.guard import Guard
from t2idist.engine.noise import Draw, Noise
from t2idist.engine.reports import StepReports, stack_scalars
from t2idist.engine.world import World
from t2idist.nn.fast.torch_internals import end_allocate_to_pool, foreach_copy_, release_pool

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 3
"""Without graphs, at the start of a stage: cuDNN chooses its kernels, and caches are filled."""
_CHECKED = 2
_MOST = 6
_MOST_RECORDED = 24
_LARGEST_DEVIATION = 0.2
"""How far a repeated step may end from a launched one, in lengths of the step. With another batch or other noise it is
farther away; with kernels that add in no fixed order it is nearer."""

_failed_graphs: list[Any] = []
"""CUDA graphs whose recording failed: torch's allocator of page-locked memory may still refer to them."""

Rule = Callable[[int, int], Any]


class CannotRecord(Exception):
    """A step cannot be recorded; the message says why."""


class Recorder:
    """Records steps. This one only says how: sub-classes record."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Within the context, add to the list what in a launched step cannot be recorded."""
        yield []

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a function that repeats the operations of `step` on the same tensors. It may run them, too.

        Raises:
            RuntimeError: The step does something that cannot be recorded.
        """
        raise NotImplementedError


class CudaGraphRecorder(Recorder):
    """Records steps on the current CUDA device, without running them.

    All graphs share the memory of their activations: one runs at a time, and what it reports is copied at once.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Note where the host waits for the device: a step that does must not even be tried to record."""
        waits: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        syncs = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        waits += [f"the host waits in {warning.filename}:{warning.lineno}" for warning in syncs]

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # not torch.cuda.graph: after an error it leaves this thread on its stream, and the allocator in its pool
        with torch.cuda.stream(stream):
            # loader threads allocate page-locked memory meanwhile
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                step()
                graph.capture_end()
            except BaseException:
                self._leave(graph)
                raise
        return graph.replay

    def _leave(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed, and let the allocator use its own memory again."""
        _failed_graphs.append(graph)
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # of the first one if the end of the recording has done both
            end_allocate_to_pool(device, self._pool)
            release_pool(device, self._pool)


@dataclass
class Inputs:
    """What a step asked for, in this order, and the shape of its batch."""

    shape: tuple[Any, ...]
    draws: list[Draw] = field(default_factory=list)
    numbers: list[Callable[[], float]] = field(default_factory=list)
    """Values that differ from step to step."""
    decisions: list[tuple[Rule, Any]] = field(default_factory=list)
    """Each rule of `Train.decide`, and its result."""

    def fits(self, batch: Batch, step: int, images: int) -> bool:
        """Return whether another step would do the same operations."""
        return _shape_of(batch) == self.shape and all(rule(step, images) == value for rule, value in self.decisions)


@dataclass(eq=False)
class _Graph:
    inputs: Inputs
    batch: Batch
    noise: list[Tensor]
    numbers: Tensor
    """(len(inputs.numbers),) float32."""
    repeat: Callable[[], None]
    names: list[str]
    """Of the step's reports."""
    values: Tensor
    """(len(names),) float64."""
    unchecked: int = _CHECKED


State = dict[str, Tensor]


class LaunchingTrainer(Protocol):
    """What is needed of the trainer (engine/trainer.py)."""

    step: int
    world: World
    noise_source: Noise
    guard: Guard
    reports: StepReports

    @property
    def images(self) -> int: ...

    def launch_step(self, batch: Batch) -> None: ...

    def abandon_step(self) -> None: ...

    def drop_casts(self) -> None: ...

    def noting(self, inputs: Inputs) -> contextlib.AbstractContextManager[None]: ...

    def given(self, noise: Sequence[Tensor], numbers: Tensor) -> contextlib.AbstractContextManager[None]: ...

    def state(self) -> State: ...


class StepGraphs:
    """Runs the steps of a trainer, recorded if possible. For one worker that computes all its groups at once."""

    def __init__(self, trainer: LaunchingTrainer, recorder: Recorder) -> None:
        self._trainer, self._recorder = trainer, recorder
        self._graphs: list[_Graph] = []
        """The latest used one last."""
        self._seen: deque[Inputs] = deque(maxlen=_MOST)
        """Of launched steps; what comes again is recorded."""
        self._steps = self._recorded = self._obstructed = 0
        self.failure = ""
        """Why no steps are recorded any more."""
        self.repeated_steps = 0
        """Without those that were compared with launched ones."""

    def run_step(self, batch: Batch) -> None:
        """Run one step on a batch on the device."""
        trainer, moment = self._trainer, (self._trainer.step, self._trainer.images)
        self._steps += 1
        if self.failure or self._steps <= _WARM_UP_STEPS:
            trainer.launch_step(batch)
            return
        graph = next((each for each in self._graphs if each.inputs.fits(batch, *moment)), None)
        if graph is not None and not graph.unchecked:
            self._graphs.remove(graph)
            self._graphs.append(graph)
            self._repeat(graph, batch)
            self.repeated_steps += 1
        elif graph is not None or any(each.fits(batch, *moment) for each in self._seen):
            self._run_checked(batch, graph)
        else:
            self._seen.append(self._launch(batch))

    def _launch(self, batch: Batch) -> Inputs:
        inputs = Inputs(_shape_of(batch))
        with self._trainer.noting(inputs):
            self._trainer.launch_step(batch)
        return inputs

    def _repeat(self, graph: _Graph, batch: Batch) -> None:
        trainer = self._trainer
        foreach_copy_(graph.batch.tensors, batch.tensors)
        trainer.noise_source.start(trainer.step)
        for tensor, draw in zip(graph.noise, graph.inputs.draws, strict=True):
            trainer.noise_source.draw_into(tensor, draw)
        numbers = torch.empty(len(graph.numbers), pin_memory=graph.numbers.device.type != "cpu")
        numbers.copy_(torch.tensor([number() for number in graph.inputs.numbers]))
        graph.numbers.copy_(numbers, non_blocking=True)
        trainer.drop_casts()
        graph.repeat()
        for name, value in zip(graph.names, graph.values.clone().unbind(), strict=True):
            trainer.reports.add(trainer.step, name, value)

    # ------------------------------------------------------------ recording and checks
    def _run_checked(self, batch: Batch, graph: _Graph | None) -> None:
        """Launch a step, repeat it with a graph from the same state, and compare. A new graph is recorded before."""
        trainer = self._trainer
        before = self._copy_state()
        with self._recorder.watching() as obstacles:
            inputs = self._launch(batch)
        if obstacles:  # perhaps of another thread, if it is the first time
            self._obstructed += 1
            if self._obstructed > 1:
                self._stop(obstacles[0])
            return
        launched, reports = self._copy_state(), list(trainer.reports.pending)
        try:
            graph = graph or self._record(batch, inputs)
            self._restore(before)
            self._repeat(graph, batch)
            if part := self._first_deviation(before, launched):
                raise CannotRecord(f"a repeated step moves {part} elsewhere than a launched one")
            graph.unchecked -= 1
        except (RuntimeError, CannotRecord) as error:
            trainer.abandon_step()
            self._stop(" ".join(str(error).split())[:300])
        trainer.reports.pending = reports
        self._restore(launched)

    def _record(self, batch: Batch, inputs: Inputs) -> _Graph:
        """Record a step like the one that has just been launched, and drop the graph that was not used for longest."""
        trainer = self._trainer
        self._recorded += 1
        if self._recorded > _MOST_RECORDED:
            raise CannotRecord(f"steps differ in more than {_MOST} ways, and were recorded {_MOST_RECORDED} times")
        own = _copy_of(batch)
        noise = [trainer.noise_source.empty(draw) for draw in inputs.draws]
        numbers = torch.empty(len(inputs.numbers), device=trainer.world.device)
        trainer.drop_casts()
        trainer.reports.pending = []
        reported: list[tuple[list[str], Tensor]] = []

        def step() -> None:
            trainer.launch_step(own)
            reports = trainer.reports.pending
            values, order = stack_scalars([value for _, _, value in reports])
            reported.append(([reports[index][1] for index in order], values))

        with trainer.given(noise, numbers):
            repeat = self._recorder.record(step)
        graph = _Graph(inputs, own, noise, numbers, repeat, *reported[0])
        self._graphs = [*self._graphs[1 - _MOST :], graph]
        return graph

    def _stop(self, reason: str) -> None:
        self.failure, self._graphs = reason, []
        logger.warning("steps are launched without CUDA graphs: %s", reason)

    # ------------------------------------------------------------ state
    def _state(self) -> State:
        trainer = self._trainer
        return {**trainer.state(), **{f"guard/{i}/": tensor for i, tensor in enumerate(trainer.guard.state())}}

    def _copy_state(self) -> State:
        """Copy the state to the host, so that a run needs no more memory on the device than a graph takes."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._state().items()}

    def _restore(self, copies: State) -> None:
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(copies[name])
        self._trainer.drop_casts()

    def _first_deviation(self, before: State, launched: State) -> str:
        """Return the first part of the state that a repeated step moved elsewhere; "" if there is none."""
        repeated = self._copy_state()
        parts: dict[str, list[str]] = {}
        for name in before:
            if _counts(name, before[name]) and not torch.equal(repeated[name], launched[name]):
                return name
            if not _counts(name, before[name]):
                parts.setdefault(_part_of(name), []).append(name)
        for part, names in parts.items():
            off = _distance([repeated[name] for name in names], [launched[name] for name in names])
            moved = _distance([before[name] for name in names], [launched[name] for name in names])
            if not off <= _LARGEST_DEVIATION * moved + 1e-12:
                return part
        return ""


def _counts(name: str, tensor: Tensor) -> bool:
    """Return whether an entry of the state is a counter, which must be equal."""
    return not tensor.is_floating_point() or name.endswith("/step") or (name.startswith("guard/") and not tensor.dim())


def _part_of(name: str) -> str:
    """Return the part of the state that an entry is compared with: values of one kind, which move alike."""
    parts = name.split("/")
    kind = parts[-1] if parts[1] == "adam" else "statistics" if "running_" in name else "values"
    return f"{parts[0]}/{parts[1]} ({kind})"


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(one, other, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def _shape_of(batch: Batch) -> tuple[Any, ...]:
    return batch.groups, batch.domain, *(tensor.shape for tensor in batch.tensors)


def _copy_of(batch: Batch) -> Batch:
    captions = batch.captions
    return replace(
        batch,
        images=tuple(image.clone() for image in batch.images),
        partners=tuple(image.clone() for image in batch.partners),
        captions=Captions(captions.tokens.clone(), captions.lengths.clone(), captions.vectors.clone()),
        class_ids=batch.class_ids.clone(),
        attributes=batch.attributes.clone(),
        ids=(),
    )
