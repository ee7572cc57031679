"""A device that is not there: what a step does on an accelerator, seen on a machine without one.

    python -m tests.helpers.fake_accelerator attngan [stargan ...]

Tensors "on" the device `elsewhere` are wrapped tensors of the host. What would fail on an accelerator fails here: an
operation on tensors of both places. What would make the host wait for it is counted: values and sizes that are read
from it, and copies to the host. Recurrent layers run on the host without being counted, where an accelerator has
kernels of its own. Prints each system's reports of a step, and its waits, as JSON. In a process of its own: torch
cannot forget a device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from t2idist.engine.strategy import Precision
from tools.bench import bench_step

DEVICE = "elsewhere"
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "repeat_interleave",
)
"""What they give depends on values, masks as indices alike."""
LENGTHS_STAY = ("_pack_padded_sequence", "_pad_packed_sequence")
"""They take lengths that lie on the host, beside what lies on the device."""
VOCABULARY = 50
RECURRENT = ("lstm", "gru", "rnn_tanh")


class Elsewhere(Tensor):
    """A tensor of the host that is said to lie on the device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=torch.device(DEVICE, 0),
        )  # fmt: skip
        made.here = here
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("outside of `Device`")


class Device(TorchDispatchMode):
    """Inside, the device is there. waits: what made the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__.partition(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [leaf for leaf in given if isinstance(leaf, Elsewhere)]
        asked = kwargs.get("device")
        if there and asked is None and name not in ("copy_", *LENGTHS_STAY):
            for tensor in given:
                if tensor.dim() and not isinstance(tensor, Elsewhere):
                    raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} of the host meets one of the device")
        to_device = bool(there) if asked is None else torch.device(asked).type == DEVICE
        masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in there[1:])
        fetched = not to_device or (name == "copy_" and not isinstance(args[0], Elsewhere))
        if there and (name in READS or masked or fetched):
            self.waits.append(name)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        with _disable_current_modes():
            out = func(*(here(part) for part in args), **{key: here(part) for key, part in kwargs.items()})
        if name == "copy_":
            return args[0]
        if not to_device:
            return out
        if name == "_pack_padded_sequence":
            return Elsewhere(out[0]), out[1]
        itself = {id(tensor.here): tensor for tensor in there}  # what was written in place
        return tree_map(lambda part: itself[id(part)] if id(part) in itself else there_of(part), out)


def here(part: Any) -> Any:
    """With tensors of the host in the place of those of the device."""
    return tree_map(lambda leaf: leaf.here if isinstance(leaf, Elsewhere) else leaf, part)


def there_of(leaf: Any) -> Any:
    """On the device, where it is a tensor of the host."""
    return Elsewhere(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere) else leaf


class Fetched(torch.autograd.Function):
    """A tensor of the device on the host, without a wait."""

    @staticmethod
    def forward(ctx: Any, there: Elsewhere) -> Tensor:
        return there.here.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return there_of(gradient)


class Sent(torch.autograd.Function):
    """And back."""

    @staticmethod
    def forward(ctx: Any, here: Tensor) -> Any:
        return there_of(here.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:  # type: ignore[override]
        return gradient.here


class OwnKernels(TorchFunctionMode):
    """What an accelerator has kernels for: recurrent layers, and lists as indices."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, Elsewhere) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in RECURRENT:
            fetched = tree_map(lambda leaf: Fetched.apply(leaf) if isinstance(leaf, Elsewhere) else leaf, args)
            out = func(*fetched, **kwargs)
            return tree_map(lambda leaf: Sent.apply(leaf) if isinstance(leaf, Tensor) else leaf, out)
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            places = (torch.tensor(i).to(DEVICE) if isinstance(i, list) else i for i in args[1])
            args = (args[0], tuple(places))
        return func(*args, **kwargs)


class Module(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Untimed(bench_step.Stopwatch):
    """A trainer that does not wait to look at the clock."""

    def _now(self) -> float:
        return 0.0


def step(name: str, device: str, waits: Sequence[str] = ()) -> tuple[dict[str, float], list[str]]:
    """The reports of a system's second step on synthetic data, and what it added to the device's `waits`."""
    words = bench_step.parser().parse_args([name, "--group-size", "4"])
    run, stage = bench_step.chosen_stage(words)
    system, plan = bench_step.system_of(run, stage, VOCABULARY)
    trainer = bench_step.stopwatch(system, plan, Precision("float64"), torch.device(device), Untimed)
    batch = bench_step.synthetic_batch(system.sizes, plan)
    trainer.timed_steps(batch, 1)
    first, before = len(trainer._reports), len(waits)
    trainer.timed_steps(batch, 1)
    waited = list(waits[before:])  # without those of the next line
    return {name: float(value) for _, name, value in trainer._reports[first:]}, waited


def main(names: Sequence[str]) -> None:
    _setup_privateuseone_for_python_backend(DEVICE, Module())  # before the first backward pass, which counts devices
    found: dict[str, Any] = {name: {"here": step(name, "cpu")[0]} for name in names}
    for name in names:
        with Device() as device, OwnKernels():
            reports, waits = step(name, DEVICE, device.waits)
            found[name] |= {"elsewhere": reports, "waits": waits}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
