"""The training step as in the authors' code of 2016 to 2018, on our networks, for comparison by bench_step.py.

It runs in float32 without compilation and updates parameters and averages of weights one by one. Gradients of the
generator's loss also flow into the discriminators' weights, where they are discarded. Up-sampling repeats pixels and
then convolves; the trunk of a discriminator runs once for each term as in the released code (StackGAN++, GAN-CLS,
StarGAN); the DAMSM compares words caption by caption, and its LSTM runs over packed captions. Losses, sizes, batch and
optimizer are the same, and so are the results up to rounding: tests/tools/test_bench_step.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from t2idist.contract import Role
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.engine.strategy import DDPStrategy, Precision, state_bytes
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.losses import adversarial
from t2idist.losses.adversarial import ConditionalDiscriminator, JointDiscriminator, JointLosses, LogitLoss, PairLosses
from t2idist.losses.matching import WrongPairs
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn import blocks
from t2idist.nn.fast import blocks as fast_blocks
from t2idist.nn.fast import lstm, word_attention
from t2idist.nn.stargan import PatchDiscriminator
from t2idist.systems import gan_cls, stackgan_pp, stargan

FLOAT32 = Precision("float32")


class ReferenceStrategy(DDPStrategy):
    """The bare network on one worker, with `torch.optim.Adam` in its plain form."""

    def __init__(self, name: str, role: Role, world: World) -> None:
        super().__init__(name, role, FLOAT32, world)
        settings = role.optimizer
        self._optimizer = torch.optim.Adam(
            self._trained.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            foreach=False,
        )

    def step(self, lr: float | Tensor, found_inf: Tensor) -> None:
        if self._role.clip_norm is not None:
            clipped = [p for name, p in self._trained.items() if name.startswith(self._role.clip_prefix)]
            nn.utils.clip_grad_norm_(clipped, self._role.clip_norm, foreach=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def optimizer_bytes(self) -> int:
        return state_bytes(self._optimizer)


class ReferenceTrainer(Trainer):
    """`contract.Train` as in the authors' code, on one worker."""

    def _prepare(self, net: nn.Module) -> nn.Module:
        return net.to(self.world.device, self.precision.weights)

    def _make_strategy(self, name: str, role: Role) -> ReferenceStrategy:
        return ReferenceStrategy(name, role, self.world)

    def apply(self, role: str, loss: Tensor) -> None:
        state = self._role_states[role]
        state.in_update = False
        state.strategy.backward(loss)
        optimizer = state.role.optimizer
        state.strategy.step(optimizer.lr * lr_factor(optimizer.schedule, self.images), loss.new_zeros(()))
        if state.ema is not None and state.role.ema_half_life_images is not None:
            decay = ema_decay(state.role.ema_half_life_images, self.group_size * self.share.groups)
            with torch.no_grad():
                for average, weight in zip(state.ema.parameters(), state.role.net.parameters(), strict=True):
                    average.mul_(decay).add_(weight, alpha=1 - decay)

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[Any]:
        nets = self._select(names)
        yield nets[0] if len(nets) == 1 else tuple(nets)


@contextlib.contextmanager
def reference_losses() -> Iterator[None]:
    """Compute layers and losses as the released code does, while the context is open."""
    with (
        mock.patch.object(word_attention, "word_similarity", word_similarity),
        mock.patch.object(lstm, "bidirectional_lstm", bidirectional_lstm),
        mock.patch.object(fast_blocks, "joint_conv2d", blocks.joint_conv2d),
        mock.patch.object(fast_blocks, "up_conv2d", blocks.up_conv2d),
        mock.patch.object(stackgan_pp, "joint_losses", joint_losses),
        mock.patch.object(gan_cls, "matching_aware_losses", matching_aware_losses),
        mock.patch.object(stargan.StarGan, "_discriminator_losses", stargan_discriminator_losses),
    ):
        yield


