"""What is given back to the cluster when Ray Train's controller fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, ray
from ray.util.placement_group import placement_group
from t2idist.nodes import own_placement_groups, remove_placement_groups
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
kept = placement_group([{"CPU": 1}]); assert kept.wait(60)
others = own_placement_groups()
left = placement_group([{"CPU": 1}]); assert left.wait(60)
remove_placement_groups(own_placement_groups() - others)
assert own_placement_groups() == others == {kept.id.hex()}
again = placement_group([{"CPU": 1}]); assert again.wait(60)
"""


@pytest.mark.whole
def test_what_a_dead_controller_held_is_free_again_and_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("r")
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
