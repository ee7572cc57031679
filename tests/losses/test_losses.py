"""Losses: published values, and that nothing crosses groups."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2idist.losses.adversarial import (
    JointLosses,
    attngan_discriminator_loss,
    joint_losses,
    loss_fake,
    loss_real,
    masked_loss_fake,
    matching_aware_loss,
    matching_aware_losses,
    stackgan_pp_discriminator_loss,
    unconditional_losses,
)
from t2idist.losses.image import colour_consistency, kl_divergence
from t2idist.losses.matching import (
    Gammas,
    WrongPairs,
    sentence_losses,
    word_losses,
    word_similarity,
    wrong_images,
    wrong_pairs,
)
from t2idist.losses.penalties import r1_penalty
from t2idist.losses.released import (
    WrongImageLosses,
    neighbour_losses,
    stackgan_v2_released_loss,
    wrong_image_losses,
)
from t2idist.nn.discriminators import PairDiscriminator
from t2idist.nn.fast import word_attention as fast

NONE_ALIKE = torch.arange(4)
LENGTHS = torch.tensor([12, 9, 7, 5])


@pytest.fixture
def codes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    regions, words = torch.randn(4, 256, 17, 17), torch.randn(4, 256, 12)
    images, sentences = torch.randn(4, 256), torch.randn(4, 256)
    assert regions.sum().item() == pytest.approx(-1106.935988, abs=1e-2)
    assert words.sum().item() == pytest.approx(-103.233789, abs=1e-3)
    return regions.flatten(2), words, images, sentences


@pytest.mark.parametrize(
    ("attention", "classes", "expected"),
    [
        (4.0, [3, 5, 3, 8], (2.679309, 1.601061, 1.270727, 1.261330)),
        (4.0, [0, 1, 2, 3], (3.106028, 1.721844, 1.354413, 1.340845)),
        (5.0, [3, 5, 3, 8], (2.644973, 1.575387, 1.270727, 1.261330)),
    ],
)
def test_damsm_losses_have_the_published_values(
    codes: tuple[Tensor, ...], attention: float, classes: list[int], expected: tuple[float]
) -> None:
    regions, words, images, sentences = codes
    gammas, ids = Gammas(attention, 5.0, 10.0), torch.tensor(classes)
    by_word = word_losses(regions, words, LENGTHS, ids, 1, gammas)
    by_sentence = sentence_losses(images, sentences, ids, 1, gammas)
    got = [by_word.caption_of_image, by_word.image_of_caption]
    got += [by_sentence.caption_of_image, by_sentence.image_of_caption]
    assert [x.item() for x in got] == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("form", [word_similarity, fast.word_similarity], ids=["plain", "fast"])
def test_word_similarity_matches_the_formula_pair_by_pair(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    regions, words = torch.randn(3, 6, 5).double(), torch.randn(3, 6, 4).double()
    lengths = torch.tensor([4, 1, 3])
    gammas = Gammas(4.0, 5.0, 10.0)
    got = form(regions[None], words[None], lengths[None], gammas.attention, gammas.words)[0]
    for i in range(3):
        for j in range(3):
            e = words[j, :, : lengths[j]]
            attention = (gammas.attention * (e.T @ regions[i]).softmax(0)).softmax(1)
            context = regions[i] @ attention.T
            evidence = torch.logsumexp(gammas.words * F.cosine_similarity(context, e, dim=0), 0)
            assert got[i, j].item() == pytest.approx(evidence.item(), abs=1e-10)


def test_fast_word_similarity_has_correct_gradients() -> None:
    torch.manual_seed(1)
    regions = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    words = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[4, 1, 3], [2, 2, 4]])

    def similarity(regions: Tensor, words: Tensor) -> Tensor:
        return fast.word_similarity(regions, words, lengths, 4.0, 5.0)

    assert torch.autograd.gradcheck(similarity, (regions, words))
    plain = word_similarity(regions, words, lengths, 4.0, 5.0)
    quick = similarity(regions, words)
    torch.testing.assert_close(quick, plain)
    cotangent = torch.randn_like(plain)
    gradients = [torch.autograd.grad(x, (regions, words), cotangent) for x in (quick, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_damsm_losses_of_two_groups_are_the_mean_of_each(codes: tuple[Tensor, ...]) -> None:
    regions, words, images, sentences = (x.double() for x in codes)
    ids, gammas = torch.tensor([1, 1, 1, 2]), Gammas()
    groups = (slice(2), slice(2, 4))
    both = word_losses(regions, words, LENGTHS, ids, 2, gammas).sum()
    each = [word_losses(regions[h], words[h], LENGTHS[h], ids[h], 1, gammas).sum() for h in groups]
    torch.testing.assert_close(both, torch.stack(each).mean(), atol=1e-12, rtol=0)
    whole = word_losses(regions, words, LENGTHS, ids, 1, gammas).sum()
    assert abs(whole.item() - both.item()) > 0.1
    both = sentence_losses(images, sentences, ids, 2, gammas).sum()
    each = [sentence_losses(images[h], sentences[h], ids[h], 1, gammas).sum() for h in groups]
    torch.testing.assert_close(both, torch.stack(each).mean(), atol=1e-12, rtol=0)


def test_damsm_losses_ignore_padding_and_have_finite_gradients(codes: tuple[Tensor, ...]) -> None:
    regions, words = codes[0].requires_grad_(), codes[1]
    filled = words.clone()
    filled[1, :, 9:] = 100.0
    zeroed = words.clone()
    zeroed[1, :, 9:] = 0.0
    zeroed.requires_grad_()
    one = word_losses(regions, filled, LENGTHS, NONE_ALIKE, 1, Gammas()).sum()
    other = word_losses(regions, zeroed, LENGTHS, NONE_ALIKE, 1, Gammas()).sum()
    torch.testing.assert_close(one, other)
    other.backward()
    assert regions.grad is not None and regions.grad.isfinite().all() and regions.grad.abs().max() > 0
    assert zeroed.grad is not None and zeroed.grad.isfinite().all() and zeroed.grad[1, :, 9:].abs().max() == 0


def test_damsm_losses_keep_full_precision_under_autocast(codes: tuple[Tensor, ...]) -> None:
    regions, words, images, sentences = codes
    plain = word_losses(regions, words, LENGTHS, NONE_ALIKE, 1, Gammas()).sum()
    with torch.autocast("cpu", torch.bfloat16):
        cast = word_losses(regions, words, LENGTHS, NONE_ALIKE, 1, Gammas()).sum()
        halved = sentence_losses(images.bfloat16(), sentences.bfloat16(), NONE_ALIKE, 1, Gammas()).sum()
    assert torch.equal(cast, plain)
    assert halved.dtype == torch.float32


def test_wrong_pairs_stay_in_their_group_and_drop_pairs_of_one_class() -> None:
    pairs = wrong_pairs(torch.tensor([7, 7, 8, 1, 2, 1]), groups=2)
    assert pairs.caption.tolist() == [1, 2, 0, 4, 5, 3]
    assert pairs.keep.tolist() == [False, True, True, True, True, False]
    with pytest.raises(ValueError, match="group_size is 1"):
        wrong_pairs(torch.arange(3), groups=3)


def test_wrong_images_are_of_the_next_sample_of_another_class_in_the_group() -> None:
    classes = torch.tensor([7, 7, 8, 7, 1, 1, 1, 1])
    assert wrong_images(classes, groups=2).tolist() == [2, 2, 3, 2, 5, 6, 7, 4]
    assert wrong_images(torch.tensor([1, 2]), groups=1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="group_size is 1"):
        wrong_images(torch.arange(3), groups=3)


def test_masked_loss_fake_averages_within_each_group() -> None:
    logits = torch.tensor([0.0, 5.0, 1.0, 2.0, 9.0, 9.0])
    keep = torch.tensor([True, False, True, True, False, False])
    terms = F.softplus(logits)
    expected = ((terms[0]) + (terms[2] + terms[3]) / 2 + 0) / 3
    torch.testing.assert_close(masked_loss_fake(logits, keep, groups=3), expected)
    torch.testing.assert_close(masked_loss_fake(logits, torch.ones(6, dtype=torch.bool), 2), loss_fake(logits))


NOT_LOSSES = ("accuracy_real", "accuracy_wrong", "accuracy_fake", "accuracy_matching", "accepted")


class Logits(PairDiscriminator):
    """A discriminator whose images are their own features, and whose logit is their product with the condition."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def conditionals(self, features: torch.Tensor, *conditions: torch.Tensor) -> list[torch.Tensor]:
        return [(features * condition).sum(1) for condition in conditions]

    def unconditional(self, features: torch.Tensor) -> torch.Tensor:
        return features.sum(1)


