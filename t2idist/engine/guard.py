"""Non-finite values stay out of the state: an update whose loss or gradients are not finite changes nothing.

Nothing here waits for the device: a flag on it decides, the same on every worker, because every worker sees the same
averaged gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Diverged(Exception):
    """So many steps in a row were skipped that the run goes back to a checkpoint; the message says what went first."""


class Guard:
    """Watches the updates of a stage's networks.

    nets: every network that a step may write floating buffers of. They are moved into one tensor, so that a skipped
    step can put them back at once.
    """

    def __init__(self, nets: Iterable[nn.Module], device: torch.device) -> None:
        self._buffers = _flatten_buffers(nets)
        self._saved = torch.empty_like(self._buffers)
        self._bad = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def start_step(self) -> None:
        self._saved.copy_(self._buffers)
        self._bad = torch.zeros_like(self._bad)

    def weigh(self, loss: Tensor, weight: float) -> Tensor:
        """The loss to differentiate; where it is not finite, so are its gradients, on every worker."""
        return loss * torch.where(loss.detach().isfinite(), weight, torch.nan)

    def check(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """() float32 on the gradients' device: 1 where one of them is not finite (or their norm overflows), else 0.

        And the 2-norm of them all together, which is not finite there.
        """
        norm = torch.stack(torch._foreach_norm(list(gradients))).double().norm()
        bad = (~norm.isfinite()).float()
        self._bad = torch.maximum(self._bad, bad)
        return bad, norm

    def end_step(self) -> None:
        """Put the buffers back where an update of this step was bad, and count."""
        torch.where(self._bad > 0, self._saved, self._buffers, out=self._buffers)
        self._skipped += self._bad
        self._in_a_row = (self._in_a_row + self._bad) * self._bad

    @property
    def skipped(self) -> int:
        """Steps so far, in this process, in which an update was skipped. Waits for the device."""
        return int(self._skipped)

    @property
    def in_a_row(self) -> int:
        """How many of them were the latest. Waits for the device."""
        return int(self._in_a_row)


def _flatten_buffers(nets: Iterable[nn.Module]) -> Tensor:
    """One tensor of which all floating buffers become views."""
    places = [
        (module, name, buffer)
        for net in nets
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    if not places:
        return torch.empty(0)
    flat = torch.cat([buffer.flatten() for _, _, buffer in places])
    parts = torch.split(flat, [buffer.numel() for _, _, buffer in places])
    for (module, name, buffer), part in zip(places, parts, strict=True):
        module._buffers[name] = part.view_as(buffer)
    return flat
