"""`compat: authors`: three steps equal the released training steps, written here in plain PyTorch, in float64.

Facts: taoxugit/AttnGAN 0d000e6, qiaott/MirrorGAN deb220f, hanzhanggit/StackGAN-Pytorch e72ef88 and StackGAN-v2 6228e34:
`trainer.py` and the losses beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist import systems
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, System
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.nn.captioning import ResNetCaptionCNN
from t2idist.nn.resnet import ResNetTrunk
from tests.helpers import toy_gan
from tests.helpers.fixed_weights import fill
from tests.helpers.released_networks import (
    CaptionDecoder,
    StageDiscriminator,
    StageOne,
    StageTwo,
    Tree,
    TreeDiscriminator,
    WordEncoder,
)

SIZE, WORDS, TEXT, Z, CONDITION, STEPS = 5, 6, 8, 4, 3, 3
HALF_LIFE = SIZE * math.log(2) / -math.log(0.999)
DAMSM = {"embedding_dim": TEXT, "word_dim": 6, "trunk": "small", "trunk_width": 4, "image_size": 32}
CAPTIONER = {"trunk": "small", "trunk_width": 4, "image_size": 32, "word_dim": 5, "hidden_dim": 7}
TREE = {
    "compat": "authors", "generator_width": 4, "discriminator_width": 2, "z_dim": Z, "condition_dim": CONDITION,
    "residuals": 1, "branches": 2, "ema_half_life_images": HALF_LIFE,
}  # fmt: skip
STAGE = {"compat": "authors", "generator_width": 4, "discriminator_width": 2, "z_dim": Z, "condition_dim": CONDITION}
CLASSES = ((1, 1, 2, 3, 3), (4, 4, 4, 4, 4), (5, 6, 5, 6, 7))
"""Class ids of the samples of each step."""


# ------------------------------------------------------------------------------------------------ ours
class Recorder(Trainer):
    """A trainer that records the noise of a step."""

    drawn: list[Tensor]

    def noise(self, *shape: int) -> Tensor:
        self.drawn.append(super().noise(*shape))
        return self.drawn[-1]


def build(name: str, info: BuildInfo, **settings: Any) -> System:
    module = systems.load(name)
    return module.build(from_dict(module.Config, settings), info)


def source(name: str, settings: dict[str, Any], info: BuildInfo) -> dict[str, Any]:
    """Describe an export of a system."""
    return {
        "system": name,
        "config": asdict(from_dict(systems.load(name).Config, settings)),
        "plan": info.describe(),
    }


INFO = BuildInfo(SIZE, WORDS, replace(toy_gan.DATA_INFO, vector_dim=TEXT))


def recorder(system: System, lanes: range = range(1)) -> Recorder:
    share = Share(lanes, len(lanes), 1)
    trainer = Recorder(
        system, stage="authors", seed=5, group_size=SIZE, share=share, world=World(), precision=Precision("float64")
    )
    trainer.drawn = []
    return trainer


def batch_of(step: int, sizes: tuple[int, ...]) -> Batch:
    batch = toy_gan.batch(step, range(1), SIZE, sizes, WORDS)
    captions = replace(batch.captions, vectors=batch.captions.vectors[:, :TEXT])
    return replace(batch, captions=captions, class_ids=torch.tensor(CLASSES[step]))


# ------------------------------------------------------------------------------------------------ theirs
def bce(probabilities: Tensor, target: float) -> Tensor:
    return nn.BCELoss()(probabilities, torch.full_like(probabilities, target))


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()


class Released:
    """The networks of a released training, from our weights, with their optimizers and the average of the generator."""

    def __init__(self, trainer: Trainer, nets: dict[str, nn.Module]) -> None:
        self.nets = nets
        for role, net in nets.items():
            net.double().load_state_dict(trainer.role_network(role).state_dict())
        self.adams = {role: torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for role, net in nets.items()}
        self.average = [p.detach().clone() for p in nets["generator"].parameters()]
        self.reports: dict[str, Tensor] = {}

    def update(self, role: str, loss: Tensor) -> None:
        self.nets[role].zero_grad()
        loss.backward()
        self.adams[role].step()

    def update_average(self) -> None:
        for average, p in zip(self.average, self.nets["generator"].parameters(), strict=True):
            average.mul_(0.999).add_(p.detach(), alpha=0.001)

    def neighbours(self, role: str, real: Tensor, fake: Tensor, condition: Tensor, joint: bool, last: bool) -> None:
        """AttnGAN's and StackGAN v1's discriminator: real[:-1] with condition[1:] is wrong."""
        net: Any = self.nets[role]
        real_features, fake_features = net.features(real), net.features(fake.detach())
        errors = {"real": bce(net.conditional(real_features, condition), 1)}

        def wrong() -> None:
            errors["wrong"] = bce(net.conditional(real_features[:-1], condition[1:]), 0)

        if not last:
            wrong()
        errors["fake"] = bce(net.conditional(fake_features, condition), 0)
        if last:
            wrong()
        loss = errors["real"] + (errors["fake"] + errors["wrong"]) / 2
        if joint:
            errors["real_alone"] = bce(net.unconditional(real_features), 1)
            errors["fake_alone"] = bce(net.unconditional(fake_features), 0)
            loss = (errors["real"] + errors["real_alone"]) / 2
            loss = loss + (errors["fake"] + errors["wrong"] + errors["fake_alone"]) / 3
        self.update(role, loss)
        self.reports |= {f"{role}/{name}": value for name, value in errors.items()}

    def wrong_images(
        self, role: str, real: Tensor, wrong: Tensor, fake: Tensor, condition: Tensor, joint: bool
    ) -> None:
        """StackGAN-v2's discriminator: three passes, of real, wrong and generated images."""
        net: Any = self.nets[role]
        features = [net.features(images) for images in (real, wrong, fake.detach())]
        heads = [net.conditional(each, condition.detach()) for each in features]
        errors = {"real": bce(heads[0], 1), "wrong": bce(heads[1], 0), "fake": bce(heads[2], 0)}
        loss = errors["real"] + (errors["wrong"] + errors["fake"]) / 2
        if joint:
            names = ("real_alone", "wrong_alone", "fake_alone")
            for name, each, target in zip(names, features, (1, 1, 0), strict=True):
                errors[name] = bce(net.unconditional(each), target)
            loss = sum(errors.values(), torch.zeros(()))
        self.update(role, loss)
        self.reports |= {f"{role}/{name}": value for name, value in errors.items()}

    def adversarial(self, role: str, fake: Tensor, condition: Tensor | None, joint: bool, name: str) -> Tensor:
        """The generator's loss by a discriminator, which is in train mode."""
        net: Any = self.nets[role]
        features = net.features(fake)
        loss = torch.zeros(())
        if condition is not None:
            loss = loss + bce(net.conditional(features, condition), 1)
        if joint:
            loss = loss + bce(net.unconditional(features), 1)
        self.reports[f"generator/{name}"] = loss
        return loss

    def check(self, trainer: Trainer, reports: dict[str, float], averaged: bool) -> None:
        """Compare parameters, buffers, the average and the reported losses; ours may report more (accuracies)."""
        state = trainer.state()
        expected = {f"{role}/net/{k}": v for role, net in self.nets.items() for k, v in net.state_dict().items()}
        if averaged:
            net = self.nets["generator"]
            names = [name for name, _ in net.named_parameters()]
            saved = {**net.state_dict(), **dict(zip(names, self.average, strict=True))}  # what the authors save
            expected |= {f"generator/ema/{k}": v for k, v in saved.items()}
        assert expected.keys() == {name for name in state if "/adam/" not in name and "/frozen/" not in name}
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9 * float(value.double().abs().max()))
        expected_reports = {name: value.item() for name, value in self.reports.items()}
        same = {name: reports[name] for name in expected_reports}
        assert same == pytest.approx(expected_reports, rel=1e-9)
        others = reports.keys() - same.keys()
        assert all(name.startswith("norm/") or "/accuracy_" in name for name in others), others


