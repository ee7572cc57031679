"""Steps on a device that is not there (tests/helpers/fake_accelerator.py): no tensor is in the wrong place, and nothing waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAPTIONED = ["damsm", "attngan", "stackgan_pp", "mirrorgan", "gan_cls", "stackgan", "style", "captioner", "char_text"]
SYSTEMS = [*CAPTIONED, "dcgan", "stargan"]


@pytest.mark.whole
def test_a_step_keeps_to_its_device_and_never_waits_for_it() -> None:
    command = [sys.executable, "-m", "tests.helpers.fake_accelerator", *SYSTEMS]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert list(found) == SYSTEMS
    for name, steps in found.items():
        assert steps["waits"] == [], name
        assert len(steps["here"]) >= 2
        assert steps["elsewhere"] == pytest.approx(steps["here"], rel=1e-9, abs=1e-12), name


def test_what_would_fail_there_fails_here() -> None:
    source = """
import torch
from tests import elsewhere
elsewhere._setup_privateuseone_for_python_backend(elsewhere.DEVICE, elsewhere.Module())
with elsewhere.Device() as device, elsewhere.OwnKernels():
    x = torch.ones(3, device=elsewhere.DEVICE)
    assert float((x + 1).sum()) == 6.0 and device.waits == ["_local_scalar_dense"]
    assert x.cpu().tolist() == [1, 1, 1] and device.waits[1:] == ["_to_copy"]
    x + torch.ones(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", source], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode != 0 and "a tensor (3,) of the host meets one of the device" in ended.stderr
