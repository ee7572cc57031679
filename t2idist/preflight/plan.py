"""``--plan``: estimate memory, network traffic, speed and hours of a run on given GPUs, without using any."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from t2idist.config import RunConfig
from t2idist.config.strict import unknown_key
from t2idist.contract import DataInfo, System
from t2idist.data.mixing import data_info
from t2idist.preflight import dry_run
from t2idist.preflight.cost import StepCost, measure_step
from t2idist.training.stages import StageRun, stages_of

DECODES_A_SECOND = 900.0
"""Images of 304 px that one CPU core (EPYC of 2025) decodes and resizes to 256 px and below (docs/performance.md)."""
FIXED_GIB = 1.5
"""Memory of the CUDA context, libraries and NCCL."""
SLACK = 0.10
"""Share of the other memory that is added for workspaces and fragmentation."""
BACKWARD_SHARE = 2 / 3
"""Share of a step's compute time that overlaps with DDP's gradient all-reduce."""
LAUNCH_SECONDS = 7e-6
"""Time in which the host submits an operation with its gradient's bookkeeping: a step cannot be faster than that."""


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU."""

    memory_gib: float
    tflops: Mapping[str, float]
    """Dense peak by precision, as its maker states it."""
    link_gb_per_second: float = 12.0
    """Bandwidth between the GPUs of a node."""


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
"""Share of the peak that these networks are assumed to reach (norms and activations bound them); not measured."""


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind, with one worker each."""

    gpus: int
    name: str
    efficiency: float
    """Share of the peak (0: as in `EFFICIENCY`)."""
    gbit: float
    """Network bandwidth of a node in Gbit/s."""
    per_machine: int
    """GPUs of a node."""

    @property
    def model(self) -> GpuModel:
        return KINDS[self.name]

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_machine)

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the slowest link that all gradients pass."""
        return self.model.link_gb_per_second * 1e9 if self.nodes == 1 else self.gbit / 8 * 1e9


@dataclass(frozen=True)
class Estimate:
    """Estimate of a stage; memory, times, operations and traffic are those of one worker, per step."""

    state_gib: float
    activations_gib: float
    flops: float
    compute_seconds: float
    launches: float
    sent_bytes: float
    network_seconds: float
    images_per_step: int
    images: int
    step_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_seconds", self.busy_seconds + self.exposed_seconds)

    @property
    def submit_seconds(self) -> float:
        """Time in which the host submits a step."""
        return self.launches * LAUNCH_SECONDS

    @property
    def busy_seconds(self) -> float:
        """Time of a step without the network: what limits it, the GPU or the host that submits its work."""
        return max(self.compute_seconds, self.submit_seconds)

    @property
    def exposed_seconds(self) -> float:
        """Time of the network that is not hidden behind backward."""
        return max(0.0, self.network_seconds - BACKWARD_SHARE * self.busy_seconds)

    @property
    def memory_gib(self) -> float:
        return FIXED_GIB + (1 + SLACK) * (self.state_gib + self.activations_gib)

    @property
    def images_per_second(self) -> float:
        return self.images_per_step / self.step_seconds

    @property
    def hours(self) -> float:
        return self.images / self.images_per_second / 3600


def parse(text: str) -> Hardware:
    """Parse ``8xa100-80[,efficiency=0.2][,gbit=25][,per_machine=4]``. Raises ValueError."""
    head, *pairs = text.split(",")
    match = re.fullmatch(r"(\d+)x([a-z0-9-]+)", head.strip().lower())
    if not match or not 1 <= int(match[1]) <= 100_000:
        raise ValueError(f"--plan: {head!r}; give a number of GPUs and their kind, such as 8xa100-80")
    if match[2] not in KINDS:
        raise ValueError(f"--plan: {unknown_key(match[2], match[2], KINDS).replace('unknown key', 'no such kind')}")
    options = {"efficiency": 0.0, "gbit": 100.0, "per_machine": 8.0}
    for pair in pairs:
        key, _, value = pair.strip().partition("=")
        if key not in options:
            raise ValueError(f"--plan: {unknown_key(key, key, options)}")
        try:
            options[key] = float(value)
        except ValueError:
            options[key] = math.nan
        if not 0 < options[key] <= (1 if key == "efficiency" else 1e6):
            raise ValueError(f"--plan: {key}={value}; give {'0 to 1' if key == 'efficiency' else 'a number above 0'}")
    per_machine = max(1, int(options["per_machine"]))
    return Hardware(int(match[1]), match[2], options["efficiency"], options["gbit"], per_machine)


def page(config: RunConfig, text: str) -> str:
    """Return the plan of a run on the hardware that `text` names. Raises ValueError if it does not fit there."""
    hardware = parse(text)
    workers = (hardware.gpus, hardware.gpus)
    config = replace(config, cluster=replace(config.cluster, workers=workers, gpus_per_worker=1))
    precision = config.precision
    if precision == "float64":
        raise ValueError("--plan: precision is float64, which is for tests; plan bfloat16 or float32")
    if precision == "auto":
        precision = "bfloat16" if "bfloat16" in hardware.model.tflops else "float32"
        config = replace(config, precision=precision)
    if precision not in hardware.model.tflops:
        raise ValueError(f"--plan: the {hardware.name} has no bfloat16; give precision=float32")
    efficiency = hardware.efficiency or EFFICIENCY[precision]
    lines = [f"plan of {config.name} on {hardware.gpus} x {hardware.name}, {precision}, {config.strategy}", ""]
    hours = 0.0
    for stage in stages_of(config):
        estimate, system = _estimate(stage, hardware, efficiency)
        lines += [*_stage_lines(stage, estimate, system, hardware), ""]
        hours += estimate.hours
    lines += [f"{_hours(hours)} in all", "", *_assumptions(hardware, config, efficiency)]
    return "\n".join(lines)


def _estimate(stage: StageRun, hardware: Hardware, efficiency: float) -> tuple[Estimate, System]:
    config, settings = stage.config, stage.settings
    data = data_info(stage.open_data()) if stage.data.source else dry_run.UNKNOWN
    system = dry_run.build_on_meta(stage, data)
    shards = hardware.gpus if config.strategy == "deepspeed" else 1
    cost = _measure_step(stage, system, data)
    groups = -(-settings.groups // hardware.gpus)
    at_once = min(settings.micro_batch_groups or groups, groups)
    element_bytes = 2 if config.precision == "bfloat16" else 4
    peak = hardware.model.tflops[config.precision] * 1e12
    sent_bytes = 2 * (hardware.gpus - 1) / hardware.gpus * (2 if config.gradients == "bfloat16" else 4) * cost.gradients
    estimate = Estimate(
        state_gib=dry_run.state_bytes(system, config.precision, shards) / 2**30,
        activations_gib=cost.activations * at_once * element_bytes / 2**30,
        flops=cost.flops * groups,
        compute_seconds=cost.flops * groups / (peak * efficiency),
        launches=cost.launches,
        sent_bytes=sent_bytes,
        network_seconds=sent_bytes / hardware.bytes_per_second,
        images_per_step=settings.images_per_step,
        images=settings.images,
    )
    if estimate.memory_gib > hardware.model.memory_gib:
        raise ValueError(
            f"--plan: stage {stage.name} needs {estimate.memory_gib:.1f} GiB a worker ({estimate.state_gib:.1f} of "
            f"weights, gradients, Adam and EMA, {estimate.activations_gib:.1f} of activations of {at_once} groups of "
            f"{settings.group_size}), and the {hardware.name} has {hardware.model.memory_gib:g}; "
            f"{_advice(at_once, stage.name, estimate, config)}"
        )
    return estimate, system


def _measure_step(stage: StageRun, system: System, data: DataInfo) -> StepCost:
    try:
        return measure_step(system, stage.settings.group_size, stage.data.max_words, data.vector_dim, data.attributes)
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--plan: a step of stage {stage.name} ({stage.settings.system}) cannot be measured without data: {first}"
        ) from None


def _advice(groups: int, stage: str, estimate: Estimate, config: RunConfig) -> str:
    if groups > 1:
        return f"give more GPUs or stages.{stage}.micro_batch_groups={groups // 2}"
    if config.strategy == "ddp" and estimate.state_gib > estimate.activations_gib:
        return "give a larger kind, or strategy=deepspeed zero=1 on more GPUs"
    return "give a larger kind: a group is the recipe's batch and is not divided"


def _stage_lines(stage: StageRun, estimate: Estimate, system: System, hardware: Hardware) -> Iterator[str]:
    settings = stage.settings
    low, high = settings.groups // hardware.gpus, -(-settings.groups // hardware.gpus)
    per_worker = f"{high}" if low == high else f"{low} to {high}"
    yield (
        f"stage {stage.name} ({settings.system}): {dry_run.format_groups(settings.groups)} x {settings.group_size} = "
        f"{estimate.images_per_step:,} images a step; groups per worker {per_worker}"
    )
    yield (
        f"  memory per worker {estimate.memory_gib:.1f} of {hardware.model.memory_gib:g} GiB: {estimate.state_gib:.2f} "
        f"weights, gradients, Adam, EMA; {estimate.activations_gib:.2f} activations; {FIXED_GIB:g} CUDA and NCCL; "
        f"{SLACK:.0%} on top"
    )
    gflop = estimate.flops / high / settings.group_size / 1e9
    yield f"  compute {gflop:,.1f} GFLOP an image, {estimate.compute_seconds * 1e3:,.1f} ms a step"
    bound = ", which limits this step" if estimate.submit_seconds > estimate.compute_seconds else ""
    yield (
        f"  {estimate.launches:,.0f} operations a step, which the host submits in "
        f"{estimate.submit_seconds * 1e3:,.1f} ms{bound}"
    )
    where = "between nodes" if hardware.nodes > 1 else "inside the node"
    yield (
        f"  network {estimate.sent_bytes / 1e6:,.0f} MB sent a step and worker {where}: "
        f"{estimate.network_seconds * 1e3:,.1f} ms, {estimate.exposed_seconds * 1e3:,.1f} of "
        "them not hidden behind backward"
    )
    cpus = stage.config.cluster.cpus_per_worker
    images_per_second = estimate.images_per_second / hardware.gpus
    cores = images_per_second * (max(system.sizes) / 256) ** 2 / DECODES_A_SECOND
    yield (
        f"  speed {estimate.images_per_second:,.0f} images/s, {images_per_second:,.0f} a worker, for which {cores:.1f} "
        f"CPU cores decode{f', more than its {cpus:g} (cluster.cpus_per_worker)' if cores > cpus else ''}"
    )
    yield f"  {_hours(estimate.hours)} for {estimate.images:,} images in {settings.steps:,} steps"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _assumptions(hardware: Hardware, config: RunConfig, efficiency: float) -> Iterator[str]:
    precision = config.precision
    yield "assumed, not measured:"
    peak = hardware.model.tflops[precision]
    yield f"  {efficiency:.0%} of {peak:g} TFLOP/s, the dense {precision} peak of the {hardware.name} (efficiency=)"
    if hardware.nodes == 1:
        yield (
            f"  {hardware.model.link_gb_per_second:g} GB/s between the GPUs of a node of {hardware.per_machine} "
            "(per_machine=)"
        )
    else:
        yield (
            f"  {hardware.nodes} nodes of {hardware.per_machine} GPUs (per_machine=) with {hardware.gbit:g} Gbit/s "
            "each (gbit=), which a ring all-reduce crosses once"
        )
    share = f"{BACKWARD_SHARE:.0%} of the compute time"
    yield f"  gradients in {config.gradients}, reduced in parallel with backward, {share}"
    yield f"  {LAUNCH_SECONDS * 1e6:g} us of the host for each operation; groups of a worker share operations"
    yield "  operations and activations of a step on tensors without data, activations in the run's precision"
    yield "  without start-up, images, scores, checkpoints and restarts; no waiting for data"