Step = Callable[[Released, Batch, list[Tensor]], None]
"""A released training step, on a batch, with the noise of ours in the order of its draws."""


def compare(system: System, nets: dict[str, nn.Module], step_of: Callable[[Trainer], Step]) -> Recorder:
    """Train with both for three steps and compare after each."""
    trainer = recorder(system)
    released = Released(trainer, nets)
    step = step_of(trainer)
    for number in range(STEPS):
        batch = batch_of(number, system.sizes)
        trainer.drawn = []
        trainer.run_step(batch, momentum=0.5 * (number % 2))  # has no effect: the average has the live statistics
        step(released, batch.to(torch.device("cpu"), torch.float64), trainer.drawn)
        released.check(trainer, trainer.reduce_reports(), system.roles["generator"].ema_half_life_images is not None)
    return trainer


def frozen_copy(trainer: Trainer, name: str, net: nn.Module) -> Any:
    """Give a network the weights of our frozen one."""
    net.double().load_state_dict(trainer.system.frozen[name].net.state_dict())
    return net.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ AttnGAN, MirrorGAN
def longest_first(batch: Batch) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
    """Return images, tokens, lengths and class ids as the released `prepare_data` orders them."""
    lengths = batch.captions.lengths.tolist()
    order = sorted(range(SIZE), key=lambda i: -lengths[i])
    images = [torch.stack([image[i] for i in order]) for image in batch.images]
    tokens = torch.stack([batch.captions.tokens[i] for i in order])
    return images, tokens, torch.tensor([lengths[i] for i in order]), [int(batch.class_ids[i]) for i in order]


