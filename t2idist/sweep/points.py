"""The values of a metric that a run has so far, read from its folder. Imports no torch: Ray's workers use it too."""

from __future__ import annotations

from t2idist import storage
from t2idist.report.run_folder import points_of, read_lines

Point = tuple[int, float]
"""Images seen, and the metric there."""


def read_points(run_url: str, stage: str, metric: str) -> list[Point]:
    """Return the values in order of images: of a score, or, if the name has a slash, of a metric of the run's log."""
    file = "metrics.jsonl" if "/" in metric else "scored/scores.jsonl"
    x, y = points_of(read_lines(storage.join(run_url, stage, file)), metric)
    return [(int(images), value) for images, value in zip(x, y, strict=True)]
