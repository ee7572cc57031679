"""The seam between mathematics and machinery: what a system declares, and all that it sees of the engine.

A *system* (one file in ``systems/``) is written as if there were one device and one group of samples. The engine
turns it into a distributed run: it wraps each role's network, runs its BatchNorm and dropout per group, places the
data, and averages gradients by each worker's share of the groups.

Shapes: ``N = groups * group_size`` is the number of samples that a worker holds in a step; samples of one group are
contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


# ------------------------------------------------------------ what data gives
@dataclass(frozen=True)
class Captions:
    """A caption for each of N pictures.

    tokens: (N, max_words) int64, 0 = padding. lengths: (N,) int64, at least 1; they stay on the host, where packing
    reads them. vectors: (N, D) float32, sentence vectors that came with the data, D = 0 where none did.
    """

    tokens: Tensor
    lengths: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Captions:
        return Captions(self.tokens[rows], self.lengths[rows], self.vectors[rows])

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Captions:
        """On `device`, but for the lengths; the vectors as `dtype`."""
        tokens = self.tokens.to(device, non_blocking=True)
        return Captions(tokens, self.lengths, self.vectors.to(device, dtype, non_blocking=True))

    def each(self, times: int) -> Captions:
        """Every caption so many times, one after the other."""
        return self[torch.arange(len(self)).repeat_interleave(times)]


@dataclass(frozen=True)
class Batch:
    """One step's samples on one worker.

    images: the pyramid, lowest size first, each (N, 3, S, S): uint8 on the host, after `to` floats in [-1, 1].
    captions: one of each picture's. class_ids: (N,) int64 (samples of one class do not serve as each other's
    negatives). attributes: (N, A) float32, 1 where a picture has the attribute, in the order of `Extent.attributes`
    of its domain. ids: sample keys, in order. domain: which of the stage's data sets all are from (0: there is one).
    """

    images: tuple[Tensor, ...]
    captions: Captions
    class_ids: Tensor
    attributes: Tensor
    ids: tuple[str, ...]
    groups: int
    domain: int = 0

    @property
    def group_size(self) -> int:
        return len(self.ids) // self.groups

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch on `device`; uint8 pictures become `dtype` in [-1, 1] there."""
        return replace(
            self,
            images=tuple(to_float(image.to(device, non_blocking=True), dtype) for image in self.images),
            captions=self.captions.to(device, dtype),
            class_ids=self.class_ids.to(device, non_blocking=True),
            attributes=self.attributes.to(device, dtype, non_blocking=True),
        )


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pictures in [-1, 1], whether they come so or as uint8."""
    return images.to(dtype).div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else images.to(dtype)


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8; what lies outside is cut off."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


# ------------------------------------------------------------ what a system declares
@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate, as a function of images seen.

    "constant": 1. "exponential": factor ** floor(images / every_images), not below `floor`.
    "linear": 1 until `start_images`, then straight to `floor` at `end_images`.
    """

    kind: str = "constant"
    factor: float = 1.0
    every_images: float = 1.0
    floor: float = 0.0
    start_images: float = 0.0
    end_images: float = 1.0


@dataclass(frozen=True)
class Adam:
    """Adam's settings; the defaults are the ones that every system of this family was published with."""

    lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = Schedule()


@dataclass(frozen=True)
class Pretrained:
    """Weights from a file that a part of a network starts from.

    url: a safetensors file, or a torch file of plain tensors; sha256: of its bytes. key: the config key that gives the
    URL, for messages. load: takes the tensors by name; raises ValueError where they do not fit.
    """

    url: str
    sha256: str
    key: str
    load: Callable[[dict[str, Tensor]], None]


@dataclass
class Role:
    """A trained network: its optimiser, its EMA, its clipping.

    ema_half_life_images: half-life of the exponential moving average of parameters and buffers, in images; None: no
    EMA. clip_norm: largest 2-norm of the gradients of the parameters whose name starts with `clip_prefix`.
    """

    net: nn.Module
    optimizer: Adam = field(default_factory=Adam)
    ema_half_life_images: float | None = None
    clip_norm: float | None = None
    clip_prefix: str = ""
    pretrained: Pretrained | None = None


@dataclass
class Frozen:
    """A network that is used and not trained: eval mode, no gradient to its weights, not in checkpoints.

    Its weights come from network `network` of the export in slot `source` (the stage's `uses`).
    """

    net: nn.Module
    source: str
    network: str


@dataclass(frozen=True)
class DataInfo:
    """What a stage's data is like.

    words: its vocabulary by number, 0 = padding. epoch_images: training samples in one epoch. vector_dim: of the
    sentence vectors that come with it, 0 where none do. attributes: names of each data set's attributes.
    """

    words: tuple[str, ...]
    epoch_images: int
    vector_dim: int = 0
    attributes: tuple[tuple[str, ...], ...] = ((),)


