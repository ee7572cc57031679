"""A fake accelerator: run training steps on a device that does not exist, on a machine without one.

    python -m tests.helpers.fake_accelerator attngan [stargan ...]
    python -m tests.helpers.fake_accelerator --recorded STEPS PRECISION MUTATION attngan [...]

Tensors on the device "fake" wrap tensors of the host. An operation that mixes tensors of both devices fails, as on an
accelerator. Whatever would block the host until the device is done is counted as a sync: reading values or sizes,
copies to the host, and copies from the host that are not marked as non-blocking or, above 64 KiB, are not from
page-locked memory. Recurrent layers run on the host and are not counted: accelerators have kernels for them. Prints
each system's reports of a step, and its syncs, as JSON; with --recorded, how steps that are recorded and repeated
(engine/step_graphs.py) differ from launched ones, on small systems. Runs in its own process: PyTorch cannot unregister
a device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from t2idist.engine import step_graphs
from t2idist.engine.noise import Noise
from t2idist.engine.step_graphs import Recorder
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from tests.helpers import small_systems
from tools.bench import bench_step

DEVICE = "fake"
VALUE_DEPENDENT = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "repeat_interleave",
)
"""Operations whose result or its size depends on values. So do boolean masks as indices."""
_STAGED_BYTES = 64 * 1024
"""CUDA copies at most this much to a buffer of its own and lets the host go on."""
VOCABULARY = 50
RECURRENT = ("lstm", "gru", "rnn_tanh")


class FakeTensor(Tensor):
    """A tensor on the fake device, which wraps a tensor of the host."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeTensor:
        tensor: FakeTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device(DEVICE, 0),
        )  # fmt: skip
        tensor.host = host
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> FakeTensor:
        return FakeTensor(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("outside of `FakeDevice`")


class FakeDevice(TorchDispatchMode):
    """Makes the fake device available within the context; `syncs` lists the operations that block the host."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self._recording: list[tuple[Any, Any, Any, Any]] | None = None
        self._pinned: dict[int, Tensor] = {}

    def pin(self, *tensors: Tensor) -> None:
        """Let these tensors of the host stand for page-locked ones."""
        self._pinned |= {tensor.data_ptr(): tensor for tensor in tensors}

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record the operations of a step, as `step_graphs.Recorder`. Also runs them.

        Raises:
            RuntimeError: The step blocks the host or copies from it: a CUDA graph could not be captured.
        """
        self._recording = []
        try:
            step()
            return functools.partial(repeat, self._recording)
        finally:
            self._recording = None

    def _note_sync(self, text: str) -> None:
        self.syncs.append(text)
        if self._recording is not None:
            raise RuntimeError(f"{text} in a recorded step")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [leaf for leaf in tensors if isinstance(leaf, FakeTensor)]
        requested = kwargs.get("device")
        if fakes and requested is None and name != "copy_":
            for tensor in tensors:
                if tensor.dim() and not isinstance(tensor, FakeTensor):
                    raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} on the host meets one on the device")
        on_device = bool(fakes) if requested is None else torch.device(requested).type == DEVICE
        masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in fakes[1:])
        copied_to_host = not on_device or (name == "copy_" and not isinstance(args[0], FakeTensor))
        if fakes and (name in VALUE_DEPENDENT or masked or copied_to_host):
            self._note_sync(name)
        if on_device and name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            copied = not isinstance(source, FakeTensor)
            if copied and (self._recording is not None or not self._is_fast(name, source, args, kwargs)):
                self._note_sync(f"{name} from the host: {tuple(source.shape)}")
        if requested is not None:
            kwargs["device"] = torch.device("cpu")
        page_locked = kwargs.pop("pin_memory", None)
        with _disable_current_modes():
            host_args, host_kwargs = to_host(args), to_host(kwargs)
            recorded = tree_map(alias, (host_args, host_kwargs)) if self._recording is not None else ()
            out = func(*host_args, **host_kwargs)
            if self._recording is not None and torch.Tag.inplace_view not in func.tags:
                self._recording.append((func, *recorded, tree_map(alias, out)))
        if page_locked:
            self.pin(out)
        if name == "copy_":
            return args[0]
        if not on_device:
            return out
        if torch.Tag.inplace_view in func.tags:  # such as unsqueeze_: the wrapper has the new shape, too
            with _disable_current_modes(), no_dispatch():
                return func(*args, **kwargs)
        in_place = {id(tensor.host): tensor for tensor in fakes}
        return tree_map(lambda leaf: in_place[id(leaf)] if id(leaf) in in_place else to_fake(leaf), out)

    def _is_fast(self, name: str, source: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        return bool(non_blocking) and (source.nbytes <= _STAGED_BYTES or source.data_ptr() in self._pinned)


def alias(leaf: Any) -> Any:
    """Return another tensor on the same memory, whose shape no later operation changes; everything else as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def repeat(recording: Sequence[tuple[Any, Any, Any, Any]]) -> None:
    """Run recorded operations again on the same tensors, and overwrite their earlier results."""
    with torch.no_grad(), _disable_current_modes():
        for func, args, kwargs, out in recording:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


def to_host(tree: Any) -> Any:
    """Replace the fake tensors in a tree by the tensors that they wrap."""
    return tree_map(lambda leaf: leaf.host if isinstance(leaf, FakeTensor) else leaf, tree)


def to_fake(leaf: Any) -> Any:
    """Wrap a tensor of the host; return everything else as it is."""
    return FakeTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


class ToHost(torch.autograd.Function):
    """Unwraps a fake tensor without counting a sync."""

    @staticmethod
    def forward(ctx: Any, fake: FakeTensor) -> Tensor:
        return fake.host.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return to_fake(gradient)


class ToFake(torch.autograd.Function):
    """Wraps a tensor of the host."""

    @staticmethod
    def forward(ctx: Any, host: Tensor) -> Any:
        return to_fake(host.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:  # type: ignore[override]
        return gradient.host


class DeviceKernels(TorchFunctionMode):
    """Runs on the host what accelerators have kernels for: recurrent layers, and lists as indices."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in RECURRENT:
            host_args = tree_map(lambda leaf: ToHost.apply(leaf) if isinstance(leaf, FakeTensor) else leaf, args)
            out = func(*host_args, **kwargs)
            return tree_map(lambda leaf: ToFake.apply(leaf) if isinstance(leaf, Tensor) else leaf, out)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):  # a list is copied to the device, blocking
            indices = (torch.tensor(i).to(DEVICE) if isinstance(i, list) else i for i in args[1])
            args = (args[0], tuple(indices))
        return func(*args, **kwargs)


