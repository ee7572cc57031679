"""What AttnGAN, MirrorGAN, DM-GAN and StackGAN++ share: a tree of generators, and a discriminator for every size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2idist.contract import Batch, BuildInfo, Captions, Frozen, NoiseFn, Role, Sample, Train, check_ranges
from t2idist.losses.adversarial import (
    LogitsOf,
    attngan_discriminator_loss,
    conditional_logits,
    joint_logits,
    joint_losses,
    matching_aware_loss,
    matching_aware_losses,
)
from t2idist.losses.image import kl_divergence
from t2idist.losses.matching import Gammas, damsm_loss, wrong_pairs
from t2idist.losses.released import neighbour_losses
from t2idist.nn import tree
from t2idist.nn.discriminators import AttnDiscriminator
from t2idist.nn.image_encoders import damsm_image_encoder
from t2idist.nn.init import orthogonal_
from t2idist.nn.text_encoders import padding_mask, text_encoder_from_export, unit_scale
from t2idist.nn.tree import AttentionGenerator, AttentionStage, GeneratorOutput, MemoryStage, pyramid
from t2idist.systems._options import GanOptions


@dataclass(frozen=True)
class TreeConfig(GanOptions):
    """Settings of every tree; each system overrides the defaults that differ in its paper."""

    generator_width: int = 32
    """Channels of the first branch (GF_DIM in the released code)."""
    discriminator_width: int = 64
    """Channels after the first layer of each discriminator (DF_DIM)."""
    residuals: int = 2
    """Residual blocks of each later stage (R_NUM)."""
    branches: int = 3
    base_size: int = 64
    """Pixels of the first branch; every branch doubles them."""
    z_dim: int = 100
    condition_dim: int = 100
    """Dimensions of the conditioning Gaussian."""
    kl_weight: float = 1.0
    """Weight of the KL divergence of the conditioning Gaussian."""
    generator_lr: float = 2e-4
    discriminator_lr: float = 2e-4
    ema_half_life_images: float = 13856.0
    """Half-life of the generator's EMA; 13856: 0.999 for each step of 20 images."""
    unit_text: bool = False
    """Scale text vectors by `unit_scale`; not published."""
    skip_excitation: bool = False
    """Let the first map of the generator scale the features of its later branches (FastGAN)."""
    compat: Literal["", "authors"] = ""
    """"authors": train as the released code, in what docs/released_code.md lists."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            self,
            at_least_1="generator_width discriminator_width branches z_dim condition_dim base_size",
            at_least_0="residuals kl_weight",
            above_0="generator_lr discriminator_lr ema_half_life_images",
        )
        if self.skip_excitation and self.branches == 1:
            raise ValueError("skip_excitation: it scales later branches, and there is one branch")


class TreeGan:
    """A generator and one discriminator for every image size."""

    def __init__(
        self,
        config: TreeConfig,
        sizes: tuple[int, ...],
        generator: nn.Module,
        make_discriminator: Callable[[int], nn.Module],
    ) -> None:
        self.sizes = sizes
        self.options: GanOptions = config
        orthogonal_(generator)
        self.roles = {
            "generator": Role(
                generator,
                config.adam(config.generator_lr),
                config.ema_half_life_images,
                ema_rampup=config.ema_rampup,
                ema_copies_statistics=config.compat == "authors",
            )
        }
        for size in sizes:
            discriminator = make_discriminator(size)
            config.finish_discriminator(discriminator, orthogonal_)
            self.roles[f"discriminator_{size}"] = Role(discriminator, config.adam(config.discriminator_lr))
        self.memory = config.memory_of(self.roles)

    def update_discriminators(
        self,
        train: Train,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        losses: Callable[..., Any],
        combine: Callable[[Any], Tensor],
        logits_of: LogitsOf,
        *args: Any,
        suffix: str = "",
    ) -> None:
        """Call `GanOptions.update_discriminator` for every image size.

        Args:
            real: Image pyramid, lowest size first.
            fake: Generated images of the same sizes.
        """
        for size, real_images, fake_images in zip(self.sizes, real, fake, strict=True):
            role = f"discriminator_{size}"
            self.options.update_discriminator(
                train, role, losses, combine, logits_of, real_images, fake_images, *args, suffix=suffix
            )

    def add_adversarial_losses(
        self, total: Tensor, train: Train, batch: Batch, fake: Sequence[Tensor], logits_of: LogitsOf, *condition: Tensor
    ) -> Tensor:
        """Add the loss of every size (`GanOptions.adversarial_loss_of`) to `total`, and report each."""
        for size, images, real in zip(self.sizes, fake, batch.images, strict=True):
            adversarial = self.options.adversarial_loss_of(
                train, f"discriminator_{size}", logits_of, images, real, batch.groups, *condition
            )
            train.report(f"generator/adversarial_{size}", adversarial)
            total = total + adversarial
        return total


def longest_captions_first(batch: Batch) -> Batch:
    """Sort the samples of each group by the length of their captions, as the released code does.

    Its mismatched pairs and its attention masks depend on the order. Captions of one length keep theirs. Sample keys
    are left out: the host would have to wait for the order.
    """
    lengths = batch.captions.lengths.view(batch.groups, -1)
    order = lengths.sort(dim=1, descending=True, stable=True).indices
    starts = torch.arange(batch.groups, device=order.device) * batch.group_size
    rows = (order + starts.unsqueeze(1)).flatten()
    return replace(
        batch,
        images=tuple(images[rows] for images in batch.images),
        captions=batch.captions[rows],
        class_ids=batch.class_ids[rows],
        attributes=batch.attributes[rows],
        ids=(),
    )


def weighted_kl(config: TreeConfig, output: GeneratorOutput, train: Train) -> Tensor:
    """Report the KL divergence of the conditioning Gaussian and return it times its weight."""
    assert output.mean is not None and output.log_variance is not None
    kl = kl_divergence(output.mean, output.log_variance)
    train.report("generator/kl", kl)
    return config.kl_weight * kl


@dataclass(frozen=True)
class AttentionConfig(TreeConfig):
    """Settings of the trees with word attention: AttnGAN, MirrorGAN and DM-GAN."""

    damsm_weight: float = 0.0
    """Weight of L_DAMSM; 0: none."""
    gamma_attention: float = 5.0
    """Smoothing factors of L_DAMSM (AttnGAN, section 4)."""
    gamma_words: float = 5.0
    gamma_ranking: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, at_least_0="damsm_weight", above_0="gamma_attention gamma_words gamma_ranking")


def damsm_encoders(info: BuildInfo) -> dict[str, Frozen]:
    """Return the text and the image encoder of slot "damsm". Raises ValueError if they do not fit the data."""
    damsm = info.sources["damsm"]
    return {
        "text": Frozen(text_encoder_from_export(damsm, info.vocabulary_size), "damsm", "text"),
        "image": Frozen(damsm_image_encoder(damsm["config"]), "damsm", "image"),
    }


class AttentionGan(TreeGan):
    """A tree with word attention; sub-classes set `frozen`, with "text" and, for L_DAMSM, "image".

    single_output: AttnDCGAN, one image at the end of the tree and one discriminator without an unconditional head.
    """

    config: AttentionConfig
    frozen: dict[str, Frozen]
    exports = ("generator", "text")

    def __init__(
        self,
        config: AttentionConfig,
        text_dim: int,
        *,
        stage: type[AttentionStage] | type[MemoryStage] = AttentionStage,
        single_output: bool = False,
    ) -> None:
        self.config = config
        self.gammas = Gammas(config.gamma_attention, config.gamma_words, config.gamma_ranking)
        self.single_output = single_output
        sizes = pyramid(config.base_size, config.branches)[-1 if single_output else 0 :]
        generator = AttentionGenerator(
            width=config.generator_width,
            z_dim=config.z_dim,
            base_size=config.base_size,
            branches=config.branches,
            residuals=config.residuals,
            text_dim=text_dim,
            condition_dim=config.condition_dim,
            compat=config.compat,
            stage=stage,
            single_output=single_output,
            skip_excitation=config.skip_excitation,
        )

        def make_discriminator(size: int) -> AttnDiscriminator:
            return AttnDiscriminator(config.discriminator_width, size, text_dim, unconditional=not single_output)

        super().__init__(config, sizes, generator, make_discriminator)

    def generator_terms(
        self, images: Tensor, words: Tensor, sentence: Tensor, batch: Batch, train: Train
    ) -> Iterator[Tensor]:
        """Yield the weighted losses in addition to the adversarial and KL losses: lambda * L_DAMSM, unless it is 0.

        Args:
            images: The largest generated images (N, 3, S, S).
            words: (N, D, T) of the text encoder.
            sentence: (N, D) of the text encoder.
        """
        if self.config.damsm_weight:
            yield self._weighted_damsm(images, words, sentence, batch, train)

    def step(self, batch: Batch, train: Train) -> None:
        released = self.config.compat == "authors"
        if released:
            batch = longest_captions_first(batch)
        with torch.no_grad(), train.frozen("text") as text:
            words, sentence = text(batch.captions.tokens, batch.captions.lengths)
        scaled_words, condition = self._scale(words, sentence)
        z, normal = train.noise(self.config.z_dim), train.noise(self.config.condition_dim)
        padding = padding_mask(batch.captions.lengths, words)
        output = train.forward("generator", tree.generate, z, normal, condition, scaled_words, padding, batch.groups)
        joint = not self.single_output
        losses: Callable[..., Any] = joint_losses if joint else matching_aware_losses
        combine: Callable[[Any], Tensor] = attngan_discriminator_loss if joint else matching_aware_loss
        logits_of: LogitsOf = joint_logits if joint else conditional_logits
        given: tuple[Any, ...] = condition, wrong_pairs(batch.class_ids, batch.groups), batch.groups
        if released:
            losses = functools.partial(neighbour_losses, joint=joint, wrong_last=True)
            given = condition, batch.groups
        self.update_discriminators(train, batch.images, output.images, losses, combine, logits_of, *given)
        loss = weighted_kl(self.config, output, train)
        loss = self.add_adversarial_losses(loss, train, batch, output.images, logits_of, condition)
        for term in self.generator_terms(output.images[-1], words, sentence, batch, train):
            loss = loss + term
        train.apply("generator", loss)

    def _weighted_damsm(self, images: Tensor, words: Tensor, sentence: Tensor, batch: Batch, train: Train) -> Tensor:
        """Report L_DAMSM of the images and return it times its weight."""
        with train.frozen("image") as encoder:
            regions, whole = encoder(images)
        lengths, classes = batch.captions.lengths, batch.class_ids
        matching = damsm_loss(regions, whole, words, sentence, lengths, classes, batch.groups, self.gammas)
        train.report("generator/damsm", matching)
        return self.config.damsm_weight * matching

    def _scale(self, words: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        return (unit_scale(words), unit_scale(sentence)) if self.config.unit_text else (words, sentence)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, noise: NoiseFn) -> Sample:
        words, sentence = self._scale(*nets["text"](captions.tokens, captions.lengths))
        padding = padding_mask(captions.lengths, words)
        z, normal = noise(self.config.z_dim), noise(self.config.condition_dim)
        output = tree.generate(nets["generator"], z, normal, sentence, words, padding)
        return Sample(output.images, output.attention)
