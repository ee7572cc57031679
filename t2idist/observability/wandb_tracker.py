"""The tracker of Weights & Biases. Each stage is a W&B run; the stages of a run are a group."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2idist.observability.tracking import END_SECONDS, FAILED, Point, Refused

X_AXIS = "images_seen"
_ANSWER_SECONDS, _START_SECONDS = 5.0, 15.0
_FLUSH_SECONDS = 1.0
"""How often the client writes to its file, which alone remains if this process is killed."""


@dataclass
class WandbService:
    """A W&B run. WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY and WANDB_DIR have their usual meaning."""

    target: str
    """PROJECT or ENTITY/PROJECT."""
    run_name: str
    group: str
    commit: str
    config: Mapping[str, Any]
    read: Callable[[str], bytes]
    """Reads a file of the run."""
    folder: Path | None = None
    """Where the client keeps its files, if WANDB_DIR is not set; None: the working directory."""
    name: str = "W&B"
    ignores_repeats: bool = False
    durable_seconds: float = 3 * _FLUSH_SECONDS
    _run_id: str = ""
    _run: Any = field(default=None, repr=False)

    def open(self, run_id: str | None) -> str:
        """Choose the id: the client creates the run, or continues it, when it is described."""
        self._run_id = run_id or self._run_id or secrets.token_hex(6)
        return self._run_id

    def describe(self) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "online":
            _check_answers(settings.base_url)
            if not wandb.login(prompt=False, verify=False):
                raise Refused("there is no API key: set WANDB_API_KEY, or WANDB_MODE=offline")
        entity, _, project = self.target.rpartition("/")
        if self.folder is not None and "WANDB_DIR" not in os.environ:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            entity=entity or None,
            id=self._run_id,
            resume="allow",
            reinit="create_new",
            name=self.run_name,
            group=self.group,
            config=dict(self.config),
            allow_val_change=True,
            save_code=False,
            dir=None if self.folder is None or "WANDB_DIR" in os.environ else str(self.folder),
            settings=wandb.Settings(
                console="off",  # the log of the process is not the tracker's
                git_commit=self.commit,
                silent=True,
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
                init_timeout=_START_SECONDS,
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", END_SECONDS - 2)),
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric(X_AXIS)
        self._run.define_metric("*", step_metric=X_AXIS)

    def metrics(self, points: Sequence[Point]) -> None:
        for point in points:
            self._log({**point.values, X_AXIS: point.images_seen})

    def picture(self, images_seen: int, url: str) -> None:
        import wandb
        from PIL import Image

        key = url.rpartition("/")[2].rpartition("_")[0]
        self._log({f"pictures/{key}": wandb.Image(Image.open(io.BytesIO(self.read(url)))), X_AXIS: images_seen})

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._run is None:
            raise Refused("the run was not started")
        self._run.log(dict(values))

    def end(self, state: str) -> None:
        if self._run is not None:
            self._run.summary["state"] = state
            self._run.finish(exit_code=int(state == FAILED))


def _check_answers(url: str) -> None:
    """Raise OSError unless the server answers: a client that waits for it would hold up the end of this process."""
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()
