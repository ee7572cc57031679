"""``--plan``: what a run would take on so many GPUs of a kind, without having one. The page says what it assumes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from t2idist.config import RunConfig, StageConfig
from t2idist.config.strict import unknown_key
from t2idist.contract import DataInfo, System
from t2idist.data.mixing import data_info
from t2idist.data.sources import open_datasets
from t2idist.preflight import dry_run
from t2idist.preflight.cost import Cost, cost_of

DECODES_A_SECOND = 900.0
"""Pictures of 304 px that a CPU core makes into 256 px and below (README, Speed), an EPYC of 2025."""
FIXED_GIB = 1.5
"""CUDA's context, libraries and NCCL."""
SLACK = 0.10
"""Of the rest, for workspaces and what the allocator cannot use."""
BACKWARD_SHARE = 2 / 3
"""Of a step's computing: DDP sums gradients beside it."""


@dataclass(frozen=True)
class GpuModel:
    """A GPU. memory_gib; tflops: dense peak of its makers by precision; link: GB/s between the GPUs of a machine."""

    memory_gib: float
    tflops: Mapping[str, float]
    link: float = 12.0


KINDS = {
    "t4": GpuModel(15, {"float32": 8.1}),
    "v100-16": GpuModel(16, {"float32": 15.7}, 100),
    "v100-32": GpuModel(32, {"float32": 15.7}, 100),
    "a10g": GpuModel(22, {"float32": 31.2, "bfloat16": 70}),
    "l4": GpuModel(22, {"float32": 30.3, "bfloat16": 121}),
    "l40s": GpuModel(44, {"float32": 91.6, "bfloat16": 362}),
    "a5000": GpuModel(24, {"float32": 27.8, "bfloat16": 111}),
    "a6000": GpuModel(48, {"float32": 38.7, "bfloat16": 155}),
    "rtx3090": GpuModel(24, {"float32": 35.6, "bfloat16": 71}),
    "rtx4090": GpuModel(24, {"float32": 82.6, "bfloat16": 165}),
    "a100-40": GpuModel(40, {"float32": 19.5, "bfloat16": 312}, 200),
    "a100-80": GpuModel(80, {"float32": 19.5, "bfloat16": 312}, 200),
    "h100": GpuModel(80, {"float32": 66.9, "bfloat16": 989}, 300),
    "h200": GpuModel(141, {"float32": 66.9, "bfloat16": 989}, 300),
}
EFFICIENCY = {"float32": 0.35, "bfloat16": 0.15}
"""Share of the peak that these networks, which norms and activations hold back, are taken to reach; not measured."""


@dataclass(frozen=True)
class Hardware:
    """gpus of a kind, a worker each. efficiency: of the peak (0: as `EFFICIENCY`). gbit: of a machine's network.

    per_machine: GPUs in a machine.
    """

    gpus: int
    name: str
    efficiency: float
    gbit: float
    per_machine: int

    @property
    def kind(self) -> GpuModel:
        return KINDS[self.name]

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.per_machine)

    @property
    def bytes_per_second(self) -> float:
        """Of the slowest link that all gradients pass."""
        return self.kind.link * 1e9 if self.machines == 1 else self.gbit / 8 * 1e9


@dataclass(frozen=True)
class Estimate:
    """Of a stage. seconds of a step and worker; memory in GiB of a worker; sent: bytes a step and worker."""

    state_gib: float
    kept_gib: float
    flops: float
    compute_seconds: float
    sent: float
    network_seconds: float
    images_per_step: int
    images: int
    step_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        exposed = max(0.0, self.network_seconds - BACKWARD_SHARE * self.compute_seconds)
        object.__setattr__(self, "step_seconds", self.compute_seconds + exposed)

    @property
    def memory_gib(self) -> float:
        return FIXED_GIB + (1 + SLACK) * (self.state_gib + self.kept_gib)

    @property
    def images_per_second(self) -> float:
        return self.images_per_step / self.step_seconds

    @property
    def hours(self) -> float:
        return self.images / self.images_per_second / 3600


