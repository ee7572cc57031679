"""The released networks in plain PyTorch, written from their layer tables, with the released parameter names.

Nothing here uses the package. Facts: AttnGAN's, MirrorGAN's and StackGAN's released `model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Gate(nn.Module):
    """The first half of the channels times the sigmoid of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * gate.sigmoid()


def conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2 if kernel != 4 else 1, bias=False)


def tiled(vector: Tensor, size: int) -> Tensor:
    return vector.reshape(*vector.shape, 1, 1).repeat(1, 1, size, size)


def gated_up(channels_in: int, channels_out: int) -> nn.Sequential:
    double = 2 * channels_out
    return nn.Sequential(nn.Upsample(scale_factor=2), conv(channels_in, double), nn.BatchNorm2d(double), Gate())


class GatedResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv(channels, 2 * channels), nn.BatchNorm2d(2 * channels), Gate(),
            conv(channels, channels), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Conditioning(nn.Module):
    """text -> condition, mean, log-variance; gated (trees), or with a ReLU (StackGAN v1)."""

    def __init__(self, text_dim: int, condition_dim: int, gated: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(text_dim, condition_dim * (4 if gated else 2))
        self.act = Gate() if gated else nn.ReLU()

    def forward(self, text: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.act(self.fc(text)).chunk(2, dim=1)
        return normal * (log_variance / 2).exp() + mean, mean, log_variance


class First(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        top = 16 * width
        self.top = top
        self.fc = nn.Sequential(nn.Linear(inputs, 32 * top, bias=False), nn.BatchNorm1d(32 * top), Gate())
        self.upsample1, self.upsample2 = gated_up(top, top // 2), gated_up(top // 2, top // 4)
        self.upsample3, self.upsample4 = gated_up(top // 4, top // 8), gated_up(top // 8, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).view(len(x), self.top, 4, 4)
        return self.upsample4(self.upsample3(self.upsample2(self.upsample1(x))))


class WordContext(nn.Module):
    """Attention to words, with the released layout of the mask; MirrorGAN adds that to the sentence."""

    def __init__(self, width: int, word_dim: int, condition_dim: int | None) -> None:
        super().__init__()
        self.conv_context = conv(word_dim, width, 1)
        if condition_dim is not None:
            self.conv_sentence_vis = conv(width, width, 1)
            self.linear = nn.Linear(condition_dim, width)

    def forward(self, h: Tensor, words: Tensor, mask: Tensor, condition: Tensor) -> list[Tensor]:
        count, width, size, _ = h.shape
        projected = self.conv_context(words.unsqueeze(3)).squeeze(3)  # (B, C, T)
        scores = h.view(count, width, -1).transpose(1, 2) @ projected  # (B, H*W, T)
        rows = scores.reshape(count * size * size, -1)
        rows = rows.masked_fill(mask.repeat(size * size, 1), -torch.inf).softmax(1)  # row r: the mask of sample r % B
        context = projected @ rows.view(count, size * size, -1).transpose(1, 2)
        out = [context.view(count, width, size, size)]
        if hasattr(self, "linear"):
            sentence = tiled(self.linear(condition), size)
            out.append(sentence * self.conv_sentence_vis(h * sentence).softmax(1))
        return out


class Later(nn.Module):
    """A later stage: of StackGAN-v2 ("stack"), AttnGAN ("attention") or MirrorGAN ("mirror")."""

    def __init__(self, kind: str, width: int, residuals: int, word_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.kind = kind
        inner = width if kind == "stack" else 2 * width
        if kind == "stack":
            double = nn.BatchNorm2d(2 * width)
            self.jointConv = nn.Sequential(conv(width + condition_dim, 2 * width), double, Gate())
        else:
            self.att = WordContext(width, word_dim, condition_dim if kind == "mirror" else None)
        if kind == "mirror":
            self.conv = conv(3 * width, 2 * width, 1)
        self.residual = nn.Sequential(*(GatedResidual(inner) for _ in range(residuals)))
        self.upsample = gated_up(inner, inner // 2)

    def forward(self, h: Tensor, condition: Tensor, words: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.kind == "stack":
            h = self.jointConv(torch.cat([tiled(condition, h.shape[2]), h], 1))
        else:
            h = torch.cat([h, *self.att(h, words, mask, condition)], 1)
        if self.kind == "mirror":
            h = self.conv(h)
        return self.upsample(self.residual(h))


class Picture(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img = nn.Sequential(conv(width, 3), nn.Tanh())

    def forward(self, h: Tensor) -> Tensor:
        return self.img(h)


class Tree(nn.Module):
    """A tree of generators from 64 pixels on. Without text_dim it has no condition but z."""

    def __init__(
        self, kind: str, *, width: int, branches: int, residuals: int, z_dim: int, condition_dim: int,
        text_dim: int | None, single_output: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.branches, self.single_output = branches, single_output
        inputs = z_dim
        if text_dim is not None:
            self.ca_net = Conditioning(text_dim, condition_dim, gated=True)
            inputs += condition_dim
        later = condition_dim if text_dim is not None else z_dim
        self.h_net1 = First(inputs, width)
        for i in range(branches):
            here = width >> (i if kind == "stack" else 0)
            if i:
                above = width >> (i - 1 if kind == "stack" else 0)
                setattr(self, f"h_net{i + 1}", Later(kind, above, residuals, text_dim or 0, later))
            if not single_output:
                setattr(self, f"img_net{i + 1}", Picture(here))
        if single_output:
            self.img_net = Picture(width)

    def forward(
        self, z: Tensor, normal: Tensor | None = None, text: Tensor | None = None, words: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
        condition, mean, log_variance = z, z, z
        x = z
        if text is not None:
            condition, mean, log_variance = self.ca_net(text, normal)
            x = torch.cat([condition, z], 1)
        h = self.h_net1(x)
        maps = [h]
        for i in range(1, self.branches):
            h = self.get_submodule(f"h_net{i + 1}")(h, condition, words, mask)
            maps.append(h)
        if self.single_output:
            return [self.img_net(h)], mean, log_variance
        images = [self.get_submodule(f"img_net{i + 1}")(h) for i, h in enumerate(maps)]
        return images, mean, log_variance


# ------------------------------------------------------------------------------------------------ discriminators
def leaky_down(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [conv(channels_in, channels_out, 4, 2), nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2)]


def leaky(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [conv(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2)]


def probability(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, 1, 4, 4), nn.Sigmoid()]


def trunk(width: int, size: int) -> dict[str, list[nn.Module]]:
    layers = [conv(3, width, 4, 2), nn.LeakyReLU(0.2)]
    parts = {"img_code_s16": layers + [m for i in range(3) for m in leaky_down(width << i, width << (i + 1))]}
    if size >= 128:
        parts["img_code_s32"] = leaky_down(8 * width, 16 * width)
    if size == 128:
        parts["img_code_s32_1"] = leaky(16 * width, 8 * width)
    if size == 256:
        parts["img_code_s64"] = leaky_down(16 * width, 32 * width)
        parts["img_code_s64_1"] = leaky(32 * width, 16 * width)
        parts["img_code_s64_2"] = leaky(16 * width, 8 * width)
    return parts


class Head(nn.Module):
    """AttnGAN's and StackGAN v1's heads, which get features and perhaps a condition, image first."""

    def __init__(self, layers: Sequence[nn.Module], joint: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        if joint:
            self.jointConv = nn.Sequential(*joint)
        self.outlogits = nn.Sequential(*layers)

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            h = torch.cat([h, tiled(condition, 4)], 1)
        if hasattr(self, "jointConv"):
            h = self.jointConv(h)
        return self.outlogits(h).view(-1)


class TreeDiscriminator(nn.Module):
    """`features`, then `conditional` and `unconditional` on them, of AttnGAN ("attention") or StackGAN-v2 ("stack")."""

    def __init__(self, kind: str, width: int, size: int, condition_dim: int | None, unconditional: bool = True) -> None:
        super().__init__()
        self.kind, self.names, top = kind, list(trunk(width, size)), 8 * width
        for name, layers in trunk(width, size).items():
            setattr(self, name, nn.Sequential(*layers))
        if kind == "attention":
            assert condition_dim is not None
            self.COND_DNET = Head(probability(top), leaky(top + condition_dim, top))
            if unconditional:
                self.UNCOND_DNET = Head(probability(top))
        else:
            self.logits = nn.Sequential(*probability(top))
            if condition_dim is not None:
                self.jointConv = nn.Sequential(*leaky(top + condition_dim, top))
                if unconditional:
                    self.uncond_logits = nn.Sequential(*probability(top))

    def features(self, images: Tensor) -> Tensor:
        for name in self.names:
            images = self.get_submodule(name)(images)
        return images

    def conditional(self, h: Tensor, condition: Tensor) -> Tensor:
        if self.kind == "attention":
            return self.COND_DNET(h, condition)
        return self.logits(self.jointConv(torch.cat([tiled(condition, 4), h], 1))).view(-1)

    def unconditional(self, h: Tensor) -> Tensor:
        if self.kind == "attention":
            return self.UNCOND_DNET(h)
        return (self.uncond_logits if hasattr(self, "jointConv") else self.logits)(h).view(-1)


# ------------------------------------------------------------------------------------------------ StackGAN (v1)
def up(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2), conv(channels_in, channels_out), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class Ups(nn.Module):
    """Four upsampling blocks and the image layer."""

    def __init__(self, top: int) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"upsample{i + 1}", up(top >> i, top >> (i + 1)))
        self.img = nn.Sequential(conv(top >> 4, 3), nn.Tanh())

    def picture(self, h: Tensor) -> Tensor:
        for i in range(4):
            h = self.get_submodule(f"upsample{i + 1}")(h)
        return self.img(h)


class StageOne(Ups):
    def __init__(self, width: int, z_dim: int, text_dim: int, condition_dim: int) -> None:
        super().__init__(8 * width)
        self.top, units = 8 * width, 8 * width * 16
        self.ca_net = Conditioning(text_dim, condition_dim, gated=False)
        self.fc = nn.Sequential(nn.Linear(z_dim + condition_dim, units, bias=False), nn.BatchNorm1d(units), nn.ReLU())

    def forward(self, z: Tensor, normal: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition, mean, log_variance = self.ca_net(text, normal)
        h = self.fc(torch.cat([z, condition], 1)).view(len(z), self.top, 4, 4)
        return self.picture(h), mean, log_variance


class PlainResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(),
            conv(channels, channels), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.block(x)).relu()


class StageTwo(Ups):
    def __init__(self, width: int, residuals: int, text_dim: int, condition_dim: int) -> None:
        super().__init__(4 * width)
        top = 4 * width
        self.ca_net = Conditioning(text_dim, condition_dim, gated=False)
        down = [
            layer
            for a, b in ((width, 2 * width), (2 * width, top))
            for layer in (conv(a, b, 4, 2), nn.BatchNorm2d(b), nn.ReLU())
        ]
        self.encoder = nn.Sequential(conv(3, width), nn.ReLU(), *down)
        self.hr_joint = nn.Sequential(conv(top + condition_dim, top), nn.BatchNorm2d(top), nn.ReLU())
        self.residual = nn.Sequential(*(PlainResidual(top) for _ in range(residuals)))

    def forward(self, low: Tensor, normal: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(low)
        condition, mean, log_variance = self.ca_net(text, normal)
        h = self.residual(self.hr_joint(torch.cat([h, tiled(condition, h.shape[2])], 1)))
        return self.picture(h), mean, log_variance


class StageDiscriminator(nn.Module):
    def __init__(self, width: int, size: int, condition_dim: int) -> None:
        super().__init__()
        top = 8 * width
        self.encode_img = nn.Sequential(*(layer for layers in trunk(width, size).values() for layer in layers))
        self.get_cond_logits = Head([*leaky(top + condition_dim, top), *probability(top)])
        if size == 256:
            self.get_uncond_logits = Head(probability(top))

    def features(self, images: Tensor) -> Tensor:
        return self.encode_img(images)

    def conditional(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.get_cond_logits(h, condition)

    def unconditional(self, h: Tensor) -> Tensor:
        return self.get_uncond_logits(h)


# ------------------------------------------------------------------------------------------------ text
class WordEncoder(nn.Module):
    """AttnGAN's text encoder in eval mode; captions sorted by length, longest first."""

    def __init__(self, vocabulary: int, word_dim: int, text_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, word_dim)
        self.rnn = nn.LSTM(word_dim, text_dim // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out, (last, _) = self.rnn(pack_padded_sequence(self.encoder(tokens), lengths, batch_first=True))
        words, _ = pad_packed_sequence(out, batch_first=True)
        return words.transpose(1, 2), last.transpose(0, 1).flatten(1)


class CaptionDecoder(nn.Module):
    """MirrorGAN's decoder: logits (words, V) of all captions, packed; captions sorted by length."""

    def __init__(self, vocabulary: int, word_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, word_dim)
        self.lstm = nn.LSTM(word_dim, hidden_dim, batch_first=True)
        self.linear = nn.Linear(hidden_dim, vocabulary)

    def forward(self, image: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        inputs = torch.cat([image.unsqueeze(1), self.embed(tokens)], 1)
        out, _ = self.lstm(pack_padded_sequence(inputs, lengths, batch_first=True))
        return self.linear(out.data)