def test_losses_report_accuracies() -> None:
    real = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    fake = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])
    condition = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    pairs = WrongPairs(caption=torch.tensor([2, 3, 0, 1]), keep=torch.tensor([True, True, True, False]))
    losses = joint_losses(Logits(), real, fake, condition, pairs, groups=1)
    assert losses.accuracy_real == 0.5  # 2, -1, 3, -1
    assert losses.accuracy_wrong == 0.0  # 0, 0, 0, and one that is not kept; a logit of 0 is not correct
    assert losses.accuracy_fake == 0.25  # 1, -1, 0, 1
    assert losses.accuracy_matching == pytest.approx(2 / 3)  # 2 > 0, -1 > 0, 3 > 0
    same = matching_aware_losses(Logits(), real, fake, condition, pairs, groups=1)
    assert all(torch.equal(value, getattr(losses, name)) for name, value in vars(same).items())
    assert losses.accepted.tolist() == [True, False, True, False]
    none = WrongPairs(caption=pairs.caption, keep=torch.zeros(4, dtype=torch.bool))
    assert matching_aware_losses(Logits(), real, fake, condition, none, groups=1).accuracy_matching == 0.0
    alone = unconditional_losses(torch.tensor([1.0, -1.0]), torch.tensor([-2.0, -1.0]))
    assert (alone.accuracy_real, alone.accuracy_fake, alone.accepted.tolist()) == (0.5, 1.0, [True, False])


