"""Options of one submission: where to stop, what to fine-tune from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from t2idist import storage
from t2idist.config import RunConfig, StageConfig
from t2idist.engine.checkpoint import export


@dataclass(frozen=True)
class StopAfter:
    """Where a submission stops before the run is done."""

    stage: str
    images: int | None
    """Images seen in the stage; None: when the stage is done."""

    def steps(self, name: str, stage: StageConfig) -> int:
        """Return the step of stage `name` at which to stop: the first that reaches `images`, or the last."""
        if name != self.stage or self.images is None:
            return stage.steps
        return min(stage.steps, -(-self.images // stage.images_per_step))


def parse_stop_after(text: str, config: RunConfig) -> StopAfter:
    """Parse ``STAGE``, ``STAGE:IMAGES``, or ``IMAGES`` for a run of one stage.

    Raises:
        ValueError: The run has no such stage, or the stage a smaller budget.
    """
    stage, _, number = text.rpartition(":")
    if not stage:
        stage, number = (text, "") if text in config.stages else (next(iter(config.stages)), text)
        if number and len(config.stages) > 1:
            last = list(config.stages)[-1]
            raise ValueError(
                f"--stop-after: {text}: give one of the stages {', '.join(config.stages)}, or images of one of them, "
                f"such as {last}:{text if text.isdigit() else config.stages[last].images // 2}"
            )
    if stage not in config.stages:
        raise ValueError(f"--stop-after: no stage '{stage}'; there are {', '.join(config.stages)}")
    if not number:
        return StopAfter(stage, None)
    images = int(number) if number.isdigit() else 0
    budget = config.stages[stage].images
    if not 0 < images <= budget:
        raise ValueError(f"--stop-after: {number} images of stage {stage}; allowed are 1 to {budget:,}, its budget")
    return StopAfter(stage, images)


def apply_init_from(config: RunConfig, texts: Iterable[str]) -> RunConfig:
    """Set the stages' `init_from` from texts of the form ``[STAGE=]EXPORT``.

    Without a stage, the export goes to the stage that trains its system.

    Raises:
        ValueError: There is no such stage, or more than one.
    """
    stages = dict(config.stages)
    for text in texts:
        name, url = _split_stage(text)
        url = storage.absolute(url)
        system = export.read_index(url)["system"]
        candidates = [stage for stage, settings in config.stages.items() if settings.system == system]
        if name and name not in config.stages:
            raise ValueError(f"--init-from: no stage '{name}'; there are {', '.join(config.stages)}")
        if not name and len(candidates) != 1:
            trained = (
                f"{', '.join(candidates)} train" if candidates else f"no stage of {', '.join(config.stages)} trains"
            )
            raise ValueError(
                f"--init-from: {storage.redact(url)} is of system {system}, which {trained}; give STAGE=EXPORT"
            )
        stage = name or candidates[0]
        stages[stage] = replace(stages[stage], init_from=url)
    return replace(config, stages=stages)


def _split_stage(text: str) -> tuple[str, str]:
    """Split into the stage's name ("": none) and the URL, which may contain equals signs itself."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else ("", text)
