"""The authors' files made into exports, strictly: every tensor has its place, every size is read off the shapes."""

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
from t2idist.convert.authors.recipes import RECIPES, Fit, Part, WeightsLayout, of_system
from t2idist.data.tokenizer import END, Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.nn.init import shapes_only
from t2idist.sampling.loading import network
from t2idist.systems import load as load_system

Sorted = dict[str, dict[str, Checkpoint]]
"""Files by recipe and by network."""


@dataclass(frozen=True)
class Imported:
    """An export that was written. parameters: of each network. settings: those that the files told."""

    url: str
    system: str
    settings: Mapping[str, Any]
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class Options:
    """What no file tells.

    vocabulary: of the text encoder. attributes: their names, for each data set. max_words: of a caption.
    """

    vocabulary: Vocabulary | None = None
    attributes: tuple[tuple[str, ...], ...] = ()
    max_words: int = 18


def import_weights(system: str, files: Sequence[str], to: str, options: Options = Options()) -> list[Imported]:
    """Write exports of the authors' files under `to`: one in a folder of the system's name, one for each slot it uses.

    An export of a slot is written where all of its files are given. Raises ValueError, one sentence that names the
    file and the tensor, for whatever does not fit; then nothing is written.
    """
    read = [checkpoints.read(url) for url in files]
    hashes = {checkpoint.file: sha256 for checkpoint, sha256 in read}
    makers = prepare(system, [checkpoint for checkpoint, _ in read], options)
    for folder in makers:
        if export.exists(storage.join(to, folder)):
            raise ValueError(
                f"{storage.redact(storage.join(to, folder))}: an export is there already; give another --to"
            )
    loaded = {folder: maker.load() for folder, maker in makers.items()}
    return [maker.write(storage.join(to, folder), loaded[folder], hashes) for folder, maker in makers.items()]


def prepare(system: str, files: Sequence[Checkpoint], options: Options = Options()) -> dict[str, Maker]:
    """The exports that can be made of the files, by their folder. Raises ValueError, one sentence."""
    recipe, found = _sort(of_system(system), files)
    words = _words(found, options.vocabulary)
    makers = {slot: Maker(RECIPES[name], found.get(name, {}), words, options) for slot, name in recipe.uses.items()}
    makers[system] = Maker(recipe, found[recipe.name], words, options, dict(makers))
    missing = makers[system].missing()
    if missing:
        raise ValueError(f"{system}: its {' and '.join(missing)} too must be given, with --from FILE")
    return {folder: maker for folder, maker in makers.items() if not maker.missing()}


# ------------------------------------------------------------------------------------------------ which file is what
def _sort(recipes: Sequence[WeightsLayout], files: Sequence[Checkpoint]) -> tuple[WeightsLayout, Sorted]:
    """The first of a system's recipes that has a place for every file, and the files in their places."""
    for recipe in recipes:
        found: Sorted = {recipe.name: {}}
        if all(_place(recipe, file, found) for file in files) and found[recipe.name]:
            return recipe, found
    known = {part.network for recipe in recipes for _, part in _parts(recipe)}
    for file in files:
        if not any(part.fits(file) for recipe in recipes for _, part in _parts(recipe)):
            raise ValueError(
                f"{file.file}: by its names (the first is '{next(iter(file.weights))}') none of {recipes[0].system}'s "
                f"networks; these are {', '.join(sorted(known))}"
            )
    raise ValueError(f"{recipes[0].system}: none of the files holds its generator")


def _parts(recipe: WeightsLayout) -> list[tuple[str, Part]]:
    """All kinds of files that a recipe takes, each with the recipe that it is of."""
    own = [(recipe.name, part) for part in recipe.parts]
    return own + [(name, part) for name in recipe.uses.values() for part in RECIPES[name].parts]


def _place(recipe: WeightsLayout, file: Checkpoint, found: Sorted) -> bool:
    part_of = next(((name, part) for name, part in _parts(recipe) if part.fits(file)), None)
    if part_of is None:
        return False
    name, part = part_of
    places = {(name, part.network): file.outside(tuple(part.inner)) if part.inner else file}
    for prefix, (slot, inner) in part.inner.items():
        places[RECIPES[name].uses[slot], inner] = file.under(prefix)
    for (owner, net), checkpoint in places.items():
        taken = found.setdefault(owner, {})
        if net in taken:
            raise ValueError(f"{taken[net].file} and {file.file}: each holds a {net}; give one")
        taken[net] = checkpoint
    return True


