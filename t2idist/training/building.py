"""The system and the trainer of a stage on one worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.contract import BuildInfo, System
from t2idist.data.single_image import load_images
from t2idist.engine.checkpoint import export, pretrained
from t2idist.engine.noise import derive_seed
from t2idist.engine.step_graphs import CudaGraphRecorder
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.training.stages import StageRun


def build_system(stage: StageRun, info: BuildInfo, vocabulary: Sequence[str]) -> System:
    """Build the system and load the weights of earlier exports, of files, and of the export that it fine-tunes."""
    torch.manual_seed(derive_seed(stage.seed, stage.name))
    system = stage.build(info)
    for slot in stage.settings.uses:
        networks = [frozen for frozen in system.frozen.values() if frozen.source == slot]
        source = export.read(stage.source_url(slot), tuple(frozen.network for frozen in networks))
        for frozen in networks:
            where = f"{storage.redact(source.url)}: {frozen.network}"
            export.load_into(frozen.net, source.weights[frozen.network], where)
    for role in system.roles.values():
        if role.pretrained is not None:
            pretrained.load(role.pretrained, f"stages.{stage.name}.model")
        load_images(role.images, stage.data, f"stages.{stage.name}.model")
    if init_from := stage.settings.init_from:
        pretrained.load_init(system, init_from, vocabulary, f"stages.{stage.name}.init_from")
    return system


def build_trainer(config: RunConfig, stage: StageRun, system: System, world: World, rollback: int) -> Trainer:
    """Build the trainer of a stage's system.

    Args:
        rollback: How often the stage has gone back to an earlier checkpoint; changes the seed.
    """
    graphs = config.cuda_graphs == "auto" and world.device.type == "cuda"
    return Trainer(
        system,
        stage=stage.name,
        seed=derive_seed(stage.seed, "rollback", rollback) if rollback else stage.seed,
        group_size=stage.settings.group_size,
        share=Share.of(world, stage.settings.groups),
        world=world,
        precision=Precision(config.precision),
        zero=config.zero,
        gradients=getattr(torch, config.gradients),
        micro_batch_groups=config.groups_at_once(stage.settings),
        recorder=CudaGraphRecorder() if graphs else None,
    )
