"""Write a self-contained page about a run: ``t2idist report RUN`` writes its report.html."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.observability.command import command
from t2idist.observability.progress import format_duration
from t2idist.report import charts
from t2idist.report.published_scores import PUBLISHED_SCORES
from t2idist.report.rendering import template_environment
from t2idist.report.run_folder import RunFolder, StageRecord, read_run

SECTIONS = {
    "images": "Images",
    "scores": "Scores",
    "time": "Over time",
    "curves": "Curves",
    "attention": "Attention",
    "setup": "Run and data",
    "config": "Configuration",
}
_CURVE_TITLES = {"val": "validation", "lr": "learning rate", "norm": "gradient norms"}


def build_report(run_url: str) -> str:
    """Build the page of the run in folder `run_url`: HTML that needs no network and no other file.

    Sections without content are left out. Raises ValueError if there is no run.
    """
    run = read_run(run_url)
    chart_list: list[charts.Chart] = []
    context = {
        "run": run,
        "about": str(run.config.get("about") or "").rstrip("."),
        "outcome": _outcome(run),
        "facts": [fact for fact in _facts(run) if fact[1]],
        "curves": [(stage, _draw_curves(stage, chart_list)) for stage in run.stages],
        "published": PUBLISHED_SCORES,
        "protocols": {stage.name: _protocol(stage.scores["protocol"]) for stage in run.stages if stage.scores},
        "tables": {title: list(_flatten(values)) for title, values in _setup_tables(run).items() if values},
    }
    environment = template_environment()
    bodies = {key: Markup(environment.get_template(f"{key}.html.j2").render(context).strip()) for key in SECTIONS}
    sections = [(key, SECTIONS[key], body) for key, body in bodies.items() if body]
    values = [chart.values for chart in chart_list]
    return environment.get_template("page.html.j2").render(context, sections=sections, chart_values=values)


def write_report(run_url: str) -> str:
    """Build the page and write it into the run folder. Returns its URL."""
    url = storage.join(run_url, "report.html")
    storage.write_bytes(url, build_report(run_url).encode("utf-8"))
    return url


def _outcome(run: RunFolder) -> str:
    state = str(run.progress.get("state", ""))
    time = str(run.progress.get("time", ""))[:16].replace("T", " ")
    if run.stages and all(stage.export for stage in run.stages):
        return f"Finished{f' on {time}' if time else ''}."
    stage = str(run.progress.get("stage", ""))
    position = f" in stage {stage} at {int(run.progress.get('images', 0)):,} images" if stage else ""
    return f"{state.capitalize() or 'Not finished'}{position}{f', {time}' if time else ''}."


def _facts(run: RunFolder) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, note) for the head of the page."""
    trained = [stage for stage in run.stages if stage.metrics]
    parts = trained if len(trained) > 1 else []
    images, seconds = sum(stage.images for stage in trained), sum(stage.seconds for stage in trained)
    yield "Images seen", f"{images:,}", ", ".join(f"{s.name} {charts.format_short(s.images)}" for s in parts)
    yield "Training time", format_duration(seconds), ", ".join(f"{s.name} {format_duration(s.seconds)}" for s in parts)
    if trained and (rates := trained[-1].series("images_per_second")[1]):
        rate = statistics.median_high(rates)
        yield "Images per second", charts.format_short(rate) if rate else "", f"median of {trained[-1].name}"
    if "workers" in run.progress:
        yield "Workers", str(run.progress["workers"]), _hardware(run.versions)
    yield "Restarts", str(len(run.restarts)), "each from a copy in memory or a checkpoint" if run.restarts else ""


def _hardware(versions: Mapping[str, Any]) -> str:
    if versions.get("accelerator"):
        return f"on {versions['accelerator']}"
    cores = f"{versions['cpu_cores']} cores of " if versions.get("cpu_cores") else ""
    return f"on {cores}{versions['cpu']}" if versions.get("cpu") else ""


def _protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the scores depend on."""
    facts = {key: value for key, value in protocol.items() if key != "extractors" and value is not None}
    for extractor in protocol["extractors"]:
        facts[f"extractor {extractor['name']}"] = ", ".join(f"{k} {v}" for k, v in extractor.items() if k != "name")
    return {key.replace("_", " "): value for key, value in facts.items()}


def _draw_curves(stage: StageRecord, chart_list: list[charts.Chart]) -> list[charts.Chart]:
    """Draw the charts of a stage; they are appended to `chart_list` too."""
    groups: dict[str, list[charts.Series]] = {}
    for name in stage.metric_names():
        network, slash, part = name.partition("/")
        groups.setdefault(network, []).append(charts.Series(part if slash else name, *stage.series(name)))
    order = sorted(groups, key=lambda group: (group == "lr", group == "val", group != "generator"))
    plots = [(_CURVE_TITLES.get(group, group), groups[group], "") for group in order]
    if shares := _shares_by_scale(stage):
        plots.append(("adversarial loss by scale", shares, "share of the generator's adversarial loss"))
    for name in stage.score_names():
        plots.append((f"{name}, scored in training", [charts.Series(name, *stage.score_series(name))], ""))
    rates = charts.Series("images/s", *stage.series("images_per_second"))
    if rates.x:
        plots.append(("throughput", [rates], "all workers together"))
    first = len(chart_list)
    for title, series, note in plots:
        chart_list.append(charts.draw_chart(title, series, len(chart_list), note))
    return chart_list[first:]


def _shares_by_scale(stage: StageRecord) -> list[charts.Series]:
    """Return the share of each scale in the generator's adversarial loss, if it has several."""
    names = [name for name in stage.metric_names() if name.startswith("generator/adversarial_")]
    if len(names) < 2:
        return []
    lines = [line for line in stage.metrics if all(name in line for name in names)]
    images = tuple(float(line["images"]) for line in lines)
    sums = [sum(float(line[name]) for name in names) or 1.0 for line in lines]
    return [
        charts.Series(
            f"{name.rpartition('_')[2]} px",
            images,
            tuple(float(line[name]) / total for line, total in zip(lines, sums, strict=True)),
        )
        for name in names
    ]


def _setup_tables(run: RunFolder) -> dict[str, Mapping[str, Any]]:
    export = next((stage.export for stage in reversed(run.stages) if stage.export), None)
    data: dict[str, Any] = dict(export.get("data") or {}) if export else {}
    if export and data:
        data["words in the vocabulary"] = len(export.get("vocabulary") or [])
    return {"Data": data or run.config.get("data") or {}, "Versions": run.versions}


def _flatten(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{path}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name} ")
        elif isinstance(value, list) and value:
            yield name, ", ".join(map(str, value))
        elif value not in (None, "", []):
            yield name, f"{value:,}" if type(value) is int else str(value)


@command("report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist report``; returns the exit status."""
    parser = command_parser(
        "report", "Write the page report.html into a run folder.", "t2idist report runs/attngan-demo"
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    options = parser.parse_args(arguments)
    print(write_report(options.run))
    return 0
