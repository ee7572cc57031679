"""What can be known of a run without a cluster: checks before anything starts, and the page of ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import nn

from t2idist import storage
from t2idist.config import DataConfig, RunConfig, StageConfig
from t2idist.config.strict import parse_yaml, to_dict, to_yaml
from t2idist.contract import DataInfo, System
from t2idist.data.mixing import data_info
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_datasets
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import pretrained
from t2idist.nn.init import shapes_only
from t2idist.training import resume, stages

ADJUSTABLE = ("about", "storage", "report", "checkpoint", "cluster", "guard", "strategy", "zero")
ADJUSTABLE_STAGE = ("images", "max_groups_per_worker", "checkpoint_every_images", "pictures_every_images")
ADJUSTABLE_DATA = ("threads", "prefetch_mib", "cache", "cache_gib", "endpoint_url", "max_bad")
UNKNOWN = DataInfo(("",), 1, vector_dim=1024, attributes=())
"""Of data that is not given yet; sentence vectors are taken to be the published ones, of the char-CNN-RNN."""


def check(config: RunConfig, resumed: resume.ResumePoint | None) -> None:
    """All that can be found wrong before a worker starts. Raises ValueError, one sentence.

    resumed: the checkpoint that the run is to go on from, where one is named.
    """
    stages.check_uses(config)
    for name in config.stages:
        datasets = open_datasets(config.stage_data(name))
        extent = data_info(datasets)
        vocabulary = _vocabulary(config, name, datasets[0])
        system = build_on_meta(config, name, extent)
        _check_weights(config, name, system, vocabulary, resumed)
        for role in system.roles.values():
            if role.pretrained is not None:
                pretrained.check(role.pretrained, f"stages.{name}.model")
    _check_same_run(config)
    _check_writable(stages.run_url(config))


def describe(config: RunConfig, resumed: resume.ResumePoint | None) -> str:
    """The resolved config, and each stage's networks, memory, epochs and steps. Raises ValueError as `check` does."""
    stages.check_uses(config)
    lines = [to_yaml(config).rstrip(), ""]
    for name in config.stages:
        data = config.stage_data(name)
        datasets = open_datasets(data) if data.source else ()
        vocabulary = _vocabulary(config, name, datasets[0]) if datasets else None
        system = build_on_meta(config, name, data_info(datasets) if datasets else UNKNOWN)
        if vocabulary is not None:
            _check_weights(config, name, system, vocabulary, resumed)
        lines += [*_stage_lines(config, name, system, datasets), ""]
    _check_same_run(config)
    return "\n".join(lines).rstrip()


def _stage_lines(config: RunConfig, name: str, system: System, datasets: Sequence[Dataset]) -> Iterator[str]:
    stage = config.stages[name]
    yield (
        f"stage {name} ({stage.system}): {stage.groups} groups x {stage.group_size} = {stage.images_per_step:,} images "
        f"a step, {stage.steps:,} steps, {stage.images:,} images"
    )
    yield from _network_lines(system)
    smallest, largest = config.cluster.workers
    dividers = smallest if config.strategy == "deepspeed" else 1
    memory = state_bytes(system, config.precision, dividers)
    yield (
        f"  memory per worker {memory / 2**30:.2f} GiB for weights, gradients, Adam and EMA; activations come on top, "
        f"for {-(-stage.groups // largest)} to {-(-stage.groups // smallest)} groups of {stage.group_size}"
    )
    if not datasets:
        yield "  data.source is not given: images per epoch and the vocabulary are not known"
    for dataset in datasets:
        images = len(dataset.split("train"))
        known = f"vocabulary of {len(dataset.vocabulary):,} words"
        if len(datasets) > 1:
            known = f"{len(dataset.attribute_names)} attributes, from {storage.redact(dataset.url)}"
        yield f"  {images:,} images per epoch, {stage.images / len(datasets) / images:.1f} epochs, {known}"
    for role in system.roles.values():
        if role.pretrained is not None and not role.pretrained.url:
            yield f"  stages.{name}.model.{role.pretrained.key} is not given; the run needs it"


