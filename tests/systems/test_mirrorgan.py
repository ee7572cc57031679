"""MirrorGAN and its captioner: published sizes and names, parts computed by hand, errors, and learning."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.engine.trainer import Trainer
from t2idist.losses.captions import word_cross_entropy
from t2idist.nn.attention import GlobalLocalAttention
from t2idist.nn.captioning import CaptionRNN, ResNetCaptionCNN
from t2idist.nn.resnet import DEVIATION, MEAN, NAMES, ResNetTrunk, imagenet_scale, load_resnet
from t2idist.nn.text_encoders import padding_mask
from tests.helpers.fixed_weights import fill, fingerprint, parameters, weight
from tests.systems.test_loss_values import (
    COCO,
    SMALL,
    TINY_DAMSM,
    caption_correlation,
    colour_batch,
    damsm_config,
    parameter_counts,
    trainer,
)

TINY_CAPTIONER = {"trunk": "small", "trunk_width": 8, "image_size": 32, "word_dim": 16, "hidden_dim": 16}


def captioner_config(**settings: Any) -> Any:
    return systems.load("captioner").Config(**settings)


def build_info(group_size: int = 16, words: int = 15, damsm: Any = None, captioner: Any = None) -> BuildInfo:
    """Build info of a stage that uses a damsm and a captioner with these configs."""
    info = BuildInfo(group_size, 5, DataInfo(("",) * words, 1000))
    sources = {
        name: {"system": name, "config": asdict(config), "plan": info.describe()}
        for name, config in (("damsm", damsm), ("captioner", captioner))
        if config is not None
    }
    return replace(info, sources=sources)


def tiny_build_info() -> BuildInfo:
    return build_info(damsm=damsm_config(**TINY_DAMSM), captioner=captioner_config(**TINY_CAPTIONER))


def build_system(name: str, info: BuildInfo, **settings: Any) -> System:
    module = systems.load(name)
    return module.build(from_dict(module.Config, settings), info)


# ------------------------------------------------------------------------------------------------ the published sizes
@pytest.mark.parametrize(
    ("settings", "names", "expected"),
    [
        ({}, "dd91fa5d6f88f3b4", (7_105_392, 6_313_730, 19_424_002, 71_858_946)),
        (COCO, "80fa1d75d6b8d1ab", (13_853_408, 13_304_450, 42_800_258, 160_774_274)),
    ],
)
def test_parameter_counts_and_names_are_the_published_ones(
    settings: dict[str, int], names: str, expected: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        system = build_system("mirrorgan", build_info(12, 5450, damsm_config(), captioner_config()), **settings)
    roles = ("generator", "discriminator_64", "discriminator_128", "discriminator_256")
    assert parameter_counts(system) == dict(zip(roles, expected, strict=True))
    assert fingerprint(system.roles["generator"].net) == names
    cnn, rnn = system.frozen["cnn"].net, system.frozen["rnn"].net
    assert (fingerprint(cnn), parameters(cnn)) == ("7d560cf805bf6a6d", 58_668_864)
    assert (fingerprint(rnn), parameters(rnn)) == ("31b9cb5a66fb6373", 5_768_010)


def test_captioner_trains_projection_and_decoder_only() -> None:
    with torch.device("meta"):
        (role,) = build_system("captioner", build_info(128, 5450)).roles.values()
    trained = {name: p.numel() for name, p in role.net.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trained.items() if name.startswith("cnn.")) == 525_056
    assert sum(n for name, n in trained.items() if name.startswith("rnn.")) == 5_768_010
    assert role.pretrained is not None and role.pretrained.key == "trunk_weights"


# ------------------------------------------------------------------------------------------------ attention
def test_sentence_attention_matches_hand_computation() -> None:
    net = GlobalLocalAttention(2, 3, 1)
    with torch.no_grad():
        net.linear.weight.copy_(torch.tensor([[1.0], [2.0]]))
        net.linear.bias.copy_(torch.tensor([0.0, 1.0]))
        net.conv_sentence_vis.weight.copy_(torch.eye(2)[:, :, None, None])
    features = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])  # ones at one position, zeros at the other
    context = net.sentence(features, torch.tensor([[1.0]]))  # the sentence becomes (1, 3)
    part = 1 / (1 + math.exp(2.0))  # softmax over channels of (1, 3)
    expected = torch.tensor([[[[part, 0.5]], [[3 * (1 - part), 1.5]]]])
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("compat", ["", "authors"])
def test_word_attention_is_that_of_attngan(compat: str) -> None:
    with torch.device("meta"):
        system = build_system("mirrorgan", tiny_build_info(), compat=compat)
    stage: Any = system.roles["generator"].net.get_submodule("h_net2")
    assert stage.att.compat == compat and type(stage.att).forward is type(stage.att).__bases__[0].forward


def test_images_depend_on_words_and_sentence() -> None:
    torch.manual_seed(0)
    net: Any = (
        build_system("mirrorgan", tiny_build_info(), **SMALL, z_dim=4, condition_dim=8).roles["generator"].net.eval()
    )
    z, normal, sentence, words = torch.randn(2, 4), torch.randn(2, 8), torch.randn(2, 16), torch.randn(2, 16, 5)
    padding = padding_mask(torch.tensor([5, 3]), words)
    with torch.no_grad():
        whole = net(z, normal, sentence, words, padding).images
        other_words = net(z, normal, sentence, words.roll(1, 0), padding).images
        net.h_net2.att.linear.bias += 1.0
        other_sentence = net(z, normal, sentence, words, padding).images
    for other in (other_words, other_sentence):
        assert torch.equal(other[0], whole[0]) and not torch.equal(other[1], whole[1])


# ------------------------------------------------------------------------------------------------ the captioner's parts
def test_word_cross_entropy_is_a_mean_over_the_words_of_a_group() -> None:
    logits = torch.randn(4, 3, 5)
    tokens = torch.tensor([[1, 2, 3], [4, 0, 0], [1, 1, 0], [2, 0, 0]])
    lengths = torch.tensor([3, 1, 2, 1])
    log = logits.log_softmax(2)
    terms = [[-log[n, t, tokens[n, t]] for t in range(lengths[n])] for n in range(4)]
    first, second = terms[0] + terms[1], terms[2] + terms[3]
    torch.testing.assert_close(word_cross_entropy(logits, tokens, lengths, 1), sum(first + second) / 7)
    by_group = (sum(first) / 4 + sum(second) / 3) / 2
    torch.testing.assert_close(word_cross_entropy(logits, tokens, lengths, 2), by_group)


def test_decoder_is_causal() -> None:
    torch.manual_seed(0)
    net = CaptionRNN(9, 4, 6)
    image, tokens = torch.randn(2, 4), torch.randint(1, 9, (2, 5))
    logits = net(image, tokens)
    for position in range(5):
        other = tokens.clone()
        other[:, position] = other[:, position] % 8 + 1
        changed = (net(image, other) != logits).any(dim=2).all(dim=0)
        assert changed.tolist() == [t > position for t in range(5)]
    assert (net(image + 1, tokens) != logits).any(dim=2).all()


def test_greedy_decode_takes_the_most_likely_word() -> None:
    torch.manual_seed(0)
    net = CaptionRNN(9, 4, 6)
    image = torch.randn(3, 4)
    words = net.greedy_decode(image, 6)
    assert words.shape == (3, 6) and torch.equal(net(image, words).argmax(2), words)


def test_frozen_decoder_passes_gradient_to_the_image() -> None:
    net = CaptionRNN(9, 4, 6).eval().requires_grad_(False)
    assert not net.training and net.lstm.training  # cuDNN gives no gradient in eval mode
    image = torch.randn(2, 4, requires_grad=True)
    net(image, torch.ones(2, 3, dtype=torch.int64)).sum().backward()
    assert image.grad is not None and bool((image.grad != 0).all())


def test_captioner_trunk_stays_frozen_in_train_mode() -> None:
    with torch.device("meta"):
        net = ResNetCaptionCNN(8, 64, "").train()
    assert net.bn.training and not any(m.training for m in net.resnet.modules())
    assert not any(p.requires_grad for p in net.resnet.parameters())


def test_resnet_gets_imagenet_normalised_images_unless_compat_is_authors() -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    by_hand = ((images + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    torch.testing.assert_close(imagenet_scale(images), by_hand)
    with torch.device("meta"):
        net = ResNetCaptionCNN(4, 32, "")
    net.resnet = fill(ResNetTrunk((1, 1, 1, 1)))  # a short one instead of 152 layers
    net.linear, net.bn = torch.nn.Linear(2048, 4), torch.nn.BatchNorm1d(4)
    net.eval()
    right = net(images)
    net.compat = "authors"
    assert not torch.allclose(net(images), right, atol=1e-3)
    torch.testing.assert_close(net(imagenet_scale(images)), right)


def torchvision_names(trunk: ResNetTrunk) -> dict[str, Tensor]:
    names = {index: name for name, index in NAMES.items()}
    given = {f"{names[k.split('.')[0]]}.{k.partition('.')[2]}": weight(k, v) for k, v in trunk.state_dict().items()}
    return {**given, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_load_resnet_reads_torchvision_names_and_names_bad_keys() -> None:
    trunk = ResNetTrunk((1, 1, 1, 1))
    given = torchvision_names(trunk)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer4.0.bn3.bias"} <= given.keys()
    old = {k: v for k, v in given.items() if not k.endswith("num_batches_tracked")}
    load_resnet(trunk, old)
    for key, value in trunk.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, weight(key, value)), key
    with pytest.raises(ValueError, match=r"does not have 'layer2\.0\.conv1\.weight' \(1 names missing"):
        load_resnet(trunk, {k: v for k, v in given.items() if k != "layer2.0.conv1.weight"})
    with pytest.raises(ValueError, match=r"has 'layer1\.1\.conv1\.weight', which ResNet-152 does not"):
        load_resnet(trunk, {**given, "layer1.1.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'bn1\.weight' has shape \(3,\); ResNet-152 has \(64,\)"):
        load_resnet(trunk, {**given, "bn1.weight": torch.zeros(3)})


# ------------------------------------------------------------------------------------------------ errors
def test_build_rejects_invalid_settings() -> None:
    right = tiny_build_info()
    sources = right.sources
    other = {**sources["captioner"], "system": "damsm"}
    for info, settings, message in (
        (replace(right, sources={"captioner": sources["captioner"]}), {}, r"uses\.damsm is missing"),
        (replace(right, sources={"damsm": sources["damsm"]}), {}, r"uses\.captioner is missing"),
        (replace(right, group_size=1), {}, "group_size is 1"),
        (right, {"compat": "old"}, "compat: 'old'; expected '' or 'authors'"),
        (right, {"base_size": 48}, "base_size is 48"),
        (replace(right, sources={**sources, "captioner": other}), {}, "of system 'damsm'; it must be of 'captioner'"),
        (
            replace(right, data=DataInfo(("",) * 16, 1000)),
            {},
            r"uses\.captioner: its vocabulary has 15 words and this data's has 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_system("mirrorgan", info, **{**SMALL, **settings})
    for settings, message in (
        ({"trunk": "vgg"}, "trunk is 'vgg'; it must be one of resnet152, small"),
        ({"image_size": 31}, "image_size is 31; the trunk 'resnet152' needs at least 32"),
        ({"trunk": "small", "image_size": 64, "trunk_weights": "x"}, "trunk_weights is given, but trunk is 'small'"),
        ({"compat": "old"}, "compat: 'old'; expected '' or 'authors'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_system("captioner", build_info(), **settings)
    with pytest.raises(ValueError, match="group_size is 1; the captioner's BatchNorm needs at least 2"):
        build_system("captioner", build_info(1), **TINY_CAPTIONER)


# ------------------------------------------------------------------------------------------------ learning
@pytest.fixture(scope="module")
def trained_captioner() -> Trainer:
    torch.manual_seed(0)
    run = trainer(build_system("captioner", build_info(), **{**TINY_CAPTIONER, "lr": 5e-3}), 16)
    for step in range(80):
        run.run_step(colour_batch((32,), step, repeats=2))
    return run


def test_captioner_learns_colour_words(trained_captioner: Trainer) -> None:
    batch = colour_batch((32,), step=1000, repeats=4)
    system: Any = trained_captioner.system
    with torch.no_grad():
        words = system.describe(trained_captioner.evaluation_nets(), batch.images[-1], 5)
    assert (words[:, 0] == batch.captions.tokens[:, 0]).float().mean() >= 0.75
    assert bool((words[:, 1:] >= 9).all()), "fillers follow the colour"


def test_damsm_loss_is_optional() -> None:
    without, given = build_system("mirrorgan", tiny_build_info(), **SMALL), {"damsm_weight": 0.5, "stream_weight": 0.0}
    assert "image" not in without.frozen
    run = trainer(build_system("mirrorgan", tiny_build_info(), **SMALL, **given), 16)
    assert "image" in run.system.frozen and run.system.exports == without.exports == ("generator", "text")
    run.run_step(colour_batch(run.system.sizes, 0, repeats=2))
    assert run.reduce_reports()["generator/damsm"] > 0


@pytest.mark.whole
def test_mirrorgan_learns_to_follow_captions(trained_captioner: Trainer) -> None:
    torch.manual_seed(1)
    rates = {"generator_lr": 1e-3, "discriminator_lr": 1e-3, "ema_half_life_images": 200.0}
    system = build_system("mirrorgan", tiny_build_info(), **SMALL, z_dim=4, condition_dim=8, unit_text=True, **rates)
    described = trained_captioner.evaluation_nets()
    for name in ("cnn", "rnn"):
        system.frozen[name].net.load_state_dict(described[name].state_dict())
    run = trainer(system, 16)
    before = {k: v.clone() for name in ("cnn", "rnn") for k, v in system.frozen[name].net.state_dict().items()}
    assert caption_correlation(run) < 0.2
    first: dict[str, float] = {}
    for step in range(120):
        run.run_step(colour_batch(system.sizes, step, repeats=2))
        first = first or run.reduce_reports()
    last = run.reduce_reports()
    assert caption_correlation(run) > 0.35
    assert last["generator/stream"] < first["generator/stream"]
    after = {k: v for name in ("cnn", "rnn") for k, v in system.frozen[name].net.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
