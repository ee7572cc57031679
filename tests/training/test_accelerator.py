"""Workers whose accelerator is missing or too small end the run with one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist.engine import kernels
from t2idist.engine.trainer import Trainer
from t2idist.training import accelerator, worker
from tests.helpers.runs import load_config

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
    ours = accelerator.allocator_settings()["PYTORCH_ALLOC_CONF"]
    assert "expandable_segments:True" in ours and "pinned_max_round_threshold_mb:64" in ours
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert accelerator.allocator_settings() == {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
