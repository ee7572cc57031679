"""The interface between systems and engine: what a system declares, and all that it sees of the engine.

A *system* (one file in ``systems/``) is written as if there were one device and one group of samples. The engine
turns it into a distributed run: it wraps each role's network, runs BatchNorm and dropout per group, moves the data to
the device, and averages gradients by each worker's share of the groups.

Shapes: ``N = groups * group_size`` is the number of samples that a worker processes in a step; samples of one group
are contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from t2idist.config.ranges import check_ranges as check_ranges
from t2idist.nn.images import move_images

P = ParamSpec("P")
T = TypeVar("T")


# ------------------------------------------------------------ data
@dataclass(frozen=True)
class Captions:
    """One caption for each of N images."""

    tokens: Tensor
    """(N, max_words) int64, 0 = padding."""
    lengths: Tensor
    """(N,) int64, at least 1."""
    vectors: Tensor
    """(N, D) float32, the sentence vectors of the data; D is 0 if it has none."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Captions:
        return Captions(self.tokens[rows], self.lengths[rows], self.vectors[rows])

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Captions:
        """Move the captions to `device`; the vectors become `dtype`."""
        tokens, lengths = (each.to(device, non_blocking=True) for each in (self.tokens, self.lengths))
        return Captions(tokens, lengths, self.vectors.to(device, dtype, non_blocking=True))

    def repeat_each(self, times: int) -> Captions:
        """Repeat every caption `times` times, the repetitions of one caption contiguous."""
        repeated = (each.repeat_interleave(times, dim=0) for each in (self.tokens, self.lengths, self.vectors))
        return Captions(*repeated)


@dataclass(frozen=True)
class Batch:
    """The samples of one step on one worker."""

    images: tuple[Tensor, ...]
    """Image pyramid, lowest size first, (N, 3, S, S) each: uint8 on the host, floats in [-1, 1] after `to`."""
    captions: Captions
    """One caption of each image."""
    class_ids: Tensor
    """(N,) int64; samples of one class are not negatives of each other."""
    attributes: Tensor
    """(N, A) float32, 1 if the image has the attribute; columns as in `DataInfo.attributes` of the domain."""
    ids: tuple[str, ...]
    """Sample keys."""
    groups: int
    domain: int = 0
    """Index of the stage's data set that all samples are from."""
    partners: tuple[Tensor, ...] = ()
    """Like `images`, a second image of each sample; empty unless the data has pairs or the system `SupportsDomains`."""
    pyramid_sizes: tuple[int, ...] = ()
    """If not empty: `images` and `partners` are one uint8 tensor (N, S, S, 4) each, of which `to` makes these sizes."""

    @property
    def group_size(self) -> int:
        return len(self.class_ids) // self.groups

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [*self.images, *self.partners, *vars(self.captions).values(), self.class_ids, self.attributes]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move the batch to `device`; uint8 images become `dtype` in [-1, 1] there."""
        return replace(
            self,
            images=move_images(self.images, device, dtype, self.pyramid_sizes),
            partners=move_images(self.partners, device, dtype, self.pyramid_sizes),
            pyramid_sizes=(),
            captions=self.captions.to(device, dtype),
            class_ids=self.class_ids.to(device, non_blocking=True),
            attributes=self.attributes.to(device, dtype, non_blocking=True),
        )


# ------------------------------------------------------------ systems
@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate, as a function of images seen.

    - "constant": 1.
    - "exponential": factor ** floor(images / every_images), at least `floor`.
    - "linear": 1 until `start_images`, then linear to `floor` at `end_images`.
    """

    kind: str = "constant"
    factor: float = 1.0
    every_images: float = 1.0
    floor: float = 0.0
    start_images: float = 0.0
    end_images: float = 1.0


@dataclass(frozen=True)
class Adam:
    """Settings of Adam; the defaults are those that most of the systems were published with."""

    lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = Schedule()


@dataclass(frozen=True)
class Pretrained:
    """Weights from a file that initialise part of a network."""

    url: str
    """A safetensors file, or a torch file of plain tensors."""
    sha256: str
    """Hash of the file."""
    key: str
    """The config key of the URL, for error messages."""
    load: Callable[[dict[str, Tensor]], None]
    """Load the tensors by name; raises ValueError if they do not fit."""


@dataclass(frozen=True)
class ReferenceImage:
    """An image beside the data that a system learns from, such as the style of neural style transfer."""

    url: str
    """Path or URL of an image file, or SET#KEY: the sample KEY of a data set that `data.source` could name."""
    key: str
    """The config key of the URL, for error messages."""
    size: int
    """Pixels of a side; the central square of the image is used."""
    load: Callable[[Tensor], None]
    """Take the image, (1, 3, size, size) in [-1, 1]."""


