"""Sentence vectors of captions: by the system's frozen network "text", or those of the data."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from t2idist.contract import Captions, Frozen, Train
from t2idist.nn.text_encoders import sentence_vectors


def for_step(captions: Captions, train: Train, frozen: Mapping[str, Frozen], unit: bool) -> Tensor:
    """Return the sentence vectors (N, D) of a training step.

    Args:
        frozen: The system's frozen networks.
        unit: Whether to scale the vectors by `unit_scale`.
    """
    with torch.no_grad(), train.frozen("text") if "text" in frozen else contextlib.nullcontext() as encoder:
        return _vectors(encoder, captions, unit)


def for_sample(captions: Captions, nets: Mapping[str, nn.Module], unit: bool) -> Tensor:
    """Return the sentence vectors (N, D) by an export's networks. Raises ValueError if the captions lack vectors."""
    return _vectors(nets.get("text"), captions, unit)


def _vectors(encoder: nn.Module | None, captions: Captions, unit: bool) -> Tensor:
    return sentence_vectors(encoder, captions.tokens, captions.lengths, captions.vectors, unit)