def bidirectional_lstm(rnn: nn.LSTM, embedded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Run the LSTM over packed captions; arguments and results as in nn/fast/lstm.py."""
    packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
    states, (last, _) = rnn(packed)
    words, _ = pad_packed_sequence(states, batch_first=True, total_length=embedded.shape[1])
    return words.transpose(1, 2), torch.cat([last[0], last[1]], dim=1)


def word_similarity(
    regions: Tensor, words: Tensor, lengths: Tensor, gamma_attention: float, gamma_words: float
) -> Tensor:
    """Compute `matching.word_similarity` caption by caption, as AttnGAN's `words_loss` and `func_attention` do."""
    similarities = []
    for group_regions, group_words, group_lengths in zip(regions, words, lengths, strict=True):
        images = group_regions.shape[0]
        columns = []
        for caption, length in zip(group_words, group_lengths.tolist(), strict=True):
            query = caption[:, :length].unsqueeze(0).repeat(images, 1, 1)  # (I, D, T)
            scores = torch.bmm(group_regions.transpose(1, 2).contiguous(), query)  # (I, R, T)
            over_words = scores.softmax(dim=2).transpose(1, 2).contiguous()  # (I, T, R)
            weights = (over_words * gamma_attention).softmax(dim=2)
            context = torch.bmm(group_regions, weights.transpose(1, 2).contiguous())  # (I, D, T)
            cosine = F.cosine_similarity(query, context, dim=1, eps=word_attention.MIN_NORM)
            columns.append((cosine * gamma_words).exp().sum(1, keepdim=True).log())
        similarities.append(torch.cat(columns, 1))
    return torch.stack(similarities)


def joint_losses(
    net: JointDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss,
) -> JointLosses:
    """Compute `adversarial.joint_losses` with a pass of the trunk for each pair, without accuracies."""
    right, wrong, generated = net.features(real), net.features(real), net.features(fake)
    return JointLosses(
        **vars(_pair_losses(net, right, wrong, generated, condition, pairs, groups, kind)),
        real_alone=adversarial.loss_real(net.unconditional(right), kind),
        fake_alone=adversarial.loss_fake(net.unconditional(generated), kind),
    )


def matching_aware_losses(
    net: ConditionalDiscriminator,
    real: Tensor,
    fake: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss,
) -> PairLosses:
    """Compute `adversarial.matching_aware_losses` with a pass of the trunk for each pair, without accuracies."""
    right, wrong, generated = net.features(real), net.features(real), net.features(fake)
    return _pair_losses(net, right, wrong, generated, condition, pairs, groups, kind)


def stargan_discriminator_losses(
    system: stargan.StarGan,
    net: PatchDiscriminator,
    real: Tensor,
    fake: Tensor,
    own: Tensor,
    mixing: Tensor,
    domain: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `StarGan._discriminator_losses` with one pass for real images and one for generated images."""
    (scores, logits), (fake_scores, _) = net(real), net(fake)
    classes = system._class_loss(logits, own, domain)
    return -scores.mean(), fake_scores.mean(), classes, gradient_penalty(net.scores, real, fake, mixing)


def _pair_losses(
    net: ConditionalDiscriminator,
    right: Tensor,
    wrong: Tensor,
    generated: Tensor,
    condition: Tensor,
    pairs: WrongPairs,
    groups: int,
    kind: LogitLoss,
) -> PairLosses:
    zero, own = condition.new_zeros(()), net.conditional(right, condition)
    return PairLosses(
        real=adversarial.loss_real(own, kind),
        wrong=adversarial.masked_loss_fake(net.conditional(wrong, condition[pairs.caption]), pairs.keep, groups, kind),
        fake=adversarial.loss_fake(net.conditional(generated, condition), kind),
        accuracy_real=zero,
        accuracy_wrong=zero,
        accuracy_fake=zero,
        accuracy_matching=zero,
        accepted=own > kind.boundary,
    )