@dataclass
class Role:
    """A trained network with its optimiser, EMA and gradient clipping."""

    net: nn.Module
    optimizer: Adam = field(default_factory=Adam)
    ema_half_life_images: float | None = None
    """Half-life of the exponential moving average of parameters and buffers, in images; None: no EMA."""
    clip_norm: float | None = None
    """Largest 2-norm of the gradients of the parameters whose name starts with `clip_prefix`; None: no clipping."""
    clip_prefix: str = ""
    pretrained: Pretrained | None = None
    images: tuple[ReferenceImage, ...] = ()
    """Images that are loaded before training, on all workers."""
    ema_rampup: float = 0.0
    """Largest half-life of the EMA as a share of the images seen; 0: no limit."""
    ema_copies_statistics: bool = False
    """Whether the EMA network has the live network's BatchNorm statistics instead of its own."""


@dataclass
class Frozen:
    """A network that is used but not trained: no gradient to its weights, which are not in checkpoints."""

    net: nn.Module
    source: str
    """The slot (a key of the stage's `uses`) of the export that has its weights."""
    network: str
    """Name of the network in that export."""
    train_mode: bool = False
    """Whether it is in train mode, not in eval mode: BatchNorm normalizes each group by its own statistics, and its
    running statistics follow them; these are then in checkpoints and exports."""


@dataclass(frozen=True)
class DataInfo:
    """Facts about the data of a stage."""

    words: tuple[str, ...]
    """Vocabulary by token id, 0 = padding."""
    epoch_images: int
    """Training samples of an epoch."""
    vector_dim: int = 0
    """Length of the sentence vectors of the data, 0 if it has none."""
    attributes: tuple[tuple[str, ...], ...] = ((),)
    """Attribute names of each data set."""
    paired: bool = False
    """Every sample is a pair of images."""


