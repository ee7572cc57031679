"""The stages of a run: settings, locations of files, and how the system of each is built."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2idist import storage, systems
from t2idist.config import DataConfig, RunConfig, StageConfig
from t2idist.config.strict import from_dict, parse_yaml, to_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.data.shards import Dataset
from t2idist.data.sources import is_folder, open_datasets
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.training import run_data

RUN_ID = "run_id.json"
"""Distinguishes a run folder from all others, including an earlier one of the same name."""


def run_url(config: RunConfig) -> str:
    return storage.join(config.storage, config.name)


def stored_config(config: RunConfig) -> dict[str, Any] | None:
    """Return the settings that the folder of a run records; None if the run has not been started."""
    url = storage.join(run_url(config), "config.yaml")
    stored: dict[str, Any] | None = None
    if storage.exists(url):
        stored = parse_yaml(storage.read_bytes(url).decode(), url)
    return stored


@dataclass(frozen=True)
class StageRun:
    """One stage of a run, by name. What it reads of the exports in `uses`, it reads once."""

    config: RunConfig
    name: str

    @property
    def settings(self) -> StageConfig:
        return self.config.stages[self.name]

    @property
    def data(self) -> DataConfig:
        return self.config.stage_data(self.name)

    @property
    def seed(self) -> int:
        return self.config.stage_seed(self.name)

    @property
    def url(self) -> str:
        return storage.join(run_url(self.config), self.name)

    @property
    def checkpoints_url(self) -> str:
        return storage.join(self.url, "checkpoints")

    @property
    def export_url(self) -> str:
        return storage.join(self.url, "export")

    def is_done(self) -> bool:
        return export.exists(self.export_url)

    def source_url(self, slot: str) -> str:
        """Return the URL of the export in a slot of `uses`: that of an earlier stage, or any other."""
        source = self.settings.uses[slot]
        return StageRun(self.config, source).export_url if source in self.config.stages else source

    def open_data(self) -> tuple[Dataset, ...]:
        """Open the data sets that the config names; the first one encodes captions with the stage's vocabulary.

        Raises:
            ValueError: A data set cannot be used, is not that which the stage was started on, or an encoder in `uses`
                was trained on other words.
        """
        first, *others = datasets = open_datasets(self.data)
        run_data.check(run_url(self.config), self.name, datasets)
        words = self._source_vocabularies()
        try:
            vocabulary = stage_vocabulary(first.vocabulary, words)
        except ValueError as error:
            raise ValueError(f"stages.{self.name}.{error}") from None
        return replace(first, vocabulary=vocabulary), *others

    @functools.cached_property
    def _source_indices(self) -> dict[str, dict[str, Any] | None]:
        """Indices of the exports in `uses` by slot; None: a stage of this run that is not done."""
        slots = self.settings.uses
        return {slot: None if self._is_unfinished(slot) else export.read_index(self.source_url(slot)) for slot in slots}

    def _is_unfinished(self, slot: str) -> bool:
        """Return whether a slot of `uses` names a stage of this run that has no export yet."""
        source = StageRun(self.config, self.settings.uses[slot])
        return source.name in self.config.stages and not source.is_done()

    def _source_vocabularies(self) -> dict[str, Vocabulary]:
        """Return the vocabularies of the exports in `uses` by slot, except those of stages that are not done."""
        return {slot: Vocabulary.from_index(index) for slot, index in self._source_indices.items() if index is not None}

    def model_config(self) -> Any:
        """Return the system's own settings. Raises ValueError, naming the key, if they are invalid."""
        try:
            module = systems.load(self.settings.system)
        except ValueError as error:
            raise ValueError(f"stages.{self.name}.{error}") from None
        where = f"stages.{self.name}.model"
        try:
            return from_dict(module.Config, self.settings.model, where)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None

    def build_info(self, data: DataInfo) -> BuildInfo:
        """Collect what the system is built from; a source without an export yet is described by its stage."""
        sources = {slot: self._source_info(slot, data) for slot in self.settings.uses}
        return BuildInfo(self.settings.group_size, self.data.max_words, data, sources)

    def _source_info(self, slot: str, data: DataInfo) -> Mapping[str, Any]:
        index = self._source_indices[slot]
        if index is None:
            source = StageRun(self.config, self.settings.uses[slot])
            info, settings = source.build_info(data), to_dict(source.model_config())
            return {"system": source.settings.system, "config": settings, "plan": info.describe()}
        return {key: index[key] for key in ("system", "config", "plan")}

    def build(self, info: BuildInfo) -> System:
        """Build the system; initial weights are drawn from torch's global generator.

        Raises:
            ValueError: The settings do not fit each other, the data or the sources; names the stage.
        """
        settings = self.model_config()
        try:
            return systems.load(self.settings.system).build(settings, info)
        except (ValueError, KeyError) as error:
            raise ValueError(f"stages.{self.name}: {error}") from None


