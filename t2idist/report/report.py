"""One self-contained page about a run: ``python -m t2idist.report.report RUN_URL`` writes its report.html."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from PIL import Image

from t2idist import storage
from t2idist.observability.progress import duration
from t2idist.report import charts, run_folder, score_section
from t2idist.report.html import WIDEST_LARGE, WIDEST_SMALL, data_uri, image, number, open_png, scale
from t2idist.report.run_folder import Drawn, RunFolder, Stage

MOST_GRIDS = 12
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def build(run_url: str) -> str:
    """The page of the run in folder `run_url`: HTML that needs no network and no other file.

    Sections for which there is nothing yet are left out. Raises ValueError where there is no run.
    """
    run = run_folder.read(run_url)
    drawn: list[charts.Chart] = []
    sections = [
        ("pictures", "Pictures", _final_pictures(run)),
        ("scores", "Scores", _scores(run.scores) + "".join(score_section.section(stage) for stage in run.stages)),
        ("time", "Over time", "".join(_over_time(stage) for stage in run.stages)),
        ("curves", "Curves", "".join(_curves(stage, drawn) for stage in run.stages)),
        ("attention", "Attention", "".join(_attention(stage) for stage in run.stages)),
        ("setup", "Run and data", _setup(run)),
        ("config", "Configuration", _configuration(run)),
    ]
    present = [(key, title, body) for key, title, body in sections if body]
    nav = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in present)
    bodies = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in present)
    values = json.dumps([c.values for c in drawn], separators=(",", ":")).replace("<", "\\u003c")
    assets = resources.files("t2idist.report")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(run.name)}: t2idist</title>"
        f"<style>{assets.joinpath('report.css').read_text('utf-8')}</style></head><body><main>"
        f"{_header(run)}<nav>{nav}</nav>{bodies}"
        f"<footer>Written by t2idist from {escape(storage.redact(run.url))}.</footer>"
        f'</main><script type="application/json" id="chart-values">{values}</script>'
        f"<script>{assets.joinpath('report.js').read_text('utf-8')}</script></body></html>\n"
    )


def write(run_url: str) -> str:
    """Build the page and write it into the run folder; gives its URL."""
    url = storage.join(run_url, "report.html")
    storage.write_bytes(url, build(run_url).encode("utf-8"))
    return url


# ------------------------------------------------------------------------------------------------ the head of the page
def _header(run: RunFolder) -> str:
    done = [stage for stage in run.stages if stage.metrics]
    systems = " then ".join(dict.fromkeys(stage.system for stage in run.stages)) or "no stage"
    about = str(run.config.get("about") or "").rstrip(".")
    about = f"{about[:1].upper()}{about[1:]}." if about else ""
    images = sum(stage.images for stage in done)
    seconds = sum(stage.seconds for stage in done)
    restarts = len(run.restarts)
    facts = [
        (
            "Images seen",
            f"{images:,}",
            ", ".join(f"{s.name} {charts.short(s.images)}" for s in done) if len(done) > 1 else "",
        ),
        (
            "Training time",
            duration(seconds),
            ", ".join(f"{s.name} {duration(s.seconds)}" for s in done) if len(done) > 1 else "",
        ),
    ]
    if done:
        speed = _median(done[-1].series("images_per_second")[1])
        facts.append(("Images per second", charts.short(speed) if speed else "", f"median of {done[-1].name}"))
    if "workers" in run.progress:
        facts.append(("Workers", str(run.progress["workers"]), _hardware(run.versions)))
    facts.append(("Restarts", str(restarts), "each from the last checkpoint" if restarts else ""))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in facts
        if value
    )
    return (
        f'<header class="top"><p class="kind">Training report: {escape(systems)}</p><h1>{escape(run.name)}</h1>'
        f'<p class="lead">{escape(_outcome(run))}{f" {escape(about)}" if about else ""}</p>'
        f'<dl class="facts">{cells}</dl></header>'
    )


def _outcome(run: RunFolder) -> str:
    state = str(run.progress.get("state", ""))
    when = str(run.progress.get("time", ""))[:16].replace("T", " ")
    exports = [stage.name for stage in run.stages if stage.export]
    if len(exports) == len(run.stages) and run.stages:
        return f"Finished{f' on {when}' if when else ''}."
    stage = str(run.progress.get("stage", ""))
    place = f" in stage {stage} at {int(run.progress.get('images', 0)):,} images" if stage else ""
    return f"{state.capitalize() or 'Not finished'}{place}{f', {when}' if when else ''}."


def _hardware(versions: Mapping[str, Any]) -> str:
    """What a worker ran on, in a few words."""
    if versions.get("accelerator"):
        return f"on {versions['accelerator']}"
    cores = f"{versions['cpu_cores']} cores of " if versions.get("cpu_cores") else ""
    return f"on {cores}{versions['cpu']}" if versions.get("cpu") else ""


# ------------------------------------------------------------------------------------------------ pictures
def _final_pictures(run: RunFolder) -> str:
    drawing = [stage for stage in run.stages if stage.grids]
    if not drawing:
        return ""
    stage = drawing[-1]
    last = stage.grids[-1]
    what = "The same captions (rows) with the same noise (columns), drawn by {} after {:,} images, at every scale."
    if stage.translates:
        what = "Pictures that were never trained on (left), and what {} made of them after {:,} images."
    return (
        f'<p class="lead">{what.format(escape(stage.name), last.images)}</p>'
        f"{image(last.url, f'Grid of pictures after {last.images:,} images', WIDEST_LARGE, 90)}"
    )


def _over_time(stage: Stage) -> str:
    if len(stage.grids) < 2:
        return ""
    shown = _evenly(stage.grids, MOST_GRIDS)
    labels = [f"{drawn.images:,} images" for drawn in shown]
    pictures = "".join(
        image(
            drawn.url,
            f"Grid after {label}",
            WIDEST_SMALL,
            80,
            f' data-label="{label}"{" hidden" if drawn is not shown[-1] else ""}',
        )
        for drawn, label in zip(shown, labels, strict=True)
    )
    thumbs = "".join(
        f'<li><button aria-pressed="{str(drawn is shown[-1]).lower()}">{_thumbnail(drawn.url)}'
        f"{charts.short(drawn.images)}</button></li>"
        for drawn in shown
    )
    return (
        f'<h3>{_stage_title(stage)}</h3><div class="over-time">'
        f'<ul class="thumbs">{thumbs}</ul><div class="bar"><button>Play</button>'
        f'<input type="range" min="0" max="{len(shown) - 1}" value="{len(shown) - 1}" aria-label="images seen">'
        f"<output>{labels[-1]}</output></div>{pictures}</div>"
    )


def _attention(stage: Stage) -> str:
    if not stage.attention:
        return ""
    ends = stage.attention[:1] + stage.attention[-1:] if len(stage.attention) > 1 else stage.attention
    figures = "".join(
        f'<figure class="plain"><figcaption>{escape(stage.name)}, after {drawn.images:,} images</figcaption>'
        f"{image(drawn.url, f'Attention of every word after {drawn.images:,} images', WIDEST_LARGE, 85)}</figure>"
        for drawn in ends
    )
    lead = "Where each word acts on the picture, early and at the end of training. " if len(ends) > 1 else ""
    lead += "Bright: the word outweighs the others there; the peak weight stands below it."
    return f'<p class="lead">{lead}</p>{figures}'


def _thumbnail(url: str) -> str:
    """The right end of a grid: its largest scale."""
    picture = open_png(url)
    side = min(picture.height - 30, picture.width // 4)
    cut = picture.crop((picture.width - side - 14, 30, picture.width - 14, 30 + side))
    return f'<img alt="" width="92" height="92" src="{data_uri(cut.resize((184, 184), Image.Resampling.LANCZOS), 70)}">'


def _evenly(items: Sequence[Drawn], most: int) -> list[Drawn]:
    """At most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# ------------------------------------------------------------------------------------------------ scores and curves
