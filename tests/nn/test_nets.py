"""Layers and networks: published names, counts and outputs, and properties of each layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from t2idist.nn.attention import WordAttention
from t2idist.nn.blocks import GLU, JointConv2d, JointSequential, UpConv2d, joint_conv2d, up_block, up_conv2d
from t2idist.nn.conditioning import ConditioningAugmentation
from t2idist.nn.discriminators import SIZES, AttnDiscriminator, StackDiscriminator
from t2idist.nn.fast import lstm as fast
from t2idist.nn.image_encoders import InceptionEncoder, SmallEncoder, damsm_image_encoder, load_trunk
from t2idist.nn.inception import InceptionTrunk, InceptionV3
from t2idist.nn.init import normal_, orthogonal_
from t2idist.nn.text_encoders import BiLSTM, unit_scale
from t2idist.nn.tree import AttentionGenerator, MemoryStage, StackGenerator, pyramid
from tests.helpers.fixed_weights import fill, fingerprint, parameters, weight
from tools.bench import reference_steps

SMALL = {"width": 8, "z_dim": 32, "base_size": 64, "branches": 3, "residuals": 2, "text_dim": 64}


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "convert/authors" / "outputs.safetensors")


def thin(images: Tensor, positions: int) -> Tensor:
    step = images.shape[2] // positions
    return images[:, :, ::step, ::step]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------ released networks
@pytest.mark.parametrize("compat", ["", "authors"])
def test_attngan_generator_reproduces_released_outputs(authors: dict[str, Tensor], compat: str) -> None:
    net = fill(AttentionGenerator(**SMALL, condition_dim=32, compat=compat))
    names = ("z", "eps", "sent_emb", "word_embs", "mask")
    with torch.no_grad():
        output = net(*(authors[f"attngan/{name}"] for name in names))
    close(output.mean, authors["attngan/mean"])
    close(thin(output.images[0], 16), authors["attngan/image_64"])
    for i, size in enumerate((128, 256), start=1):
        name = f"attngan/image_{size}" if compat else f"attngan/right_mask_{size}"
        close(thin(output.images[i], 16), authors[name])
    if compat:
        for i, size in enumerate((64, 128)):
            close(thin(output.attention[i], 16), authors[f"attngan/attention_{size}"])


@pytest.mark.parametrize("compat", ["", "authors"])
def test_dm_gan_generator_reproduces_released_outputs(authors: dict[str, Tensor], compat: str) -> None:
    """The inputs are those of AttnGAN; the mask of a caption that is generated alone is right in the released code."""
    released = load_file(Path(__file__).parents[1] / "convert/authors" / "dm_gan.safetensors")
    net = fill(AttentionGenerator(**SMALL, condition_dim=32, compat=compat, stage=MemoryStage))
    with torch.no_grad():
        output = net(*(authors[f"attngan/{name}"] for name in ("z", "eps", "sent_emb", "word_embs", "mask")))
    for image, size in zip(output.images[1:], (128, 256), strict=True):
        close(thin(image, 16), released[f"image_{size}" if compat else f"right_mask_{size}"])
    if compat:
        for weights, size in zip(output.attention, (64, 128), strict=True):
            close(thin(weights, 16), released[f"attention_{size}"])


def test_stackgan_generator_reproduces_released_outputs(authors: dict[str, Tensor]) -> None:
    net = fill(StackGenerator(**SMALL, condition_dim=16))
    with torch.no_grad():
        output = net(*(authors[f"stackgan/{name}"] for name in ("z", "eps", "text_embedding")))
    for image, size in zip(output.images, (64, 128, 256), strict=True):
        close(thin(image, 16), authors[f"stackgan/image_{size}"])


def test_attngan_discriminators_reproduce_released_outputs(authors: dict[str, Tensor]) -> None:
    torch.manual_seed(3)
    images = [torch.tanh(torch.randn(2, 3, size, size)) for size in (64, 128, 256)]
    condition = authors["discriminator/condition"]
    for image in images:
        size = image.shape[2]
        net = fill(AttnDiscriminator(4, size, 64))
        with torch.no_grad():
            features = net.features(image)
            close(features, authors[f"discriminator/features_{size}"])
            close(net.conditional(features, condition).sigmoid(), authors[f"discriminator/conditional_{size}"])
            close(net.unconditional(features).sigmoid(), authors[f"discriminator/unconditional_{size}"])


def test_text_encoder_reproduces_released_outputs_in_any_order(authors: dict[str, Tensor]) -> None:
    net = fill(BiLSTM(60, 64, 300, dropout=0.5))
    tokens, lengths = authors["text/tokens"], authors["text/lengths"]
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        words, sentence = net(tokens[order], lengths[order])
    close(words, authors["text/words"][order])
    close(sentence, authors["text/sentence"][order])


def test_inception_matches_torchvision() -> None:
    """Values of torchvision's inception_v3 with the recipe's weights."""
    net = fill(InceptionTrunk())
    torch.manual_seed(0)
    with torch.no_grad():
        regions, pooled = net.features(torch.tanh(torch.randn(1, 3, 96, 96)))
    assert regions.shape == (1, 768, 4, 4)
    assert pooled[0, :3].tolist() == pytest.approx([0.1974576, 0.0512189, 0.1164021], abs=1e-5)
    assert pooled.sum().item() == pytest.approx(132.29134, rel=1e-5)
    assert regions.sum().item() == pytest.approx(918.76813, rel=1e-5)


PUBLISHED = {
    "attngan/cub/netG": ("6e465dfa083b2dfb", 7_084_592),
    "attngan/cub/netD64": ("69b0f04feca6e8ed", 6_313_730),
    "attngan/cub/netD128": ("6223b9fc0f7a04af", 19_424_002),
    "attngan/cub/netD256": ("c753a6a325387c00", 71_858_946),
    "attngan/coco/netG": ("d083fbff2f057867", 13_811_456),
    "attngan/coco/netD64": ("4cc3e35db4e6bb4d", 13_304_450),
    "attngan/coco/netD128": ("ddf11bed20b2daa8", 42_800_258),
    "attngan/coco/netD256": ("ce8987f0d9a59bc1", 160_774_274),
    "damsm/cub/text": ("d4c2522ddcc938eb", 2_075_320),
    "damsm/coco/text": ("b17c848c91c4e227", 8_629_420),
    "damsm/image": ("1c4e03e0923f0e1d", 22_506_720),
    "stackgan/cub/netG": ("2bd66d5c630386de", 21_239_696),
    "stackgan/cub/netD64": ("af22957e86c44bf1", 5_723_906),
    "stackgan/cub/netD128": ("992af0a0d6d8bd35", 18_834_178),
    "stackgan/cub/netD256": ("659b09a6e4841a04", 71_269_122),
    "stackgan/unconditional/netG": ("9890723c5ed500bc", 16_472_208),
    "stackgan/unconditional/netD64": ("175cb31262d42e8d", 2_765_569),
    "stackgan/unconditional/netD128": ("c48451861188cc94", 15_875_841),
    "stackgan/unconditional/netD256": ("e025f3620c8137c9", 68_310_785),
}
"""Names and shapes (hashed) and counts of the released networks."""


def published(name: str) -> nn.Module:
    system, *rest = name.split("/")
    if system == "damsm":
        return (
            InceptionEncoder(256) if rest == ["image"] else BiLSTM({"cub": 5450, "coco": 27297}[rest[0]], 256, 300, 0.5)
        )
    preset, net = rest
    tree = {"z_dim": 100, "base_size": 64, "branches": 3}
    if system == "attngan":
        width, residuals, discriminator = {"cub": (32, 2, 64), "coco": (48, 3, 96)}[preset]
        if net == "netG":
            return AttentionGenerator(**tree, width=width, residuals=residuals, text_dim=256, condition_dim=100)
        return AttnDiscriminator(discriminator, int(net.removeprefix("netD")), 256)
    conditional = preset == "cub"
    if net == "netG":
        text_dim = 1024 if conditional else None
        return StackGenerator(**tree, width=64, residuals=2, text_dim=text_dim, condition_dim=128)
    return StackDiscriminator(64, int(net.removeprefix("netD")), 128 if conditional else None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        net = published(name)
    assert (fingerprint(net), parameters(net)) == PUBLISHED[name]


# ---------------------------------------------------------------------------------------------------- layers
def test_glu_gates_with_the_second_half() -> None:
    x = torch.tensor([[2.0, 3.0, 0.0, 100.0]])
    assert GLU()(x).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (1, 5, 3, 7)])
def test_fast_up_conv2d_matches_the_plain_form(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = UpConv2d(5, 4).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    slow = up_conv2d(x, layer.weight)
    quick = layer(x)
    torch.testing.assert_close(quick, slow, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad(quick, (x, layer.weight), cotangent),
        torch.autograd.grad(slow, (x, layer.weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    assert set(dict(up_block(4, 2).named_parameters())) == {"1.weight", "2.weight", "2.bias"}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("positions", [(2, 2), (4, 4), (3, 7)])
def test_fast_joint_conv2d_matches_the_plain_form(positions: tuple[int, int], first: bool) -> None:
    torch.manual_seed(0)
    layer = JointConv2d(5, 3, 4, condition_first=first).double()
    features = torch.randn(2, 5, *positions, dtype=torch.float64, requires_grad=True)
    conditions = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    slow = joint_conv2d(features, conditions, layer.weight, condition_first=first)
    quick = layer(features, *conditions)
    torch.testing.assert_close(quick, slow, atol=1e-12, rtol=0)
    cotangents = list(torch.randn_like(torch.stack(slow)))
    for a, b in zip(
        torch.autograd.grad(quick, (features, conditions, layer.weight), cotangents),
        torch.autograd.grad(slow, (features, conditions, layer.weight), cotangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_joint_sequential_runs_each_condition_separately() -> None:
    torch.manual_seed(0)
    layers = JointSequential(JointConv2d(5, 3, 4), nn.BatchNorm2d(4))
    features, conditions = torch.randn(2, 5, 4, 4), torch.randn(2, 2, 3)
    each = layers(features, *conditions)
    statistics = layers[1].running_mean.clone()
    layers[1].reset_running_stats()
    for out, condition in zip(each, conditions, strict=True):
        torch.testing.assert_close(out, layers(features, condition)[0])
    torch.testing.assert_close(statistics, layers[1].running_mean)


def test_conditioning_samples_its_gaussian() -> None:
    torch.manual_seed(0)
    net = ConditioningAugmentation(6, 3)
    text, normal = torch.randn(4, 6), torch.randn(4, 3)
    condition, mean, log_variance = net(text, normal)
    torch.testing.assert_close(condition, mean + (log_variance / 2).exp() * normal)
    assert torch.equal(net(text, torch.zeros(4, 3))[0], mean)


@pytest.mark.parametrize(("compat", "total"), [("", 65.14293), ("authors", 66.50846)])
def test_word_attention_values(compat: str, total: float) -> None:
    torch.manual_seed(0)
    features, words = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 6)
    projection = torch.randn(8, 16, 1, 1) * 0.1
    net = WordAttention(8, 16, compat)
    net.conv_context.weight.data = projection
    padding = torch.zeros(2, 6, dtype=torch.bool)
    assert net(features, words, padding)[0].abs().sum().item() == pytest.approx(59.6646, abs=1e-3)
    padding[1, 4:] = True
    context, weights = net(features, words, padding)
    assert context.abs().sum().item() == pytest.approx(total, abs=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 4, 4))
    if not compat:
        assert weights[1, 4:].abs().max() == 0 and weights[0, 4:].min() > 0


def test_word_attention_ignores_padding_and_other_samples() -> None:
    torch.manual_seed(0)
    net = WordAttention(8, 16)
    features, words = torch.randn(3, 8, 4, 4), torch.randn(3, 16, 6)
    padding = torch.arange(6) >= torch.tensor([[6], [3], [1]])
    whole = net(features, words, padding)[0]
    alone = net(features[1:2], words[1:2, :, :3], padding[1:2, :3])[0]
    torch.testing.assert_close(whole[1:2], alone)


def test_mask_with_compat_authors_stays_in_its_group() -> None:
    torch.manual_seed(0)
    net = WordAttention(8, 16, "authors")
    features, words = torch.randn(6, 8, 4, 4), torch.randn(6, 16, 6)
    padding = torch.arange(6) >= torch.tensor([6, 3, 1, 2, 5, 4]).unsqueeze(1)
    both = net(features, words, padding, groups=2)[0]
    parts = [net(features[s], words[s], padding[s])[0] for s in (slice(3), slice(3, 6))]
    torch.testing.assert_close(both, torch.cat(parts))


def test_text_encoder_ignores_padding() -> None:
    torch.manual_seed(0)
    net = BiLSTM(20, 8, 6, dropout=0.0)
    tokens, lengths = torch.randint(1, 20, (3, 7)), torch.tensor([7, 2, 4])
    words, sentence = net(tokens, lengths)
    alone, alone_sentence = net(tokens[1:2, :2], lengths[1:2])
    torch.testing.assert_close(words[1:2, :, :2], alone)
    torch.testing.assert_close(sentence[1:2], alone_sentence)
    assert words[1, :, 2:].abs().max() == 0


@pytest.mark.parametrize("training", [False, True])
def test_bidirectional_lstm_matches_that_of_packed_captions(training: bool) -> None:
    torch.manual_seed(0)
    net = BiLSTM(20, 8, 6, dropout=0.0).train(training)
    lengths = torch.tensor([3, 5, 1, 4])
    embedded = torch.randn(4, 5, 6, requires_grad=True)
    results = []
    for run in (fast.bidirectional_lstm, reference_steps.bidirectional_lstm):
        words, sentence = run(net.rnn, embedded, lengths)
        inputs = (embedded, *net.rnn.parameters())
        results.append((words, sentence, *torch.autograd.grad((words.sin() * 3).sum() + sentence.cos().sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])


def test_unit_scale_keeps_direction_and_padding() -> None:
    torch.manual_seed(0)
    words = 0.01 * torch.randn(2, 16, 3)
    words[1, :, 2] = 0.0
    scaled = unit_scale(words.bfloat16())
    assert scaled.dtype == torch.float32 and scaled[1, :, 2].abs().max() == 0
    torch.testing.assert_close(scaled[0].square().mean(0), torch.ones(3))
    torch.testing.assert_close(F.cosine_similarity(unit_scale(words)[0], words[0], dim=0), torch.ones(3))


@pytest.mark.parametrize("base_size", [16, 32, 64])
@pytest.mark.parametrize("branches", [1, 2, 4])
def test_trees_of_any_height_have_the_right_shapes(base_size: int, branches: int) -> None:
    sizes = pyramid(base_size, branches)
    shape = {"width": 16, "z_dim": 5, "base_size": base_size, "branches": branches, "residuals": 1, "condition_dim": 4}
    with torch.device("meta"):
        z, normal, text, words = torch.randn(2, 5), torch.randn(2, 4), torch.randn(2, 6), torch.randn(2, 6, 3)
        padding = torch.zeros(2, 3, dtype=torch.bool)
        attn = AttentionGenerator(**shape, text_dim=6)(z, normal, text, words, padding)
        stack = StackGenerator(**shape, text_dim=6)(z, normal, text)
        plain = StackGenerator(**shape, text_dim=None)(z)
    for output in (attn, stack, plain):
        assert [tuple(x.shape) for x in output.images] == [(2, 3, s, s) for s in sizes]
    assert [tuple(x.shape) for x in attn.attention] == [(2, 3, s, s) for s in sizes[:-1]]


def test_unsupported_sizes_are_rejected() -> None:
    with pytest.raises(ValueError, match="base_size is 48; it must be 16, 32 or 64"):
        pyramid(48, 2)
    with pytest.raises(ValueError, match="branches is 0"):
        pyramid(64, 0)
    with pytest.raises(ValueError, match="512 pixels"):
        AttnDiscriminator(8, 512, 4)


@pytest.mark.parametrize("size", SIZES)
def test_discriminators_support_every_size(size: int) -> None:
    with torch.device("meta"):
        images, condition = torch.randn(3, 3, size, size), torch.randn(3, 6)
        for net in (AttnDiscriminator(8, size, 6), StackDiscriminator(8, size, 6)):
            features = net.features(images)
            assert features.shape == (3, min(64, size), 4, 4)
            assert net.conditional(features, condition).shape == net.unconditional(features).shape == (3,)


def test_initial_weights_have_the_published_distributions() -> None:
    torch.manual_seed(0)
    net = AttnDiscriminator(8, 64, 6)
    orthogonal_(net)
    first = net.get_submodule("img_code_s16")[0].weight.flatten(1)
    torch.testing.assert_close(first @ first.T, torch.eye(8), atol=1e-5, rtol=0)
    assert net.COND_DNET.outlogits[0].bias.item() == 0
    norm = net.COND_DNET.jointConv[1]
    assert 0 < (norm.weight - 1).abs().mean() < 0.05 and norm.bias.abs().max() == 0
    normal_(net)
    assert net.COND_DNET.jointConv[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


# ---------------------------------------------------------------------------------------------- image encoders
def test_inception_encoder_trains_its_projections_only() -> None:
    with torch.device("meta"):
        net = InceptionEncoder(256).train()
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 721_152
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and net.emb_features.training


def test_inception_encoder_shapes_at_any_size() -> None:
    with torch.device("meta"):
        regions, whole = InceptionEncoder(16)(torch.randn(2, 3, 64, 64))
    assert regions.shape == (2, 16, 289) and whole.shape == (2, 16)


def test_small_encoder_shapes_and_gradients() -> None:
    net = SmallEncoder(8, image_size=32, width=4)
    images = torch.randn(2, 3, 48, 48, requires_grad=True)
    regions, whole = net(images)
    assert regions.shape == (2, 8, 16) and whole.shape == (2, 8)
    (regions.sum() + whole.sum()).backward()
    assert all(p.grad is not None for p in net.parameters()) and images.grad is not None


def test_unknown_trunk_is_rejected() -> None:
    with pytest.raises(ValueError, match="trunk is 'resnet'; it must be one of inception, small"):
        damsm_image_encoder({"trunk": "resnet"})


def test_trunk_weights_are_checked_by_name_and_shape() -> None:
    with torch.device("meta"):
        whole = InceptionV3(1000)
    good = {f"module.{k}": weight(k, torch.empty(v.shape)) for k, v in whole.state_dict().items()}
    good = {k: v for k, v in good.items() if not k.endswith("num_batches_tracked")} | {
        "AuxLogits.fc.bias": torch.ones(9)
    }
    net = InceptionEncoder(4)
    before = net.emb_cnn_code.weight.clone()
    load_trunk(net, good)
    assert torch.equal(net.Mixed_7c.branch_pool.conv.weight, good["module.Mixed_7c.branch_pool.conv.weight"])
    assert torch.equal(net.emb_cnn_code.weight, before)
    with pytest.raises(ValueError, match=r"does not have 'Conv2d_1a_3x3.conv.weight' \(1 names missing, 0 unknown\)"):
        load_trunk(net, {k: v for k, v in good.items() if k != "module.Conv2d_1a_3x3.conv.weight"})
    with pytest.raises(ValueError, match="has 'conv1.weight', which Inception-v3 does not"):
        load_trunk(net, good | {"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'Mixed_6a.branch3x3.bn.bias' has shape \(3,\); Inception-v3 has \(384,\)"):
        load_trunk(net, good | {"module.Mixed_6a.branch3x3.bn.bias": torch.ones(3)})
