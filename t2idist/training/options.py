"""What the command line asks of one submission: where to stop, what to fine-tune from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from t2idist import storage
from t2idist.config import RunConfig, StageConfig
from t2idist.engine.checkpoint import export


@dataclass(frozen=True)
class StopAfter:
    """Where a submission ends before its run does. images: of the stage; None: when the stage is done."""

    stage: str
    images: int | None

    def steps(self, name: str, stage: StageConfig) -> int:
        """Steps of the stage of this name after which to end: all, or those that reach the number of images."""
        if name != self.stage or self.images is None:
            return stage.steps
        return min(stage.steps, -(-self.images // stage.images_per_step))


def parse_stop_after(text: str, config: RunConfig) -> StopAfter:
    """``STAGE``, ``STAGE:IMAGES``, or ``IMAGES`` of a run of one stage. Raises ValueError for what the run lacks."""
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
    """The config with ``[STAGE=]EXPORT`` of each text as a stage's `init_from`.

    Without a stage it is the one that trains the export's system. Raises ValueError where there is none, or more.
    """
    changed = dict(config.stages)
    for text in texts:
        name, url = _split(text)
        url = storage.absolute(url)
        system = export.read_index(url)["system"]
        fits = [stage for stage, settings in config.stages.items() if settings.system == system]
        if name and name not in config.stages:
            raise ValueError(f"--init-from: no stage '{name}'; there are {', '.join(config.stages)}")
        if not name and len(fits) != 1:
            trained = f"{', '.join(fits)} do" if fits else f"no stage of {', '.join(config.stages)} does"
            raise ValueError(
                f"--init-from: {storage.redact(url)} is of system {system}, and {trained} train that; give STAGE=EXPORT"
            )
        stage = name or fits[0]
        changed[stage] = replace(changed[stage], init_from=url)
    return replace(config, stages=changed)


def _split(text: str) -> tuple[str, str]:
    """A stage's name, or none, and a URL, which may hold equals signs itself."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else ("", text)
