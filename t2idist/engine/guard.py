"""Keeps non-finite values out of the state: an update with a non-finite loss or gradient changes nothing.

There is no host sync: a flag on the device decides. It is equal on every worker, because every worker has the same
averaged gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from t2idist.nn.fast.torch_internals import foreach_norm


class Diverged(Exception):
    """Too many steps in a row were skipped: the run must return to a checkpoint. The message names the first cause."""


class Guard:
    """Checks every update of a stage and restores the buffers after a skipped one.

    Args:
        nets: every network whose floating buffers a step may write. The buffers are moved into one tensor, so that
            one copy restores them all.
    """

    def __init__(self, nets: Iterable[nn.Module], device: torch.device) -> None:
        self.buffers = _flatten_buffers(nets, device)
        """The floating buffers of all networks, flat."""
        self._saved = torch.empty_like(self.buffers)
        self._found_inf = torch.zeros((), device=device)
        self._skipped_steps = torch.zeros((), device=device)
        self._skips_in_a_row = torch.zeros((), device=device)

    def start_step(self) -> None:
        self._saved.copy_(self.buffers)
        self._found_inf.zero_()

    def scale_loss(self, loss: Tensor, weight: float) -> Tensor:
        """Return the weighted loss to differentiate. If it is not finite, its gradients are NaN on every worker."""
        return loss * torch.where(loss.detach().isfinite(), weight, torch.nan)

    def check(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Check averaged gradients.

        Returns:
            found_inf: () float32 on the gradients' device, 1 if one of them is not finite or their norm overflows.
            norm: () float64, the 2-norm of them all, not finite if found_inf is 1.
        """
        norm = torch.stack(foreach_norm(list(gradients))).double().norm()
        found_inf = (~norm.isfinite()).float()
        torch.maximum(self._found_inf, found_inf, out=self._found_inf)
        return found_inf, norm

    def end_step(self) -> None:
        """Restore the buffers if an update of this step was skipped, and count."""
        torch.where(self._found_inf > 0, self._saved, self.buffers, out=self.buffers)
        self._skipped_steps += self._found_inf
        self._skips_in_a_row.add_(self._found_inf).mul_(self._found_inf)

    def state(self) -> tuple[Tensor, ...]:
        """Return the tensors that a step changes, live."""
        return self.buffers, self._skipped_steps, self._skips_in_a_row

    @property
    def skipped_steps(self) -> int:
        """Steps of this process in which an update was skipped. Waits for the device."""
        return int(self._skipped_steps)

    @property
    def skips_in_a_row(self) -> int:
        """Skipped steps since the last one that was not skipped. Waits for the device."""
        return int(self._skips_in_a_row)


def _flatten_buffers(nets: Iterable[nn.Module], device: torch.device) -> Tensor:
    """Move all floating buffers into one tensor, of which they become views, and return it."""
    buffers = [
        (module, name, buffer)
        for net in nets
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    if not buffers:
        return torch.empty(0, device=device)
    flat = torch.cat([buffer.flatten() for _, _, buffer in buffers])
    views = torch.split(flat, [buffer.numel() for _, _, buffer in buffers])
    for (module, name, buffer), view in zip(buffers, views, strict=True):
        module._buffers[name] = view.view_as(buffer)
    return flat
