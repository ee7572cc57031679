"""StarGAN: one generator for all attributes of one or several data sets (Choi et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Frozen, Role, Schedule, Train, check_ranges
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn.precision import upcast
from t2idist.nn.stargan import PatchDiscriminator, TranslationGenerator


@dataclass(frozen=True)
class Domain:
    """The labels of one data set."""

    attributes: tuple[str, ...] = ()
    """Names of the attributes to learn; none: all that the data set has."""
    exclusive: bool = False
    """Exactly one attribute holds for an image (an expression, say): softmax instead of a sigmoid for each."""


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CelebA at 128 pixels, else the released ones.

    The gradient penalty is on the gradient of the sum over patches, as in the released code: the paper does not
    specify it, and the weights are tuned to it, for 2x2 patches. At 64 pixels, 4 layers learnt hardly more than to
    satisfy the class head; 5 also learnt hair and glasses, 6 (one patch) hats as well.
    """

    domains: tuple[Domain, ...] = ()
    """One for each data set of the stage, in their order; none: all attributes of every set, not exclusive."""
    image_size: int = 128
    generator_width: int = 64
    residuals: int = 6
    modulated: bool = False
    """Not in the paper; see `TranslationGenerator`."""
    masked: bool = False
    """Not in the paper; see `TranslationGenerator`."""
    discriminator_width: int = 64
    layers: int = 6
    """Down-sampling layers of the discriminator."""
    class_weight: float = 1.0
    """lambda_cls, section 3.1."""
    reconstruction_weight: float = 10.0
    """lambda_rec, section 3.1."""
    penalty_weight: float = 10.0
    """lambda_gp, section 4."""
    discriminator_steps: int = 5
    """n_critic, section 5.3: the generator is updated in every fifth step."""
    generator_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    decay_start_images: float = 1_600_000.0
    """The learning rate falls linearly from here; released code: in the last 100,000 of 200,000 steps of 16 images."""
    decay_end_images: float = 3_200_000.0
    """The learning rate is 0 here; should be the stage's budget."""
    compat: Literal["", "authors"] = ""
    """"authors": a thousandth of the decay, as in the released code."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_1="image_size generator_width discriminator_width layers discriminator_steps",
            at_least_0="residuals class_weight reconstruction_weight penalty_weight decay_start_images",
            above_0="generator_lr discriminator_lr decay_end_images",
        )


class StarGan:
    """The system. Exports: "generator", and "discriminator" for its class head."""

    def __init__(self, config: Config, domains: Sequence[Domain], names: Sequence[tuple[str, ...]]) -> None:
        self.config = config
        self.labels = tuple(domain.attributes for domain in domains)
        self.exclusive = tuple(domain.exclusive for domain in domains)
        self._columns = [
            torch.tensor([n.index(a) for a in labels]) for labels, n in zip(self.labels, names, strict=True)
        ]
        counts = [len(names) for names in self.labels]
        self._slices = [slice(sum(counts[:d]), sum(counts[: d + 1])) for d in range(len(counts))]
        self._classes = sum(counts)
        mask = len(counts) if len(counts) > 1 else 0  # eq. 7: one element for each domain, if there are several
        floor = 0.999 if config.compat == "authors" else 0.0
        decay = Schedule(
            "linear", floor=floor, start_images=config.decay_start_images, end_images=config.decay_end_images
        )
        dims = config.generator_width, self._classes + mask, config.residuals
        generator = TranslationGenerator(*dims, modulated=config.modulated, masked=config.masked)
        discriminator = PatchDiscriminator(config.discriminator_width, config.image_size, self._classes, config.layers)
        self.roles = {
            "generator": Role(generator, Adam(lr=config.generator_lr, schedule=decay)),
            "discriminator": Role(discriminator, Adam(lr=config.discriminator_lr, schedule=decay)),
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("generator", "discriminator")

    def _columns_on(self, device: torch.device, domain: int) -> Tensor:
        """Return the columns of a domain's labels on the device, copied there once."""
        if self._columns[domain].device != device:
            self._columns[domain] = self._columns[domain].to(device)
        return self._columns[domain]

    def step(self, batch: Batch, train: Train) -> None:
        real, domain = batch.images[-1], batch.domain
        own = batch.attributes.index_select(1, self._columns_on(batch.attributes.device, domain))
        target = shuffled(own, train.noise(1).squeeze(1), batch.groups)
        target_condition, own_condition = self._condition(target, domain), self._condition(own, domain)
        mixing = torch.special.ndtr(train.noise(1).squeeze(1))  # uniform in [0, 1]
        if train.decide(self._updates_generator):
            fake, reconstructed = train.forward("generator", _cycle, real, target_condition, own_condition)
        else:
            with torch.no_grad(), train.frozen("generator") as net:
                fake, reconstructed = net(real, target_condition), None
        self._update_discriminator(real, fake.detach(), own, mixing, domain, train)
        if reconstructed is not None:
            train.apply("generator", self._generator_loss(real, fake, reconstructed, target, domain, train))

    def _updates_generator(self, step: int, images: int) -> bool:
        round_number = step // len(self.labels) + 1  # data sets take turns within a round
        return round_number % self.config.discriminator_steps == 0

    def _update_discriminator(
        self, real: Tensor, fake: Tensor, own: Tensor, mixing: Tensor, domain: int, train: Train
    ) -> None:
        parts = train.forward("discriminator", self._discriminator_losses, real, fake, own, mixing, domain)
        names = ("real", "fake", "class", "penalty")
        weights = (1.0, 1.0, self.config.class_weight, self.config.penalty_weight)
        train.apply("discriminator", torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum())
        for name, part in zip(names, parts, strict=True):
            train.report(f"discriminator/{name}", part)

    def _discriminator_losses(
        self, net: PatchDiscriminator, real: Tensor, fake: Tensor, own: Tensor, mixing: Tensor, domain: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Terms of the discriminator's loss (eq. 5 and 8): real images, generated images, classes, gradient penalty."""
        scores, logits = net(torch.cat([real, fake]))
        real_scores, fake_scores = upcast(scores).chunk(2)
        return (
            -real_scores.mean(),
            fake_scores.mean(),
            self._class_loss(logits[: len(real)], own, domain),
            gradient_penalty(net.scores, real, fake, mixing),
        )

    def _generator_loss(
        self, real: Tensor, fake: Tensor, reconstructed: Tensor, target: Tensor, domain: int, train: Train
    ) -> Tensor:
        """Loss of the generator (eq. 6): adversarial, of classes, and reconstruction."""
        with train.frozen("discriminator") as discriminator:
            scores, logits = discriminator(fake)
        adversarial = -upcast(scores).mean()
        classes = self._class_loss(logits, target, domain)
        reconstruction = (real - reconstructed).abs().mean()
        train.report("generator/adversarial", adversarial)
        train.report("generator/class", classes)
        train.report("generator/reconstruction", reconstruction)
        return adversarial + self.config.class_weight * classes + self.config.reconstruction_weight * reconstruction

    def _class_loss(self, logits: Tensor, labels: Tensor, domain: int) -> Tensor:
        """Cross-entropy of the domain's columns of logits (N, classes), summed over labels (N, A), mean over images."""
        own = upcast(logits)[:, self._slices[domain]]
        if self.exclusive[domain]:
            return -(labels * F.log_softmax(own, dim=1)).sum(1).mean()
        return F.binary_cross_entropy_with_logits(own, labels, reduction="none").sum(1).mean()

    def _condition(self, labels: Tensor, domain: int) -> Tensor:
        """Return the generator's condition: labels (N, A) in their domain's columns, zeros elsewhere, and the mask."""
        if len(self.labels) == 1:
            return labels
        condition = labels.new_zeros(labels.shape[0], self._classes + len(self.labels))
        condition[:, self._slices[domain]] = labels
        condition[:, self._classes + domain] = 1
        return condition

    def translate(self, nets: Mapping[str, nn.Module], images: Tensor, attributes: Tensor, domain: int) -> Tensor:
        out: Tensor = nets["generator"](images, self._condition(attributes, domain))
        return out

    def read(self, nets: Mapping[str, nn.Module], images: Tensor, domain: int) -> Tensor:
        logits: Tensor = nets["discriminator"](images)[1][:, self._slices[domain]]
        if self.exclusive[domain]:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(images.dtype)
        return (logits > 0).to(images.dtype)


def shuffled(labels: Tensor, keys: Tensor, groups: int) -> Tensor:
    """Permute labels (N, A) within each group, in the order of keys (N,)."""
    order = keys.view(groups, -1).argsort(dim=1, stable=True)
    starts = torch.arange(0, len(labels), order.shape[1], device=labels.device)
    return labels[(order + starts[:, None]).flatten()]


def _cycle(net: TranslationGenerator, real: Tensor, target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    fake: Tensor = net(real, target)
    return fake, net(fake, own)


def build(config: Config, info: BuildInfo) -> StarGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if not 0 <= config.decay_start_images < config.decay_end_images:
        raise ValueError(
            f"decay_end_images is {config.decay_end_images:g}; it must be above decay_start_images, "
            f"{config.decay_start_images:g}"
        )
    if config.layers < 2 or config.image_size % 2**config.layers:
        raise ValueError(
            f"image_size is {config.image_size} and layers is {config.layers}; layers must be at least 2, and the size "
            "a multiple of 2 to their power"
        )
    domains, known = config.domains, info.data.attributes
    if known and domains and len(known) != len(domains):
        raise ValueError(
            f"domains has {len(domains)} entries and the stage has {len(known)} data sets (data.source and "
            "data.beside); give one entry for each data set, or none"
        )
    domains = domains or tuple(Domain() for _ in known)
    names = known or tuple(domain.attributes for domain in domains)  # if unknown, trust the config
    if not domains or not all(names):
        raise ValueError("stargan changes attributes, and the data has none")
    selected = [_select_attributes(index, *pair) for index, pair in enumerate(zip(domains, names, strict=True))]
    return StarGan(config, selected, names)


def _select_attributes(index: int, domain: Domain, names: tuple[str, ...]) -> Domain:
    """Fill in the attributes of a domain and check them against those of its data set, `names`."""
    attributes = domain.attributes or names
    for name in attributes:
        if name not in names:
            raise ValueError(
                f"domains[{index}].attributes: '{name}' is not an attribute of the data: {', '.join(names)}"
            )
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"domains[{index}].attributes: {', '.join(attributes)}: one is given twice")
    if domain.exclusive and len(attributes) < 2:
        raise ValueError(f"domains[{index}].exclusive: it needs at least two attributes")
    return Domain(attributes, domain.exclusive)
