"""CycleGAN: translation between two domains without pairs (Zhu et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from t2idist.contract import Batch, BuildInfo, Frozen, Role, Train, check_ranges
from t2idist.losses.adversarial import half_loss, patch_losses
from t2idist.nn.image_translation import PatchGan, ResnetGenerator, patch_logits
from t2idist.nn.init import normal_
from t2idist.systems._options import GanOptions


@dataclass(frozen=True)
class Config(GanOptions):
    """Defaults: the paper's settings for 256 pixels and, where it states none, the released ones (horse2zebra)."""

    domains: tuple[str, ...] = ()
    """Two attributes of the data: images with the first are translated to images with the second, and back; none: the
    data has only two attributes, or pairs."""
    image_size: int = 256
    """A multiple of 4."""
    generator_width: int = 64
    """Appendix 7.2: c7s1-64."""
    residuals: int = 9
    """Appendix 7.2: 9 blocks for 256 pixels, 6 for 128."""
    discriminator_width: int = 64
    discriminator_layers: int = 3
    """Strided convolutions; 3 for patches of 70x70 pixels (appendix 7.2)."""
    cycle_weight: float = 10.0
    """lambda, section 3.3."""
    identity_weight: float = 0.5
    """Of the loss of images that are in the target domain already, relative to `cycle_weight`: section 5.2, as
    released."""
    pool_size: int = 50
    """Generated images that a group keeps for the discriminators (section 4); 0: they see the newest only."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    adversarial_loss: Literal["bce", "hinge", "least_squares"] = "least_squares"
    """Section 4."""
    discriminator_norm: Literal["batch", "group", "instance", "spectral", "none"] = "instance"
    """As released."""
    decay_start_images: float = 133_400.0
    """Section 4: constant for 100 epochs; an epoch of horse2zebra has 1,334 images of each domain."""
    decay_end_images: float = 266_800.0
    """Section 4: linear to zero over the next 100 epochs; should be the stage's budget."""
    decay_floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            at_least_1="image_size generator_width discriminator_width discriminator_layers",
            at_least_0="residuals cycle_weight identity_weight pool_size",
            above_0="generator_lr discriminator_lr",
        )


