"""Steps recorded as CUDA graphs: the launches of a whole step are repeated by one call.

A step of these systems is some thousand short kernels, and Python needs longer to launch them than a fast GPU to run
them. A recorded step reads its batch, its noise, its learning rates and the decays of its averages from tensors of its
own, which are filled before it is repeated. What else a step depends on are its decisions (`Train.decide`) and the
shape of its batch: there is a graph for each combination, up to `_MOST`.

No step is trusted because it could be recorded: the first two repetitions of each graph are compared with the step as
it is launched without one, from the same state. If a graph cannot be recorded, or moves the state elsewhere, the run
goes on without graphs, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from t2idist.contract import Batch, Captions
from t2idist.engine.noise import Draw
from t2idist.engine.reports import stack_scalars
from t2idist.nn.fast.torch_internals import foreach_copy_

if TYPE_CHECKING:
    from t2idist.engine.trainer import Trainer

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 3
"""Without graphs, at the start of a stage: cuDNN chooses its kernels, and caches are filled."""
_CHECKED = 2
_MOST = 4
_LARGEST_DEVIATION = 0.2
"""Of a step: how far a repeated step may end from a launched one. Another batch or other noise is farther away; kernels
that add in no fixed order are nearer."""

Rule = Callable[[int, int], Any]


class Record(Protocol):
    """Records a step."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a function that repeats the operations of `step`, on the same tensors.

        Raises:
            RuntimeError: The step does something that cannot be repeated so.
        """
        ...


class CudaGraphRecorder:
    """Records steps on the current CUDA device, without running them.

    All graphs share the memory of their activations: one runs at a time, and what it reports is copied at once.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads copy batches and checkpoints meanwhile
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


@dataclass
class Inputs:
    """The values that differ from step to step, in the order in which a step asks for them."""

    draws: list[Draw] = field(default_factory=list)
    numbers: list[Callable[[], float]] = field(default_factory=list)
    decisions: list[tuple[Rule, Any]] = field(default_factory=list)
    """Each rule of `Train.decide`, and its result."""


@dataclass(eq=False)
class _Graph:
    batch: Batch
    inputs: Inputs
    noise: list[Tensor]
    numbers: Tensor
    """(len(inputs.numbers),) float32."""
    repeat: Callable[[], None]
    names: list[str]
    """Of the step's reports."""
    values: Tensor
    """(len(names),) float64."""
    unchecked: int = _CHECKED

    def fits(self, batch: Batch, step: int, images: int) -> bool:
        alike = _shape_of(batch) == _shape_of(self.batch)
        return alike and all(rule(step, images) == value for rule, value in self.inputs.decisions)


class StepGraphs:
    """Runs the steps of a trainer, recorded if possible. For one worker that computes all its groups at once."""

    def __init__(self, trainer: Trainer, record: Record) -> None:
        self._trainer, self._record = trainer, record
        self._graphs: list[_Graph] = []
        self._steps = 0
        self.failure = ""
        """Why no steps are recorded any more."""
        self.repeated_steps = 0

    def run_step(self, batch: Batch) -> None:
        """Run one step on a batch on the device."""
        trainer = self._trainer
        self._steps += 1
        if self.failure or self._steps <= _WARM_UP_STEPS:
            trainer.launch_step(batch)
            return
        graph = next((each for each in self._graphs if each.fits(batch, trainer.step, trainer.images)), None)
        if graph is None and len(self._graphs) == _MOST:
            self._give_up(batch, f"steps differ in more than {_MOST} ways")
        elif graph is None or graph.unchecked:
            self._run_checked(batch, graph)
        else:
            self._repeat(graph, batch)

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
        self.repeated_steps += 1

    def _run_checked(self, batch: Batch, graph: _Graph | None) -> None:
        """Launch a step, repeat it with a graph from the same state, and compare."""
        trainer, inputs = self._trainer, Inputs()
        launched, deviation, reason = None, "", ""
        try:
            before = self._copy_state()
        except RuntimeError as error:
            self._give_up(batch, _text(error))
            return
        with trainer.noting(inputs):
            trainer.launch_step(batch)
        reports = list(trainer.reports.pending)
        try:
            launched = self._copy_state()
            if graph is None:
                graph = self._recorded(batch, inputs)
            self._restore(before)
            self._repeat(graph, batch)
            deviation = self._deviation(before, launched)
        except RuntimeError as error:
            reason = _text(error)
            trainer.abandon_step()
        trainer.reports.pending = reports
        if launched is not None:
            self._restore(launched)
        if reason:
            self._stop(reason)
        elif deviation:
            self._stop(f"a repeated step moves {deviation} elsewhere than a launched one")
        elif graph is not None:
            graph.unchecked -= 1
            if graph not in self._graphs:
                self._graphs.append(graph)

    def _recorded(self, batch: Batch, inputs: Inputs) -> _Graph:
        trainer = self._trainer
        own = _copy_of(batch)
        noise = [trainer.noise_source.empty(draw) for draw in inputs.draws]
        numbers = torch.empty(len(inputs.numbers), device=trainer.world.device)
        trainer.drop_casts()
        trainer.reports.pending = []
        names: list[str] = []
        values: list[Tensor] = []

        def step() -> None:
            trainer.launch_step(own)
            reports = trainer.reports.pending
            stacked, order = stack_scalars([value for _, _, value in reports])
            names.extend(reports[index][1] for index in order)
            values.append(stacked)

        with trainer.given(noise, numbers):
            repeat = self._record(step)
        trainer.drop_casts()
        return _Graph(own, inputs, noise, numbers, repeat, names, values[0])

    def _give_up(self, batch: Batch, reason: str) -> None:
        self._stop(reason)
        self._trainer.launch_step(batch)

    def _stop(self, reason: str) -> None:
        self.failure, self._graphs = reason, []
        self._trainer.drop_casts()
        logger.warning("steps are launched without CUDA graphs: %s", reason)

    # ------------------------------------------------------------ state
    def _state(self) -> dict[str, Tensor]:
        trainer = self._trainer
        return {**trainer.state(), **{f"guard/{i}/": tensor for i, tensor in enumerate(trainer.guard.state())}}

    def _copy_state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def _restore(self, copies: dict[str, Tensor]) -> None:
        state = self._state()
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(copies[name])
        self._trainer.drop_casts()

    def _deviation(self, before: dict[str, Tensor], launched: dict[str, Tensor]) -> str:
        """Return the first part of the state that a repeated step moved elsewhere; "" if there is none."""
        parts: dict[str, list[str]] = {}
        for name in before:
            parts.setdefault("/".join(name.split("/")[:2]), []).append(name)
        state = self._state()
        for part, names in parts.items():
            off = _distance([state[name] for name in names], [launched[name] for name in names])
            moved = _distance([before[name] for name in names], [launched[name] for name in names])
            if not off <= _LARGEST_DEVIATION * moved + 1e-12:
                return part
        return ""


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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