def _scores(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    body = ""
    for row in rows:
        name = str(row.get("name", ""))
        body += (
            f"<tr{' class=mean' if name.startswith('mean') else ''}><td>{escape(name)}</td>"
            f'<td class="n">{number(row.get("value"))}</td><td>{scale(row)}</td>'
            f'<td class="n">{number(row.get("chance"))}</td><td class="n">{number(row.get("real"))}</td>'
            f'<td class="n">{number(row.get("n"))}</td><td class="note">{escape(str(row.get("note") or ""))}</td></tr>'
        )
    return (
        '<p class="lead">On samples that were never trained on. In each bar the orange mark is chance and the dark '
        'mark is what real pictures score.</p><div class="scroll"><table><thead><tr><th>Score</th>'
        '<th class="n">Generated</th><th></th><th class="n">Chance</th><th class="n">Real</th>'
        '<th class="n">n</th><th>How</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _curves(stage: Stage, drawn: list[charts.Chart]) -> str:
    groups: dict[str, list[charts.Series]] = {}
    for name in stage.metric_names():
        network, slash, part = name.partition("/")
        groups.setdefault(network, []).append(charts.Series(part if slash else name, *stage.series(name)))
    titles = {"val": "validation", "lr": "learning rate", "norm": "gradient norms"}
    order = sorted(groups, key=lambda group: (group == "lr", group == "val", group != "generator"))
    html = []

    def add(title: str, series: Sequence[charts.Series], note: str = "") -> None:
        drawn.append(charts.chart(title, series, len(drawn), note))
        html.append(drawn[-1].html)

    for group in order:
        add(titles.get(group, group), groups[group])
    shares = _shares_by_scale(stage)
    if shares:
        add("adversarial loss by scale", shares, "share of the generator's adversarial loss")
    for name in stage.scored_names():
        add(f"{name}, scored in training", [charts.Series(name, *stage.scored_series(name))])
    speed = stage.series("images_per_second")
    if speed[0]:
        add("throughput", [charts.Series("images/s", *speed)], "all workers together")
    if not html:
        return ""
    return f'<h3>{_stage_title(stage)} <small>over images seen</small></h3><div class="charts">{"".join(html)}</div>'


def _shares_by_scale(stage: Stage) -> list[charts.Series]:
    """Of the adversarial losses of a generator that has one for each scale: what part of their sum each is."""
    names = [name for name in stage.metric_names() if name.startswith("generator/adversarial_")]
    if len(names) < 2:
        return []
    lines = [line for line in stage.metrics if all(name in line for name in names)]
    images = tuple(float(line["images"]) for line in lines)
    sums = [sum(float(line[name]) for name in names) for line in lines]
    return [
        charts.Series(
            f"{name.rpartition('_')[2]} px",
            images,
            tuple(float(line[name]) / (total or 1.0) for line, total in zip(lines, sums, strict=True)),
        )
        for name in names
    ]


def _stage_title(stage: Stage) -> str:
    system = f" <small>{escape(stage.system)}</small>" if stage.system != stage.name else ""
    return f"{escape(stage.name)}{system}"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


# ------------------------------------------------------------------------------------------------ facts
def _setup(run: RunFolder) -> str:
    restarts = "".join(
        f'<tr><td class="n">{r.number}</td><td>{escape(r.time[:19].replace("T", " "))}</td>'
        f'<td>{escape(r.stage)}</td><td class="n">{r.images:,}</td><td class="n">{r.workers or ""}</td></tr>'
        for r in run.restarts
    )
    if restarts:
        restarts = (
            '<h3>Restarts</h3><div class="scroll"><table><thead><tr><th class="n">Number</th><th>Began</th>'
            '<th>Stage</th><th class="n">First report at images</th><th class="n">Workers</th></tr></thead>'
            f"<tbody>{restarts}</tbody></table></div>"
        )
    export = next((stage.export for stage in reversed(run.stages) if stage.export), None)
    data: dict[str, Any] = dict(export.get("data") or {}) if export else {}
    if not data:
        data = dict(run.config.get("data") or {})
    elif export:
        data["words in the vocabulary"] = len(export.get("vocabulary") or [])
    tables = [("Data", data), ("Versions", run.versions)]
    made = [f"<div><h3>{title}</h3>{_facts_table(values)}</div>" for title, values in tables if values]
    return restarts + (f'<div class="two">{"".join(made)}</div>' if made else "")


def _facts_table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _flat(values))
    return f'<table class="facts-table"><tbody>{rows}</tbody></table>'


def _flat(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{path}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        elif value is not None and value != "" and value != []:
            yield (
                name,
                ", ".join(map(str, value))
                if isinstance(value, list)
                else f"{value:,}"
                if type(value) is int
                else str(value),
            )


def _configuration(run: RunFolder) -> str:
    samples = next((stage for stage in reversed(run.stages) if stage.export and stage.grids), None)
    command = ""
    if samples:
        line = f'python -m t2idist.sampling.sample --export {samples.export_url} --text "..."'
        lead = "To draw pictures of your own sentences:"
        if samples.translates:
            line = f"python -m t2idist.sampling.translate --export {samples.export_url} --image FILE --set NAME"
            lead = "To change a picture of your own:"
        command = f'<p class="lead">{lead}</p>{_copyable(line)}'
    return f"{command}<details><summary>Resolved configuration</summary>{_copyable(run.config_text.rstrip())}</details>"


def _copyable(text: str) -> str:
    return f'<div class="copyable"><button>Copy</button><pre>{escape(text)}</pre></div>'


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m t2idist.report.report", description="Write a run's report.html.")
    parser.add_argument("run", metavar="RUN_URL", help="the run's folder")
    arguments = parser.parse_args(words)
    try:
        print(write(arguments.run))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
