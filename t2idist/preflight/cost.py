"""What a step of a system takes, counted on tensors without data: operations, what backward keeps, gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from t2idist.contract import Batch, Captions, System
from t2idist.engine.trainer import frozen_parameters, select_networks
from t2idist.nn.fast.layers import use_fast_layers

_MOST_STEPS = 50
META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Of a mean step on one group. flops: forward and backward. gradients: numbers that workers sum.

    kept: most floating numbers that are kept for a backward pass at a time, weights apart.
    """

    flops: float
    gradients: float
    kept: int


def cost_of(
    system: System, group_size: int, max_words: int, vector_dim: int, attributes: Sequence[Sequence[str]]
) -> Cost:
    """Count the steps of a system on the meta device, as many as it takes for each role to be updated.

    vector_dim, attributes: as of `contract.Extent`. Raises RuntimeError or NotImplementedError where a step of
    somebody's own system looks at values, which are not there.
    """
    kept = _Kept()
    counting = _Counting(system, group_size)
    with _Lift() as lift, kept:
        while counting.updated.keys() < system.roles.keys() and counting.step < _MOST_STEPS:
            batch = _batch(system.sizes, group_size, max_words, vector_dim, attributes, counting.step)
            system.step(batch, counting)
            counting.step += 1
    trained = {
        name: sum(p.numel() for p in role.net.parameters() if p.requires_grad) for name, role in system.roles.items()
    }
    gradients = sum(trained[name] * times for name, times in counting.updated.items())
    return Cost(lift.flops / counting.step, gradients / counting.step, kept.most)


def _batch(
    sizes: Sequence[int],
    group_size: int,
    max_words: int,
    vector_dim: int,
    attributes: Sequence[Sequence[str]],
    step: int,
) -> Batch:
    """Pictures without data, and captions of full length, whose numbers are there."""
    domain = step % max(len(attributes), 1)
    kinds = len(attributes[domain]) if attributes else 0
    tokens = torch.ones(group_size, max_words, dtype=torch.int64)
    lengths = torch.full((group_size,), max_words)
    captions = Captions(tokens, lengths, torch.empty(group_size, vector_dim, device=META))
    images = tuple(torch.empty(group_size, 3, size, size, device=META) for size in sizes)
    known = torch.empty(group_size, kinds, device=META)
    return Batch(images, captions, torch.arange(group_size), known, ("",) * group_size, 1, domain)


class _Counting:
    """`contract.Train` on one group, without optimisers."""

    def __init__(self, system: System, group_size: int) -> None:
        self.step = 0
        self.updated: Counter[str] = Counter()
        self._group_size = group_size
        self._nets = {name: use_fast_layers(role.net.train()) for name, role in system.roles.items()}
        self._frozen = {name: f.net.eval().requires_grad_(False) for name, f in system.frozen.items()}

    @property
    def images(self) -> int:
        return self.step * self._group_size

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

    def report(self, name: str, value: Tensor) -> None:
        return


_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index as whole numbers, where it is a mask that is there: how many it picks is known then."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return [index]
    return index.nonzero(as_tuple=True)


class _Lift(TorchDispatchMode):
    """Lets whole numbers that are there meet tensors without data, and counts the operations of what is computed.

    Sentences are packed as if all were of full length. (torch's FlopCounterMode counts by the same table, but its
    tracking of modules does not stand a gradient inside a step.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._pack_padded_sequence.default:
            data, _, batch_first = args
            data = data.transpose(0, 1) if batch_first else data
            words, captions = data.shape[:2]
            return data.reshape(words * captions, *data.shape[2:]), torch.full((words,), captions)
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func in _INDEXING:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = any(t.is_meta for t in tensors) and any(not t.is_meta for t in tensors)
        if mixed and "pack" not in func.name():
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        made = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=made)
        return made


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the floating numbers that are kept for backward passes; one storage is counted once."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._users: Counter[int] = Counter()
        super().__init__(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def begin(self, key: int, numbers: int) -> None:
        self._users[key] += 1
        if self._users[key] == 1:
            self._now += numbers
            self.most = max(self.most, self._now)

    def end(self, key: int, numbers: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._now -= numbers


class _Saved:
    """A tensor that a graph keeps, counted as long as it does."""

    def __init__(self, tensor: Tensor, kept: _Kept) -> None:
        self.tensor, self._kept = tensor, kept
        storage = tensor.untyped_storage()
        weight = isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
        self._key, self._numbers = storage._cdata, 0 if weight else storage.nbytes() // tensor.element_size()
        kept.begin(self._key, self._numbers)

    def __del__(self) -> None:
        self._kept.end(self._key, self._numbers)
