"""One worker's run: each stage in turn, from its data and sources to its export.

The same code runs in every Ray Train worker and, alone, under ``--local``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import to_dict, to_yaml
from t2idist.contract import BuildInfo, System
from t2idist.data.mixing import data_info, open_mixed_loader
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_datasets
from t2idist.engine import loop
from t2idist.engine.batches import TrackedBatches, write_ledger
from t2idist.engine.checkpoint import export, pretrained
from t2idist.engine.checkpoint.manager import CheckpointManager, CommittedCheckpoint
from t2idist.engine.checkpoint.replica_protocol import ReplicaStore
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.guard import Diverged
from t2idist.engine.metrics import MetricLogger, append_lines, now
from t2idist.engine.noise import derive_seed
from t2idist.engine.preemption import Poll, PreemptionHandler
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.evaluate.in_training import InTrainingEvaluator
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.environment import environment_info
from t2idist.observability.logs import LogContext, redact_secrets
from t2idist.report import report
from t2idist.training import stages
from t2idist.training.lifecycle import OnProgress, read_fatal, write_fatal
from t2idist.training.options import StopAfter

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts.json"


@dataclasses.dataclass(frozen=True)
class WorkerContext:
    """What a worker's surroundings give it, where they do.

    watch: gets the progress messages of the first worker. keepers: hold copies of the state outside this process. ask:
    whether the end of this worker, or of one beside it, is announced; look_seconds: how often to ask (0: after every
    step). stand: what a worker calls that stands still to be replaced (see `PreemptionHandler`). stop: where this submission ends
    before the run does. place: where this process is, for its log.
    """

    watch: OnProgress | None = None
    keepers: ReplicaStore | None = None
    ask: Poll | None = None
    look_seconds: float = 0.0
    stand: Callable[[], None] | None = None
    stop: StopAfter | None = None
    place: LogContext = dataclasses.field(default_factory=LogContext)


def main(config: RunConfig, device: torch.device, around: WorkerContext) -> None:
    """Run all stages that have no export yet. Raises `Left` where it was asked to end."""
    world = _world(device)
    keep_freed_memory()
    around.place.run, around.place.rank = config.name, world.rank
    if world.broadcast_object(read_fatal(config)) is not None:
        return
    try:
        _run(config, world, around)
    except (ValueError, AssertionError, PermissionError) as error:
        sentence = f"a fault of the program: {error!r}" if isinstance(error, AssertionError) else str(error)
        with contextlib.suppress(OSError):  # where the store refuses everything, the worker's own error says it
            write_fatal(config, sentence)
        raise


def _run(config: RunConfig, world: World, around: WorkerContext) -> None:
    url = stages.run_url(config)
    messages = _Messages()
    logging.getLogger("t2idist").addHandler(messages)
    ran_on = environment_info(world)
    restarts = 0
    if world.is_main:
        storage.write_bytes(storage.join(url, "config.yaml"), to_yaml(config).encode())
        storage.write_json(storage.join(url, "versions.json"), ran_on)
        restarts = _count_attempt(url, world)
    restarts = world.broadcast_object(restarts)
    for index, name in enumerate(config.stages):
        if around.stop is not None and around.stop.stage in list(config.stages)[:index]:
            break
        done = world.broadcast_object(export.exists(stages.export_url(config, name)))
        if done:
            continue
        around.place.stage = name
        facts = {
            "run": config.name,
            "stage": name,
            "stage_index": index,
            "stages": len(config.stages),
            "restarts": restarts,
            "workers": world.size,
            "messages": messages.texts,
        }
        run = functools.partial(_run_stage, config, name, world, ran_on, facts, around)
        _run_guarded(run, name, world, config.guard.rollbacks)
    if world.is_main:
        report.write_report(url)
    world.barrier()


class _Messages(logging.Handler):
    """Keeps the latest warnings, which travel with the progress messages."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(redact_secrets(f"{record.levelname.lower()}: {record.getMessage()}"))
        del self.texts[:-20]


def _world(device: torch.device) -> World:
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)  # where collectives of plain objects put their bytes
    if dist.is_initialized() and dist.get_world_size() > 1:
        aside = dist.new_group(backend="gloo")
        return World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, aside)
    return World(device=device)


