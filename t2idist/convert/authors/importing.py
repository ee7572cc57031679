"""Convert the authors' files to exports: every tensor must be used, and all sizes are inferred from the shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from t2idist import storage
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import BuildInfo, DataInfo, System
from t2idist.convert.authors import checkpoints
from t2idist.convert.authors.checkpoints import Checkpoint
from t2idist.convert.authors.layouts import LAYOUTS, FileLayout, InferredConfig, WeightsLayout, layouts_for
from t2idist.data.tokenizer import END_TOKEN, Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.nn.init import shapes_only
from t2idist.observability.progress_bar import track
from t2idist.sampling.loading import exported_network
from t2idist.storage.outputs import check_not_input
from t2idist.systems import load as load_system

FilesByLayout = dict[str, dict[str, Checkpoint]]
"""Files by layout and network."""


@dataclass(frozen=True)
class ImportResult:
    """An export that was written."""

    url: str
    system: str
    settings: Mapping[str, Any]
    """Settings of the system that were inferred from the files."""
    parameters: Mapping[str, int]
    """Number of parameters of each network."""


@dataclass(frozen=True)
class ImportOptions:
    """Information that the files do not contain."""

    vocabulary: Vocabulary | None = None
    """Vocabulary of the text encoder."""
    attributes: tuple[tuple[str, ...], ...] = ()
    """Names of the attributes of each data set."""
    max_words: int = 18
    """Words per caption."""


def import_weights(
    system: str, files: Sequence[str], to: str, options: ImportOptions = ImportOptions()
) -> list[ImportResult]:
    """Write an export of the system under `to`, and one of each system that it uses if all files of that are given.

    Raises:
        ValueError: a file or tensor does not match; nothing is written.
    """
    with track(files, "file") as tracked:
        contents = [checkpoints.read(url) for url in tracked]
    hashes = {checkpoint.file: sha256 for checkpoint, sha256 in contents}
    builders = prepare_exports(system, [checkpoint for checkpoint, _ in contents], options)
    for folder in builders:
        if export.exists(storage.join(to, folder)):
            raise ValueError(
                f"{storage.redact(storage.join(to, folder))}: already contains an export; use another --to"
            )
        for name in builders[folder].networks():
            check_not_input(storage.join(to, folder, f"{name}.safetensors"), files, "--to")
    loaded = {folder: builder.load() for folder, builder in builders.items()}
    return [builder.write(storage.join(to, folder), loaded[folder], hashes) for folder, builder in builders.items()]


def prepare_exports(
    system: str, files: Sequence[Checkpoint], options: ImportOptions = ImportOptions()
) -> dict[str, ExportBuilder]:
    """Return a builder for each export that the files are sufficient for, by folder. Raises ValueError."""
    layout, matched = _match_layout(layouts_for(system), files)
    words = _vocabulary_words(matched, options.vocabulary)
    builders = {
        slot: ExportBuilder(LAYOUTS[name], matched.get(name, {}), words, options) for slot, name in layout.uses.items()
    }
    builders[system] = ExportBuilder(layout, matched[layout.name], words, options, dict(builders))
    missing = builders[system].missing()
    if missing:
        raise ValueError(f"{system}: missing {' and '.join(missing)}; add the file with --from FILE")
    return {folder: builder for folder, builder in builders.items() if not builder.missing()}


# -------------------------------------------------------------------------------------------------- matching of files
def _match_layout(layouts: Sequence[WeightsLayout], files: Sequence[Checkpoint]) -> tuple[WeightsLayout, FilesByLayout]:
    """Return the first layout that accounts for every file, and the files by layout and network."""
    for layout in layouts:
        matched: FilesByLayout = {layout.name: {}}
        if all(_assign(layout, file, matched) for file in files) and matched[layout.name]:
            return layout, matched
    kinds = [kind for layout in layouts for _, kind in _file_layouts(layout)]
    for file in files:
        if not any(kind.matches(file) for kind in kinds):
            known = ", ".join(sorted({kind.network for kind in kinds}))
            raise ValueError(
                f"{file.file}: its tensor names (the first is '{next(iter(file.weights))}') match no network of "
                f"{layouts[0].system}; the networks are {known}; is --system right?"
            )
    raise ValueError(f"{layouts[0].system}: none of the files contains its generator; add it with --from FILE")


def _file_layouts(layout: WeightsLayout) -> list[tuple[str, FileLayout]]:
    """Return all kinds of files of a layout and of the layouts that it uses, each with the name of its layout."""
    names = [layout.name, *layout.uses.values()]
    return [(name, kind) for name in names for kind in LAYOUTS[name].files]


def _assign(layout: WeightsLayout, file: Checkpoint, matched: FilesByLayout) -> bool:
    """Add a file to `matched`. Returns False if it is not of this layout."""
    match = next(((name, kind) for name, kind in _file_layouts(layout) if kind.matches(file)), None)
    if match is None:
        return False
    name, kind = match
    network = kind.again if kind.again and kind.network in matched.get(name, {}) else kind.network
    networks = {(name, network): file.without_prefixes(tuple(kind.nested)) if kind.nested else file}
    for prefix, (slot, network) in kind.nested.items():
        networks[LAYOUTS[name].uses[slot], network] = file.with_prefix(prefix)
    for (owner, network), checkpoint in networks.items():
        others = matched.setdefault(owner, {})
        if network in others:
            raise ValueError(f"{others[network].file} and {file.file}: both contain a {network}; use only one")
        others[network] = checkpoint
    return True


def _vocabulary_words(matched: FilesByLayout, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    """Return the words in the order of the text encoder's ids; only "<end>" if no network reads words."""
    for name, files in matched.items():
        for kind in LAYOUTS[name].files:
            if not kind.vocabulary_tensor or kind.network not in files:
                continue
            file = files[kind.network]
            rows = file.size(kind.vocabulary_tensor, 0)
            if vocabulary is None:
                raise ValueError(
                    f"{file.file}: has a vocabulary of {rows} words; add the authors' captions.pickle with --captions, "
                    "or a file with one word per line with --vocabulary"
                )
            if len(vocabulary) != rows:
                raise ValueError(
                    f"{file.file}: has a vocabulary of {rows} words; the given vocabulary has {len(vocabulary)}; "
                    "give the one of the data set on which these weights were trained"
                )
    return (END_TOKEN,) if vocabulary is None else vocabulary.words