def test_discriminator_losses_have_the_published_values() -> None:
    torch.manual_seed(0)
    real, fake, wrong, real_alone, fake_alone = torch.randn(5, 4)
    losses = JointLosses(
        real=loss_real(real),
        wrong=loss_fake(wrong[:3]),
        fake=loss_fake(fake),
        real_alone=loss_real(real_alone),
        fake_alone=loss_fake(fake_alone),
        **dict.fromkeys(NOT_LOSSES, torch.ones(())),
    )
    assert attngan_discriminator_loss(losses).item() == pytest.approx(1.9574025, abs=1e-6)
    assert matching_aware_loss(losses).item() == pytest.approx(2.1567173, abs=1e-6)


def test_stackgan_losses_weight_their_terms() -> None:
    parts = ("real", "wrong", "fake", "real_alone", "fake_alone")
    values = {name: torch.tensor(float(10**i)) for i, name in enumerate(parts)}
    losses = JointLosses(**values, **dict.fromkeys(NOT_LOSSES, torch.ones(())))
    assert stackgan_pp_discriminator_loss(losses).item() == 1 + (10 + 100) / 2 + 1000 + 10000
    released = WrongImageLosses(**vars(losses), wrong_alone=torch.tensor(5.0))
    assert stackgan_v2_released_loss(released).item() == 1 + 10 + 100 + 1000 + 10000 + 5