def _run_guarded(run: Callable[[int], None], name: str, world: World, rollbacks: int) -> None:
    """Run a stage; where it diverges, again from its last checkpoint with fresh noise, up to the limit."""
    for rollback in range(rollbacks + 1):
        try:
            run(rollback)
            return
        except Diverged as diverged:
            if rollback == rollbacks:
                raise ValueError(f"stage {name} diverged {rollback + 1} times: {diverged}") from None
            if world.is_main:
                logger.warning("stage %s goes back to its last checkpoint: %s", name, diverged)


def _run_stage(
    config: RunConfig,
    name: str,
    world: World,
    ran_on: dict[str, Any],
    facts: Mapping[str, Any],
    around: WorkerContext,
    rollback: int,
) -> None:
    stage = config.stages[name]
    datasets = open_datasets(config.stage_data(name))
    vocabulary = stages.stage_vocabulary(datasets[0].vocabulary, stages.vocabularies(config, name))
    datasets = (dataclasses.replace(datasets[0], vocabulary=vocabulary), *datasets[1:])
    plan = stages.plan(config, name, data_info(datasets))
    system = _build(config, name, plan, vocabulary.words)
    trainer = _trainer(config, name, system, world, rollback)
    around.place.images = lambda: trainer.images
    meta = {"config": to_dict(config), "vocabulary": list(vocabulary.words), "versions": ran_on}
    checkpoints = CheckpointManager(
        storage.join(stages.stage_url(config, name), "checkpoints"), world, config.checkpoint, meta
    )
    memory = None
    if around.keepers is not None and config.checkpoint.memory:
        memory = ReplicaManager(around.keepers, f"{name}/{rollback}", world, config.checkpoint, checkpoints.attempt)
    found = _restore(trainer, checkpoints, memory, stages.stage_url(config, name))
    if found is not None and world.is_main:
        logger.info("stage %s goes on from %s images (%s)", name, found.images, found.url)
        _note_resumed(stages.run_url(config), name, found)
    index = functools.partial(_export_index, config, name, datasets, plan, ran_on)
    log, watcher = None, None
    if world.is_main:
        watcher = InTrainingEvaluator(
            system, datasets, config, name, stages.stage_url(config, name), world.device, index
        )
        log = MetricLogger(
            stages.run_url(config),
            name,
            images=trainer.images,
            step=trainer.step,
            budget_images=stage.steps * stage.images_per_step,
            facts={**facts, "checkpoint": checkpoints.newest},
            watch=around.watch,
        )
        log.tell("training")
    steps = stage.steps if around.stop is None else around.stop.steps(name, stage)
    batches = _open_intake(config, name, datasets, plan.extent.epoch_images, system, trainer, checkpoints.attempt)
    try:
        look = watcher.look if watcher is not None else _no_look
        notices = PreemptionHandler(around.ask, around.look_seconds, world, around.stand)
        loop.run(trainer, batches, stage, steps, checkpoints, memory, notices, log, look, config.guard)
    except Diverged:
        if memory is not None:
            memory.close(forget=True)
        raise
    finally:
        batches.close()
        if log is not None:
            log.close()
        if watcher is not None:
            watcher.close(finished=trainer.step == stage.steps)
    if trainer.step >= stage.steps:
        _finish(config, name, trainer, index, log)
    elif log is not None:
        log.tell("stopped")
    if memory is not None:
        memory.close(forget=True)


def _trainer(config: RunConfig, name: str, system: System, world: World, rollback: int) -> Trainer:
    seed, stage = config.stage_seed(name), config.stages[name]
    return Trainer(
        system,
        stage=name,
        seed=derive_seed(seed, "rollback", rollback) if rollback else seed,
        group_size=stage.group_size,
        share=Share.of(world, stage.groups),
        world=world,
        precision=Precision(config.precision),
        zero=config.zero,
    )


def _restore(
    trainer: Trainer, checkpoints: CheckpointManager, memory: ReplicaManager | None, stage_url: str
) -> CommittedCheckpoint | None:
    """Go on from the newest state there is, in memory or in storage."""
    found = memory.restore(trainer, checkpoints.newest_images()) if memory is not None else None
    if memory is None or found is None:
        return checkpoints.restore(trainer)
    if trainer.world.is_main:
        for rank, notes in enumerate(memory.notes):
            if notes["ledger"]:
                write_ledger(stage_url, f"{checkpoints.attempt}m", rank, notes["ledger"])
            if notes["metrics"]:
                append_lines(stage_url, notes["metrics"])
    trainer.world.barrier()
    return found


