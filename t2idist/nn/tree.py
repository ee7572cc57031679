"""The generator trees of StackGAN++, AttnGAN and MirrorGAN: one trunk, an image at every branch.

The trunk starts with ``width * base_size / 4`` channels at 4x4 and reaches `width` channels at the first branch, which
has 64 pixels in the papers. Parameter names are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2idist.nn.attention import GlobalLocalAttention, WordAttention, attend
from t2idist.nn.blocks import GLU, GLUResidual, JointConv2d, JointSequential, SkipExcitation, conv3x3, up_block
from t2idist.nn.conditioning import ConditioningAugmentation
from t2idist.nn.precision import upcast

INIT_SIZE = 4
"""Width and height of the first feature map."""


@dataclass(frozen=True)
class GeneratorOutput:
    """What a generator returns."""

    images: tuple[Tensor, ...]
    """Lowest size first, (N, 3, S, S) each, in [-1, 1]."""
    mean: Tensor | None = None
    """(N, condition_dim) of the conditioning Gaussian; None without a condition."""
    log_variance: Tensor | None = None
    """(N, condition_dim)."""
    attention: tuple[Tensor, ...] = ()
    """Word weights (N, T, H, W) of each attention stage."""


def generate(net: nn.Module, *inputs: Tensor | int | None) -> GeneratorOutput:
    """Call the network; for `Train.forward`, which takes a function of it."""
    output: GeneratorOutput = net(*inputs)
    return output


def pyramid(base_size: int, branches: int) -> tuple[int, ...]:
    """Return the image sizes of a tree, lowest first. Raises ValueError if they are not supported."""
    if base_size not in (16, 32, 64):
        raise ValueError(f"base_size is {base_size}; it must be 16, 32 or 64")
    if branches < 1:
        raise ValueError(f"branches is {branches}; it must be at least 1")
    return tuple(base_size * 2**i for i in range(branches))


class InitStage(nn.Module):
    """Noise and condition to the features of the first branch: (N, input_dim) -> (N, width, base_size, base_size).

    `start` computes the first feature map, (N, channels, 4, 4); `grow` upsamples it to the base size.
    """

    def __init__(self, input_dim: int, width: int, base_size: int) -> None:
        super().__init__()
        self.ups = (base_size // INIT_SIZE).bit_length() - 1
        self.channels = channels = width * 2**self.ups
        units = channels * INIT_SIZE * INIT_SIZE
        self.fc = nn.Sequential(nn.Linear(input_dim, 2 * units, bias=False), nn.BatchNorm1d(2 * units), GLU())
        for i in range(self.ups):
            setattr(self, f"upsample{i + 1}", up_block(channels >> i, channels >> (i + 1)))

    def start(self, vector: Tensor) -> Tensor:
        out: Tensor = self.fc(vector)
        return out.view(vector.shape[0], -1, INIT_SIZE, INIT_SIZE)

    def grow(self, x: Tensor) -> Tensor:
        for i in range(self.ups):
            x = self.get_submodule(f"upsample{i + 1}")(x)
        return x

    def forward(self, vector: Tensor) -> Tensor:
        return self.grow(self.start(vector))


class JointStage(nn.Module):
    """Later stage of StackGAN-v2: features and condition, (N, C, H, W) and (N, D) -> (N, C/2, 2H, 2W)."""

    def __init__(self, channels: int, condition_dim: int, residuals: int) -> None:
        super().__init__()
        joint = JointConv2d(channels, condition_dim, 2 * channels, condition_first=True)
        self.jointConv = JointSequential(joint, nn.BatchNorm2d(2 * channels), GLU())
        self.residual = nn.Sequential(*(GLUResidual(channels) for _ in range(residuals)))
        self.upsample = up_block(channels, channels // 2)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        (joint,) = self.jointConv(features, condition)
        out: Tensor = self.upsample(self.residual(joint))
        return out


class AttentionStage(nn.Module):
    """Later stage of AttnGAN: features and their word context, (N, C, H, W) -> (N, C, 2H, 2W) and word weights.

    condition_dim: of the condition, which this stage does not use.
    """

    def __init__(self, channels: int, word_dim: int, condition_dim: int, residuals: int, compat: str) -> None:
        super().__init__()
        self.att = WordAttention(channels, word_dim, compat)
        self.residual = nn.Sequential(*(GLUResidual(2 * channels) for _ in range(residuals)))
        self.upsample = up_block(2 * channels, channels)

    def forward(
        self, features: Tensor, condition: Tensor, words: Tensor, padding: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        context, weights = self.att(features, words, padding, groups)
        joint = self.join(features, context.to(features.dtype), condition)
        return self.upsample(self.residual(joint)), weights

    def join(self, features: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """Join features and word context, each (N, C, H, W), to (N, 2 * C, H, W); the condition is not used."""
        return torch.cat([features, context], dim=1)


class MirrorStage(AttentionStage):
    """Later stage of MirrorGAN: that of AttnGAN, with a sentence context in addition to the word context."""

    def __init__(self, channels: int, word_dim: int, condition_dim: int, residuals: int, compat: str) -> None:
        super().__init__(channels, word_dim, condition_dim, residuals, compat)
        self.att: GlobalLocalAttention = GlobalLocalAttention(channels, word_dim, condition_dim, compat)
        self.conv = nn.Conv2d(3 * channels, 2 * channels, kernel_size=1, bias=False)

    def join(self, features: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([features, context, self.att.sentence(features, condition)], dim=1))
        return out


class MemoryStage(nn.Module):
    """Later stage of DM-GAN, with a memory of the words (section 3), in the place of `AttentionStage`.

    The memory has 2 * C dimensions. compat "authors": no gradient reaches the features through the mean that is written
    into the memory; and the mask layout of `WordAttention`.
    """

    def __init__(self, channels: int, word_dim: int, condition_dim: int, residuals: int, compat: str) -> None:
        super().__init__()
        self.compat = compat
        self.A = nn.Linear(word_dim, 1, bias=False)
        self.B = nn.Linear(channels, 1, bias=False)
        self.M_r = _pointwise(channels, 2 * channels)
        self.M_w = _pointwise(word_dim, 2 * channels)
        self.key = _pointwise(2 * channels, channels)
        self.value = _pointwise(2 * channels, channels)
        self.response_gate = nn.Sequential(nn.Conv2d(2 * channels, 1, kernel_size=1), nn.Sigmoid())
        self.residual = nn.Sequential(*(GLUResidual(2 * channels) for _ in range(residuals)))
        self.upsample = up_block(2 * channels, channels)

    def forward(
        self, features: Tensor, condition: Tensor, words: Tensor, padding: Tensor, groups: int
    ) -> tuple[Tensor, Tensor]:
        memory = self.write(features, words)
        read, weights = attend(features, self.key(memory), self.value(memory), padding, groups, self.compat)
        read = read.to(features.dtype)
        gate = self.response_gate(torch.cat([features, read], dim=1))  # (N, 1, H, W)
        refined = gate * read + (1 - gate) * features
        return self.upsample(self.residual(torch.cat([refined, refined], dim=1))), weights  # twice, as released

    def write(self, features: Tensor, words: Tensor) -> Tensor:
        """Write words (N, D, T) into the memory (N, 2 * C, T); a gate mixes each with the mean of the features."""
        mean = features.mean(dim=(2, 3))  # (N, C)
        if self.compat == "authors":
            mean = mean.detach()
        gate = torch.sigmoid(self.A(words.transpose(1, 2)) + self.B(mean).unsqueeze(1)).transpose(1, 2)  # (N, 1, T)
        memory: Tensor = gate * self.M_w(words) + (1 - gate) * self.M_r(mean.unsqueeze(2))
        return memory


def _pointwise(channels_in: int, channels_out: int) -> nn.Sequential:
    """Map each word on its own, with a ReLU (as released): (N, channels_in, T) -> (N, channels_out, T)."""
    return nn.Sequential(nn.Conv1d(channels_in, channels_out, kernel_size=1), nn.ReLU())


class ImageHead(nn.Module):
    """Features (N, C, S, S) to an image (N, 3, S, S) in [-1, 1], in float32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.img = nn.Sequential(conv3x3(channels, 3))

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(upcast(self.img(features)))


