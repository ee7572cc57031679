"""Checks before a run starts, and the summary of ``--dry-run``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn

from t2idist import storage
from t2idist.config import EXPORT_R_PRECISION, ClusterConfig, DataConfig, RunConfig, StageConfig
from t2idist.config.strict import to_dict, to_yaml
from t2idist.contract import DataInfo, SupportsDomains, SupportsEmbed, SupportsTranslate, System, is_text_conditional
from t2idist.data import sources, statistics
from t2idist.data.mixing import data_info, is_unpaired, training_sets
from t2idist.data.shards import Dataset
from t2idist.data.single_image import read_one
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import pretrained
from t2idist.evaluate import best_weights, in_training
from t2idist.nn.init import shapes_only
from t2idist.training import resume, run_data, trackers
from t2idist.training.stages import StageRun, check_uses, run_url, stages_of, stored_config

ADJUSTABLE = (
    "about",
    "storage",
    "report",
    "checkpoint",
    "cluster",
    "guard",
    "strategy",
    "zero",
    "gradients",
    "cuda_graphs",
)
ADJUSTABLE_STAGE = (
    "images",
    "max_groups_per_worker",
    "micro_batch_groups",
    "checkpoint_every_images",
    "pictures_every_images",
    "export_best",
)
ADJUSTABLE_DATA = ("threads", "prefetch_mib", "cache", "cache_gib", "endpoint_url", "max_bad")
PLACES_OF_DATA = ("source", "beside")
_PROBE_BYTES = 4096
"""An empty file can be written to a full disk."""
UNKNOWN = DataInfo(("",), 1, vector_dim=1024, attributes=())
"""Assumed if data.source is not given; sentence vectors have the size of the published char-CNN-RNN ones."""


def check(config: RunConfig, resumed: resume.ResumePoint | None, local: bool = False) -> None:
    """Check a run before any worker starts.

    Args:
        resumed: the checkpoint that ``--resume-from`` names.
        local: the run trains on this machine, in this process or on a Ray cluster that it starts.

    Raises:
        ValueError: The config, data, exports or weights do not fit each other, the storage is not writable, or the run
            asks for an accelerator that this machine lacks.
    """
    if missing := _missing_accelerator(config, local):
        raise ValueError(missing)
    for _ in _checked_stages(config, resumed, is_run=True):
        pass


def describe(config: RunConfig, resumed: resume.ResumePoint | None, local: bool = False) -> str:
    """Return the resolved config and a summary of each stage: networks, memory, epochs. Raises as `check` does.

    Without data.source this describes a recipe, not a run, and names the other settings that the run needs too.
    """
    missing = _missing_accelerator(config, local)
    if missing and all(stage.data.source for stage in stages_of(config)):
        raise ValueError(missing)
    lines = [to_yaml(config).rstrip(), "", _workers_line(config.cluster, local), ""]
    for stage, system, datasets in _checked_stages(config, resumed, is_run=False):
        lines += [*_stage_lines(stage, system, datasets), ""]
    return "\n".join([*lines, missing]).rstrip()


def _workers_line(cluster: ClusterConfig, local: bool) -> str:
    smallest, largest = cluster.workers
    count = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    devices = f", {cluster.gpus_per_worker} GPU" * bool(cluster.gpus_per_worker)
    spares = cluster.spare_processes(local)
    return (
        f"workers: {count} of {cluster.cpus_per_worker:g} CPU{devices} each; {spares or 'no'} spare "
        f"process{'es' * (spares != 1)} on each node{' with memory to spare' * bool(spares)}"
    )


def _checked_stages(
    config: RunConfig, resumed: resume.ResumePoint | None, is_run: bool
) -> Iterator[tuple[StageRun, System, tuple[Dataset, ...]]]:
    """Check a run; yields each stage with its system, on the meta device, and its data sets.

    Args:
        is_run: data.source must be given; else a stage without it has no data sets.
    """
    _check_before_work(config)
    opened: dict[str, tuple[Dataset, ...]] = {}
    for stage in stages_of(config):
        opened[stage.name] = datasets = stage.open_data() if is_run or stage.data.source else ()
        _print_findings(stage, datasets, opened)
        system = build_on_meta(stage, data_info(datasets) if datasets else UNKNOWN)
        if datasets:
            _check_data(stage, system, datasets)
            _check_weights(stage, system, datasets[0].vocabulary, resumed)
        _check_pretrained(stage, system, needed=bool(datasets))
        _check_evaluation(stage, system, datasets)
        yield stage, system, datasets
    _check_same_run(config, opened)


def _check_before_work(config: RunConfig) -> None:
    """Check all that needs no data: names, numbers, places. Drawing avatars takes minutes."""
    check_uses(config)
    trackers.check(config)
    for stage in stages_of(config):
        stage.model_config()
        if stage.data.source:
            sources.check_names(stage.data)
    _check_writable(run_url(config))


def _missing_accelerator(config: RunConfig, local: bool) -> str:
    """Return why a run cannot train on this machine, where `local` says that it trains; else ""."""
    if not (local and config.cluster.gpus_per_worker) or torch.accelerator.is_available():
        return ""
    return (
        f"cluster.gpus_per_worker: {config.cluster.gpus_per_worker}, but PyTorch finds no accelerator on this machine; "
        "give cluster.gpus_per_worker=0 to train on its CPU, or train on a cluster (RAY_ADDRESS, cluster.address or "
        "ray job submit, without --local)"
    )


def _print_findings(stage: StageRun, datasets: Sequence[Dataset], opened: Mapping[str, Sequence[Dataset]]) -> None:
    """Say on stderr what is wrong with the data of a stage, once for each data set of the run.

    Raises:
        ValueError: A data set has no split to train on.
    """
    before = {dataset.url for name, others in opened.items() if name != stage.name for dataset in others}
    for dataset in datasets:
        findings = statistics.problems_of(dataset)
        if dataset.url not in before:
            statistics.print_findings(storage.redact(dataset.url), [f for f in findings if not f.fatal], sys.stderr)
        _refuse(stage, dataset, findings)


def _check_data(stage: StageRun, system: System, datasets: Sequence[Dataset]) -> None:
    """Raise ValueError if it is meaningless to train the system of a stage on its data."""
    for index, dataset in enumerate(datasets):
        if is_text_conditional(system, dataset.vector_dim) or isinstance(system, SupportsEmbed):
            _refuse(stage, dataset, statistics.problems_for_text(dataset))
        if isinstance(system, SupportsTranslate):
            where = f"model.domains[{index}]"
            labels, exclusive = system.labels[index], system.exclusive[index]
            _refuse(stage, dataset, statistics.problems_of_domain(dataset, labels, exclusive, where))
        if is_unpaired(system) and not dataset.paired:
            assert isinstance(system, SupportsDomains)
            _refuse(stage, dataset, statistics.problems_of_domain(dataset, system.domains, False, "model.domains"))


def _check_evaluation(stage: StageRun, system: System, datasets: Sequence[Dataset]) -> None:
    """Raise ValueError if a stage asks for scores, or for weights by a score, that cannot be computed.

    If it is the system that asks for the best weights, say on stderr that the last ones are exported.
    """
    judge = stage.config.scores.judge.rstrip("/")
    is_planned = any(judge == other.export_url and not other.is_done() for other in stages_of(stage.config))
    in_training.check_scores(system, stage.config, stage.name, with_judge=not is_planned)
    chosen, where = stage.settings.export_best, f"stages.{stage.name}.export_best"
    if chosen == EXPORT_R_PRECISION and not isinstance(system, SupportsEmbed):
        raise ValueError(
            f"{where}: {stage.settings.system} does not embed images and captions, so it has no R-precision; allowed "
            "are auto and last"
        )
    missing = best_weights.missing_data(datasets[0]) if datasets else ""
    if missing and chosen == EXPORT_R_PRECISION:
        raise ValueError(f"{where}: {chosen}, but {missing}; give held-out images, or {where}=last")
    if missing and best_weights.is_tracked(system, stage.settings):
        print(f"warning: {where}: {missing}; the last weights are exported, not the best", file=sys.stderr, flush=True)


def _refuse(stage: StageRun, dataset: Dataset, findings: Sequence[statistics.Finding]) -> None:
    if fatal := [finding.text for finding in findings if finding.fatal]:
        raise ValueError(f"stages.{stage.name}: {storage.redact(dataset.url)}: {fatal[0]}")


def _check_pretrained(stage: StageRun, system: System, needed: bool = True) -> None:
    """Check the files of pretrained weights and their hashes, and images. `needed`: also that they are given."""
    for role in system.roles.values():
        for image in role.images:
            if needed or image.url:
                read_one(image, stage.data, f"stages.{stage.name}.model")
        if role.pretrained is not None and (needed or role.pretrained.url):
            pretrained.check_content(role.pretrained, f"stages.{stage.name}.model")


def _stage_lines(run: StageRun, system: System, datasets: Sequence[Dataset]) -> Iterator[str]:
    config, stage = run.config, run.settings
    yield (
        f"stage {run.name} ({stage.system}): {format_groups(stage.groups)} x {stage.group_size} = "
        f"{stage.images_per_step:,} images a step, {stage.steps:,} steps, {stage.images:,} images"
    )
    yield from _network_lines(system)
    shards = config.cluster.workers[0] if config.strategy == "deepspeed" else 1
    memory = state_bytes(system, config.precision, shards)
    yield (
        f"  memory per worker {memory / 2**30:.2f} GiB for weights, gradients, Adam and EMA; activations come on top, "
        f"for {format_groups(config.groups_at_once(stage))} of {stage.group_size} at once"
    )
    if not datasets:
        yield "  data.source is not given; the run needs it: images per epoch and the vocabulary are unknown"
    sets = training_sets(system, datasets) if datasets else ()
    in_turn = 1 if is_unpaired(system) else len(datasets)
    for i, dataset in enumerate(sets):
        images = len(dataset.split("train"))
        content = f"vocabulary of {len(dataset.vocabulary):,} words"
        if len(datasets) > 1:
            content = f"{len(dataset.attribute_names)} attributes, from {storage.redact(dataset.url)}"
        if is_unpaired(system):
            assert isinstance(system, SupportsDomains)
            content = f"domain {system.domains[i]}"
        yield f"  {images:,} images per epoch, {stage.images / in_turn / images:.1f} epochs, {content}"
    for role in system.roles.values():
        for image in role.images:
            if not image.url:
                yield f"  stages.{run.name}.model.{image.key} is not given; the run needs it"
        if role.pretrained is not None and not role.pretrained.url:
            yield f"  stages.{run.name}.model.{role.pretrained.key} is not given; the run needs it"


def format_groups(groups: int) -> str:
    return f"{groups} group{'s' * (groups != 1)}"


def _network_lines(system: System) -> Iterator[str]:
    """List parameter counts: ``G``, every ``D`` from the lowest resolution up, other networks by name or by part."""
    kinds: dict[str, list[str]] = {}
    for role_name, role in system.roles.items():
        kind = {"generator": "G", "discriminator": "D"}.get(role_name.partition("_")[0], role_name)
        exported = [name.partition(".")[2] for name in system.exports if name.startswith(f"{role_name}.")]
        for part in exported or [""]:
            total, trained = _parameters(role.net.get_submodule(part))
            count = f"{total:,}" + (f" ({trained:,} trained)" if trained != total else "")
            kinds.setdefault(part or kind, []).append(count)
    for kind, counts in kinds.items():
        yield f"  {kind} {' / '.join(counts)} parameters"
    for frozen_name, frozen in system.frozen.items():
        yield f"  {frozen_name} {_parameters(frozen.net)[0]:,} parameters, frozen, from {frozen.source}"


def _parameters(net: nn.Module) -> tuple[int, int]:
    """Return the number of parameters: (all, trained)."""
    counts = [(p.numel(), p.requires_grad) for p in net.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def state_bytes(system: System, precision: str, shards: int) -> int:
    """Return the bytes of weights, gradients, Adam moments and EMA on one worker.

    Args:
        shards: number of workers among which DeepSpeed divides the optimizer state (1: not divided).
    """
    element_bytes = 8 if precision == "float64" else 4
    elements = sum(_parameters(frozen.net)[0] for frozen in system.frozen.values())
    for role in system.roles.values():
        total, trained = _parameters(role.net)
        # DeepSpeed also keeps a copy of its part of the weights
        optimizer_state = 2 * trained if shards == 1 else -(-3 * trained // shards)
        elements += total + trained + optimizer_state + (total if role.ema_half_life_images is not None else 0)
    return element_bytes * elements


def build_on_meta(stage: StageRun, data: DataInfo) -> System:
    """Build a stage's system on the meta device. Raises ValueError that names the stage."""
    with shapes_only():
        system = stage.build(stage.build_info(data))
    if len(data.attributes) > 1 and not isinstance(system, SupportsTranslate):
        raise ValueError(
            f"stages.{stage.name}: data.beside gives {len(data.attributes)} data sets, but {stage.settings.system} "
            "trains on one; remove data.beside"
        )
    return system