def matching_loss(
    regions: Tensor, whole: Tensor, words: Tensor, sentence: Tensor, lengths: Tensor, classes: list[int]
) -> Tensor:
    """AttnGAN's words_loss and sent_loss, both directions, with the released gammas."""
    gamma1, gamma2, gamma3 = 4.0, 5.0, 10.0
    columns = []
    for caption, length in zip(words, lengths.tolist(), strict=True):
        query = caption[:, :length]
        scores = (regions.transpose(1, 2) @ query).softmax(2)  # (B, R, T), over words
        attention = (gamma1 * scores.transpose(1, 2)).softmax(2)  # (B, T, R), over regions
        context = regions @ attention.transpose(1, 2)  # (B, D, T)
        norms = context.norm(dim=1) * query.norm(dim=0)
        cosine = (context * query).sum(1) / norms.clamp(min=1e-8)
        columns.append((gamma2 * cosine).exp().sum(1).log())
    norms = whole.norm(dim=1)[:, None] * sentence.norm(dim=1)[None]
    masked = torch.tensor([[i != j and a == b for j, b in enumerate(classes)] for i, a in enumerate(classes)])
    target, total = torch.arange(SIZE), torch.zeros(())
    for similarity in (torch.stack(columns, 1), whole @ sentence.T / norms.clamp(min=1e-8)):
        logits = (gamma3 * similarity).masked_fill(masked, -torch.inf)
        total = total + F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return total


def attention_step(kind: str, joint: bool, damsm_weight: float, stream_weight: float) -> Callable[[Trainer], Step]:
    def step_of(trainer: Trainer) -> Step:
        vocabulary, frozen = toy_gan.VOCABULARY_SIZE, trainer.system.frozen
        text = frozen_copy(trainer, "text", WordEncoder(vocabulary, DAMSM["word_dim"], TEXT))
        if kind == "mirror":
            decoder = frozen_copy(trainer, "rnn", CaptionDecoder(vocabulary, CAPTIONER["word_dim"], 7))

        def step(run: Released, batch: Batch, noise: list[Tensor]) -> None:
            images, tokens, lengths, classes = longest_first(batch)
            words, sentence = text(tokens, lengths)
            mask = (tokens == 0)[:, : words.shape[2]]
            fakes, mean, log_variance = run.nets["generator"](*noise, sentence, words, mask)
            for real, fake in zip(images, fakes, strict=True):
                role = f"discriminator_{real.shape[2]}"
                run.neighbours(role, real, fake, sentence, joint, last=True)
            loss = torch.zeros(())
            for fake in fakes:
                size = fake.shape[2]
                loss = loss + run.adversarial(f"discriminator_{size}", fake, sentence, joint, f"adversarial_{size}")
            if damsm_weight:
                regions, whole = frozen["image"].net(fakes[-1])
                damsm = matching_loss(regions, whole, words, sentence, lengths, classes)
                run.reports["generator/damsm"] = damsm
                loss = loss + damsm_weight * damsm
            if stream_weight:
                logits = decoder(frozen["cnn"].net(fakes[-1]), tokens, lengths)
                target = nn.utils.rnn.pack_padded_sequence(tokens, lengths, batch_first=True).data
                run.reports["generator/stream"] = F.cross_entropy(logits, target)
                loss = loss + stream_weight * run.reports["generator/stream"]
            run.reports["generator/kl"] = kl_loss(mean, log_variance)
            run.update("generator", loss + run.reports["generator/kl"])
            run.update_average()

        return step

    return step_of