def _words(found: Sorted, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    """The words that the text encoder numbers; "<end>" alone where the files read no words."""
    for name, files in found.items():
        for part in RECIPES[name].parts:
            if not part.numbered or part.network not in files:
                continue
            rows = files[part.network].size(part.numbered, 0)
            if vocabulary is None:
                raise ValueError(
                    f"{files[part.network].file}: knows {rows} words by number; give the captions.pickle of its "
                    "authors with --captions, or the words, one a line, with --vocabulary"
                )
            if len(vocabulary) != rows:
                raise ValueError(
                    f"{files[part.network].file}: knows {rows} words; the given vocabulary has {len(vocabulary)}"
                )
    return (END,) if vocabulary is None else vocabulary.words


# ---------------------------------------------------------------------------------------------------- one export
class Maker:
    """One export in the making: its system, built from what the files tell, on no device."""

    def __init__(
        self,
        recipe: WeightsLayout,
        files: Mapping[str, Checkpoint],
        words: tuple[str, ...],
        options: Options,
        sources: Mapping[str, Maker] | None = None,
    ) -> None:
        self.recipe, self.files, self.sources = recipe, files, sources or {}
        module = load_system(recipe.system)
        borrowed = {
            f"{slot}.{name}": file for slot, source in self.sources.items() for name, file in source.files.items()
        }
        try:
            fit = recipe.fit({**borrowed, **files})
        except KeyError as lacking:
            raise ValueError(f"{recipe.system}: its {lacking.args[0]} too must be given, with --from FILE") from None
        self.settings = fit.config
        self.config = from_dict(module.Config, fit.config, recipe.system)
        extent = DataInfo(
            words, 1, fit.vector_dim, _attributes(fit, options.attributes)
        )  # how much data, no file tells
        described = {slot: maker.describe() for slot, maker in self.sources.items()}
        self.plan = BuildInfo(recipe.group_size, options.max_words, extent, described)
        try:
            with shapes_only():
                self.system: System = module.build(self.config, self.plan)
        except ValueError as error:
            raise ValueError(f"{recipe.system}: {error}") from None

    def describe(self) -> dict[str, Any]:
        """What a plan says of an export."""
        return {"system": self.recipe.system, "config": to_dict(self.config), "plan": self.plan.describe()}

    def places(self) -> dict[str, tuple[str, Checkpoint | None]]:
        """The networks by their name in the export: what the system calls each, and its file."""
        places: dict[str, tuple[str, Checkpoint | None]] = {}
        for dotted in self.system.exports:
            name = dotted.rpartition(".")[2]
            places[name] = (dotted, self.files.get(name) or self._borrowed(dotted))
        others = self.files.keys() & self.system.roles.keys()
        places.update({name: (name, self.files[name]) for name in sorted(others - places.keys())})
        return places

    def _borrowed(self, name: str) -> Checkpoint | None:
        """The file of a network that the system has from one of its slots."""
        if name not in self.system.frozen:
            return None
        frozen = self.system.frozen[name]
        source = self.sources[frozen.source]
        return source.files.get(frozen.network) or source._borrowed(frozen.network)

    def missing(self) -> list[str]:
        """Networks of the export that no file holds."""
        return [name for name, (_, file) in self.places().items() if file is None]

    def load(self) -> dict[str, nn.Module]:
        """The networks with their weights. Raises ValueError that names the file and the tensor."""
        nets, used = {}, set()
        for name, (dotted, file) in self.places().items():
            assert file is not None
            net = network(self.system, dotted).to_empty(device="cpu")
            export.load_into(net, checkpoints.fitted(file, net), f"{file.file}: {name}")
            nets[name] = net
            used.add(name)
        for name in self.files.keys() - used:
            raise ValueError(f"{self.files[name].file}: {self.recipe.system} of these sizes has no {name}")
        return nets

    def write(self, url: str, nets: Mapping[str, nn.Module], hashes: Mapping[str, str]) -> Imported:
        files = {name: file for name, (_, file) in self.places().items() if file is not None}
        index = {
            **self.describe(),
            "vocabulary": list(self.plan.extent.words),
            "images": 0,
            "imported": {
                "from": {name: {"file": file.file, "sha256": hashes[file.file]} for name, file in files.items()},
                "weights": self.recipe.weights,
            },
        }
        export.write(url, nets, index)
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
        return Imported(url, self.recipe.system, self.settings, counts)


def _attributes(fit: Fit, given: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """The attributes' names, by data set: the given ones, else the published ones, else numbers."""
    sets = f"{fit.domains} data set{'s' if fit.domains > 1 else ''}"
    if given:
        if len(given) != fit.domains or sum(len(names) for names in given) != fit.labels:
            counts = " and ".join(str(len(names)) for names in given)
            raise ValueError(f"--attributes: {counts} names are given; the files have {fit.labels}, of {sets}")
        return given
    if fit.names:
        return fit.names
    if fit.domains > 1:
        raise ValueError(f"--attributes: must be given for each of {sets}, {fit.labels} names in all")
    return (tuple(f"attribute_{i + 1}" for i in range(fit.labels)),)
