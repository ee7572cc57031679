"""A run's stages: where each one's files lie, what it is built from, and how its system is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from t2idist import storage, systems
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export

RUN_ID = "run_id.json"
"""Tells a run folder from all others, an earlier one of the same name too."""


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with relative local paths made absolute, as workers elsewhere need them."""
    made = {}
    for name, stage in config.stages.items():
        uses = {s: u if u in config.stages else storage.absolute(u) for s, u in stage.uses.items()}
        own = to_dict(_anchored_data(config.stage_data(name)))
        init = storage.absolute(stage.init_from) if stage.init_from else ""
        made[name] = replace(stage, uses=uses, data={key: own[key] for key in stage.data}, init_from=init)
    return replace(config, storage=storage.absolute(config.storage), data=_anchored_data(config.data), stages=made)


def _anchored_data(data: DataConfig) -> DataConfig:
    def absolute(source: str) -> str:
        return storage.absolute(source) if "/" in source else source

    return replace(data, source=absolute(data.source), beside=tuple(absolute(source) for source in data.beside))


def run_url(config: RunConfig) -> str:
    return storage.join(config.storage, config.name)


def stage_url(config: RunConfig, stage: str) -> str:
    return storage.join(run_url(config), stage)


def export_url(config: RunConfig, stage: str) -> str:
    return storage.join(stage_url(config, stage), "export")


def source_url(config: RunConfig, source: str) -> str:
    """The export that a stage's `uses` names: an earlier stage of the run, or a URL."""
    return export_url(config, source) if source in config.stages else source


def model_config(config: RunConfig, stage: str) -> Any:
    """The system's own settings of a stage, checked. Raises ValueError that names the key."""
    settings = config.stages[stage]
    try:
        module = systems.load(settings.system)
    except ValueError as error:
        raise ValueError(f"stages.{stage}.{error}") from None
    where = f"stages.{stage}.model"
    try:
        return from_dict(module.Config, settings.model, where)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def check_uses(config: RunConfig) -> None:
    """Whether every stage only uses stages before it. Raises ValueError."""
    before: list[str] = []
    for name, stage in config.stages.items():
        for slot, source in stage.uses.items():
            if source in config.stages and source not in before:
                raise ValueError(f"stages.{name}.uses.{slot}: stage '{source}' does not come before '{name}'")
        before.append(name)


def plan(config: RunConfig, stage: str, extent: DataInfo) -> BuildInfo:
    """What the stage's system is built from; an export that is not there yet is described by its stage."""
    settings = config.stages[stage]
    sources = {slot: _source(config, source, extent) for slot, source in settings.uses.items()}
    return BuildInfo(settings.group_size, config.stage_data(stage).max_words, extent, sources)


def _source(config: RunConfig, source: str, extent: DataInfo) -> Mapping[str, Any]:
    url = source_url(config, source)
    if source in config.stages and not export.exists(url):
        made = plan(config, source, extent)
        settings = to_dict(model_config(config, source))
        return {"system": config.stages[source].system, "config": settings, "plan": made.describe()}
    index = export.read_index(url)
    return {key: index[key] for key in ("system", "config", "plan")}


def build(config: RunConfig, stage: str, made: BuildInfo) -> System:
    """The stage's system; initial weights from torch's global generator. Raises ValueError that names the stage."""
    settings = model_config(config, stage)
    try:
        return systems.load(config.stages[stage].system).build(settings, made)
    except (ValueError, KeyError) as error:
        raise ValueError(f"stages.{stage}: {error}") from None


def vocabularies(config: RunConfig, stage: str) -> dict[str, list[str]]:
    """By slot, the words that the exports know which a stage uses; those of stages that are not done are left out."""
    urls = {s: source_url(config, u) for s, u in config.stages[stage].uses.items()}
    return {
        slot: export.read_index(url)["vocabulary"]
        for slot, url in urls.items()
        if config.stages[stage].uses[slot] not in config.stages or export.exists(url)
    }


def stage_vocabulary(data: Vocabulary, sources: Mapping[str, list[str]]) -> Vocabulary:
    """The vocabulary that a stage's captions are numbered with: its encoder's where it uses one, else the data's.

    Raises ValueError where an encoder does not know words of the data, or two number them in different ways.
    """
    chosen, first = data, ""
    for slot, words in sources.items():
        known = Vocabulary(words)
        missing = [word for word in data.words if word not in known.numbers]
        if missing:
            raise ValueError(
                f"uses.{slot}: its vocabulary of {len(known)} words does not fit the data: {len(missing)} of the "
                f"data's {len(data)} words are not in it ({', '.join(missing[:5])}...); train the encoder on this "
                "data, or give the data that it was trained on"
            )
        if first and known.words != chosen.words:
            raise ValueError(
                f"uses.{slot}: its vocabulary is not that of uses.{first}, and captions can be numbered in one way "
                "only; give exports that were trained on the same data"
            )
        chosen, first = known, slot
    return chosen