def attention_nets(kind: str, sizes: tuple[int, ...], joint: bool, residuals: int) -> dict[str, nn.Module]:
    dims = {"z_dim": Z, "condition_dim": CONDITION, "text_dim": TEXT}
    generator = Tree(kind, width=4, branches=2, residuals=residuals, **dims, single_output=not joint)
    return {"generator": generator} | {
        f"discriminator_{size}": TreeDiscriminator("attention", 2, size, TEXT, joint) for size in sizes
    }


@pytest.mark.parametrize("single_output", [False, True], ids=["attngan", "attn-dcgan"])
def test_attngan_trains_as_released(single_output: bool) -> None:
    torch.manual_seed(0)
    settings = {**TREE, "gamma_attention": 4.0, "single_output": single_output}
    settings |= {"residuals": 0, "damsm_weight": 1.0} if single_output else {}
    system = build("attngan", replace(INFO, sources={"damsm": source("damsm", DAMSM, INFO)}), **settings)
    nets = attention_nets("attention", system.sizes, not single_output, 0 if single_output else 1)
    compare(system, nets, attention_step("attention", not single_output, 1.0 if single_output else 5.0, 0.0))


def test_mirrorgan_trains_as_released() -> None:
    torch.manual_seed(0)
    sources = {"damsm": source("damsm", DAMSM, INFO), "captioner": source("captioner", CAPTIONER, INFO)}
    system = build("mirrorgan", replace(INFO, sources=sources), **TREE, stream_weight=10.0)
    compare(system, attention_nets("mirror", system.sizes, True, 1), attention_step("mirror", True, 0.0, 10.0))


# ------------------------------------------------------------------------------------------------ StackGAN-v2
def wrong_rows(classes: list[int]) -> list[int]:
    """Choose the wrong image of each sample, as documented: of the next sample of another class, else the next one."""
    rows = []
    for i in range(SIZE):
        others = [(i + k) % SIZE for k in range(1, SIZE)]
        rows.append(next((j for j in others if classes[j] != classes[i]), others[0]))
    return rows


def colour_loss(high: Tensor, low: Tensor) -> Tensor:
    """Compute like_mu / COLOR_LOSS and like_cov / COLOR_LOSS, summed."""
    statistics = []
    for images in (high, low.detach()):
        pixels = images.flatten(2)
        mean = pixels.mean(2, keepdim=True)
        statistics.append((mean, (pixels - mean) @ (pixels - mean).transpose(1, 2) / pixels.shape[2]))
    (mean1, covariance1), (mean2, covariance2) = statistics
    return nn.MSELoss()(mean1, mean2) + 5 * nn.MSELoss()(covariance1, covariance2)