class StackGenerator(nn.Module):
    """The tree of StackGAN-v2 (StackGAN++, section 4): z (N, z_dim), normal (N, condition_dim), text (N, text_dim).

    Branch i, from 0, has width / 2**i channels. Without `text_dim` the tree is unconditional: it takes z only and uses
    it in place of the condition at every stage.
    """

    def __init__(
        self,
        *,
        width: int,
        z_dim: int,
        base_size: int,
        branches: int,
        residuals: int,
        text_dim: int | None,
        condition_dim: int,
        skip_excitation: bool = False,
    ) -> None:
        super().__init__()
        self.branches, self.skip_excitation = branches, skip_excitation
        joint_dim = z_dim if text_dim is None else condition_dim
        self.ca_net = None if text_dim is None else ConditioningAugmentation(text_dim, condition_dim)
        self.h_net1 = InitStage(z_dim if text_dim is None else condition_dim + z_dim, width, base_size)
        self.img_net1 = ImageHead(width)
        for i in range(1, branches):
            setattr(self, f"h_net{i + 1}", JointStage(width >> (i - 1), joint_dim, residuals))
            setattr(self, f"img_net{i + 1}", ImageHead(width >> i))
            if skip_excitation:
                setattr(self, f"excite{i + 1}", SkipExcitation(self.h_net1.channels, width >> i))

    def forward(self, z: Tensor, normal: Tensor | None = None, text: Tensor | None = None) -> GeneratorOutput:
        if self.ca_net is None:
            condition, mean, log_variance = z, None, None
            first = self.h_net1.start(z)
        else:
            condition, mean, log_variance = self.ca_net(text, normal)
            first = self.h_net1.start(torch.cat([condition, z], dim=1))
        features = self.h_net1.grow(first)
        images = [self.img_net1(features)]
        for i in range(1, self.branches):
            features = self.get_submodule(f"h_net{i + 1}")(features, condition)
            if self.skip_excitation:
                features = self.get_submodule(f"excite{i + 1}")(first, features)
            images.append(self.get_submodule(f"img_net{i + 1}")(features))
        return GeneratorOutput(tuple(images), mean, log_variance)


