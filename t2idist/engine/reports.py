"""The scalars that a system reports in its steps, and their means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2idist.engine.world import Share, World

GRADIENTS = "gradients of "
"""Prefix of a report of a role's gradient norm, as it is named if it is not finite."""
NORM = "norm/"
"""Prefix of the metric that these reports become."""


class StepReports:
    """Collects scalars of steps on the device; `reduce` reads and averages them."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, str, Tensor]] = []
        """Step, name and value of each report since the last call of `reduce`."""
        self.first_nonfinite = ""
        """Names of the values of the first step that had any that were not finite, and that step."""

    def add(self, step: int, name: str, value: Tensor) -> None:
        self.pending.append((step, name, value.detach()))

    def reduce(self, world: World, share: Share) -> dict[str, float]:
        """Average the reports since the last call, over steps and, weighted by share, over workers. A collective.

        "norm/<role>" is the 2-norm of the role's averaged gradients before clipping. Values that are not finite are
        left out.
        """
        reports, self.pending = self.pending, []
        stacked, order = stack_scalars([value for _, _, value in reports])
        values = dict(zip(order, stacked.cpu().tolist(), strict=True))
        finite: dict[str, list[float]] = {}
        nonfinite: list[tuple[int, bool, str]] = []  # losses sort before gradients
        for index, (step, name, _) in enumerate(reports):
            if not math.isfinite(values[index]):
                nonfinite.append((step, name.startswith(GRADIENTS), name))
            else:
                finite.setdefault(name.replace(GRADIENTS, NORM, 1), []).append(values[index])
        means = {name: math.fsum(of_name) / len(of_name) for name, of_name in finite.items()}
        gathered = world.all_gather_object(
            (share.fraction, means, [entry for entry in nonfinite if entry[0] == nonfinite[0][0]])
        )
        firsts = sorted({entry for _, _, entries in gathered for entry in entries})
        if firsts:
            step = firsts[0][0]
            self.first_nonfinite = ", ".join(name for at, _, name in firsts if at == step) + f" in step {step}"
        names = dict.fromkeys(name for _, means, _ in gathered for name in means)
        return {name: _mean([(part, means[name]) for part, means, _ in gathered if name in means]) for name in names}


def stack_scalars(scalars: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return scalars on one device as a float64 vector, with a few launches for all, and the index of each element."""
    kinds = list({scalar.dtype for scalar in scalars})
    order = sorted(range(len(scalars)), key=lambda i: kinds.index(scalars[i].dtype))
    of_kinds = [torch.stack([scalar for scalar in scalars if scalar.dtype == kind]).double() for kind in kinds]
    return torch.cat(of_kinds) if of_kinds else torch.empty(0), order


def _mean(weighted: list[tuple[float, float]]) -> float:
    return math.fsum(weight * value for weight, value in weighted) / math.fsum(weight for weight, _ in weighted)
