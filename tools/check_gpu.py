"""Check this package on a GPU, in about eight minutes: what holds, what waits, and how fast it is.

    python tools/check_gpu.py [--out check_gpu.jsonl] [--parts engine,timings] [--device cuda] [--tiny]

Each part runs in a process of its own, under a time limit. Its results are appended to the file as they come, one JSON
object a line; a short table follows at the end. Ray, DeepSpeed and DiceBear need not be installed: the data are the
embedded emoji. ``--device cpu --tiny`` rehearses all parts on a CPU, with small models. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from t2idist import config as configuration
from t2idist.data.loader import LoaderSpec
from t2idist.data.mixing import data_info, open_mixed_loader
from t2idist.engine.batches import BatchSource
from t2idist.engine.device_batches import DeviceBatches
from t2idist.engine.step_graphs import CudaGraphRecorder, Recorder
from t2idist.engine.strategy import Precision
from t2idist.engine.world import Share, World
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn.fast import blocks as fast
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.nn.stargan import PatchDiscriminator
from t2idist.observability.command import command
from t2idist.training.stages import StageRun
from tools.bench import bench_step

LIMITS = {
    "environment": 60, "tests": 180, "engine": 180, "waits": 120, "stargan": 120, "timings": 360, "run": 180,
    "loader": 90,
}  # fmt: skip
"""Seconds of each part."""
TESTS = ("test_two_steps", "test_bfloat16", "not test_two_steps and not test_bfloat16 and not test_check")
"""Tests of tests/engine/test_gpu.py that run in one process each; part "engine" has the others."""
TIMINGS = (
    ("attngan", "cub", 1), ("attngan", "cub", 4), ("attngan", "cub", 8), ("attngan", "coco", 1), ("damsm", "coco", 1),
    ("stackgan_pp", "cub", 1), ("mirrorgan", "cub", 1), ("captioner", "cub", 1), ("dcgan", "demo", 1),
)  # fmt: skip
"""System, preset and groups of a worker."""
RECORDED = (("attngan", "cub", 1), ("attngan", "coco", 1), ("stackgan_pp", "cub", 1), ("damsm", "coco", 1))
"""Those that are also timed with CUDA graphs."""
SIGTERM_AFTER_SECONDS = 25
VOCABULARY = 5450


# ------------------------------------------------------------ results
def record(options: argparse.Namespace, name: str, failure: str = "", **values: Any) -> None:
    """Append a result of this part to the file."""
    line = {"part": options.part, "name": name, **values, **({"failure": failure} if failure else {})}
    with Path(options.out).open("a") as out:
        out.write(json.dumps(line) + "\n")


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def synchronised_seconds(device: torch.device, run: Callable[[], Any], repeats: int = 3) -> float:
    """Return the seconds of the fastest of some runs, after one to warm up."""
    run()
    best = float("inf")
    for _ in range(repeats):
        bench_step.synchronise(device)
        start = time.perf_counter()
        run()
        bench_step.synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def make_benchmark(
    system: str,
    preset: str,
    groups: int,
    options: argparse.Namespace,
    way: str = "best",
    recorder: Recorder | None = None,
) -> bench_step.StepBenchmark:
    """Create a training step of several groups on the device; with `way` "authors", of one group.

    Args:
        recorder: As of `Trainer`.
    """
    words = [system, "--preset", preset, "--device", options.device, *(["--group-size", "2"] if options.tiny else [])]
    arguments = bench_step.build_parser().parse_args([*words, "--threads", "1"])
    if way == "authors":
        return bench_step.make_benchmark(way, arguments)
    run, stage = bench_step.select_stage(arguments)
    built, info = bench_step.build_system(run, stage, VOCABULARY)
    world = World(device=torch.device(options.device))
    trainer = bench_step.TimedTrainer(
        built, stage="check", seed=0, group_size=info.group_size, share=Share.of(world, groups), world=world,
        precision=Precision.of(run.precision, world.device), recorder=recorder,
    )  # fmt: skip
    batch = bench_step.synthetic_batch(built.sizes, info, groups * info.group_size)
    return bench_step.StepBenchmark(trainer, replace(batch, groups=groups))


def kernels(benchmark: bench_step.StepBenchmark, device: torch.device) -> dict[str, list[float]]:
    """Return the microseconds of each run of each kernel of a step; on a CPU of each operation."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        benchmark.trainer.run_step(benchmark.batch)
        bench_step.synchronise(device)
    found: dict[str, list[float]] = {}
    for event in profiled.events() or []:
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            found.setdefault(event.name, []).append(float(event.time_range.elapsed_us()))
    return found