def stack_step(conditional: bool, joint: bool, colour_weight: float) -> Callable[[Trainer], Step]:
    def step(run: Released, batch: Batch, noise: list[Tensor]) -> None:
        fakes, mean, log_variance = run.nets["generator"](*noise, *([batch.captions.vectors] if conditional else []))
        wrong = wrong_rows(batch.class_ids.tolist())
        loss = torch.zeros(())
        for real, fake in zip(batch.images, fakes, strict=True):
            role = f"discriminator_{real.shape[2]}"
            if conditional:
                run.wrong_images(role, real, real[wrong], fake, mean, joint)
                continue
            net: Any = run.nets[role]
            real_head, fake_head = (net.unconditional(net.features(x)) for x in (real, fake.detach()))
            errors = {"real_alone": bce(real_head, 1), "fake_alone": bce(fake_head, 0)}
            run.update(role, errors["real_alone"] + errors["fake_alone"])
            run.reports |= {f"{role}/{name}": value for name, value in errors.items()}
        for fake in fakes:
            size, condition = fake.shape[2], mean if conditional else None  # not detached, unlike in StackGAN v1
            loss = loss + run.adversarial(f"discriminator_{size}", fake, condition, joint, f"adversarial_{size}")
        if colour_weight:
            for low, high in pairwise(fakes):
                run.reports[f"generator/colour_{high.shape[2]}"] = colour_loss(high, low)
                loss = loss + colour_weight * colour_loss(high, low)
        if conditional:
            run.reports["generator/kl"] = kl_loss(mean, log_variance)
            loss = loss + 2 * run.reports["generator/kl"]
        run.update("generator", loss)
        run.update_average()

    return lambda trainer: step


@pytest.mark.parametrize(
    ("conditional", "joint", "colour_weight"),
    [(True, True, 0.0), (True, False, 0.0), (False, True, 50.0)],
    ids=["uncond-loss-1", "uncond-loss-0", "without-captions"],
)
def test_stackgan_v2_trains_as_released(conditional: bool, joint: bool, colour_weight: float) -> None:
    torch.manual_seed(0)
    branches = 2 if conditional else 3
    settings = {**TREE, "branches": branches, "kl_weight": 2.0, "unit_text": False, "colour_weight": colour_weight}
    system = build("stackgan_pp", INFO, **settings, conditional=conditional, unconditional_loss=joint)
    shape = {"width": 4, "branches": branches, "residuals": 1, "z_dim": Z, "condition_dim": CONDITION}
    nets: dict[str, nn.Module] = {"generator": Tree("stack", **shape, text_dim=TEXT if conditional else None)}
    for size in system.sizes:
        nets[f"discriminator_{size}"] = TreeDiscriminator("stack", 2, size, CONDITION if conditional else None, joint)
    compare(system, nets, stack_step(conditional, joint, colour_weight))


def test_without_unconditional_loss_there_is_no_unconditional_head() -> None:
    for compat in ("", "authors"):
        settings = {**TREE, "base_size": 16, "compat": compat, "unconditional_loss": False}
        trainer = recorder(build("stackgan_pp", INFO, **settings))
        trainer.run_step(batch_of(0, trainer.system.sizes))
        assert not any("alone" in name for name in trainer.reduce_reports())
        assert not any("uncond" in name for name in trainer.state())
    with pytest.raises(ValueError, match="unconditional_loss is false; with conditional=false it is the only loss"):
        build("stackgan_pp", INFO, **TREE, conditional=False, unconditional_loss=False)


# ------------------------------------------------------------------------------------------------ StackGAN (v1)
def stage_step(trainer: Trainer, stage: int) -> Step:
    if stage == 2:
        first = StageOne(4, Z, TEXT, CONDITION)
        frozen_copy(trainer, "stage1", first).train()

    def step(run: Released, batch: Batch, noise: list[Tensor]) -> None:
        text = batch.captions.vectors
        *inputs, normal = noise
        if stage == 2:
            inputs = [first(*inputs, text)[0].detach()]
        fake, mean, log_variance = run.nets["generator"](*inputs, normal, text)
        condition = mean.detach()
        run.neighbours("discriminator", batch.images[-1], fake, condition, stage == 2, last=False)
        loss = run.adversarial("discriminator", fake, condition, stage == 2, "adversarial")
        run.reports["generator/kl"] = kl_loss(mean, log_variance)
        run.update("generator", loss + 2 * run.reports["generator/kl"])
        if stage == 2:
            state = trainer.state()
            for name, buffer in first.named_buffers():
                torch.testing.assert_close(state[f"stage1/frozen/{name}"], buffer, rtol=1e-9, atol=1e-9)

    return step