class Generators(nn.Module):
    """Both generators of the cycle."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.a_to_b = ResnetGenerator(config.generator_width, config.residuals)
        self.b_to_a = ResnetGenerator(config.generator_width, config.residuals)


class CycleGan:
    """The system. Exports: the generators, "a_to_b" and "b_to_a"."""

    paired = False
    targets = (1, 0)

    def __init__(self, config: Config, domains: tuple[str, str], group_size: int) -> None:
        self.config, self.domains, self._group_size = config, domains, group_size
        self.sizes = (config.image_size,)
        self.frozen: dict[str, Frozen] = {}
        generators = Generators(config)
        normal_(generators)
        self.roles = {"generator": Role(generators, config.adam(config.generator_lr))}
        for domain in ("a", "b"):
            norm = "instance" if config.discriminator_norm == "instance" else "batch"
            net = PatchGan(3, config.discriminator_width, config.discriminator_layers, norm)
            config.finish_discriminator(net, normal_)
            self.roles[f"discriminator_{domain}"] = Role(net, config.adam(config.discriminator_lr))
        self.exports = ("generator.a_to_b", "generator.b_to_a")
        images = (config.pool_size, 3, config.image_size, config.image_size)
        pools = {f"pool_{domain}": images for domain in ("a", "b")} if config.pool_size else {}
        self.memory = {**pools, **config.memory_of(self.roles)}

    def step(self, batch: Batch, train: Train) -> None:
        real = {"a": batch.images[-1], "b": batch.partners[-1]}
        fake, losses = train.forward("generator", self._cycle, real["a"], real["b"])
        for domain in ("a", "b"):
            losses[f"adversarial_{domain}"] = self.config.adversarial_loss_of(
                train, f"discriminator_{domain}", patch_logits, fake[domain], real[domain], batch.groups
            )
        for name, value in losses.items():
            train.report(f"generator/{name}", value)
        weights = {
            "cycle": self.config.cycle_weight,
            "identity": self.config.cycle_weight * self.config.identity_weight,
        }
        train.apply(
            "generator", torch.stack([weights.get(name[:-2], 1.0) * value for name, value in losses.items()]).sum()
        )
        for domain in ("a", "b"):
            seen = self._exchange(f"pool_{domain}", fake[domain].detach(), train)
            self.config.update_discriminator(
                train, f"discriminator_{domain}", patch_losses, half_loss, patch_logits, real[domain], seen
            )

    def _cycle(self, net: Generators, real_a: Tensor, real_b: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Translate there and back (N, 3, S, S): images by domain, and the L1 losses (eq. 2 and section 5.2)."""
        fake_b, fake_a = net.a_to_b(real_a), net.b_to_a(real_b)
        losses = {
            "cycle_a": (net.b_to_a(fake_b) - real_a).abs().mean(),
            "cycle_b": (net.a_to_b(fake_a) - real_b).abs().mean(),
        }
        if self.config.identity_weight:
            losses["identity_a"] = (net.b_to_a(real_a) - real_a).abs().mean()
            losses["identity_b"] = (net.a_to_b(real_b) - real_b).abs().mean()
        return {"a": fake_a, "b": fake_b}, losses

    def _exchange(self, name: str, fake: Tensor, train: Train) -> Tensor:
        """Return each image (N, 3, S, S) or, half of the time, an earlier one of its group, which it replaces.

        The pool of Shrivastava et al. 2017, section 2.3, as released: an image is stored while there is room.
        """
        if not self.config.pool_size:
            return fake
        pool = train.memory(name)  # (groups, pool_size, 3, S, S)
        draws = torch.special.ndtr(train.noise(2)).view(len(pool), -1, 2)  # uniform in [0, 1]
        slots = (draws[..., 0] * self.config.pool_size).long().clamp(max=self.config.pool_size - 1)
        groups = torch.arange(len(pool), device=fake.device)
        seen = fake.nan_to_num().view(len(pool), -1, *fake.shape[1:]).clone()  # a step that diverges leaves no trace
        first = train.decide(lambda step, images: min(step * self._group_size, self.config.pool_size))
        for position in range(self._group_size):
            new = seen[:, position].clone()
            stored = first + position
            if stored < self.config.pool_size:
                pool[:, stored] = new
                continue
            slot = slots[:, position]
            old = pool[groups, slot]
            exchanged = (draws[:, position, 1] > 0.5)[:, None, None, None]
            seen[:, position] = torch.where(exchanged, old, new)
            pool[groups, slot] = torch.where(exchanged, new, old)
        return seen.view_as(fake)

    def to_domain(self, nets: Mapping[str, nn.Module], images: Tensor, target: int) -> Tensor:
        out: Tensor = nets["a_to_b" if target else "b_to_a"](images)
        return out


def build(config: Config, info: BuildInfo) -> CycleGan:
    """Build the system with new weights. Raises ValueError, naming the key, if the config is invalid."""
    if config.image_size % 4:
        raise ValueError(f"image_size is {config.image_size}; it must be a multiple of 4")
    known = info.data.attributes[0] if info.data.attributes else config.domains or ("A", "B")
    if info.data.paired:
        known = config.domains or ("A", "B")
    domains = config.domains or known
    if unknown := [name for name in domains if name not in known]:
        raise ValueError(
            f"domains: '{unknown[0]}' is not an attribute of the data: {', '.join(known) or 'it has none'}"
        )
    if len(domains) != 2 or domains[0] == domains[1]:
        given = f"{', '.join(config.domains)}" if config.domains else f"none, and the data has {len(known)} attributes"
        raise ValueError(f"domains: {given}; give two different attributes of the data: {', '.join(known) or 'none'}")
    return CycleGan(config, (domains[0], domains[1]), info.group_size)