# ------------------------------------------------------------ parts
def environment(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    versions = {}
    for package in ("ray", "deepspeed", "dicebear-core", "pillow", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        shown = subprocess.run(query, capture_output=True, text=True, check=False)
        facts |= {
            "gpu": shown.stdout.strip(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }  # fmt: skip
    record(options, "versions", **facts, **versions)
    record(options, "peak", bfloat16_tflops=round(bench_step.peak_flops(device, 0.5) / 1e12, 2))


def tests(options: argparse.Namespace) -> None:
    """Run the tests of the accelerator; on a CPU, those of the same file that need none."""
    on_cpu = options.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, chosen in enumerate(["test_checks_pass_on_the_cpu"] if on_cpu else TESTS):
            report = Path(folder) / f"{number}.xml"
            words = ["-q", "-p", "no:cacheprovider", "-m", "not gpu" if on_cpu else "gpu", "-k", chosen]
            words += [f"--junitxml={report}", "tests/engine/test_gpu.py"]
            command_line = [sys.executable, "-m", "pytest", *words]
            started.append((chosen, report, subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.DEVNULL)))
        for chosen, report, process in started:
            process.wait()
            if not report.exists():
                record(options, chosen, f"pytest ended with status {process.returncode}")
                continue
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
            for case in cases:
                for bad in (*case.findall("failure"), *case.findall("error")):
                    record(options, case.get("name", ""), (bad.get("message") or "failed").splitlines()[0][:300])
            record(options, chosen, tests=len(cases), skipped=sum(case.find("skipped") is not None for case in cases))


def engine(options: argparse.Namespace) -> None:
    from tests.helpers import device_checks

    for name in device_checks.QUICK[:4] if options.tiny else device_checks.CHECKS:
        start, failure = time.perf_counter(), ""
        try:
            device_checks.CHECKS[name](torch.device(options.device))
        except Exception as error:  # each check is a result of its own
            failure = one_line(error)
        record(options, name, failure, seconds=round(time.perf_counter() - start, 2))


def waits(options: argparse.Namespace) -> None:
    """List the lines in which the host waits in a warm step, and what copies to the device cost the host."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    for system in ("dcgan",) if options.tiny else ("damsm", "attngan", "stackgan_pp", "stargan", "mirrorgan", "style"):
        benchmark = make_benchmark(system, "demo", 1, options)
        for _ in range(2):
            benchmark.trainer.run_step(benchmark.batch)
        batch = benchmark.batch.to(device, benchmark.trainer.precision.weights)
        lines: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            benchmark.trainer.run_step(batch)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "called a synchronizing" in str(warning.message):
                lines[f"{warning.filename.removeprefix(f'{ROOT}/')}:{warning.lineno}"] += 1
        record(options, system, waits=sum(lines.values()), lines=dict(lines))
    images = torch.zeros(20, 3, 256, 256, dtype=torch.uint8)
    busy = torch.zeros(4096, 4096, device=device if on_gpu else "meta")
    for name, source in {"pageable": images, **({"pinned": images.pin_memory()} if on_gpu else {})}.items():
        bench_step.synchronise(device)
        for _ in range(50 if on_gpu else 0):  # tens of milliseconds of work
            busy = busy @ busy
        start = time.perf_counter()
        source.to(device, non_blocking=True)
        record(options, f"copy of {name} memory behind a busy device", host_ms=1e3 * (time.perf_counter() - start))
        bench_step.synchronise(device)


def stargan(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    benchmark = make_benchmark("stargan", "demo" if options.tiny else "celeba128", 1, options)
    period = 1 + benchmark.run_period()
    phases = benchmark.timed_steps(period).phases
    record(options, "phases", ms={name: round(1e3 * value * period, 2) for name, value in phases.items()})
    totals = {name: sum(times) for name, times in kernels(benchmark, device).items()}
    for name in sorted(totals, key=lambda name: -totals[name])[: 3 if options.tiny else 10]:
        record(options, f"kernel {name[:80]}", ms=round(totals[name] / 1e3, 3))
    channels, size = (8, 8) if options.tiny else (64, 128)
    count = 2 if options.tiny else 16
    x = torch.randn(count, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)

    def loop() -> Tensor:
        each = (nn.functional.batch_norm(image, None, None, weight, bias, True, 0.0, 1e-5) for image in x.split(1))
        return torch.cat(list(each))

    for name, run in {"in one operation": lambda: fast.instance_norm(x, weight, bias, 1e-5), "in a loop": loop}.items():
        record(options, f"instance norm {name}", ms=round(1e3 * synchronised_seconds(device, run), 3))
    real, fake = (torch.rand(count, 3, 32 if options.tiny else 128, 32 if options.tiny else 128) for _ in range(2))
    for name, prepare in {"torch's": lambda net: net, "ours": use_fast_layers}.items():
        net = PatchDiscriminator(4 if options.tiny else 64, len(real[0, 0]), 5, 3 if options.tiny else 6).to(device)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        prepare(net)

        def penalty(net: PatchDiscriminator = net) -> None:
            mixing = torch.rand(count, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = gradient_penalty(net.scores, real.to(device), fake.to(device), mixing)
            loss.backward()  # type: ignore[no-untyped-call]

        try:
            record(
                options, f"penalty, {name} double backward", ms=round(1e3 * synchronised_seconds(device, penalty), 3)
            )
        except RuntimeError as error:
            record(
                options,
                f"penalty, {name} double backward",
                one_line(error) if name == "ours" else "",
                error=one_line(error),
            )


def timings(options: argparse.Namespace) -> None:
    """Time steps without phases; weights are drawn by a normal, because QR of large matrices takes half a minute."""
    device = torch.device(options.device)
    setattr(nn.init, "orthogonal_", functools.partial(nn.init.normal_, std=0.02))  # noqa: B010 (mypy: other arguments)
    chosen = (("dcgan", "demo", 1), ("dcgan", "demo", 2)) if options.tiny else TIMINGS
    for system, preset, groups in chosen:
        for tuned in (False, True) if groups == 1 else (True,):
            torch.backends.cudnn.benchmark = tuned
            name = f"{system} {preset}, {groups} groups, cudnn.benchmark {'on' if tuned else 'off'}"
            try:
                _time_steps(options, name, make_benchmark(system, preset, groups, options), device)
            except RuntimeError as error:
                record(options, name, one_line(error))
    torch.backends.cudnn.benchmark = True
    for system, preset, groups in RECORDED if device.type == "cuda" else ():
        name = f"{system} {preset}, {groups} groups, CUDA graphs"
        try:
            benchmark = make_benchmark(system, preset, groups, options, recorder=CudaGraphRecorder())
            benchmark.timed_steps(24)  # until all ways in which steps differ are recorded
            graphs = benchmark.trainer.graphs
            assert graphs is not None
            if graphs.failure:
                record(options, name, graphs.failure)
            else:
                _time_steps(options, name, benchmark, device)
        except RuntimeError as error:
            record(options, name, one_line(error))
    system, preset, _ = chosen[0]
    _time_steps(
        options, f"{system} {preset}, the authors' way", make_benchmark(system, preset, 1, options, "authors"), device
    )


def _time_steps(
    options: argparse.Namespace, name: str, benchmark: bench_step.StepBenchmark, device: torch.device
) -> None:
    steps = 2 if options.tiny else 10
    benchmark.timed_steps(2)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    times = benchmark.timed_steps(steps)
    # reserved: that of recorded steps is never allocated again
    memory = 0 if device.type == "cpu" else torch.accelerator.max_memory_reserved(device)
    run_times = [micros for times in kernels(benchmark, device).values() for micros in times]
    record(
        options, name, total_ms=round(1e3 * times.seconds, 2), submit_ms=round(1e3 * times.submit_seconds, 2),
        images_per_second=round(len(benchmark.batch.ids) / times.seconds, 1), reserved_gib=round(memory / 2**30, 2),
        launches=len(run_times), busy_ms=round(sum(run_times) / 1e3, 2),
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Train a whole run, send SIGTERM, and give the same command again."""
    from tests.helpers.runs import command_environment, images_in_progress, write_recipe

    with tempfile.TemporaryDirectory() as folder:
        words = ["--local", f"cluster.gpus_per_worker={int(options.device != 'cpu')}", "cluster.workers=1"]
        if options.tiny:
            words = [str(write_recipe(Path(folder))), *words, "stages.damsm.images=160", "name=check"]
        else:
            words = ["attngan", *words, "data.source=emoji", f"storage={folder}/runs", "name=check"]
            words += ["stages.damsm.images=12800", "stages.judge.images=3200", "cluster.cpus_per_worker=8"]
        line = [sys.executable, "-m", "t2idist.run", *words]
        at, start = Path(folder) / "runs/check", time.monotonic()
        process = subprocess.Popen(line, cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL)
        while process.poll() is None and time.monotonic() < start + SIGTERM_AFTER_SECONDS:
            if options.tiny and images_in_progress(at, "damsm"):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        record(options, "SIGTERM", "" if status in (0, 143) else f"status {status}", status=status)
        start = time.monotonic()
        again = subprocess.run(line, cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False)
        failure = "" if again.returncode == 0 else f"status {again.returncode}: {again.stderr[-300:]}"
        complete = (at / "attngan/export").exists() and (at / "report.html").exists()
        record(options, "the same command again", failure or ("" if complete else "no export or no report"),
               resumed="resumes from" in again.stderr, seconds=round(time.monotonic() - start, 1))  # fmt: skip


def loader(options: argparse.Namespace) -> None:
    """Load images into the device while it trains DAMSM."""
    device, threads = torch.device(options.device), max(2, (os.cpu_count() or 2) - 1)
    settings = ["preset=demo" if options.tiny else "preset=cub", "data.source=emoji", f"data.threads={threads}"]
    config = configuration.load("attngan", [*settings, bench_step.EMPTY_STORAGE])
    stage = StageRun(config, "damsm")
    datasets = stage.open_data()
    info = stage.build_info(data_info(datasets))
    torch.manual_seed(0)
    system = stage.build(info)
    trainer = bench_step.build_trainer(system, info, Precision.of(config.precision, device), device)
    spec = LoaderSpec(stage.data, system.sizes, [0], 1, info.group_size, for_device=device.type != "cpu")
    source: BatchSource = open_mixed_loader(datasets, spec, [0])
    batches = DeviceBatches(source, device, trainer.precision.weights) if spec.for_device else source
    trainer.run_step(next(batches))
    bench_step.synchronise(device)
    waited, start, steps = batches.wait_seconds, time.perf_counter(), 0
    while time.perf_counter() < start + (1 if options.tiny else 12):
        trainer.run_step(next(batches))
        steps += 1
    bench_step.synchronise(device)
    seconds = time.perf_counter() - start
    batches.close()
    record(
        options, f"damsm at {system.sizes[-1]} px, {threads} threads",
        images_per_second=round(steps * info.group_size / seconds, 1),
        waiting_for_data=round((batches.wait_seconds - waited) / seconds, 3),
    )  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    part.__name__: part for part in (environment, tests, engine, waits, stargan, timings, run, loader)
}


# ------------------------------------------------------------ the command
def run_part(options: argparse.Namespace, part: str) -> None:
    """Run a part in a process group of its own; record its failure or that it took too long."""
    words = ["--part", part, "--out", options.out, "--device", options.device, *(["--tiny"] if options.tiny else [])]
    process = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
    failure = ""
    try:
        status = process.wait(LIMITS[part])
        failure = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failure = f"took more than {LIMITS[part]} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if failure:
        record(argparse.Namespace(part=part, out=options.out), "the part", failure)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a line for each result."""
    lines = []
    for result in results:
        values = {key: value for key, value in result.items() if key not in ("part", "name", "failure") and value != {}}
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        failed = f"FAILED: {result['failure']}" if "failure" in result else ""
        lines.append(
            f"{result['part']:12} {result['name'][:60]:60} {' '.join(text for text in (failed, shown) if text)}"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--out", default="check_gpu.jsonl", metavar="FILE", help="results (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models and few repeats")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser


@command("error")
def main() -> int:
    options = build_parser().parse_args()
    options.out = str(Path(options.out).absolute())
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    if options.part:
        PARTS[options.part](options)
        return 0
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts: '{unknown[0]}'; there are {', '.join(PARTS)}")
    if options.device != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"--device {options.device}: PyTorch {torch.__version__} finds no GPU; --device cpu rehearses")
    before = len(Path(options.out).read_text().splitlines()) if Path(options.out).exists() else 0
    for part in parts:
        start = time.monotonic()
        run_part(options, part)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    results = [json.loads(line) for line in Path(options.out).read_text().splitlines()[before:]]
    print(table(results))
    return 1 if any("failure" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
