"""The sentence vectors of a system: of its frozen network "text", or those that came with the captions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, Frozen, Train
from t2idist.nn.text_encoders import sentence_vectors


def for_step(captions: Captions, train: Train, frozen: Mapping[str, Frozen], unit: bool) -> Tensor:
    """(N, D) in training. frozen: the system's; unit: scaled by `unit_scale`."""
    with torch.no_grad(), train.frozen("text") if "text" in frozen else contextlib.nullcontext() as encoder:
        return _read(encoder, captions, unit)


def for_sample(captions: Captions, nets: Mapping[str, nn.Module], unit: bool) -> Tensor:
    """(N, D) of an export's networks. Raises ValueError where vectors are needed and none were given."""
    return _read(nets.get("text"), captions, unit)


def _read(encoder: nn.Module | None, captions: Captions, unit: bool) -> Tensor:
    return sentence_vectors(encoder, captions.tokens, captions.lengths, captions.vectors, unit)
