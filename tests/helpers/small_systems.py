"""Every system at small widths, as a run's stages: what the generic tests are run over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from t2idist.config import RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import DataInfo, System
from t2idist.engine.checkpoint import export
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
    "margin": 3e-4,  # as small as the scores: where every hinge acts, the biases' gradients are rounding alone
}
TWO_STAGE = {"generator_width": 8, "discriminator_width": 4, "z_dim": 6, "condition_dim": 6}
MODELS: dict[str, dict[str, Any]] = {
    "damsm": DAMSM,
    "char_text": CHAR_TEXT,
    "attngan": {**TREE, "generator_width": 8, "discriminator_width": 8},
    "stackgan_pp": {**TREE, "generator_width": 8, "discriminator_width": 4, "colour_weight": 5.0},
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
    "stackgan-2": {**TWO_STAGE, "stage": 2, "image_size": 32, "residuals": 1, "compat": "authors"},
    "captioner": {"trunk": "small", "trunk_width": 4, "image_size": 32, "word_dim": 8, "hidden_dim": 8},
    "mirrorgan": {**TREE, "generator_width": 8, "discriminator_width": 4, "damsm_weight": 1.0},
}
"""By label: a system's name, and what follows a dash tells its settings apart."""
QUICK = ("damsm", "attngan", "stackgan_pp")
"""Systems for which everything is tested every time; the whole of it for all others takes longer."""
USES: dict[str, dict[str, str]] = {
    "attngan": {"damsm": "damsm"},
    "stackgan_pp": {"text": "damsm"},
    "gan_cls": {"text": "damsm"},
    "style": {"generator": "gan_cls"},
    "stackgan": {"text": "damsm"},
    "stackgan-2": {"stage1": "stackgan"},
    "mirrorgan": {"damsm": "damsm", "captioner": "captioner"},
}
"""By label and slot, which other one trains what it uses."""


def system_of(label: str) -> str:
    return label.partition("-")[0]


EXTENTS = {"stargan": toy_gan.TWO_SETS}
"""By system, what its data is like, where that is not `toys.EXTENT`."""


def config(system: str, precision: str = "float64") -> RunConfig:
    """A run of one system, after those that it uses."""
    scale = {"group_size": GROUP_SIZE, "groups": GROUPS, "images": 240}
    made: dict[str, Any] = {}

    def add(name: str) -> None:
        uses = USES.get(name, {})
        for source in uses.values():
            add(source)
        made[name] = {"system": system_of(name), **scale, "model": MODELS[name], "uses": uses}

    add(system)
    return from_dict(
        RunConfig,
        {
            "name": "small",
            "storage": "memory://small",
            "precision": precision,
            "data": {"max_words": MAX_WORDS},
            "stages": made,
        },
    )


def build(system: str) -> System:
    """The system with weights that are a function of its name alone; frozen networks are those of fresh sources."""
    run = config(system)
    torch.manual_seed(11)
    stage = StageRun(run, system)
    made = stage.build(stage.build_info(EXTENTS.get(system, toy_gan.EXTENT)))
    for frozen in made.frozen.values():
        source = build(USES[system][frozen.source])
        dotted = next(name for name in source.exports if name.rpartition(".")[2] == frozen.network)
        frozen.net.load_state_dict(exported_network(source, dotted).state_dict())
    return made


def build_smooth(label: str) -> System:
    """The system with SiLU in the place of ReLU and LeakyReLU, for what is compared in float32.

    A unit that rounding puts on the other side of a kink changes the gradients of a small network by half a percent,
    and all that comes after by more: that would hide what a comparison is for. char_text stays as it is: its margin was
    chosen for the scores that it gives with them.
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


WITHOUT_VECTORS = replace(toy_gan.EXTENT, vector_dim=0)


def write_export(system: str, url: str, words: Sequence[str], extent: DataInfo = WITHOUT_VECTORS) -> None:
    """The export of the system as `build` makes it, from a stage whose data is like `extent`, with this vocabulary."""
    run, made = config(system), build(system)
    stage = StageRun(run, system)
    plan = stage.build_info(extent)
    settings = to_dict(stage.model_config())
    index = {
        "system": system_of(system),
        "config": settings,
        "plan": plan.describe(),
        "vocabulary": list(words),
        "images": 7,
    }
    export.write(url, {dotted.rpartition(".")[2]: exported_network(made, dotted) for dotted in made.exports}, index)


def trainer(world: World, system: str, precision: str, groups: int = GROUPS) -> Trainer:
    """precision: "float64" for the system itself; in others its smooth variant."""
    share = Share.of(world, groups)
    return Trainer(
        build(system) if precision == "float64" else build_smooth(system),
        stage=system,
        seed=5,
        group_size=GROUP_SIZE,
        share=share,
        world=world,
        precision=Precision(precision),
    )


def run_steps(made: Trainer, count: int) -> None:
    extent = EXTENTS.get(made.noise_source.stage, toy_gan.EXTENT)
    for _ in range(count):
        batch = toy_gan.batch(made.step, made.share.lanes, GROUP_SIZE, made.system.sizes, MAX_WORDS, extent)
        made.run_step(batch, momentum=1 / (made.step + 1) if made.step % 3 else 0.0)  # both ways to settle averages
