"""The page's section about scores: the table under its protocol, whose captions are followed, what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from t2idist import storage
from t2idist.report.html import WIDEST_SMALL, image, number, scale
from t2idist.report.published_scores import PUBLISHED
from t2idist.report.run_folder import Stage

MOST_ROWS = 12
SHEETS = {
    "best": "Captions that are followed best: a real picture, and what was drawn",
    "worst": "Captions that are followed worst",
    "nearest": "Drawn pictures that are nearest to a training picture, on their left: here copies would show",
}


def section(stage: Stage) -> str:
    """Empty where the stage was not scored."""
    html = ""
    if stage.best is not None:
        best = stage.best
        html += (
            f'<p class="lead">In training, {escape(stage.name)} was best after {int(best["images"]):,} images by '
            f"{escape(str(best['metric']))} ({number(best['value'])}): its weights are kept in "
            f"{escape(stage.name)}/{escape(str(best['export']))}.</p>"
        )
    if stage.scores is None:
        return html
    protocol = stage.scores["protocol"]
    html += f"<h3>{escape(stage.name)}</h3>{_table(stage.scores['scores'])}{_protocol(protocol)}"
    breakdown = stage.scores.get("breakdown") or {}
    parts = [_breakdown(kind, rows) for kind, rows in breakdown.items() if rows]
    if parts:
        html += (
            '<h3>Whose captions are followed</h3><p class="lead">How often a picture picks its own caption, over the '
            f'captions with a word and the samples with an attribute.</p><div class="two">{"".join(parts)}</div>'
        )
    for name, file in (stage.scores.get("sheets") or {}).items():
        about = SHEETS[name]
        url = storage.join(stage.scores_url, file)
        html += f'<figure class="plain"><figcaption>{about}</figcaption>{image(url, about, WIDEST_SMALL, 85)}</figure>'
    return html + _published()


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = ""
    for row in rows:
        error = "" if row["error"] is None else f"± {number(row['error'])}"
        reach = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
        body += (
            f'<tr><td>{escape(row["name"])}</td><td class="n">{number(row["value"])}</td><td class="n">{error}</td>'
            f'<td class="n">{reach}</td><td>{scale(row)}</td><td class="n">{number(row["chance"])}</td>'
            f'<td class="n">{number(row["real"])}</td><td class="n">{number(row["n"])}</td>'
            f'<td class="note">{escape(row["note"])}</td></tr>'
        )
    head = "".join(f'<th class="n">{name}</th>' for name in ("Generated", "±", "95 %"))
    ends = "".join(f'<th class="n">{name}</th>' for name in ("Chance", "Real", "n"))
    return (
        f'<div class="scroll"><table><thead><tr><th>Score</th>{head}<th></th>{ends}<th>How</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Everything that the numbers depend on, so that nobody compares what cannot be compared."""
    facts = {key: value for key, value in protocol.items() if key != "extractors" and value is not None}
    for extractor in protocol["extractors"]:
        facts[f"extractor {extractor['name']}"] = ", ".join(f"{k} {v}" for k, v in extractor.items() if k != "name")
    rows = "".join(
        f"<tr><th>{escape(str(key).replace('_', ' '))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return (
        "<details open><summary>Protocol: scores compare only where all of this is the same</summary>"
        f'<table class="facts-table"><tbody>{rows}</tbody></table></details>'
    )


def _breakdown(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The lowest and the highest rows; `rows` are in order."""
    shown = list(rows)
    cut = len(shown) > 2 * MOST_ROWS
    if cut:
        shown = shown[:MOST_ROWS] + shown[-MOST_ROWS:]
    metrics = [name for name in shown[0] if name not in ("name", "n")]
    body = ""
    for row in shown:
        values = "".join(
            f'<td class="n">{number(row[name])}</td><td>{scale({"value": row[name], "chance": 0.0})}</td>'
            for name in metrics
        )
        body += f'<tr><td>{escape(row["name"])}</td>{values}<td class="n">{number(row["n"])}</td></tr>'
    heads = "".join(f'<th class="n">{escape(name)}</th><th></th>' for name in metrics)
    title = f"{kind}: the lowest and highest {MOST_ROWS} of {len(rows)}" if cut else kind
    return (
        f'<div><h3>By {escape(title)}</h3><div class="scroll"><table><thead><tr><th></th>{heads}'
        f'<th class="n">n</th></tr></thead><tbody>{body}</tbody></table></div></div>'
    )


def _published() -> str:
    rows = "".join(
        f"<tr><td>{escape(p.data)}</td><td>{escape(p.model)}</td><td>{escape(p.metric)}</td>"
        f'<td class="n">{escape(p.value)}</td><td class="note">{escape(p.by)}</td>'
        f'<td class="note">{escape(p.source)}</td></tr>'
        for p in PUBLISHED
    )
    return (
        "<details><summary>Published numbers, by other protocols: none compares with the table above</summary>"
        '<div class="scroll"><table><thead><tr><th>Data</th><th>Model</th><th>Score</th><th class="n">Value</th>'
        f"<th>By</th><th>Source</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
