"""Every system at small widths, as stages of a run, for the tests that cover all systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from t2idist.config import RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import Batch, DataInfo, System
from t2idist.engine.checkpoint import export
from t2idist.engine.step_graphs import Recorder
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.sampling.loading import exported_network
from t2idist.training.stages import StageRun
from tests.helpers import toy_gan

GROUPS, GROUP_SIZE, MAX_WORDS = 4, 3, 6

DAMSM = {"embedding_dim": 16, "word_dim": 8, "trunk": "small", "trunk_width": 4, "image_size": 32}
TREE = {"base_size": 16, "branches": 2, "residuals": 1, "z_dim": 6, "condition_dim": 6, "ema_half_life_images": 100}
CHAR_TEXT = {
    "embedding_dim": 16,
    "characters": 60,
    "widths": [6, 8, 8],
    "trunk": "small",
    "trunk_width": 4,
    "image_size": 32,
    "margin": 3e-4,  # as small as the scores: if every hinge is active, the gradients of biases are rounding noise
}
OPTIONS = {
    "r1_weight": 0.5,
    "r1_every": 2,
    "ma_gp_weight": 0.3,
    "ema_rampup": 0.5,
    "augment": ["color", "translation", "cutout"],
    "augment_target": 0.005,
    "augment_ramp_images": 300,
    "decay_start_images": 24,
    "decay_end_images": 90,
    "decay_floor": 0.2,
}
TWO_STAGE = {"generator_width": 8, "discriminator_width": 4, "z_dim": 6, "condition_dim": 6}
DF_GAN = {
    "image_size": 16,
    "generator_width": 4,
    "discriminator_width": 4,
    "z_dim": 6,
    "unit_text": True,
    "beta1": 0.9,  # with 0, Adam's first moment is one gradient, whose rounding the moments of 10 steps average
}
MODELS: dict[str, dict[str, Any]] = {
    "damsm": DAMSM,
    "char_text": CHAR_TEXT,
    "attngan": {**TREE, "generator_width": 8, "discriminator_width": 8},
    "attngan-options": {
        **TREE,
        **OPTIONS,
        "generator_width": 8,
        "discriminator_width": 8,
        "discriminator_norm": "group",
        "relativistic": True,
        "top_k": 0.5,
        "top_k_start_images": 12,
        "skip_excitation": True,
    },
    "attngan-authors": {**TREE, "generator_width": 8, "discriminator_width": 8, "compat": "authors"},
    "stackgan_pp": {**TREE, "generator_width": 8, "discriminator_width": 4, "colour_weight": 5.0},
    "stackgan_pp-authors": {**TREE, "generator_width": 8, "discriminator_width": 4, "compat": "authors"},
    "stackgan_pp-options": {
        **TREE,
        **OPTIONS,
        "generator_width": 8,
        "discriminator_width": 4,
        "discriminator_norm": "none",
        "adversarial_loss": "hinge",
        "top_k": 0.5,
        "skip_excitation": True,
        "condition_on_text": True,
    },
    "dcgan": {"image_size": 16, "generator_width": 4, "discriminator_width": 4, "z_dim": 6},
    "gan_cls": {
        "image_size": 16,
        "generator_width": 8,
        "discriminator_width": 4,
        "z_dim": 6,
        "condition_dim": 5,
        "unit_text": True,
        "ema_half_life_images": 100,
    },
    "gan_cls-options": {
        **OPTIONS,
        "image_size": 16,
        "generator_width": 8,
        "discriminator_width": 4,
        "z_dim": 6,
        "condition_dim": 5,
        "skip_excitation": True,
        "discriminator_norm": "group",
        "relativistic": True,
    },
    "style": {"width": 4},
    "stargan": {
        "domains": [{"attributes": ["Black_Hair", "Blond_Hair", "Smiling"]}, {"exclusive": True}],
        "image_size": 16,
        "generator_width": 4,
        "residuals": 1,
        "discriminator_width": 4,
        "layers": 3,
        "discriminator_steps": 2,
        "decay_start_images": 12,
        "decay_end_images": 200,
    },
    "stackgan": {**TWO_STAGE, "generator_width": 16, "image_size": 16, "ema_half_life_images": 100},
    "stackgan-authors": {**TWO_STAGE, "generator_width": 16, "image_size": 16, "compat": "authors"},
    "stackgan-2": {**TWO_STAGE, "stage": 2, "image_size": 32, "residuals": 1, "compat": "authors"},
    "stackgan-2-options": {
        **TWO_STAGE,
        **OPTIONS,
        "stage": 2,
        "image_size": 32,
        "residuals": 1,
        "discriminator_norm": "spectral",
        "skip_excitation": True,
        "condition_on_text": True,
    },
    "cyclegan": {
        "domains": ["Black_Hair", "Smiling"],
        "image_size": 16,
        "generator_width": 4,
        "residuals": 1,
        "discriminator_width": 4,
        "discriminator_layers": 2,
        "pool_size": 5,
        "decay_start_images": 24,
        "decay_end_images": 200,
    },
    "cyclegan-options": {
        **OPTIONS,
        "domains": ["Black_Hair", "Smiling"],
        "image_size": 16,
        "generator_width": 4,
        "residuals": 1,
        "discriminator_width": 4,
        "discriminator_layers": 2,
        "discriminator_norm": "spectral",
        "adversarial_loss": "bce",
        "augment_target": 0.0,  # with images that are not augmented, the gradients of a logit's bias nearly cancel
        "identity_weight": 0.0,
        "pool_size": 0,
    },
    "pix2pix": {
        "image_size": 16,
        "generator_width": 4,
        "discriminator_width": 4,
        "discriminator_layers": 2,
        "decay_start_images": 24,
        "decay_end_images": 200,
    },
    "pix2pix-options": {
        **OPTIONS,
        "direction": "b_to_a",
        "image_size": 16,
        "generator": "resnet",
        "generator_width": 4,
        "generator_norm": "batch",
        "residuals": 1,
        "discriminator_width": 4,
        "discriminator_layers": 2,
        "discriminator_norm": "instance",
        "augment_target": 0.0,
        "adversarial_loss": "least_squares",
        "ema_half_life_images": 100,
    },
    "captioner": {"trunk": "small", "trunk_width": 4, "image_size": 32, "word_dim": 8, "hidden_dim": 8},
    "neural_style": {
        "image_size": 32,
        "content_layers": ["conv1_2"],
        "style_layers": ["conv1_1", "conv2_1"],
        "total_variation_weight": 1e-4,
    },
    "mirrorgan": {**TREE, "generator_width": 8, "discriminator_width": 4, "damsm_weight": 1.0},
    "mirrorgan-authors": {**TREE, "generator_width": 8, "discriminator_width": 4, "compat": "authors"},
    # with small words the keys of an image are nearly equal, and the gradient of their bias is rounding noise
    "dm_gan": {**TREE, "generator_width": 8, "discriminator_width": 4, "unit_text": True},
    "df_gan": DF_GAN,
    "df_gan-options": {
        **DF_GAN,
        **OPTIONS,
        "discriminator_norm": "spectral",
        "relativistic": True,
        "top_k": 0.5,
        "ema_half_life_images": 100,
    },
}
"""Settings by label: the system's name, with a suffix after a dash for further settings of one system."""
QUICK = ("damsm", "attngan", "stackgan_pp")
"""Systems that are tested completely in every run; the others are too slow."""
USES: dict[str, dict[str, str]] = {
    "attngan": {"damsm": "damsm"},
    "attngan-options": {"damsm": "damsm"},
    "attngan-authors": {"damsm": "damsm"},
    "stackgan_pp": {"text": "damsm"},
    "stackgan_pp-options": {"text": "damsm"},
    "stackgan_pp-authors": {"text": "damsm"},
    "gan_cls": {"text": "damsm"},
    "gan_cls-options": {"text": "damsm"},
    "style": {"generator": "gan_cls"},
    "stackgan": {"text": "damsm"},
    "stackgan-authors": {"text": "damsm"},
    "stackgan-2": {"stage1": "stackgan"},
    "stackgan-2-options": {"stage1": "stackgan"},
    "mirrorgan": {"damsm": "damsm", "captioner": "captioner"},
    "mirrorgan-authors": {"damsm": "damsm", "captioner": "captioner"},
    "dm_gan": {"damsm": "damsm"},
    "df_gan": {"text": "damsm"},
    "df_gan-options": {"text": "damsm"},
}
"""By label and slot, the label of the stage that the slot uses."""


