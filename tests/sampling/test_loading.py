"""Loading of exports."""

from __future__ import annotations

from pathlib import Path

import torch

from t2idist.data.tokenizer import Vocabulary
from t2idist.sampling.loading import exported_network, load_export
from tests.helpers import small_systems
from tests.sampling.conftest import WORDS


def test_loaded_networks_equal_the_exported_ones(tmp_path: Path) -> None:
    small_systems.write_export("attngan", str(tmp_path), WORDS)
    loaded = load_export(str(tmp_path), torch.device("cpu"))
    system = small_systems.build("attngan")
    assert set(loaded.nets) == {"generator", "text"}
    for name in system.exports:
        expected = exported_network(system, name).state_dict()
        assert all(torch.equal(expected[key], value) for key, value in loaded.nets[name].state_dict().items())
    assert isinstance(loaded.vocabulary, Vocabulary) and not any(
        p.requires_grad for p in loaded.nets["text"].parameters()
    )