def parse(text: str) -> Hardware:
    """``8xa100-80[,efficiency=0.2][,gbit=25][,per_machine=4]``. Raises ValueError, one sentence."""
    head, *pairs = text.split(",")
    found = re.fullmatch(r"(\d+)x([a-z0-9-]+)", head.strip().lower())
    if not found or not 1 <= int(found[1]) <= 100_000:
        raise ValueError(f"--plan: {head!r}; give a number of GPUs and their kind, such as 8xa100-80")
    if found[2] not in KINDS:
        raise ValueError(f"--plan: {unknown_key(found[2], found[2], KINDS).replace('unknown key', 'no such kind')}")
    given = {"efficiency": 0.0, "gbit": 100.0, "per_machine": 8.0}
    for pair in pairs:
        key, _, value = pair.strip().partition("=")
        if key not in given:
            raise ValueError(f"--plan: {unknown_key(key, key, given)}")
        try:
            given[key] = float(value)
        except ValueError:
            given[key] = math.nan
        if not 0 < given[key] <= (1 if key == "efficiency" else 1e6):
            raise ValueError(f"--plan: {key}={value}; give {'0 to 1' if key == 'efficiency' else 'a number above 0'}")
    per_machine = max(1, int(given["per_machine"]))
    return Hardware(int(found[1]), found[2], given["efficiency"], given["gbit"], per_machine)


def page(config: RunConfig, text: str) -> str:
    """The plan of a run on the machines that `text` names. Raises ValueError where it cannot fit, one sentence."""
    machines = parse(text)
    workers = (machines.gpus, machines.gpus)
    config = replace(config, cluster=replace(config.cluster, workers=workers, gpus_per_worker=1))
    precision = config.precision
    if precision == "float64":
        raise ValueError("--plan: precision is float64, which is for tests; plan bfloat16 or float32")
    if precision not in machines.kind.tflops:
        raise ValueError(f"--plan: the {machines.name} has no bfloat16; give precision=float32")
    efficiency = machines.efficiency or EFFICIENCY[precision]
    lines = [f"plan of {config.name} on {machines.gpus} x {machines.name}, {precision}, {config.strategy}", ""]
    hours = 0.0
    for name in config.stages:
        made, system = _estimate(config, name, machines, efficiency)
        lines += [*_stage_lines(config, name, made, system, machines), ""]
        hours += made.hours
    lines += [f"{_hours(hours)} in all", "", *_assumptions(machines, precision, efficiency)]
    return "\n".join(lines)


def _estimate(config: RunConfig, name: str, machines: Hardware, efficiency: float) -> tuple[Estimate, System]:
    stage, data = config.stages[name], config.stage_data(name)
    extent = data_info(open_datasets(data)) if data.source else dry_run.UNKNOWN
    system = dry_run.build_on_meta(config, name, extent)
    dividers = machines.gpus if config.strategy == "deepspeed" else 1
    state = dry_run.state_bytes(system, config.precision, dividers)
    cost = _cost(name, stage, system, data.max_words, extent)
    groups = -(-stage.groups // machines.gpus)
    bytes_kept = 2 if config.precision == "bfloat16" else 4
    peak = machines.kind.tflops[config.precision] * 1e12
    sent = 2 * (machines.gpus - 1) / machines.gpus * 4 * cost.gradients
    made = Estimate(
        state_gib=state / 2**30,
        kept_gib=cost.kept * groups * bytes_kept / 2**30,
        flops=cost.flops * groups,
        compute_seconds=cost.flops * groups / (peak * efficiency),
        sent=sent,
        network_seconds=sent / machines.bytes_per_second,
        images_per_step=stage.images_per_step,
        images=stage.images,
    )
    if made.memory_gib > machines.kind.memory_gib:
        raise ValueError(
            f"--plan: stage {name} needs {made.memory_gib:.1f} GiB a worker ({made.state_gib:.1f} of weights, "
            f"gradients, Adam and EMA, {made.kept_gib:.1f} of activations of {groups} groups of {stage.group_size}), "
            f"and the {machines.name} has {machines.kind.memory_gib:g}; {_advice(groups, made, config)}"
        )
    return made, system


def _cost(name: str, stage: StageConfig, system: System, max_words: int, extent: DataInfo) -> Cost:
    try:
        return cost_of(system, stage.group_size, max_words, extent.vector_dim, extent.attributes)
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--plan: a step of stage {name} ({stage.system}) cannot be counted without data: {first}"
        ) from None