def system_of(label: str) -> str:
    return label.partition("-")[0]


DATA_INFOS = {"stargan": toy_gan.TWO_DOMAINS, "pix2pix": toy_gan.PAIRS, "pix2pix-options": toy_gan.PAIRS}
"""By label, its data if that is not `toy_gan.DATA_INFO`."""


def config(system: str, precision: str = "float64") -> RunConfig:
    """Return a run of the system, preceded by the stages that it uses."""
    scale = {"group_size": GROUP_SIZE, "groups": GROUPS, "images": 240}
    stages: dict[str, Any] = {}

    def add(name: str) -> None:
        uses = USES.get(name, {})
        for source in uses.values():
            add(source)
        stages[name] = {"system": system_of(name), **scale, "model": MODELS[name], "uses": uses}

    add(system)
    return from_dict(
        RunConfig,
        {
            "name": "small",
            "storage": "memory://small",
            "precision": precision,
            "data": {"max_words": MAX_WORDS},
            "stages": stages,
        },
    )


def build(system: str) -> System:
    """Build the system with weights that depend on its name only; frozen networks are those of new sources."""
    run = config(system)
    torch.manual_seed(11)
    stage = StageRun(run, system)
    built = stage.build(stage.build_info(DATA_INFOS.get(system, toy_gan.DATA_INFO)))
    for frozen in built.frozen.values():
        source = build(USES[system][frozen.source])
        dotted = next(name for name in source.exports if name.rpartition(".")[2] == frozen.network)
        frozen.net.load_state_dict(exported_network(source, dotted).state_dict())
    return built