def build_stage_2() -> System:
    info = replace(INFO, sources={"stage1": source("stackgan", STAGE, INFO)})
    return build("stackgan", info, **STAGE, kl_weight=2.0, stage=2, image_size=256, residuals=1)


@pytest.mark.parametrize("stage", [1, 2])
def test_stackgan_v1_trains_as_released(stage: int) -> None:
    torch.manual_seed(0)
    if stage == 1:
        system = build("stackgan", INFO, **STAGE, kl_weight=2.0)
        generator: nn.Module = StageOne(4, Z, TEXT, CONDITION)
    else:
        system, generator = build_stage_2(), StageTwo(4, 1, TEXT, CONDITION)
    nets = {"generator": generator, "discriminator": StageDiscriminator(2, system.sizes[0], CONDITION)}
    trainer = compare(system, nets, lambda trainer: stage_step(trainer, stage))
    if stage == 2:  # the export has the statistics that drifted
        exported, state = trainer.evaluation_nets()["stage1"], trainer.state()
        assert not exported.training
        for name, buffer in exported.named_buffers():
            torch.testing.assert_close(buffer, state[f"stage1/frozen/{name}"], rtol=0, atol=0)
            assert not torch.equal(buffer, torch.ones_like(buffer))


def test_a_skipped_step_does_not_move_the_statistics_of_stage_1() -> None:
    trainer = recorder(build_stage_2())
    batch = batch_of(0, trainer.system.sizes)
    statistics = {name: value for name, value in trainer.state().items() if "/frozen/" in name and "num_" not in name}
    before = {name: value.clone() for name, value in statistics.items()}
    trainer.run_step(replace(batch, images=(torch.full_like(batch.images[0], torch.nan, dtype=torch.float64),)))
    assert statistics and all(torch.equal(value, before[name]) for name, value in statistics.items())
    trainer.run_step(batch)
    assert not any(torch.equal(value, before[name]) for name, value in statistics.items())


# ------------------------------------------------------------------------------------------------ several groups
@pytest.mark.parametrize("name", ["attngan", "stackgan_pp"])
def test_each_of_several_groups_has_the_released_losses(name: str) -> None:
    info = replace(INFO, sources={"damsm": source("damsm", DAMSM, INFO)} if name == "attngan" else {})

    def losses(lanes: range) -> dict[str, float]:
        torch.manual_seed(0)
        system = build(name, info, **{**TREE, "base_size": 16})
        trainer = recorder(system, lanes)
        batch = toy_gan.batch(0, lanes, SIZE, system.sizes, WORDS)
        vectors = replace(batch.captions, vectors=batch.captions.vectors[:, :TEXT])
        trainer.run_step(replace(batch, captions=vectors))
        # those of the generator come after the discriminators' update, by all groups
        reports = trainer.reduce_reports()
        return {key: v for key, v in reports.items() if key.startswith("discriminator") and "accuracy" not in key}

    both, first, second = (losses(lanes) for lanes in (range(2), range(1), range(1, 2)))
    assert "discriminator_32/wrong" in both
    assert both == pytest.approx({key: (first[key] + second[key]) / 2 for key in both}, rel=1e-9)


# ------------------------------------------------------------------------------------------------ MirrorGAN's captioner
def test_released_captioner_resizes_without_antialiasing() -> None:
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    with torch.device("meta"):
        net = ResNetCaptionCNN(4, 35, "authors")
    net.resnet = fill(ResNetTrunk((1, 1, 1, 1)))  # a short one instead of 152 layers
    net.linear, net.bn = nn.Linear(2048, 4), nn.BatchNorm1d(4)
    net.eval()
    small = nn.Upsample(size=(35, 35), mode="bilinear")(images)
    with torch.no_grad():
        expected = net.bn(net.linear(net.resnet(small).flatten(1)))
        torch.testing.assert_close(net(images), expected)
        net.compat = ""
        assert not torch.allclose(net(images), expected, atol=1e-3)
