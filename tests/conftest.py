from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fidelity() -> None:
    """torch-fidelity can be imported. The torchvision that it wants asks for operators that a CPU torch lacks."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torch_fidelity.metrics

    assert torch_fidelity.metrics is not None and library is not None
