"""Measure a training step of a system on the meta device: operations, activations kept for backward, gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from t2idist.contract import Batch, Captions, KeepsMemory, System
from t2idist.engine.networks import frozen_parameters, select_networks
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.nn.fast.torch_internals import TorchDispatchMode, tree_leaves, tree_map_only

UPDATE_LAUNCHES = 30
"""Operations of Adam, clipping, the average and the check of an update of a role, each of which takes whole lists."""
_MAX_STEPS = 50
META = torch.device("meta")

T = TypeVar("T")


@dataclass(frozen=True)
class StepCost:
    """Cost of a mean step on one group."""

    flops: float
    """Operations of forward and backward."""
    gradients: float
    """Elements that workers all-reduce."""
    activations: int
    """Peak number of floating-point elements kept for a backward pass, without weights."""
    launches: float
    """Operations that the host submits to an accelerator one by one."""


def measure_step(
    system: System, group_size: int, max_words: int, vector_dim: int, attributes: Sequence[Sequence[str]]
) -> StepCost:
    """Run steps of a system on the meta device until each role has been updated, and average their cost.

    Args:
        vector_dim, attributes: as in `contract.DataInfo`.

    Raises:
        RuntimeError, NotImplementedError: A step of a custom system reads values of tensors, which have none here.
    """
    activations = _Activations()
    train = _MetaTrain(system, group_size)
    with _MetaMode() as mode, activations:
        while train.updated.keys() < system.roles.keys() and train.step < _MAX_STEPS:
            batch = _batch(system.sizes, group_size, max_words, vector_dim, attributes, train.step)
            system.step(batch, train)
            train.step += 1
    trained = {
        name: sum(p.numel() for p in role.net.parameters() if p.requires_grad) for name, role in system.roles.items()
    }
    gradients = sum(trained[name] * times for name, times in train.updated.items())
    updates = UPDATE_LAUNCHES * sum(train.updated.values())
    return StepCost(
        mode.flops / train.step, gradients / train.step, activations.peak, (mode.launches + updates) / train.step
    )


def _batch(
    sizes: Sequence[int],
    group_size: int,
    max_words: int,
    vector_dim: int,
    attributes: Sequence[Sequence[str]],
    step: int,
) -> Batch:
    """Build a batch with images on the meta device and full-length captions with real token ids."""
    domain = step % max(len(attributes), 1)
    kinds = len(attributes[domain]) if attributes else 0
    tokens = torch.ones(group_size, max_words, dtype=torch.int64)
    lengths = torch.full((group_size,), max_words)
    captions = Captions(tokens, lengths, torch.empty(group_size, vector_dim, device=META))
    images = tuple(torch.empty(group_size, 3, size, size, device=META) for size in sizes)
    labels = torch.empty(group_size, kinds, device=META)
    return Batch(images, captions, torch.arange(group_size), labels, ("",) * group_size, 1, domain, partners=images)


class _MetaTrain:
    """`contract.Train` on one group, without optimizers."""

    def __init__(self, system: System, group_size: int) -> None:
        self.step = 0
        self.updated: Counter[str] = Counter()
        self._group_size = group_size
        self._nets = {name: use_fast_layers(role.net.train()) for name, role in system.roles.items()}
        self._frozen = {name: f.net.train(f.train_mode).requires_grad_(False) for name, f in system.frozen.items()}
        shapes = system.memory if isinstance(system, KeepsMemory) else {}
        self._memory = {name: torch.empty(1, *shape, device=META) for name, shape in shapes.items()}

    def decide(self, rule: Callable[[int, int], T]) -> T:
        return rule(self.step, self.step * self._group_size)

    def forward(self, role: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(self._nets[role], *args, **kwargs)

    def apply(self, role: str, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self._nets[role].zero_grad(set_to_none=True)
        self.updated[role] += 1

    def update(self, role: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = self.forward(role, fn, *args, **kwargs)
        self.apply(role, loss)
        return loss.detach()

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        nets = select_networks(names, self._frozen, self._nets)
        with frozen_parameters(nets):
            yield nets[0] if len(nets) == 1 else tuple(nets)

    def noise(self, *shape: int) -> Tensor:
        return torch.empty(self._group_size, *shape, device=META)

    def memory(self, name: str) -> Tensor:
        return self._memory[name]

    def report(self, name: str, value: Tensor) -> None:
        return


_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


def _mask_to_indices(index: Tensor | None) -> Sequence[Tensor | None]:
    """Convert a mask that has data to integer indices, so that the number of selected elements is known."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return [index]
    return index.nonzero(as_tuple=True)


_NO_KERNELS = ("empty", "detach", "resize", "lift", "_unsafe_view")


def _launches(func: Any, args: Sequence[Any]) -> int:
    """Return the number of kernels that an operation starts, at least: 0 for views and allocations."""
    if any(name in func.name() for name in _NO_KERNELS):
        return 0
    if func is torch.ops.aten.convolution_backward.default:  # by input, weight and bias
        return sum(args[-1])
    returned = func._schema.returns
    is_view = bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    return 0 if is_view else 1


class _MetaMode(TorchDispatchMode):
    """Lets integer tensors with data be used with meta tensors, and counts operations.

    PyTorch's FlopCounterMode uses the same table of operations, but its module tracking fails if a step computes a
    gradient (a penalty).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func in _INDEXING:
            args = (args[0], [i for index in args[1] for i in _mask_to_indices(index)], *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = any(t.is_meta for t in tensors) and any(not t.is_meta for t in tensors)
        if mixed:
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        output = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(output)):
            self.launches += _launches(func, args)
        return output


class _Activations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the floating-point elements that are kept for backward passes; each storage once."""

    def __init__(self) -> None:
        self.peak = self._current = 0
        self._users: Counter[int] = Counter()
        super().__init__(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> _SavedTensor:
        return _SavedTensor(tensor, self)

    def add(self, key: int, elements: int) -> None:
        self._users[key] += 1
        if self._users[key] == 1:
            self._current += elements
            self.peak = max(self.peak, self._current)

    def remove(self, key: int, elements: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._current -= elements


class _SavedTensor:
    """A tensor that the autograd graph keeps; counted until it is released."""

    def __init__(self, tensor: Tensor, activations: _Activations) -> None:
        self.tensor, self._activations = tensor, activations
        storage = tensor.untyped_storage()
        weight = isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
        self._key, self._elements = storage._cdata, 0 if weight else storage.nbytes() // tensor.element_size()
        activations.add(self._key, self._elements)

    def __del__(self) -> None:
        self._activations.remove(self._key, self._elements)
