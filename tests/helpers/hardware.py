"""Hardware that some tests need."""

from __future__ import annotations

import pytest
import torch

from t2idist.engine.kernels import multiplies_bfloat16

needs_bfloat16 = pytest.mark.skipif(
    not multiplies_bfloat16(torch.device("cpu")),
    reason="this CPU has no instructions for bfloat16; torch lacks some operations then, and runs refuse it",
)