def stages_of(config: RunConfig) -> Iterator[StageRun]:
    for name in config.stages:
        yield StageRun(config, name)


def open_unrecorded_data(config: RunConfig) -> dict[str, tuple[Dataset, ...]]:
    """Open the data of the stages that the run folder does not record yet. Raises ValueError as `open_data` does."""
    recorded = run_data.read(run_url(config))
    return {stage.name: stage.open_data() for stage in stages_of(config) if stage.name not in recorded}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make relative local paths absolute, because workers run in other working directories."""

    def is_name(source: str) -> bool:
        return source in config.stages or ("/" not in source and not Path(source).exists())

    stages = {}
    for stage in stages_of(config):
        settings = stage.settings
        uses = {slot: url if is_name(url) else storage.absolute(url) for slot, url in settings.uses.items()}
        data = to_dict(_with_absolute_sources(stage.data))
        init_from = storage.absolute(settings.init_from) if settings.init_from else ""
        overrides = {key: data[key] for key in settings.data}
        stages[stage.name] = replace(settings, uses=uses, data=overrides, init_from=init_from)
    data_config = _with_absolute_sources(config.data)
    return replace(config, storage=storage.absolute(config.storage), data=data_config, stages=stages)


def _with_absolute_sources(data: DataConfig) -> DataConfig:
    def absolute(source: str) -> str:
        return storage.absolute(source) if "/" in source or is_folder(source) else source

    return replace(data, source=absolute(data.source), beside=tuple(absolute(source) for source in data.beside))


def check_uses(config: RunConfig) -> None:
    """Check that each stage uses only stages before it. Raises ValueError."""
    before: list[str] = []
    for name, stage in config.stages.items():
        for slot, source in stage.uses.items():
            if source in config.stages and source not in before:
                raise ValueError(f"stages.{name}.uses.{slot}: stage '{source}' does not come before '{name}'")
            if source not in config.stages and "/" not in source and not Path(source).exists():
                near = difflib.get_close_matches(source, before, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"earlier stages: {', '.join(before) or 'none'}"
                raise ValueError(f"stages.{name}.uses.{slot}: '{source}': no such stage and no such folder; {hint}")
        before.append(name)


def stage_vocabulary(data: Vocabulary, sources: Mapping[str, Vocabulary]) -> Vocabulary:
    """Return the vocabulary that encodes a stage's captions: that of its encoders if it uses any, else the data's.

    It brings its tokenizer: the data's captions are then split as they were for the encoder.

    Raises:
        ValueError: An encoder lacks words of the data, or two encoders number words differently.
    """
    chosen, first = data, ""
    for slot, vocabulary in sources.items():
        missing = [word for word in data.words_read_by(vocabulary.tokenizer) if word not in vocabulary.ids]
        if missing:
            raise ValueError(
                f"uses.{slot}: its vocabulary of {len(vocabulary)} words does not fit the data: {len(missing)} of the "
                f"data's {len(data)} words are not in it ({', '.join(missing[:5])}...); train the encoder on this "
                "data, or give the data that it was trained on"
            )
        if first and vocabulary.words != chosen.words:
            raise ValueError(
                f"uses.{slot}: its vocabulary is not that of uses.{first}, and a caption has only one encoding; give "
                "exports that were trained on the same data"
            )
        chosen, first = vocabulary, slot
    return chosen