class BackendModule(_DummyBackendModule):  # type: ignore[misc]
    """The module of functions that PyTorch expects of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def run_step(name: str, device: str, fake: FakeDevice | None = None) -> tuple[dict[str, float], list[str]]:
    """Run two steps of a system on synthetic data; return the second one's reports and its syncs."""
    arguments = bench_step.build_parser().parse_args([name, "--group-size", "4"])
    run, stage = bench_step.select_stage(arguments)
    system, build_info = bench_step.build_system(run, stage, VOCABULARY)
    trainer = bench_step.build_trainer(system, build_info, Precision("float64"), torch.device(device))
    batch = bench_step.synthetic_batch(system.sizes, build_info)
    if fake is not None:
        fake.pin(*batch.images, batch.captions.tokens, batch.captions.vectors, batch.class_ids, batch.attributes)
    trainer.run_step(batch)
    first_report, first_sync = len(trainer.reports.pending), 0 if fake is None else len(fake.syncs)
    trainer.run_step(batch)
    step_syncs = [] if fake is None else fake.syncs[first_sync:]  # before the next line reads values
    return {name: float(value) for _, name, value in trainer.reports.pending[first_report:]}, step_syncs


class FakeRecorder(Recorder):
    """Records steps on the fake device; `record` is its method, perhaps changed by a test."""

    def __init__(self, record: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        self.record = record  # type: ignore[method-assign]


MUTATIONS = {
    "noise": (Noise, "draw_into", lambda noise, tensor, draw: None),
    "batch": (step_graphs, "foreach_copy_", lambda own, given: None),
    "casts": (Trainer, "drop_casts", lambda trainer: None),
}
"""What goes wrong if a repeated step reads the noise, the batch or the weights of an earlier one."""


def run_recorded(label: str, fake: FakeDevice, steps: int, precision: str, mutation: str) -> dict[str, Any]:
    """Run steps of a small system launched and recorded: how far the states are apart, the reports, the failure."""
    # the fake device has no autocast; operations of the host are recorded as well
    world = World(device=torch.device("cpu" if precision == "bfloat16" else DEVICE))
    recorders = None, FakeRecorder(fake.record)
    trainers = [small_systems.trainer(world, label, precision, recorder=recorder) for recorder in recorders]
    before = {name: value.clone() for name, value in trainers[0].state().items()}
    with mock.patch.object(*MUTATIONS[mutation]) if mutation else contextlib.nullcontext():
        for trainer in trainers:
            for step in range(steps):  # some steps between repeated ones are launched
                trainer.run_step(small_systems.toy_batch(trainer), momentum=0.1 if step % 4 == 1 else 0.0)
    launched, recorded = (trainer.state() for trainer in trainers)
    apart = {}
    for name, value in launched.items():
        moved = float((value - before[name]).double().norm())
        apart[name] = float((recorded[name] - value).double().norm()) / max(moved, 1e-12)
    graphs = trainers[1].graphs
    assert graphs is not None
    return {
        "apart": max(apart.values()),
        "where": max(apart, key=lambda name: apart[name]),
        "reports": [trainer.reduce_reports() for trainer in trainers],
        "failure": graphs.failure,
        "repeated": graphs.repeated_steps,
    }


def main(names: Sequence[str]) -> None:
    # before the first backward pass, in which PyTorch counts the devices
    _setup_privateuseone_for_python_backend(DEVICE, BackendModule())
    if names[0] == "--recorded":
        steps, precision, mutation, *labels = names[1:]
        with FakeDevice() as device, DeviceKernels():
            runs = {label: run_recorded(label, device, int(steps), precision, mutation) for label in labels}
        print(json.dumps(runs))
        return
    results: dict[str, Any] = {name: {"host": run_step(name, "cpu")[0]} for name in names}
    for name in names:
        with FakeDevice() as device, DeviceKernels():
            reports, syncs = run_step(name, DEVICE, device)
            results[name] |= {"device": reports, "syncs": syncs}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
