"""Train a run on one worker: each stage in turn, from its data and sources to its export.

The same code runs in every Ray Train worker and, with ``--local``, in the process of the command.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import to_dict, to_yaml
from t2idist.data.loader import LoaderSpec
from t2idist.data.mixing import data_info, is_unpaired, open_mixed_loader, training_sets
from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import recorded
from t2idist.engine import loop
from t2idist.engine.batches import BatchSource, TrackedBatches, write_ledger
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.manager import CheckpointManager, CommittedCheckpoint
from t2idist.engine.checkpoint.replica_protocol import ReplicaStore
from t2idist.engine.checkpoint.replicas import ReplicaManager
from t2idist.engine.device_batches import DeviceBatches
from t2idist.engine.guard import Diverged
from t2idist.engine.hooks import CallAfterStep, StageState, stage_hooks
from t2idist.engine.kernels import allow_tf32, use_deterministic_kernels
from t2idist.engine.metrics import MetricLogger, append_lines
from t2idist.engine.noise import derive_seed
from t2idist.engine.preemption import Poll, PreemptionHandler, StopRequested
from t2idist.engine.world import World
from t2idist.evaluate import best_weights
from t2idist.evaluate.in_training import InTrainingEvaluator
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.environment import environment_info
from t2idist.observability.logs import LogContext, RecentWarnings
from t2idist.observability.recovery import Recovery
from t2idist.observability.tracking import DONE, FAILED, STOPPED
from t2idist.report import report
from t2idist.training import accelerator, building, run_data
from t2idist.training.attempts import AttemptRecord
from t2idist.training.background import in_background
from t2idist.training.lifecycle import OnProgress, read_progress, write_fatal
from t2idist.training.options import StopAfter
from t2idist.training.stages import StageRun, open_unrecorded_data, run_url, stages_of
from t2idist.training.trackers import open_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """Optional services that the launcher passes to a worker."""

    on_progress: OnProgress | None = None
    """Called on the first worker with each progress message."""
    replica_store: ReplicaStore | None = None
    """Holds copies of the state outside this process."""
    poll_preemption: Poll | None = None
    """Returns whether this worker, or another one of the run, is about to be shut down."""
    poll_seconds: float = 0.0
    """Time between two polls (0: after every step)."""
    pause: Callable[[float], None] | None = None
    """Called to wait for the replacement of this worker (see `PreemptionHandler`)."""
    recovery: Recovery | None = None
    """The restart that this group of workers ends."""
    on_step: Callable[[], None] = lambda: None
    """Called after every step."""
    stop_after: StopAfter | None = None
    """Where this submission stops before the run is done."""
    log_context: LogContext = field(default_factory=LogContext)
    """Kept up to date with the stage and images of this process, for its log."""


def main(config: RunConfig, device: torch.device, context: WorkerContext) -> None:
    """Train all stages that have no export yet.

    Raises:
        StopRequested: The run was asked to stop; its state is saved.
    """
    allow_tf32(config.tf32)
    use_deterministic_kernels(config.deterministic)
    world = _open_world(device, config.cluster.hung_after_seconds)
    keep_freed_memory()
    context.log_context.run, context.log_context.rank = config.name, world.rank
    fatal, done = world.broadcast_object(read_progress(config) if world.is_main else (None, frozenset()))
    if fatal is not None:
        return
    try:
        accelerator.prepare(config.cluster.gpus_per_worker)
        with RecentWarnings() as warnings:
            _RunWorker(config, world, context, warnings).run(done)
    except (ValueError, AssertionError, PermissionError) as error:
        message = f"a fault of the program: {error!r}" if isinstance(error, AssertionError) else str(error)
        with contextlib.suppress(OSError):  # if storage is not writable, the worker's own error reports it
            write_fatal(config, message)
        raise


def _open_world(device: torch.device, timeout_seconds: float) -> World:
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)  # collectives of Python objects use the current device
    if dist.is_initialized() and dist.get_world_size() > 1:
        side_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
        return World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, side_group)
    return World(device=device)


class _RunWorker:
    """A run on one worker."""

    def __init__(self, config: RunConfig, world: World, context: WorkerContext, warnings: RecentWarnings) -> None:
        self.world, self.context, self.warnings = world, context, warnings
        self.config = config = accelerator.with_precision(config, world)
        self.environment = environment_info(world.size, world.device)
        data = open_unrecorded_data(config)  # on all workers: one that draws data takes longer than others may wait
        self._recording = in_background(self._record, data) if world.is_main else None

    def wait_for_attempt(self) -> AttemptRecord:
        """Return, on the first worker, the record of this attempt, once it is written."""
        assert self._recording is not None, "only the first worker keeps records"
        return self._recording.result()

    def _record(self, data: Mapping[str, Sequence[Dataset]]) -> AttemptRecord:
        """Write config, data, environment and this attempt to the run folder."""
        url = run_url(self.config)
        storage.write_bytes(storage.join(url, "config.yaml"), to_yaml(self.config).encode())
        if data:
            run_data.record(url, data)
        storage.write_json(storage.join(url, "versions.json"), self.environment)
        return AttemptRecord(url, self.world.size, self.context.recovery)

    def run(self, done: Collection[str]) -> None:
        """Train all stages but those that are done."""
        stop_after = self.context.stop_after
        try:
            for stage in stages_of(self.config):
                if stage.name not in done:
                    self.context.log_context.stage = stage.name
                    self._run_stage(stage)
                if stop_after is not None and stop_after.stage == stage.name:
                    break
        except Exception:
            if self._recording is not None:  # so that it does not overwrite the record of the next attempt
                self._recording.exception()
            raise
        if self.world.is_main:
            self.wait_for_attempt()
            report.write_report(run_url(self.config))
        self.world.barrier()

    def _run_stage(self, stage: StageRun) -> None:
        """Train a stage. If it diverges, repeat from its last checkpoint with other noise, `guard.rollbacks` times."""
        rollbacks = self.config.guard.rollbacks
        for rollback in range(rollbacks + 1):
            try:
                _StageWorker(self, stage, rollback).run()
                return
            except Diverged as diverged:
                if rollback == rollbacks:
                    raise ValueError(f"stage {stage.name} diverged {rollback + 1} times: {diverged}") from None
                if self.world.is_main:
                    logger.warning("stage %s returns to its last checkpoint: %s", stage.name, diverged)

    def progress_facts(self, stage: StageRun) -> dict[str, Any]:
        """Return the constant values of the stage's progress messages, on the first worker."""
        return {
            "run": self.config.name,
            "stage": stage.name,
            "stage_index": list(self.config.stages).index(stage.name),
            "stages": len(self.config.stages),
            "restarts": self.wait_for_attempt().restarts,
            "workers": self.world.size,
            "messages": self.warnings.texts,
        }