def _network_lines(system: System) -> Iterator[str]:
    """Parameters by kind of network: ``G``, every ``D`` from the lowest scale up, and all else by name and by part."""
    kinds: dict[str, list[str]] = {}
    for role_name, role in system.roles.items():
        kind = {"generator": "G", "discriminator": "D"}.get(role_name.partition("_")[0], role_name)
        exported = [name.partition(".")[2] for name in system.exports if name.startswith(f"{role_name}.")]
        for part in exported or [""]:
            total, trained = _parameters(role.net.get_submodule(part))
            counted = f"{total:,}" + (f" ({trained:,} trained)" if trained != total else "")
            kinds.setdefault(part or kind, []).append(counted)
    for kind, counts in kinds.items():
        yield f"  {kind} {' / '.join(counts)} parameters"
    for frozen_name, frozen in system.frozen.items():
        yield f"  {frozen_name} {_parameters(frozen.net)[0]:,} parameters, frozen, from {frozen.source}"


def _parameters(net: nn.Module) -> tuple[int, int]:
    counts = [(p.numel(), p.requires_grad) for p in net.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def state_bytes(system: System, precision: str, dividers: int) -> int:
    """Of weights, gradients, Adam and EMA of a worker.

    dividers: workers among which DeepSpeed divides Adam's moments (1: none).
    """
    each = 8 if precision == "float64" else 4
    numbers = 0
    for role in system.roles.values():
        total, trained = _parameters(role.net)
        divided = 3 * trained  # DeepSpeed keeps a copy of a worker's part of the weights too
        moments = 2 * trained if dividers == 1 else -(-divided // dividers)
        numbers += total + trained + moments + (total if role.ema_half_life_images is not None else 0)
    return each * (numbers + sum(_parameters(f.net)[0] for f in system.frozen.values()))


def build_on_meta(config: RunConfig, name: str, extent: DataInfo) -> System:
    """A stage's system without data in its tensors. Raises ValueError that names the stage."""
    with shapes_only():
        system = stages.build(config, name, stages.plan(config, name, extent))
    if len(extent.attributes) > 1 and not callable(getattr(system, "translate", None)):
        raise ValueError(
            f"stages.{name}: data.beside gives {len(extent.attributes)} data sets that take turns, and "
            f"{config.stages[name].system} learns from one; leave data.beside out"
        )
    return system


def _check_weights(
    config: RunConfig, name: str, system: System, vocabulary: Vocabulary, resumed: resume.ResumePoint | None
) -> None:
    """Whether what a stage starts or goes on from fits it."""
    if config.stages[name].init_from:
        pretrained.check_init(system, config.stages[name].init_from, vocabulary.words, f"stages.{name}.init_from")
    if resumed is not None and resumed.stage == name:
        resume.check(config, resumed, system, list(vocabulary.words))


def _vocabulary(config: RunConfig, name: str, dataset: Dataset) -> Vocabulary:
    """A stage's vocabulary, if the exports from elsewhere that it uses know the data's words."""
    words = stages.vocabularies(config, name)
    try:
        return stages.stage_vocabulary(dataset.vocabulary, words)
    except ValueError as error:
        raise ValueError(f"stages.{name}.{error}") from None


def _check_same_run(config: RunConfig) -> None:
    """Whether a run of this name that is there already was started with the same mathematics."""
    where = storage.join(stages.run_url(config), "config.yaml")
    if not storage.exists(where):
        return
    stored = parse_yaml(storage.read_bytes(where).decode(), where)
    stored["data"] = {**to_dict(DataConfig()), **stored["data"]}  # an older version's run lacks keys that came since
    for stage in stored["stages"].values():
        stage.update(
            {f.name: f.default for f in fields(StageConfig) if f.default is not MISSING and f.name not in stage}
        )
    before = _fixed(stored)
    now = _fixed(to_dict(config))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise ValueError(
            f"{key}: {now.get(key)!r}, but the run {config.name} in {storage.redact(config.storage)} was started with "
            f"{before.get(key)!r}; give name=ANOTHER for a new run"
        )


def _fixed(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Flat keys and values that may not change between two attempts at a run."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        parts = where.split(".")
        if parts[0] in ADJUSTABLE or (parts[0] == "stages" and parts[-1] in ADJUSTABLE_STAGE and len(parts) == 3):
            continue
        if "data" in (parts[0], parts[2] if len(parts) > 3 else "") and parts[-1] in ADJUSTABLE_DATA:
            continue
        flat |= _fixed(value, where) if isinstance(value, dict) else {where: value}
    return flat


def _check_writable(url: str) -> None:
    probe = storage.join(url, ".writable")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except Exception as error:
        raise ValueError(f"storage: cannot write to {storage.redact(url)}: {type(error).__name__}: {error}") from None
