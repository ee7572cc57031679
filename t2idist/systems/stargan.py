"""StarGAN: one generator for all attributes, of one data set or several (Choi et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.contract import Adam, Batch, BuildInfo, Frozen, Role, Schedule, Train
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn.precision import upcast
from t2idist.nn.stargan import PatchDiscriminator, TranslationGenerator


@dataclass(frozen=True)
class Domain:
    """The labels of one data set.

    attributes: names of those that are learnt (none given: all that the set has). exclusive: exactly one of them holds
    for a picture (an expression, say), which is learnt by softmax instead of one yes or no for each.
    """

    attributes: tuple[str, ...] = ()
    exclusive: bool = False


@dataclass(frozen=True)
class Config:
    """Defaults: the paper's settings for CelebA at 128 pixels, else the released ones.

    domains: one for each data set of the stage, in their order (none given: all attributes of every set, as yes or no).
    decay_start_images, decay_end_images: between them the learning rate falls to 0; the end should be the stage's
    budget. The slope that is penalised is that of the sum over the patches, as in the released code: the paper does not
    say, and the weights are tuned to it. They suit 2x2 patches: at 64 pixels, 4 layers gave faces little but what fools
    the class head, 5 gave them hair and glasses, 6 (one patch) hats as well. compat: "authors" takes a thousandth of
    the decay, as the released code does.
    """

    domains: tuple[Domain, ...] = ()
    image_size: int = 128
    generator_width: int = 64
    residuals: int = 6
    modulated: bool = False  # these two are not StarGAN's own: see TranslationGenerator
    masked: bool = False
    discriminator_width: int = 64
    layers: int = 6
    class_weight: float = 1.0  # lambda_cls, section 3.1
    reconstruction_weight: float = 10.0  # lambda_rec, section 3.1
    penalty_weight: float = 10.0  # lambda_gp, section 4
    discriminator_steps: int = 5  # n_critic, section 5.3: the generator's turn comes every fifth time
    generator_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    decay_start_images: float = 1_600_000.0  # released code: the last 100,000 of 200,000 steps of 16 images
    decay_end_images: float = 3_200_000.0
    compat: str = ""


class StarGan:
    """The system; its export holds "generator" and "discriminator", whose class head reads a picture's labels."""

    def __init__(self, config: Config, domains: Sequence[Domain], names: Sequence[tuple[str, ...]]) -> None:
        self.config = config
        self.labels = tuple(domain.attributes for domain in domains)
        self.exclusive = tuple(domain.exclusive for domain in domains)
        self._columns = [[n.index(a) for a in labels] for labels, n in zip(self.labels, names, strict=True)]
        counts = [len(names) for names in self.labels]
        self._slices = [slice(sum(counts[:d]), sum(counts[: d + 1])) for d in range(len(counts))]
        self._classes = sum(counts)
        mask = len(counts) if len(counts) > 1 else 0  # eq. 7: the mask vector says whose labels are known
        floor = 0.999 if config.compat == "authors" else 0.0
        decay = Schedule(
            "linear", floor=floor, start_images=config.decay_start_images, end_images=config.decay_end_images
        )
        dims = config.generator_width, self._classes + mask, config.residuals
        generator = TranslationGenerator(*dims, modulated=config.modulated, masked=config.masked)
        judge = PatchDiscriminator(config.discriminator_width, config.image_size, self._classes, config.layers)
        self.roles = {
            "generator": Role(generator, Adam(lr=config.generator_lr, schedule=decay)),
            "discriminator": Role(judge, Adam(lr=config.discriminator_lr, schedule=decay)),
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (config.image_size,)
        self.exports = ("generator", "discriminator")

    def step(self, batch: Batch, train: Train) -> None:
        real, domain = batch.images[-1], batch.domain
        own = batch.attributes[:, self._columns[domain]]
        wanted = shuffled(own, train.noise(1).squeeze(1), batch.groups)
        there, back = self._condition(wanted, domain), self._condition(own, domain)
        mixing = torch.special.ndtr(train.noise(1).squeeze(1))  # uniform in [0, 1]
        turn = train.step // len(self.labels) + 1  # every data set has its own at each turn
        generator_too = turn % self.config.discriminator_steps == 0
        if generator_too:
            fake, again = train.forward("generator", _there_and_back, real, there, back)
        else:
            with torch.no_grad(), train.frozen("generator") as net:
                fake, again = net(real, there), None
        self._judge(real, fake.detach(), own, mixing, domain, train)
        if again is not None:
            train.apply("generator", self._generator_loss(real, fake, again, wanted, domain, train))

    def _judge(self, real: Tensor, fake: Tensor, own: Tensor, mixing: Tensor, domain: int, train: Train) -> None:
        parts = train.forward("discriminator", self._verdict, real, fake, own, mixing, domain)
        names = ("real", "fake", "class", "penalty")
        weights = (1.0, 1.0, self.config.class_weight, self.config.penalty_weight)
        train.apply("discriminator", torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum())
        for name, part in zip(names, parts, strict=True):
            train.report(f"discriminator/{name}", part)

    def _verdict(
        self, net: PatchDiscriminator, real: Tensor, fake: Tensor, own: Tensor, mixing: Tensor, domain: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Terms of the discriminator's loss (eq. 5, 8): on real and generated pictures, of classes, and the penalty."""
        scores, logits = net(torch.cat([real, fake]))
        real_scores, fake_scores = upcast(scores).chunk(2)
        return (
            -real_scores.mean(),
            fake_scores.mean(),
            self._class_loss(logits[: len(real)], own, domain),
            gradient_penalty(net.scores, real, fake, mixing),
        )

    def _generator_loss(
        self, real: Tensor, fake: Tensor, again: Tensor, wanted: Tensor, domain: int, train: Train
    ) -> Tensor:
        """Equation 6."""
        with train.frozen("discriminator") as judge:
            scores, logits = judge(fake)
        adversarial = -upcast(scores).mean()
        classes = self._class_loss(logits, wanted, domain)
        reconstruction = (real - again).abs().mean()
        train.report("generator/adversarial", adversarial)
        train.report("generator/class", classes)
        train.report("generator/reconstruction", reconstruction)
        return adversarial + self.config.class_weight * classes + self.config.reconstruction_weight * reconstruction

    def _class_loss(self, logits: Tensor, labels: Tensor, domain: int) -> Tensor:
        """Cross-entropy of a set's own logits (N, classes), summed over its labels (N, A), mean over pictures."""
        own = upcast(logits)[:, self._slices[domain]]
        if self.exclusive[domain]:
            return -(labels * F.log_softmax(own, dim=1)).sum(1).mean()
        return F.binary_cross_entropy_with_logits(own, labels, reduction="none").sum(1).mean()

    def _condition(self, labels: Tensor, domain: int) -> Tensor:
        """What the generator is told: labels (N, A) in their domain's place, zeros in the others', and the mask."""
        if len(self.labels) == 1:
            return labels
        whole = labels.new_zeros(labels.shape[0], self._classes + len(self.labels))
        whole[:, self._slices[domain]] = labels
        whole[:, self._classes + domain] = 1
        return whole

    def translate(self, nets: Mapping[str, nn.Module], images: Tensor, attributes: Tensor, domain: int) -> Tensor:
        out: Tensor = nets["generator"](images, self._condition(attributes, domain))
        return out

    def read(self, nets: Mapping[str, nn.Module], images: Tensor, domain: int) -> Tensor:
        logits: Tensor = nets["discriminator"](images)[1][:, self._slices[domain]]
        if self.exclusive[domain]:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(images.dtype)
        return (logits > 0).to(images.dtype)


def shuffled(labels: Tensor, keys: Tensor, groups: int) -> Tensor:
    """Labels (N, A), each group's own in another order: that of its keys (N,)."""
    order = keys.view(groups, -1).argsort(dim=1, stable=True)
    starts = torch.arange(0, len(labels), order.shape[1], device=labels.device)
    return labels[(order + starts[:, None]).flatten()]


def _there_and_back(net: TranslationGenerator, real: Tensor, there: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    fake: Tensor = net(real, there)
    return fake, net(fake, back)


def build(config: Config, plan: BuildInfo) -> StarGan:
    """The system with newly drawn weights. Raises ValueError, naming the key, where the config cannot be had."""
    if config.compat not in ("", "authors"):
        raise ValueError(f"compat is '{config.compat}'; it must be '' or 'authors'")
    if config.discriminator_steps < 1:
        raise ValueError(f"discriminator_steps is {config.discriminator_steps}; it must be at least 1")
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
    domains, known = config.domains, plan.extent.attributes
    if known and domains and len(known) != len(domains):
        raise ValueError(
            f"domains has {len(domains)} entries and the stage has {len(known)} data sets (data.source and "
            "data.beside); give one for each, or none"
        )
    domains = domains or tuple(Domain() for _ in known)
    names = known or tuple(domain.attributes for domain in domains)  # data that is not there yet is taken at its word
    if not domains or not all(names):
        raise ValueError("attributes are what stargan changes, and the data has none")
    chosen = [_chosen(number, *pair) for number, pair in enumerate(zip(domains, names, strict=True))]
    return StarGan(config, chosen, names)


def _chosen(number: int, domain: Domain, names: tuple[str, ...]) -> Domain:
    """The domain with its attributes, which are some of its data set's."""
    attributes = domain.attributes or names
    for name in attributes:
        if name not in names:
            raise ValueError(f"domains[{number}].attributes: '{name}' is not one of the data's: {', '.join(names)}")
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"domains[{number}].attributes: {', '.join(attributes)}: one stands twice")
    if domain.exclusive and len(attributes) < 2:
        raise ValueError(f"domains[{number}].exclusive: it takes two attributes and more to choose from")
    return Domain(attributes, domain.exclusive)