class RecordingLogits(Logits):
    """Records the features (N, 2) of every pass of the conditional head."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Tensor] = []

    def conditionals(self, features: Tensor, *conditions: Tensor) -> list[Tensor]:
        self.passes.append(features)
        return super().conditionals(features, *conditions)


@pytest.mark.parametrize("wrong_last", [False, True])
def test_neighbours_are_all_images_but_the_last_with_the_next_caption(wrong_last: bool) -> None:
    real, fake, condition = torch.randn(3, 6, 2)
    net = RecordingLogits()
    losses = neighbour_losses(net, real, fake, condition, 2, joint=True, wrong_last=wrong_last)
    wrong = [float((real[i] * condition[i + 1]).sum()) for i in (0, 1, 3, 4)]
    torch.testing.assert_close(losses.wrong, loss_fake(torch.tensor(wrong)))
    torch.testing.assert_close(losses.real, loss_real((real * condition).sum(1)))
    torch.testing.assert_close(losses.fake, loss_fake((fake * condition).sum(1)))
    own = (real * condition).sum(1)
    assert losses.accuracy_matching == sum(own[i] > w for i, w in zip((0, 1, 3, 4), wrong, strict=True)) / 4
    first, *others = net.passes
    middle, last = reversed(others) if wrong_last else others
    assert torch.equal(first, real) and torch.equal(middle, real[[0, 1, 3, 4]]) and torch.equal(last, fake)
    assert not hasattr(neighbour_losses(net, real, fake, condition, 2, joint=False, wrong_last=True), "real_alone")


def test_wrong_images_have_passes_of_their_own() -> None:
    real, fake, condition = torch.randn(3, 4, 2)
    net, wrong = RecordingLogits(), torch.tensor([1, 0, 3, 2])
    losses = wrong_image_losses(net, real, fake, condition, wrong, 2, joint=True)
    assert isinstance(losses, WrongImageLosses)
    torch.testing.assert_close(losses.wrong, loss_fake((real[wrong] * condition).sum(1)))
    torch.testing.assert_close(losses.wrong_alone, loss_real(real[wrong].sum(1)))
    torch.testing.assert_close(losses.fake_alone, loss_fake(fake.sum(1)))
    assert [torch.equal(a, b) for a, b in zip(net.passes, (real, real[wrong], fake), strict=True)] == [True] * 3
    alone = wrong_image_losses(net, real, fake, condition, wrong, 2, joint=False)
    assert alone.wrong == losses.wrong and not hasattr(alone, "wrong_alone")


def test_bce_is_full_precision_and_stable() -> None:
    assert loss_real(torch.tensor([-200.0])).item() == pytest.approx(200.0)
    assert loss_fake(torch.tensor([-200.0])).item() == pytest.approx(0.0)
    assert loss_real(torch.zeros(3, dtype=torch.bfloat16)).item() == pytest.approx(math.log(2), abs=1e-7)


def test_kl_divergence_has_the_published_value() -> None:
    torch.manual_seed(0)
    assert kl_divergence(torch.randn(4, 100), torch.randn(4, 100)).item() == pytest.approx(0.8998332, abs=1e-6)
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def test_colour_consistency_matches_hand_computation() -> None:
    high = torch.zeros(1, 3, 4, 4)
    high[0, 0, :, ::2] = 1.0  # mean 1/2, variance 1/4 of red
    low = torch.zeros(1, 3, 2, 2, requires_grad=True)
    assert colour_consistency(high, low).item() == pytest.approx(0.25 + 5 * 0.0625)
    assert colour_consistency(high, low, "authors").item() == pytest.approx(0.25 / 3 + 5 * 0.0625 / 9)
    grown = F.interpolate(torch.randn(2, 3, 4, 4), scale_factor=2)
    assert colour_consistency(grown, grown[:, :, ::2, ::2]).item() == pytest.approx(0, abs=1e-9)
    assert colour_consistency(high, low).requires_grad and not colour_consistency(high, low, "authors").requires_grad


def test_r1_is_the_mean_squared_norm_of_the_gradient_on_real_images() -> None:
    torch.manual_seed(0)
    weight, images = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, 4, 4).double()
    linear = r1_penalty(lambda x: (x * weight).flatten(1).sum(1), images)
    assert torch.allclose(linear, weight.square().sum())
    quadratic = r1_penalty(lambda x: (x.square() * weight).flatten(1).sum(1), images)
    expected = (2 * images * weight).square().flatten(1).sum(1).mean()
    assert torch.allclose(quadratic, expected)
    ours, theirs = (torch.autograd.grad(value, weight)[0] for value in (quadratic, expected))
    assert torch.allclose(ours, theirs)