def _check_weights(stage: StageRun, system: System, vocabulary: Vocabulary, resumed: resume.ResumePoint | None) -> None:
    """Check the weights that a stage starts or resumes from."""
    if init_from := stage.settings.init_from:
        pretrained.check_init(system, init_from, vocabulary.words, f"stages.{stage.name}.init_from")
    if resumed is not None and resumed.stage == stage.name:
        resume.check(stage.config, resumed, system, list(vocabulary.words))


def _check_same_run(config: RunConfig, opened: Mapping[str, Sequence[Dataset]]) -> None:
    """Check that an existing run of this name was started with the same settings, except adjustable ones.

    Args:
        opened: data sets of each stage, none if data.source is not given. Those that the run folder records are known
            to be the same, and may be in another place.
    """
    recorded = run_data.read(run_url(config))
    same_data = all(bool(datasets) and stage in recorded for stage, datasets in opened.items())
    stored = stored_config(config)
    if stored is None:
        return
    newer = {f.name: f.default for f in fields(RunConfig) if isinstance(f.default, bool | int | str)}
    stored = {**newer, **stored}  # runs of older versions lack newer keys
    stored["data"] = {**to_dict(DataConfig()), **stored["data"]}
    for stage in stored["stages"].values():
        stage.update(
            {f.name: f.default for f in fields(StageConfig) if f.default is not MISSING and f.name not in stage}
        )
    if config.precision == "auto":  # a run keeps the precision of its start
        stored["precision"] = config.precision
    adjustable_data = ADJUSTABLE_DATA + (PLACES_OF_DATA if same_data else ())
    before = _fixed(stored, adjustable_data)
    now = _fixed(to_dict(config), adjustable_data)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise ValueError(
            f"{key}: {now.get(key)!r}, but the run {config.name} in {storage.redact(config.storage)} was started with "
            f"{before.get(key)!r}; give name=ANOTHER for a new run"
        )


def _fixed(values: dict[str, Any], adjustable_data: Sequence[str], path: str = "") -> dict[str, Any]:
    """Flatten the settings that may not change between two submissions of a run to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        parts = where.split(".")
        if parts[0] in ADJUSTABLE or (parts[0] == "stages" and parts[-1] in ADJUSTABLE_STAGE and len(parts) == 3):
            continue
        if "data" in (parts[0], parts[2] if len(parts) > 3 else "") and parts[-1] in adjustable_data:
            continue
        flat |= _fixed(value, adjustable_data, where) if isinstance(value, dict) else {where: value}
    return flat


def _check_writable(url: str) -> None:
    """Write and remove a file; folders that this creates are removed too. Raises ValueError."""
    probe = storage.join(url, ".writable")
    path = storage.local_path(url)
    try:
        storage.check_url(url)
    except ValueError as error:
        raise ValueError(f"storage: {error}") from None
    created = [] if path is None else [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        storage.write_bytes(probe, bytes(_PROBE_BYTES))
        storage.remove(probe)
        with contextlib.suppress(OSError):  # another run has written there
            for folder in created:
                folder.rmdir()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"storage: cannot write to {storage.redact(url)}: {reason}") from None
