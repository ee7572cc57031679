"""The folder of an export that is published: its weights and a model card (README.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from t2idist import storage
from t2idist.contract import (
    SupportsDomains,
    SupportsEmbed,
    SupportsSample,
    SupportsTranslate,
    System,
    is_text_conditional,
)
from t2idist.engine.checkpoint import export
from t2idist.sampling.loading import LoadedExport

README, SHEET = "README.md", "samples.png"
UNKNOWN_LICENCES = ("", "not said", "unknown")
_VERSIONS = ("t2idist", "git", "torch", "python", "device")
_COMMANDS = {
    "text-to-image": 't2idist sample --export {url} --text "..."',
    "unconditional-image-generation": "t2idist sample --export {url}",
    "image-to-image": "t2idist translate --export {url} --image photo.jpg",
}
_ABOUT = {
    "text-to-image": "Draws images of {size} px from sentences.",
    "unconditional-image-generation": "Draws images of {size} px.",
    "image-to-image": "Translates images of {size} px.",
    "feature-extraction": "Embeds sentences and images, for other models and for scores.",
}
_PYTHON = {
    "text-to-image": 'model.draw("...", n=4, seed=0)',
    "unconditional-image-generation": "model.draw(n=4, seed=0)",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card says and the export does not know."""

    url: str
    """Where the export will be: hf://USER/NAME, or a folder."""
    licence: str
    """Identifier of the licence of the weights, as the Hub names it."""
    data_licence: str | None
    """None: as the data set states it."""
    datasets: tuple[str, ...]
    """Data sets on the Hub: USER/NAME."""


def write_folder(loaded: LoadedExport, folder: str, facts: CardFacts) -> list[str]:
    """Write the files of an export that are published, with its card; return their names.

    Raises:
        ValueError: The licence of the data is not known, or the export has weights that are not safetensors.
    """
    index = export.read_index(loaded.url)
    card_data = _data(index, facts)
    files = [*(entry["file"] for entry in index["networks"].values()), export.INDEX]
    content = {name: storage.read_bytes(storage.join(loaded.url, name)) for name in files}
    if (sheet := _sheet_url(loaded.url)) is not None:
        content[SHEET] = storage.read_bytes(sheet)
    scores = _scores(loaded.url)
    content[README] = _render(loaded, index, facts, card_data, scores, sheet is not None).encode()
    for name, data in content.items():
        storage.write_bytes(storage.join(folder, name), data)
    return sorted(content)


def _data(index: Mapping[str, Any], facts: CardFacts) -> tuple[str, str]:
    """Return the source of the data and its licence."""
    data = index.get("data") or {}
    licence = facts.data_licence or str(data.get("licence", ""))
    parts = [part.strip() for part in licence.split(";")]
    if all(part.lower() in UNKNOWN_LICENCES for part in parts):
        raise ValueError("the licence of the data is not known to the export; give --data-licence TEXT")
    return storage.redact(str(data.get("source") or "not recorded")), licence


def _task(system: System, vector_dim: int) -> str:
    """Return what the Hub calls the task of a system."""
    if isinstance(system, SupportsSample):
        conditional = is_text_conditional(system, vector_dim)
        return "text-to-image" if conditional else "unconditional-image-generation"
    if isinstance(system, SupportsTranslate | SupportsDomains):
        return "image-to-image"
    return "feature-extraction" if isinstance(system, SupportsEmbed) else "other"


def _render(
    loaded: LoadedExport,
    index: Mapping[str, Any],
    facts: CardFacts,
    data: tuple[str, str],
    scores: Mapping[str, Any] | None,
    has_sheet: bool,
) -> str:
    task = _task(loaded.system, loaded.build_info.data.vector_dim)
    metadata: dict[str, Any] = {
        "license": facts.licence,
        "library_name": "t2idist",
        "pipeline_tag": task,
        "tags": ["t2idist", "gan", loaded.name],
    }
    if facts.datasets:
        metadata["datasets"] = list(facts.datasets)
    if task == "other":
        del metadata["pipeline_tag"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("t2idist.convert"),
        autoescape=False,  # Markdown; values are made single-line below
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    versions = loaded.meta.get("versions") or {}
    return environment.get_template("card.md.j2").render(
        metadata=_Yaml(yaml.safe_dump(metadata, sort_keys=False)),
        title=facts.url.rstrip("/").rpartition("/")[2],
        about=_ABOUT.get(task, "").format(size=loaded.system.sizes[-1] if loaded.system.sizes else ""),
        system=loaded.name,
        images=loaded.images,
        sheet=SHEET if has_sheet else "",
        command=_COMMANDS.get(task, "t2idist convert export --export {url} --to weights").format(url=facts.url),
        python=_PYTHON.get(task, ""),
        url=facts.url,
        data=data[0],
        data_licence=data[1],
        licence=facts.licence,
        scores=[] if scores is None else scores["scores"],
        protocol={} if scores is None else _protocol(scores["protocol"]),
        versions={key: versions[key] for key in _VERSIONS if key in versions},
    )


class _Yaml(str):
    """Text of several lines."""


def _plain(value: Any) -> Any:
    """Return a value as one line of Markdown, without markup of its own."""
    if not isinstance(value, str) or isinstance(value, _Yaml):
        return value
    return " ".join(re.sub(r"[<>|`]", " ", value).split())


def _protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol without the places on the machine that scored."""
    values = {key: value for key, value in protocol.items() if key not in ("export", "extractors")}
    names = [str(facts.get("name")) for facts in protocol.get("extractors", ())]
    return {**values, **({"extractors": ", ".join(names)} if names else {})}


def _scores(url: str) -> Mapping[str, Any] | None:
    """Return the scores next to an export that are of this export; None if there are none."""
    file = _beside(url, "scores", "scores.json")
    if file is None or not storage.exists(file):
        return None
    scores = storage.read_json(file)
    ours = storage.sha256(storage.read_bytes(storage.join(url, export.INDEX)))
    fits = isinstance(scores, dict) and scores.get("protocol", {}).get("export_sha256") == ours
    return scores if fits else None


def _sheet_url(url: str) -> str | None:
    """Return the newest sample images of the stage that an export is of."""
    folder = _beside(url, "pictures")
    names: Sequence[str] = [] if folder is None else storage.list_dir(folder)
    sheets = [name for name in names if name.startswith(("images_", "translated_")) and name.endswith(".png")]
    return storage.join(folder, sheets[-1]) if folder is not None and sheets else None


def _beside(url: str, *parts: str) -> str | None:
    """Return the URL of something next to an export; None for an export of the Hub."""
    if url.startswith("hf://"):
        return None
    return storage.join(url.rstrip("/").rpartition("/")[0] or ".", *parts)
