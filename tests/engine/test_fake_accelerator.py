"""Training steps on a fake accelerator (tests/helpers/fake_accelerator.py): all tensors on one device, no host sync."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAPTIONED = [
    "damsm", "attngan", "stackgan_pp", "mirrorgan", "dm_gan", "df_gan", "gan_cls", "stackgan", "style", "captioner",
    "char_text",
]  # fmt: skip
SYSTEMS = [*CAPTIONED, "dcgan", "stargan"]


@pytest.mark.whole
def test_a_step_stays_on_the_device_and_never_syncs() -> None:
    command = [sys.executable, "-m", "tests.helpers.fake_accelerator", *SYSTEMS]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(process.stdout)
    assert list(results) == SYSTEMS
    for name, result in results.items():
        assert result["syncs"] == [], name
        assert len(result["host"]) >= 2
        assert result["device"] == pytest.approx(result["host"], rel=1e-9, abs=1e-12), name


def test_fake_device_counts_syncs_and_rejects_mixed_devices() -> None:
    source = """
import torch
from tests.helpers import fake_accelerator
fake_accelerator._setup_privateuseone_for_python_backend(fake_accelerator.DEVICE, fake_accelerator.BackendModule())
with fake_accelerator.FakeDevice() as device, fake_accelerator.DeviceKernels():
    x = torch.ones(3, device=fake_accelerator.DEVICE)
    assert float((x + 1).sum()) == 6.0 and device.syncs == ["_local_scalar_dense"]
    assert x.cpu().tolist() == [1, 1, 1] and device.syncs[1:] == ["_to_copy"]
    del device.syncs[:]
    large = torch.ones(100_000)
    torch.ones(3).to(fake_accelerator.DEVICE, non_blocking=True)
    large.to(fake_accelerator.DEVICE, non_blocking=True)
    torch.ones(3).to(fake_accelerator.DEVICE)
    x.view(1, 3)[:, [0, 2]]
    assert device.syncs == [f"_to_copy from the host: {shape}" for shape in ("(100000,)", "(3,)", "(2,)")], device.syncs
    device.pin(large)
    large.to(fake_accelerator.DEVICE, non_blocking=True)
    torch.ones(100_000, pin_memory=True).to(fake_accelerator.DEVICE, non_blocking=True)
    assert len(device.syncs) == 3
    x + torch.ones(3)
"""
    process = subprocess.run(
        [sys.executable, "-c", source], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert process.returncode != 0 and "a tensor (3,) on the host meets one on the device" in process.stderr