@dataclass(frozen=True)
class BuildInfo:
    """All that a system knows when it is built."""

    group_size: int
    max_words: int
    data: DataInfo
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By slot, the index of that export (``{"system", "config", "plan", ...}``); in a dry run even before it exists."""

    @property
    def vocabulary_size(self) -> int:
        return len(self.data.words)

    def require_pairs(self, system: str) -> None:
        """Raise ValueError if groups are too small to pair images with wrong captions."""
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}; {system} pairs images with wrong captions and needs at least 2"
            )

    def describe(self) -> dict[str, Any]:
        """Return plain values for the index of an export, which stores the vocabulary separately."""
        data = asdict(self.data)
        del data["words"]
        sizes = {"group_size": self.group_size, "max_words": self.max_words, "vocabulary_size": self.vocabulary_size}
        return {**sizes, **data, "sources": dict(self.sources)}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], words: Sequence[str]) -> BuildInfo:
        """Invert `describe`. Raises KeyError or TypeError if `described` is not its result."""
        attributes = tuple(tuple(names) for names in described["attributes"])
        paired = described.get("paired", False)  # exports of older versions lack it
        data = DataInfo(tuple(words), described["epoch_images"], described["vector_dim"], attributes, paired)
        return cls(described["group_size"], described["max_words"], data, described["sources"])


NoiseFn = Callable[..., Tensor]
"""``noise(*shape) -> (N, *shape)``, standard normal."""


@dataclass(frozen=True)
class Sample:
    """Generated images."""

    images: tuple[Tensor, ...]
    """Lowest size first, (N, 3, S, S) each, in [-1, 1]."""
    attention: tuple[Tensor, ...] = ()
    """Weight of each word at each position, (N, T, H, W) for each attention stage; may be empty."""


class Train(Protocol):
    """All that the step of a system sees of the engine."""

    def decide(self, rule: Callable[[int, int], T]) -> T:
        """Return ``rule(step, images)`` of the steps done and the images seen, over all workers, before this step.

        A step depends on these numbers in no other way: one that is recorded is repeated while its decisions are equal.
        """
        ...

    def forward(self, role: str, fn: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``fn(net, *args)`` inside the role's distributed wrapper; `apply` must follow."""
        ...

    def apply(self, role: str, loss: Tensor) -> None:
        """Back-propagate a scalar mean over the worker's samples; then clip, step the optimiser, update the EMA."""
        ...

    def update(self, role: str, fn: Callable[Concatenate[Any, P], Tensor], *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Run `forward` with a function that returns the loss, then `apply`; returns the detached loss."""
        ...

    def frozen(self, *names: str) -> contextlib.AbstractContextManager[Any]:
        """Enter a context with unwrapped networks, under autocast and without gradient to their weights.

        Gradients still flow to their inputs.

        Args:
            names: Roles (their networks stay in train mode) or `System.frozen` networks (in the mode they declare).

        Returns:
            The network if one name is given, else a tuple.
        """
        ...

    def noise(self, *shape: int) -> Tensor:
        """Return (N, *shape) standard normal: a function of (seed, step, group, position) and of the call's index."""
        ...

    def memory(self, name: str) -> Tensor:
        """Return the tensor (groups, *shape) that `KeepsMemory.memory` declares; write to it in place."""
        ...

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar: averaged over workers by share and over the steps between two log lines."""
        ...


class System(Protocol):
    """A published model: its networks and its training step.

    A module ``systems/<name>.py`` defines ``Config`` (a frozen dataclass whose defaults are the paper's, with their
    source) and ``build(config: Config, info: BuildInfo) -> System``, which draws initial weights from torch's global
    generator and uses no device, file or clock.
    """

    roles: dict[str, Role]
    """Trained networks."""
    frozen: dict[str, Frozen]
    """Networks of earlier exports."""
    sizes: tuple[int, ...]
    """Image sizes that `step` needs, lowest first."""
    exports: tuple[str, ...]
    """Roles, frozen networks, or parts of them ("damsm.text") that the stage exports; EMA weights if a role has EMA."""

    def step(self, batch: Batch, train: Train) -> None:
        """Train on one batch."""
        ...


@runtime_checkable
class KeepsMemory(Protocol):
    """A system whose groups keep tensors from step to step, other than weights; they are zeros at first."""

    memory: Mapping[str, tuple[int, ...]]
    """Shape of each tensor of one group, by name."""


@runtime_checkable
class SupportsSample(Protocol):
    """A system that generates images from captions."""

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        """Generate images for N captions. `nets`: the exported networks, in eval mode; the caller sets no_grad."""
        ...


@runtime_checkable
class SupportsInvert(Protocol):
    """A system that finds the noise of an image, to combine the style of an image with another text."""

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        """Return z (N, z_dim), the first noise of `sample`, of images (N, 3, S, S) in [-1, 1] of any size."""
        ...


@runtime_checkable
class SupportsTranslate(Protocol):
    """A system that changes attributes of images; it may be trained on several data sets, its domains."""

    labels: tuple[tuple[str, ...], ...]
    """For each domain, the names of its A attributes, in the order of the tensors' columns."""
    exclusive: tuple[bool, ...]
    """For each domain, whether exactly one attribute holds for an image."""

    def translate(self, nets: Mapping[str, nn.Module], images: Tensor, attributes: Tensor, domain: int) -> Tensor:
        """Return images (N, 3, S, S) in [-1, 1] changed to have the given attributes (N, A) of a domain."""
        ...

    def read(self, nets: Mapping[str, nn.Module], images: Tensor, domain: int) -> Tensor:
        """Classify images (N, 3, S, S) in [-1, 1]: (N, A), 0 or 1 for each attribute of a domain."""
        ...


@runtime_checkable
class SupportsDomains(Protocol):
    """A system that translates images between two domains; each of its samples has an image of both.

    `Batch.images` are of the first domain and `Batch.partners` of the second.
    """

    domains: tuple[str, str]
    """Names of the domains; unless the data has pairs, attributes of the images in them."""
    paired: bool
    """The two images of a sample belong together, so the data must have pairs; else each is drawn by itself."""
    targets: tuple[int, ...]
    """Index of each domain that images can be translated to, from the other one."""

    def to_domain(self, nets: Mapping[str, nn.Module], images: Tensor, target: int) -> Tensor:
        """Translate images (N, 3, S, S) in [-1, 1] of the other domain to domain `target`."""
        ...


@runtime_checkable
class SupportsEmbed(Protocol):
    """A system that embeds images and captions in one space, for R-precision."""

    def embed_images(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        """Embed images (N, 3, S, S) in [-1, 1] of any size: (N, D)."""
        ...

    def embed_captions(self, nets: Mapping[str, nn.Module], captions: Captions) -> Tensor:
        """Embed captions: (N, D)."""
        ...


def uses_sentence_vectors(system: System, vector_dim: int) -> bool:
    """Return whether the system reads the sentence vectors of its data: it has some and exports no text encoder."""
    return vector_dim > 0 and not _exports_text_encoder(system)


def is_text_conditional(system: System, vector_dim: int) -> bool:
    """Return whether the system generates from captions, by an exported text encoder or by sentence vectors."""
    return vector_dim > 0 or _exports_text_encoder(system)


def _exports_text_encoder(system: System) -> bool:
    return any(name.rpartition(".")[2] == "text" for name in system.exports)