def _open_intake(
    config: RunConfig,
    name: str,
    datasets: Sequence[Dataset],
    epoch_images: int,
    system: System,
    trainer: Trainer,
    attempt: str,
) -> TrackedBatches:
    data, seed = config.stage_data(name), config.stage_seed(name)
    loader = open_mixed_loader(
        datasets,
        "train",
        config=data,
        sizes=system.sizes,
        groups=list(trainer.share.lanes),
        total_groups=trainer.share.groups,
        group_size=trainer.group_size,
        seeds=[derive_seed(seed, name, "data", *([domain] if domain else [])) for domain in range(len(datasets))],
        step0=trainer.step,
    )
    return TrackedBatches(
        loader,
        trainer.world,
        trainer.share,
        stages.stage_url(config, name),
        step=trainer.step,
        attempt=attempt,
        max_bad=data.max_bad,
        epoch_images=epoch_images,
        ledger=config.report.ledger,
    )


def _build(config: RunConfig, name: str, plan: BuildInfo, vocabulary: Sequence[str]) -> System:
    """The stage's system with its initial weights, those of earlier exports, from files and of what it fine-tunes."""
    torch.manual_seed(derive_seed(config.stage_seed(name), name))
    system = stages.build(config, name, plan)
    for slot, source in config.stages[name].uses.items():
        taken = [frozen for frozen in system.frozen.values() if frozen.source == slot]
        found = export.read(stages.source_url(config, source), tuple(frozen.network for frozen in taken))
        for frozen in taken:
            where = f"{storage.redact(found.url)}: {frozen.network}"
            export.load_into(frozen.net, found.weights[frozen.network], where)
    for role in system.roles.values():
        if role.pretrained is not None:
            pretrained.load(role.pretrained, f"stages.{name}.model")
    if init_from := config.stages[name].init_from:
        pretrained.load_init(system, init_from, vocabulary, f"stages.{name}.init_from")
    return system


def _no_look(nets: Mapping[str, nn.Module], images_seen: int, *, pictures: bool, scores: bool) -> Mapping[str, float]:
    raise AssertionError("only the first worker looks")


def _finish(
    config: RunConfig, name: str, trainer: Trainer, index: Callable[[int], dict[str, Any]], log: MetricLogger | None
) -> None:
    nets = trainer.evaluation_nets()
    if trainer.world.is_main:
        export.write(stages.export_url(config, name), nets, index(trainer.images))
        assert log is not None
        log.tell("done")
    trainer.world.barrier()


def _export_index(
    config: RunConfig, name: str, datasets: Sequence[Dataset], plan: BuildInfo, ran_on: dict[str, Any], images: int
) -> dict[str, Any]:
    return {
        "system": config.stages[name].system,
        "config": to_dict(stages.model_config(config, name)),
        "plan": plan.describe(),
        "vocabulary": list(datasets[0].vocabulary.words),
        "images": images,
        "data": {
            "source": "; ".join(dataset.source for dataset in datasets),
            "licence": "; ".join(dataset.licence for dataset in datasets),
            "settings": to_dict(config.stage_data(name)),
            "vectors": None if datasets[0].vectors is None else to_dict(datasets[0].vectors),
        },
        "versions": ran_on,
        "seed": config.stage_seed(name),
        "init_from": storage.redact(config.stages[name].init_from),
    }


def _count_attempt(url: str, world: World) -> int:
    """Note that an attempt at this run begins; gives how many there were before."""
    where = storage.join(url, ATTEMPTS)
    attempts = storage.read_json(where) if storage.exists(where) else []
    storage.write_json(where, [*attempts, {"time": now(), "workers": world.size}])
    return len(attempts)


def _note_resumed(url: str, name: str, found: CommittedCheckpoint) -> None:
    """Note with this attempt where a stage went on."""
    where = storage.join(url, ATTEMPTS)
    attempts = storage.read_json(where)
    attempts[-1].setdefault("resumed", {})[name] = {"images": found.images, "from": found.url}
    storage.write_json(where, attempts)
