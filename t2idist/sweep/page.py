"""The page of a sweep: its trials ranked, with their pictures, curves, and each key's values against the metric."""

from __future__ import annotations

from typing import Any

from t2idist import storage
from t2idist.report import charts
from t2idist.report.rendering import template_environment
from t2idist.report.run_folder import grids_of
from t2idist.sweep.points import read_points
from t2idist.sweep.state import Sweep, Trial, best_command, counts

FILE = "report.html"


def build(storage_url: str, sweep: Sweep) -> str:
    """Build the page: HTML that needs no network and no other file, but links to the trials' own reports."""
    rows = [_row(storage_url, sweep, trial) for trial in sweep.ranked]
    drawn = [charts.Series(row["label"], row["images"], row["values"]) for row in rows if row["images"]]
    curves = charts.draw_chart(sweep.metric, drawn, 0, "of all trials") if drawn else None
    return (
        template_environment()
        .get_template("sweep.html.j2")
        .render(
            sweep=sweep,
            counts=counts(sweep),
            rows=rows,
            better="lower" if sweep.mode == "min" else "higher",
            curves=curves,
            chart_values=[curves.values] if curves else [],
            scatters=_scatters(sweep),
            best=best_command(storage_url, sweep) if sweep.best else "",
            url=storage.join(storage_url, sweep.name),
        )
    )


def write(storage_url: str, sweep: Sweep) -> str:
    """Build the page and write it into the sweep's folder. Returns its URL."""
    url = storage.join(storage_url, sweep.name, FILE)
    storage.write_bytes(url, build(storage_url, sweep).encode("utf-8"))
    return url


def _row(storage_url: str, sweep: Sweep, trial: Trial) -> dict[str, Any]:
    name = sweep.trial_name(trial.number)
    url = storage.join(storage_url, name)
    points = read_points(url, sweep.stage, sweep.metric)
    grids = grids_of(storage.join(url, sweep.stage))
    return {
        "trial": trial,
        "label": f"{trial.number:04d}",
        "name": name,
        "images": tuple(float(images) for images, _ in points),
        "values": tuple(value for _, value in points),
        "grid": grids[-1] if grids else None,
        "has_report": storage.exists(storage.join(url, FILE)),
    }


def _scatters(sweep: Sweep) -> list[str]:
    """Draw each swept key's values against the last values of the metric."""
    measured = [trial for trial in sweep.trials if trial.value is not None]
    if not measured:
        return []
    return [
        charts.draw_scatter(
            key,
            [(trial.values[key], float(trial.value or 0.0), f"{trial.number:04d}") for trial in measured],
            log=domain.startswith("loguniform"),
            best=f"{sweep.best.number:04d}" if sweep.best else "",
        )
        for key, domain in sweep.space.items()
    ]