# ---------------------------------------------------------------------------------------------------- one export
class ExportBuilder:
    """Builds one export: its system, on the meta device, with the settings inferred from the files."""

    def __init__(
        self,
        layout: WeightsLayout,
        files: Mapping[str, Checkpoint],
        words: tuple[str, ...],
        options: ImportOptions,
        sources: Mapping[str, ExportBuilder] | None = None,
    ) -> None:
        self.layout, self.files, self.sources = layout, files, sources or {}
        module = load_system(layout.system)
        source_files = {
            f"{slot}.{name}": file for slot, source in self.sources.items() for name, file in source.files.items()
        }
        try:
            inferred = layout.infer({**source_files, **files})
        except KeyError as error:
            raise ValueError(f"{layout.system}: missing {error.args[0]}; add the file with --from FILE") from None
        self.settings = inferred.config
        self.config = from_dict(module.Config, inferred.config, layout.system)
        # the number of training samples is unknown
        names = _attribute_names(inferred, options.attributes)
        data = DataInfo(words, 1, inferred.vector_dim, names, inferred.paired)
        described = {slot: source.describe() for slot, source in self.sources.items()}
        self.build_info = BuildInfo(layout.group_size, options.max_words, data, described)
        try:
            with shapes_only():
                self.system: System = module.build(self.config, self.build_info)
        except ValueError as error:
            raise ValueError(f"{layout.system}: {error}") from None

    def describe(self) -> dict[str, Any]:
        """Return the description of the export for the build info of a system that uses it."""
        return {"system": self.layout.system, "config": to_dict(self.config), "plan": self.build_info.describe()}

    def networks(self) -> dict[str, tuple[str, Checkpoint | None]]:
        """Return, by name in the export, each network's name in the system and its file."""
        networks: dict[str, tuple[str, Checkpoint | None]] = {}
        for dotted in self.system.exports:
            name = dotted.rpartition(".")[2]
            networks[name] = (dotted, self.files.get(name) or self._source_file(dotted))
        others = self.files.keys() & self.system.roles.keys()
        networks.update({name: (name, self.files[name]) for name in sorted(others - networks.keys())})
        return networks

    def _source_file(self, name: str) -> Checkpoint | None:
        """Return the file of a network that the system takes from an export that it uses."""
        if name not in self.system.frozen:
            return None
        frozen = self.system.frozen[name]
        source = self.sources[frozen.source]
        return source.files.get(frozen.network) or source._source_file(frozen.network)

    def missing(self) -> list[str]:
        """Return the networks of the export without a file."""
        return [name for name, (_, file) in self.networks().items() if file is None]

    def load(self) -> dict[str, nn.Module]:
        """Return the networks with their weights. Raises ValueError if a tensor does not match."""
        nets, used = {}, set()
        for name, (dotted, file) in self.networks().items():
            assert file is not None
            net = exported_network(self.system, dotted).to_empty(device="cpu")
            export.load_into(net, checkpoints.adapt_weights(file, net), f"{file.file}: {name}")
            nets[name] = net
            used.add(name)
        for name in self.files.keys() - used:
            raise ValueError(f"{self.files[name].file}: {self.layout.system} of these sizes has no {name}")
        return nets

    def write(self, url: str, nets: Mapping[str, nn.Module], hashes: Mapping[str, str]) -> ImportResult:
        files = {name: file for name, (_, file) in self.networks().items() if file is not None}
        index = {
            **self.describe(),
            "vocabulary": list(self.build_info.data.words),
            "images": 0,
            "imported": {
                "from": {name: {"file": file.file, "sha256": hashes[file.file]} for name, file in files.items()},
                "weights": self.layout.weights,
            },
        }
        export.write(url, nets, index)
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
        return ImportResult(url, self.layout.system, self.settings, counts)


def _attribute_names(inferred: InferredConfig, given: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Return the attribute names of each data set: the given, else the published ones, else attribute_1, ..."""
    data_sets = f"{inferred.domains} data set{'s' if inferred.domains > 1 else ''}"
    if given:
        if len(given) != inferred.domains or sum(len(names) for names in given) != inferred.labels:
            counts = " and ".join(str(len(names)) for names in given)
            raise ValueError(f"--attributes: {counts} names; the files have {inferred.labels}, of {data_sets}")
        return given
    if inferred.names:
        return inferred.names
    if inferred.domains > 1:
        raise ValueError(f"--attributes: required for each of {data_sets}, {inferred.labels} names in total")
    return (tuple(f"attribute_{i + 1}" for i in range(inferred.labels)),)