@dataclass(frozen=True)
class _StageRecords:
    """Of a stage, on the first worker."""

    log: MetricLogger
    evaluator: InTrainingEvaluator

    def close(self, ended: str, finished: bool) -> None:
        """Write what is left. `ended` as in `MetricLogger.close`, `finished` as in `InTrainingEvaluator.close`."""
        with contextlib.ExitStack() as stack:  # closed in reverse order: the last scores go to the trackers too
            stack.callback(self.log.close, ended)
            stack.callback(self.evaluator.close, finished=finished)
            self.log.flush()


class _StageWorker:
    """One stage on one worker, up to its export or until it diverges."""

    def __init__(self, run: _RunWorker, stage: StageRun, rollback: int) -> None:
        self._run, self._stage, self._world = run, stage, run.world
        self._config, self._context = run.config, run.context
        self._datasets = stage.open_data()
        self._data_info = data_info(self._datasets)
        self._build_info = stage.build_info(self._data_info)
        self._system = building.build_system(stage, self._build_info, self._datasets[0].vocabulary.words)
        self._trainer = trainer = building.build_trainer(self._config, stage, self._system, run.world, rollback)
        self._context.log_context.images = lambda: trainer.images
        self._checkpoints = self._open_checkpoints()
        self._replicas = self._open_replicas(rollback)

    def run(self) -> None:
        """Train from the newest checkpoint to the end of the stage and export it, or to the stop of this submission."""
        stage, trainer = self._stage, self._trainer
        resumed = self._restore()
        batches, opening, records, ended = self._open_batches(), None, None, FAILED
        began, step = time.monotonic(), trainer.step
        if self._world.is_main:  # in parallel to the first step, for which the other workers wait
            opening = in_background(self._open_records, resumed, began, trainer.images, step)
        try:
            self._train(batches, opening, began, step)
            ended = DONE if trainer.step >= stage.settings.steps else STOPPED
        except StopRequested:
            ended = STOPPED
            raise
        except Diverged:
            self._forget_replicas()
            raise
        except torch.OutOfMemoryError as error:
            if accelerator.is_shared(self._world.device):  # perhaps with a worker that is about to end
                raise
            raise ValueError(self._out_of_memory()) from error
        finally:
            batches.close()
            trainer.close()
            interrupted = isinstance(sys.exception(), KeyboardInterrupt)  # perhaps because storage does not respond
            if opening is not None and (opening.done() or not interrupted) and opening.exception() is None:
                records = opening.result()
                records.close(ended, finished=trainer.step == stage.settings.steps)
        if trainer.step >= stage.settings.steps:
            self._export(records)
        elif records is not None:
            records.log.log_state("stopped")
        self._forget_replicas()

    def _out_of_memory(self) -> str:
        stage = self._stage
        groups = min(self._config.groups_at_once(stage.settings), len(self._trainer.share.lanes))
        return (
            f"stages.{stage.name}: out of memory on {accelerator.describe(self._world.device)} with "
            f"{groups} x {stage.settings.group_size} images at once; lower stages.{stage.name}."
            f"{'micro_batch_groups' if groups > 1 else 'group_size'}; --plan shows what fits"
        )

    def _open_checkpoints(self) -> CheckpointManager:
        meta = {
            "config": to_dict(self._config),
            "vocabulary": list(self._datasets[0].vocabulary.words),
            "versions": self._run.environment,
        }
        return CheckpointManager(self._stage.checkpoints_url, self._world, self._config.checkpoint, meta)

    def _open_replicas(self, rollback: int) -> ReplicaManager | None:
        store, config = self._context.replica_store, self._config.checkpoint
        if store is None or not config.memory:
            return None
        return ReplicaManager(store, f"{self._stage.name}/{rollback}", self._world, config, self._checkpoints.attempt)

    def _forget_replicas(self) -> None:
        if self._replicas is not None:
            self._replicas.close(forget=True)

    def _restore(self) -> CommittedCheckpoint | None:
        """Restore the newest state, from memory or from storage."""
        replicas, checkpoints = self._replicas, self._checkpoints
        restored = None
        if replicas is not None:
            restored = replicas.restore(self._trainer, checkpoints.newest_images())
        if replicas is None or restored is None:
            return checkpoints.restore(self._trainer)
        if self._world.is_main:
            for rank, notes in enumerate(replicas.notes):
                if notes["ledger"]:
                    write_ledger(self._stage.url, f"{checkpoints.attempt}m", rank, notes["ledger"])
                if notes["metrics"]:
                    append_lines(self._stage.url, notes["metrics"])
        self._world.barrier()
        return restored

    def _open_records(self, resumed: CommittedCheckpoint | None, began: float, images: int, step: int) -> _StageRecords:
        """Record from where the stage goes on, remove records of what it does again, and open the others."""
        stage = self._stage
        if resumed is not None:
            logger.info("stage %s resumes from %s images (%s)", stage.name, resumed.images, resumed.url)
            self._run.wait_for_attempt().resumed(stage.name, resumed)
        best_weights.forget_after(stage.url, images)
        log = self._open_log(began, images, step)
        records = _StageRecords(log, self._open_evaluator(log))
        log.log_state("training")
        return records

    def _open_evaluator(self, log: MetricLogger) -> InTrainingEvaluator:
        stage, device = self._stage, self._world.device
        return InTrainingEvaluator(
            self._system, self._datasets, self._config, stage.name, stage.url, device, self._export_index,
            log.log_pictures, log.log_scores,
        )  # fmt: skip

    def _open_log(self, began: float, images: int, step: int) -> MetricLogger:
        settings = self._stage.settings
        return MetricLogger(
            run_url(self._config),
            self._stage.name,
            images=images,
            step=step,
            budget_images=settings.steps * settings.images_per_step,
            metadata={**self._run.progress_facts(self._stage), "checkpoint": self._checkpoints.newest},
            on_progress=self._context.on_progress,
            started=began,
            trackers=open_trackers(self._stage, self._run.environment),
        )

    def _open_batches(self) -> TrackedBatches:
        stage, trainer = self._stage, self._trainer
        datasets = training_sets(self._system, self._datasets)
        spec = LoaderSpec(
            config=stage.data,
            sizes=self._system.sizes,
            groups=list(trainer.share.lanes),
            total_groups=trainer.share.groups,
            group_size=trainer.group_size,
            step0=trainer.step,
            for_device=self._world.device.type != "cpu",
        )
        seeds = [derive_seed(stage.seed, stage.name, "data", *([i] if i else [])) for i in range(len(datasets))]
        source: BatchSource = open_mixed_loader(datasets, spec, seeds, unpaired=is_unpaired(self._system))
        if spec.for_device:
            source = DeviceBatches(source, self._world.device, trainer.precision.weights)
        return TrackedBatches(
            source,
            self._world,
            trainer.share,
            stage.url,
            step=trainer.step,
            attempt=self._checkpoints.attempt,
            max_bad=stage.data.max_bad,
            epoch_images=self._data_info.epoch_images,
            ledger=self._config.report.ledger,
        )

    def _train(self, batches: TrackedBatches, opening: Future[_StageRecords] | None, began: float, step: int) -> None:
        context, settings = self._context, self._stage.settings
        stop_after = context.stop_after
        steps = settings.steps if stop_after is None else stop_after.steps(self._stage.name, settings)
        preemption = PreemptionHandler(context.poll_preemption, context.poll_seconds, self._world, context.pause)

        def hooks() -> list[loop.Hook]:
            records = None if opening is None else opening.result()
            log = None if records is None else records.log
            evaluate = _no_evaluation if records is None else records.evaluator.evaluate
            state = StageState(self._trainer, batches, self._checkpoints, self._replicas, log)
            result = stage_hooks(state, settings, self._config.guard, preemption, evaluate, began, step)
            result.append(CallAfterStep(context.on_step))
            if log is not None:
                result += self._run.wait_for_attempt().recovery_hooks(log)
            return result

        loop.run(self._trainer, batches, settings, steps, hooks)

    def _export(self, records: _StageRecords | None) -> None:
        nets = self._trainer.evaluation_nets()
        if records is not None:
            records.evaluator.score_last(nets, self._trainer.images)
            if not self._export_best():
                export.write(self._stage.export_url, nets, self._export_index(self._trainer.images))
            best_weights.remove(self._stage.url)
            records.log.log_state("done")
        self._world.barrier()

    def _export_best(self) -> bool:
        """Export the weights with the best held-out R-precision if the last ones are worse by more than noise."""
        stage = self._stage
        return best_weights.is_tracked(self._system, stage.settings) and best_weights.export_if_better(
            stage.name, stage.url, stage.export_url, self._trainer.images
        )

    def _export_index(self, images: int) -> dict[str, Any]:
        """Describe an export of this stage at a number of images."""
        stage, datasets = self._stage, self._datasets
        return {
            "system": stage.settings.system,
            "config": to_dict(stage.model_config()),
            "plan": self._build_info.describe(),
            "vocabulary": list(datasets[0].vocabulary.words),
            **recorded(datasets[0].vocabulary.tokenizer),
            "images": images,
            "data": {
                "source": "; ".join(dataset.source for dataset in datasets),
                "licence": "; ".join(dataset.licence for dataset in datasets),
                "settings": to_dict(stage.data),
                "vectors": None if datasets[0].vector_info is None else to_dict(datasets[0].vector_info),
            },
            "versions": self._run.environment,
            "seed": stage.seed,
            "init_from": storage.redact(stage.settings.init_from),
        }


def _no_evaluation(
    nets: Mapping[str, nn.Module], images_seen: int, *, images: bool, scores: bool
) -> Mapping[str, float]:
    raise AssertionError("only the first worker evaluates")
