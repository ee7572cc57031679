"""How the authors' code of 2016 to 2018 does a training step, on our networks: bench_step.py measures against it.

float32 without compilation; Adam parameter by parameter; the generator's loss flows into the discriminators' weights,
where it is thrown away; pixels are repeated, then convolved; a pass of the trunk for each term where the released code
has one (StackGAN++, GAN-CLS, StarGAN); the DAMSM's words caption by caption, its LSTM over packed captions; the average
of weights one by one. Losses, sizes, batch and optimiser are the same, and so are the numbers, to rounding:
tests/tools/test_bench_step.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist.contract import Role
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.engine.strategy import DDPStrategy, Precision, state_bytes
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.losses import adversarial, matching
from t2idist.losses.adversarial import ConditionalDiscriminator, JointDiscriminator, JointLosses, PairLosses
from t2idist.losses.matching import Gammas, WrongPairs
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn import blocks
from t2idist.nn.stargan import PatchDiscriminator
from t2idist.nn.text_encoders import BiLSTM
from t2idist.systems import gan_cls, stackgan_pp, stargan

FULL = Precision("float32")


class Plain(DDPStrategy):
    """The bare network on one worker, with Adam as `torch.optim.Adam` has it when it is not asked for more."""

    def __init__(self, name: str, role: Role, world: World) -> None:
        super().__init__(name, role, FULL, world)
        settings = role.optimizer
        self._optimizer = torch.optim.Adam(
            self._trained.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            foreach=False,
        )

    def step(self, lr: float, bad: Tensor) -> None:
        if self._role.clip_norm is not None:
            clipped = [p for name, p in self._trained.items() if name.startswith(self._role.clip_prefix)]
            nn.utils.clip_grad_norm_(clipped, self._role.clip_norm, foreach=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def optimizer_bytes(self) -> int:
        return state_bytes(self._optimizer)


class AuthorsTrainer(Trainer):
    """`contract.Train` in the authors' way, on one worker."""

    def _place(self, net: nn.Module) -> nn.Module:
        return net.to(self.world.device, self.precision.weights)

    def _engine(self, name: str, role: Role) -> Plain:
        return Plain(name, role, self.world)

    def apply(self, role: str, loss: Tensor) -> None:
        live = self._live[role]
        live.entered = False
        live.engine.backward(loss)
        live.engine.step(live.role.optimizer.lr * lr_factor(live.role.optimizer.schedule, self.images), loss.new_zeros(()))
        if live.ema is not None and live.role.ema_half_life_images is not None:
            keep = ema_decay(live.role.ema_half_life_images, self.group_size * self.share.groups)
            with torch.no_grad():
                for average, weight in zip(live.ema.parameters(), live.role.net.parameters(), strict=True):
                    average.mul_(keep).add_(weight, alpha=1 - keep)

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        nets = self._bare(names)
        yield nets[0] if len(nets) == 1 else tuple(nets)


@contextlib.contextmanager
def losses() -> Iterator[None]:
    """Inside, losses are computed as the released code does."""
    with (
        mock.patch.object(matching, "word_similarity", word_similarity),
        mock.patch.object(stackgan_pp, "judge_pairs", judge_pairs),
        mock.patch.object(gan_cls, "judge_three", judge_three),
        mock.patch.object(stargan.StarGan, "_verdict", stargan_verdict),
        mock.patch.object(BiLSTM, "_each_way", BiLSTM._packed),
        mock.patch.object(blocks.JointConv2d, "forward", tile_then_convolution),
        mock.patch.object(blocks.UpConv2d, "forward", nearest_then_convolution),
    ):
        yield


def nearest_then_convolution(conv: blocks.UpConv2d, x: Tensor) -> Tensor:
    """`blocks.UpConv2d` in two passes: four times the places, then the convolution over all of them."""
    return F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, padding=1)


def tile_then_convolution(conv: blocks.JointConv2d, features: Tensor, *conditions: Tensor) -> list[Tensor]:
    """`blocks.JointConv2d` with the condition at every place, anew for each."""
    parts = [[features, blocks.tile(condition, features)] for condition in conditions]
    joint = [torch.cat(both[::-1] if conv.condition_first else both, dim=1) for both in parts]
    return [F.conv2d(both, conv.weight, padding=1) for both in joint]


def word_similarity(regions: Tensor, words: Tensor, lengths: Tensor, gammas: Gammas) -> Tensor:
    """`matching.word_similarity`, a caption at a time, as AttnGAN's `words_loss` and `func_attention` do."""
    of_groups = []
    for group_regions, group_words, group_lengths in zip(regions, words, lengths, strict=True):
        images = group_regions.shape[0]
        columns = []
        for caption, length in zip(group_words, group_lengths.tolist(), strict=True):
            query = caption[:, :length].unsqueeze(0).repeat(images, 1, 1)  # (I, D, T)
            scores = torch.bmm(group_regions.transpose(1, 2).contiguous(), query)  # (I, R, T)
            over_words = scores.softmax(dim=2).transpose(1, 2).contiguous()  # (I, T, R)
            weights = (over_words * gammas.attention).softmax(dim=2)
            context = torch.bmm(group_regions, weights.transpose(1, 2).contiguous())  # (I, D, T)
            cosine = F.cosine_similarity(query, context, dim=1, eps=matching.MIN_NORM)
            columns.append((cosine * gammas.words).exp().sum(1, keepdim=True).log())
        of_groups.append(torch.cat(columns, 1))
    return torch.stack(of_groups)


def judge_pairs(
    net: JointDiscriminator, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> JointLosses:
    """`adversarial.judge_pairs` with a pass of the trunk for each pair; accuracies are not taken."""
    own, other, drawn = net.features(real), net.features(real), net.features(fake)
    return JointLosses(
        **vars(_pair_verdict(net, own, other, drawn, condition, pairs, groups)),
        real_alone=adversarial.bce_real(net.unconditional(own)),
        fake_alone=adversarial.bce_fake(net.unconditional(drawn)),
    )


def judge_three(
    net: ConditionalDiscriminator, real: Tensor, fake: Tensor, condition: Tensor, pairs: WrongPairs, groups: int
) -> PairLosses:
    """`adversarial.judge_three`, likewise."""
    own, other, drawn = net.features(real), net.features(real), net.features(fake)
    return _pair_verdict(net, own, other, drawn, condition, pairs, groups)


def stargan_verdict(
    system: stargan.StarGan,
    net: PatchDiscriminator,
    real: Tensor,
    fake: Tensor,
    own: Tensor,
    mixing: Tensor,
    domain: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`StarGan._verdict` with a pass for real pictures and one for generated ones."""
    (scores, logits), (fake_scores, _) = net(real), net(fake)
    classes = system._class_loss(logits, own, domain)
    return -scores.mean(), fake_scores.mean(), classes, gradient_penalty(net.scores, real, fake, mixing)


def _pair_verdict(
    net: ConditionalDiscriminator,
    own: Tensor,
    other: Tensor,
    drawn: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
) -> PairLosses:
    zero = condition.new_zeros(())
    return PairLosses(
        real=adversarial.bce_real(net.conditional(own, condition)),
        wrong=adversarial.masked_bce_fake(net.conditional(other, condition[pairs.caption]), pairs.keep, groups),
        fake=adversarial.bce_fake(net.conditional(drawn, condition)),
        accuracy_real=zero,
        accuracy_wrong=zero,
        accuracy_fake=zero,
        accuracy_matching=zero,
    )
