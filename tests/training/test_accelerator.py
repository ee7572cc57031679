"""Workers whose accelerator is missing or too small end the run with one sentence; the precision that devices have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist.config import RunConfig
from t2idist.config.strict import to_yaml
from t2idist.engine import kernels
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.preflight import dry_run
from t2idist.training import accelerator, allocator, worker
from tests.helpers.runs import load_config
from tests.helpers.worker_processes import Workers

CPU = torch.device("cpu")


def fatal(folder: Path) -> str:
    return str(json.loads((folder / "runs/tiny/fatal.json").read_text())["error"])


def test_a_gpu_that_torch_cannot_use_is_fatal_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # restored after the test
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    config = load_config(tmp_path, "cluster.gpus_per_worker=1")
    with pytest.raises(ValueError, match="cluster.gpus_per_worker: 1, but this machine's PyTorch .* is built for CPUs"):
        worker.main(config, CPU, worker.WorkerContext())
    assert "install the build for its GPU" in fatal(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="it needs a driver for CUDA 13.0"):
        accelerator.prepare(1)
    accelerator.prepare(0)


def test_out_of_memory_is_fatal_and_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_step(self: Trainer, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "run_step", run_step)
    config = load_config(tmp_path)
    expected = r"stages.damsm: out of memory on cpu with 2 x 4 images at once; lower stages.damsm.micro_batch_groups"
    with pytest.raises(ValueError, match=expected):
        worker.main(config, CPU, worker.WorkerContext())
    assert "stages.damsm.micro_batch_groups; --plan shows what fits" in fatal(tmp_path)


def test_out_of_memory_beside_another_process_is_no_fault_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gib)
    for free, shared in ((9 * gib, True), (13 * gib, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 24 * gib))
        assert accelerator.is_shared(torch.device("cuda", 0)) is shared
    assert not accelerator.is_shared(CPU)


def test_precision_of_cuda_kernels_follows_the_config() -> None:
    try:
        kernels.allow_tf32(True)
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        kernels.allow_tf32(False)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        kernels.use_deterministic_kernels(True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        kernels.use_deterministic_kernels(False)
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()


def test_memory_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    ours = allocator.allocator_settings()["PYTORCH_ALLOC_CONF"]
    assert "expandable_segments:True" in ours and "pinned_max_round_threshold_mb:64" in ours
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert allocator.allocator_settings() == {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}


def set_capabilities(monkeypatch: pytest.MonkeyPatch, **capabilities: bool) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": "a processor", "avx2": True, **capabilities}
    )


def precisions(world: World, config: RunConfig) -> list[str]:
    """Return, on one of several workers of which the last has no bfloat16, the precisions of two configurations."""
    slow = world.rank == world.size - 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_capabilities(monkeypatch, avx512_bf16=not slow)
        found = [accelerator.with_precision(replace(config, precision=name), world) for name in ("auto", "float64")]
        with pytest.raises(ValueError, match="^precision: bfloat16, but a CPU of this run .*; give precision=auto or"):
            accelerator.with_precision(replace(config, precision="bfloat16"), world)
        return [each.precision for each in found]


def test_a_run_starts_in_bfloat16_if_all_devices_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    config = load_config(tmp_path, "precision=auto")
    for capabilities, expected in (
        ({"avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({}, "float32"),
    ):
        set_capabilities(monkeypatch, **capabilities)
        assert accelerator.with_precision(config, World(device=CPU)).precision == expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert accelerator.with_precision(config, World(device=torch.device("cuda"))).precision == "float32"
    assert workers.run(2, precisions, config) == [["float32", "float64"]] * 2


def test_a_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tmp_path, "precision=auto")
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    for started in ("float32", "bfloat16"):
        set_capabilities(monkeypatch, amx_bf16=True)
        (folder / "config.yaml").write_text(to_yaml(replace(config, precision=started)))
        assert accelerator.with_precision(config, World(device=CPU)).precision == started
        dry_run.check(config, None)
        with pytest.raises(ValueError, match=f"precision: 'float64', but the run .* was started with '{started}'"):
            dry_run.check(replace(config, precision="float64"), None)
    set_capabilities(monkeypatch, amx_bf16=False)
    with pytest.raises(
        ValueError, match="the run was started with it: continue on other machines, or give name=ANOTHE"
    ):
        accelerator.with_precision(config, World(device=CPU))