@dataclass(frozen=True)
class BuildInfo:
    """What a system may know when it is built.

    sources: for each export slot, the `config.json` of that export (``{"system", "config", "plan", ...}``), also
    in a dry run, before the export exists.
    """

    group_size: int
    max_words: int
    extent: DataInfo
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def vocabulary_size(self) -> int:
        return len(self.extent.words)

    def describe(self) -> dict[str, Any]:
        """Plain values for an export's index, which holds the words elsewhere."""
        extent = asdict(self.extent)
        del extent["words"]
        sizes = {"group_size": self.group_size, "max_words": self.max_words, "vocabulary_size": self.vocabulary_size}
        return {**sizes, **extent, "sources": dict(self.sources)}

    @classmethod
    def of(cls, described: Mapping[str, Any], words: Sequence[str]) -> BuildInfo:
        """The plan that `describe` was asked of. Raises KeyError or TypeError for values that are none."""
        attributes = tuple(tuple(names) for names in described["attributes"])
        extent = DataInfo(tuple(words), described["epoch_images"], described["vector_dim"], attributes)
        return cls(described["group_size"], described["max_words"], extent, described["sources"])


NoiseFn = Callable[..., Tensor]
"""``draw(*shape) -> (N, *shape)`` standard normal."""


@dataclass(frozen=True)
class Sample:
    """Generated pictures.

    images: lowest size first, each (N, 3, S, S) in [-1, 1]. attention: one (N, T, H, W) map per attention stage
    (weights of each word at each place), or empty.
    """

    images: tuple[Tensor, ...]
    attention: tuple[Tensor, ...] = ()


class Train(Protocol):
    """All that a system's step sees of the engine."""

    @property
    def images(self) -> int:
        """Images seen by the run before this step, over all workers."""
        ...

    @property
    def step(self) -> int:
        """Steps done before this one."""
        ...

    def forward(self, role: str, fn: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``fn(net, *args)`` inside the role's distributed wrapper; `apply` must follow."""
        ...

    def apply(self, role: str, loss: Tensor) -> None:
        """Backward of a scalar mean over the worker's samples, clip, optimiser step, EMA."""
        ...

    def update(self, role: str, fn: Callable[Concatenate[Any, P], Tensor], *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """`forward` of a function that returns the loss, then `apply`; gives the detached loss."""
        ...

    def frozen(self, *names: str) -> contextlib.AbstractContextManager[Any]:
        """Bare networks (one: the network; more: a tuple), without gradient to their weights, under autocast.

        Names of roles (in their training mode) or of the system's `frozen` networks (in eval mode). Gradients
        still flow to their inputs.
        """
        ...

    def noise(self, *shape: int) -> Tensor:
        """(N, *shape) standard normal: a function of (seed, step, group, place) and of the number of the call."""
        ...

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar: averaged over workers by share and over the steps between two log lines."""
        ...


class System(Protocol):
    """A published model: its networks and its one training step.

    A module ``systems/<name>.py`` holds ``Config`` (a frozen dataclass; defaults are the paper's, with their source)
    and ``build(config: Config, plan: Plan) -> System``, which draws initial weights from torch's global generator and
    touches no device, file or clock.

    roles: trained networks. frozen: networks of earlier exports. sizes: picture sizes that `step` wants, lowest first.
    exports: names among roles and frozen that the stage's export holds (EMA weights where a role has EMA).
    """

    roles: dict[str, Role]
    frozen: dict[str, Frozen]
    sizes: tuple[int, ...]
    exports: tuple[str, ...]

    def step(self, batch: Batch, train: Train) -> None: ...


@runtime_checkable
class SupportsSample(Protocol):
    """A system that draws pictures from captions."""

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        """Pictures of N captions by `nets` (the exported networks, in eval mode), under no_grad by the caller."""
        ...


@runtime_checkable
class SupportsInvert(Protocol):
    """A system that finds the noise of a picture (for the style of one picture with the text of another)."""

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        """z (N, z_dim) of pictures (N, 3, S, S) in [-1, 1] of any size; what `sample` draws first."""
        ...


@runtime_checkable
class SupportsTranslate(Protocol):
    """A system that changes attributes of pictures; it may be trained on several data sets, its domains.

    labels: for each domain, the names of the A attributes that it changes, in the order of the tensors below.
    exclusive: for each domain, whether exactly one of them holds for a picture.
    """

    labels: tuple[tuple[str, ...], ...]
    exclusive: tuple[bool, ...]

    def translate(self, nets: Mapping[str, nn.Module], images: Tensor, attributes: Tensor, domain: int) -> Tensor:
        """Pictures (N, 3, S, S) in [-1, 1] with these attributes (N, A) of a domain instead of their own."""
        ...

    def read(self, nets: Mapping[str, nn.Module], images: Tensor, domain: int) -> Tensor:
        """What it takes the attributes (N, A) of a domain of pictures (N, 3, S, S) in [-1, 1] to be: 0 or 1."""
        ...


@runtime_checkable
class SupportsEmbed(Protocol):
    """A system that places pictures and captions in one space (for R-precision)."""

    def embed_pictures(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        """Codes (N, D) of pictures (N, 3, S, S) in [-1, 1] of any size."""
        ...

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        """Codes (N, D) of captions."""
        ...


def uses_sentence_vectors(system: System, vector_dim: int) -> bool:
    """Return whether the system reads the sentence vectors of its data: it has some and exports no text encoder."""
    return vector_dim > 0 and not _exports_text_encoder(system)


def is_text_conditional(system: System, vector_dim: int) -> bool:
    """Return whether the system generates from captions, by an exported text encoder or by sentence vectors."""
    return vector_dim > 0 or _exports_text_encoder(system)


def _exports_text_encoder(system: System) -> bool:
    return any(name.rpartition(".")[2] == "text" for name in system.exports)