def build_smooth(label: str) -> System:
    """Build the system with SiLU instead of ReLU and LeakyReLU, for comparisons in float32.

    If rounding moves a unit across a kink, the gradients of a small network change by half a percent, and later values
    by more, which would hide real differences. char_text is not changed: its margin was chosen for its scores.
    """
    system = build(label)
    if label == "char_text":
        return system
    for net in [role.net for role in system.roles.values()] + [frozen.net for frozen in system.frozen.values()]:
        for module in net.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU | nn.LeakyReLU):
                    setattr(module, name, nn.SiLU())
    return system


DATA_WITHOUT_VECTORS = replace(toy_gan.DATA_INFO, vector_dim=0)


def write_export(system: str, url: str, words: Sequence[str], data: DataInfo = DATA_WITHOUT_VECTORS) -> None:
    """Write the export of `build(system)`, as a stage on such data with this vocabulary would."""
    stage, built = StageRun(config(system), system), build(system)
    settings = to_dict(stage.model_config())
    index = {
        "system": system_of(system),
        "config": settings,
        "plan": stage.build_info(data).describe(),
        "vocabulary": list(words),
        "images": 7,
    }
    export.write(url, {dotted.rpartition(".")[2]: exported_network(built, dotted) for dotted in built.exports}, index)


ALWAYS_SMOOTH = ("dm_gan",)
"""Systems in which a unit that is active for all words, as half of them are with ReLU, has no gradient to its bias: a
softmax over words does not depend on it. What training adds to such a bias is rounding noise, in float64 too."""


def trainer(
    world: World,
    system: str,
    precision: str,
    groups: int = GROUPS,
    micro_batch_groups: int | None = None,
    zero: int = 0,
    recorder: Recorder | None = None,
) -> Trainer:
    """Build a trainer: of the system itself in float64, unless it is `ALWAYS_SMOOTH`, else of `build_smooth`."""
    share = Share.of(world, groups)
    return Trainer(
        build(system) if precision == "float64" and system not in ALWAYS_SMOOTH else build_smooth(system),
        stage=system,
        seed=5,
        group_size=GROUP_SIZE,
        share=share,
        world=world,
        precision=Precision(precision),
        zero=zero,
        micro_batch_groups=micro_batch_groups,
        recorder=recorder,
    )


def toy_batch(trainer: Trainer) -> Batch:
    """Return the toy data of a trainer's next step."""
    data = DATA_INFOS.get(trainer.noise_source.stage, toy_gan.DATA_INFO)
    return toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE, trainer.system.sizes, MAX_WORDS, data)


def run_steps(trainer: Trainer, count: int) -> None:
    """Train on toy batches, with both kinds of BatchNorm averages."""
    for _ in range(count):
        trainer.run_step(toy_batch(trainer), momentum=1 / (trainer.step + 1) if trainer.step % 3 else 0.0)