def _advice(groups: int, made: Estimate, config: RunConfig) -> str:
    if groups > 1:
        return "give more GPUs or fewer groups"
    if config.strategy == "ddp" and made.state_gib > made.kept_gib:
        return "give a larger kind, or strategy=deepspeed zero=1 on more GPUs"
    return "give a larger kind: a group is the recipe's batch and is not divided"


def _stage_lines(config: RunConfig, name: str, made: Estimate, system: System, machines: Hardware) -> Iterator[str]:
    stage = config.stages[name]
    low, high = stage.groups // machines.gpus, -(-stage.groups // machines.gpus)
    each = f"{high}" if low == high else f"{low} to {high}"
    yield (
        f"stage {name} ({stage.system}): {stage.groups} groups x {stage.group_size} = {made.images_per_step:,} images "
        f"a step; groups per worker {each}"
    )
    yield (
        f"  memory per worker {made.memory_gib:.1f} of {machines.kind.memory_gib:g} GiB: {made.state_gib:.2f} weights, "
        f"gradients, Adam, EMA; {made.kept_gib:.2f} activations; {FIXED_GIB:g} CUDA and NCCL; {SLACK:.0%} on top"
    )
    gflop = made.flops / high / stage.group_size / 1e9
    yield f"  compute {gflop:,.1f} GFLOP an image, {made.compute_seconds * 1e3:,.1f} ms a step"
    where = "between machines" if machines.machines > 1 else "inside the machine"
    yield (
        f"  network {made.sent / 1e6:,.0f} MB sent a step and worker {where}: {made.network_seconds * 1e3:,.1f} ms, "
        f"{(made.step_seconds - made.compute_seconds) * 1e3:,.1f} of them not hidden behind backward"
    )
    has = config.cluster.cpus_per_worker
    per_worker = made.images_per_second / machines.gpus
    cores = per_worker * (max(system.sizes) / 256) ** 2 / DECODES_A_SECOND
    yield (
        f"  speed {made.images_per_second:,.0f} images/s, {per_worker:,.0f} a worker, for which {cores:.1f} CPU cores "
        f"decode{f', more than its {has:g} (cluster.cpus_per_worker)' if cores > has else ''}"
    )
    yield f"  {_hours(made.hours)} for {made.images:,} images in {stage.steps:,} steps"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _assumptions(machines: Hardware, precision: str, efficiency: float) -> Iterator[str]:
    yield "assumed, not measured:"
    peak = machines.kind.tflops[precision]
    yield f"  {efficiency:.0%} of {peak:g} TFLOP/s, the dense {precision} peak of the {machines.name} (efficiency=)"
    if machines.machines == 1:
        yield f"  {machines.kind.link:g} GB/s between the GPUs of a machine of {machines.per_machine} (per_machine=)"
    else:
        yield (
            f"  {machines.machines} machines of {machines.per_machine} GPUs (per_machine=) with {machines.gbit:g} "
            "Gbit/s each (gbit=), through which a ring passes once"
        )
    yield f"  gradients in float32, summed beside backward, {BACKWARD_SHARE:.0%} of the computing"
    yield "  operations and activations counted from a step on tensors without data, activations in the run's precision"
    yield "  start-up, pictures, scores, checkpoints and restarts are left out; data is never waited for"