class AttentionGenerator(nn.Module):
    """The generator of AttnGAN (section 3.1), MirrorGAN and DM-GAN; every branch has `width` channels.

    forward(z (N, z_dim), normal (N, condition_dim), sentence (N, text_dim), words (N, text_dim, T), padding (N, T),
    groups); `groups` matters only with compat "authors".

    Args:
        compat: See `WordAttention` and `MemoryStage`.
        stage: Kind of the later stages.
        single_output: Generate only the image at the end of the tree (AttnDCGAN; AttnGAN, section 4.2).
        skip_excitation: Scale the features of the later branches by `SkipExcitation`.
    """

    def __init__(
        self,
        *,
        width: int,
        z_dim: int,
        base_size: int,
        branches: int,
        residuals: int,
        text_dim: int,
        condition_dim: int,
        compat: str = "",
        stage: type[AttentionStage] | type[MemoryStage] = AttentionStage,
        single_output: bool = False,
        skip_excitation: bool = False,
    ) -> None:
        super().__init__()
        self.branches, self.skip_excitation = branches, skip_excitation
        self.heads = ("img_net",) if single_output else tuple(f"img_net{i + 1}" for i in range(branches))
        self.ca_net = ConditioningAugmentation(text_dim, condition_dim)
        self.h_net1 = InitStage(condition_dim + z_dim, width, base_size)
        setattr(self, self.heads[0], ImageHead(width))
        for i in range(1, branches):
            setattr(self, f"h_net{i + 1}", stage(width, text_dim, condition_dim, residuals, compat))
            if skip_excitation:
                setattr(self, f"excite{i + 1}", SkipExcitation(self.h_net1.channels, width))
            if not single_output:
                setattr(self, self.heads[i], ImageHead(width))

    def forward(
        self, z: Tensor, normal: Tensor, sentence: Tensor, words: Tensor, padding: Tensor, groups: int = 1
    ) -> GeneratorOutput:
        condition, mean, log_variance = self.ca_net(sentence, normal)
        first = self.h_net1.start(torch.cat([condition, z], dim=1))
        features = self.h_net1.grow(first)
        maps = [features]
        attention = []
        for i in range(1, self.branches):
            features, weights = self.get_submodule(f"h_net{i + 1}")(features, condition, words, padding, groups)
            if self.skip_excitation:
                features = self.get_submodule(f"excite{i + 1}")(first, features)
            maps.append(features)
            attention.append(weights)
        maps = maps[-len(self.heads) :]
        images = tuple(self.get_submodule(head)(x) for head, x in zip(self.heads, maps, strict=True))
        return GeneratorOutput(images, mean, log_variance, tuple(attention))
