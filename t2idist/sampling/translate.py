"""Translate images to other attributes or another domain: the grids of the training, and ``t2idist translate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.contract import SupportsDomains, SupportsTranslate, System
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.nn.images import to_float
from t2idist.observability.command import command
from t2idist.observability.progress_bar import track
from t2idist.sampling.attribute_edits import AttributeEditor
from t2idist.sampling.drawings import PlannedImages, choose_folder, export_sha256, png_with_settings
from t2idist.sampling.figures import png_bytes, read_image, stack_figures, to_pil, translation_grid
from t2idist.sampling.generate import eval_mode
from t2idist.sampling.loading import LoadedExport, load_export, open_device
from t2idist.storage.outputs import unique_names

DEFAULT_FOLDER = "translated"
GRID = "grid.png"
GRID_IMAGES = 8
MAX_COLUMNS = 16


def translate(
    system: SupportsTranslate,
    nets: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    domain: int,
    *,
    device: torch.device,
    batch_size: int = 32,
) -> Tensor:
    """Translate images (N, 3, S, S) to labels (N, A) of a domain, batch by batch; returns float32 on the host."""
    dtype = _dtype_of(nets)
    labels = labels.to(device, dtype)

    def of_rows(batch: Tensor, rows: slice) -> Tensor:
        return system.translate(nets, batch, labels[rows], domain)

    return _in_batches(of_rows, images, device, dtype, batch_size)


def to_domain(
    system: SupportsDomains,
    nets: Mapping[str, nn.Module],
    images: Tensor,
    target: int,
    *,
    device: torch.device,
    batch_size: int = 32,
) -> Tensor:
    """Translate images (N, 3, S, S) to domain `target`, batch by batch; returns float32 on the host."""
    return _in_batches(
        lambda batch, _: system.to_domain(nets, batch, target), images, device, _dtype_of(nets), batch_size
    )


def _dtype_of(nets: Mapping[str, nn.Module]) -> torch.dtype:
    return next(weight.dtype for net in nets.values() for weight in net.parameters())


def _in_batches(
    run: Callable[[Tensor, slice], Tensor], images: Tensor, device: torch.device, dtype: torch.dtype, size: int
) -> Tensor:
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            parts.append(run(to_float(images[rows].to(device), dtype), rows).float().cpu())
    return torch.cat(parts)


class TranslationGrid:
    """Applies the same edits to the same images at every cadence: one grid per domain, all on one sheet.

    Rows are images of a data set's held-out split. Columns are the image, each attribute of its domain set or flipped,
    combinations, and each attribute of every other domain alone.

    Args:
        system: system that translates images (SupportsTranslate).
        datasets: data set of each domain.
        crop: crop of the images, as in training.
        folder: URL under which the sheets are written.
        device: device of the networks.
    """

    def __init__(
        self,
        system: System,
        datasets: Sequence[Dataset],
        *,
        crop: float,
        folder: str,
        device: torch.device,
    ) -> None:
        assert isinstance(system, SupportsTranslate)
        self._system: SupportsTranslate = system
        self._folder, self._device = folder, device
        self._titles = [dataset.source for dataset in datasets]
        self._editors: list[AttributeEditor] = []
        self._samples: list[tuple[Tensor, Tensor]] = []  # images and labels of each domain
        for domain, dataset in enumerate(datasets):
            split = held_out_split(dataset)
            loaded = load_split(dataset, split, sizes=system.sizes, max_words=1, limit=GRID_IMAGES, crop=crop)
            names = system.labels[domain]
            columns = [dataset.attribute_names.index(name) for name in names]
            editor = AttributeEditor.from_names(names, system.exclusive[domain], dataset.split("train"))
            self._editors.append(editor)
            self._samples.append((to_float(loaded.batch.images[-1]), loaded.batch.attributes[:, columns]))

    def write(self, nets: Mapping[str, nn.Module], images_seen: int) -> str:
        """Translate with the exported networks and write the sheet; returns its URL. Restores the mode of `nets`."""
        with eval_mode(nets):
            sheets = [
                translation_grid(f"{self._titles[domain]}, after {images_seen:,} images", self._columns(nets, domain))
                for domain in range(len(self._samples))
            ]
        url = storage.join(self._folder, f"translated_{images_seen:09d}.png")
        storage.write_bytes(url, png_bytes(stack_figures(sheets)))
        return url

    def _columns(self, nets: Mapping[str, nn.Module], domain: int) -> list[tuple[str, Tensor]]:
        images, own_labels = self._samples[domain]
        columns = [("image", images)]
        for name, edit in self._editors[domain].grid_edits(MAX_COLUMNS):
            columns.append((name, self._translate(nets, images, edit(own_labels), domain)))
        for other, editor in enumerate(self._editors):
            if other == domain:
                continue
            for name in editor.names[:MAX_COLUMNS]:
                only = editor.set_attribute(torch.zeros(len(images), len(editor.names)), name)
                columns.append((name, self._translate(nets, images, only, other)))
        return columns

    def _translate(self, nets: Mapping[str, nn.Module], images: Tensor, labels: Tensor, domain: int) -> Tensor:
        return translate(self._system, nets, images, labels, domain, device=self._device)


class DomainGrid:
    """Translates the same held-out images of both domains at every cadence: one grid per direction, on one sheet.

    Columns are the image, its translation, and the image that belongs to it, or if both directions are trained the
    translation back.

    Args:
        system: system that translates between domains (SupportsDomains).
        datasets: data set of the pairs, or of each domain (`data.mixing.training_sets`).
        crop: crop of the images, as in training.
        folder: URL under which the sheets are written.
        device: device of the networks.
    """

    def __init__(
        self, system: System, datasets: Sequence[Dataset], *, crop: float, folder: str, device: torch.device
    ) -> None:
        assert isinstance(system, SupportsDomains)
        self._system: SupportsDomains = system
        self._folder, self._device = folder, device
        loaded = [
            load_split(each, held_out_split(each), sizes=system.sizes, max_words=1, limit=GRID_IMAGES, crop=crop).batch
            for each in datasets
        ]
        second = loaded[-1].partners or loaded[-1].images
        self._images = to_float(loaded[0].images[-1]), to_float(second[-1])

    def write(self, nets: Mapping[str, nn.Module], images_seen: int) -> str:
        """Translate with the exported networks and write the sheet; returns its URL. Restores the mode of `nets`."""
        with eval_mode(nets):
            sheets = [self._sheet(nets, target, images_seen) for target in self._system.targets]
        url = storage.join(self._folder, f"translated_{images_seen:09d}.png")
        storage.write_bytes(url, png_bytes(stack_figures(sheets)))
        return url

    def _sheet(self, nets: Mapping[str, nn.Module], target: int, images_seen: int) -> Image.Image:
        system, source, names = self._system, 1 - target, self._system.domains
        given = self._images[source]
        made = to_domain(system, nets, given, target, device=self._device)
        columns = [(names[source], given), (f"to {names[target]}", made)]
        if system.paired:
            columns.append((names[target], self._images[target]))
        elif source in system.targets:
            columns.append((f"back to {names[source]}", to_domain(system, nets, made, source, device=self._device)))
        return translation_grid(f"after {images_seen:,} images", columns)


def held_out_split(dataset: Dataset) -> str:
    """Return the first of test, val and train that a data set has."""
    return next(name for name in ("test", "val", "train") if name in dataset.splits)


@dataclass(frozen=True)
class AttributeChanges:
    """Which attributes of an image are set and cleared; the others stay as the export's own classifier finds them."""

    system: SupportsTranslate
    editor: AttributeEditor
    domain: int
    set_names: tuple[str, ...]
    clear_names: tuple[str, ...]

    @classmethod
    def of(
        cls, loaded: LoadedExport, set_names: Sequence[str], clear_names: Sequence[str], domain: int, *, option: str
    ) -> AttributeChanges:
        """Check the changes.

        Args:
            loaded: export of a system that translates images.
            set_names: attributes to set.
            clear_names: attributes to clear.
            domain: index of the data set with these attributes.
            option: what precedes the names set, clear and domain in messages.

        Raises:
            ValueError: the export does not translate images, there is no such domain or attribute, or changes conflict.
        """
        system = loaded.system
        if not isinstance(system, SupportsTranslate):
            where = storage.redact(loaded.url)
            raise ValueError(
                f"{where}: this export does not translate images; give that of a stargan, cyclegan or pix2pix stage"
            )
        if not 0 <= domain < len(system.labels):
            raise ValueError(f"{option}domain {domain}: this export has {len(system.labels)}, counted from 0")
        if not set_names and not clear_names:
            raise ValueError(f"give {option}set or {option}clear: {', '.join(system.labels[domain])}")
        editor = AttributeEditor.from_names(system.labels[domain], system.exclusive[domain])
        indices = {editor.index(name) for name in set_names}
        for name in clear_names:
            editor.index(name)
        for name in set_names:
            if name in clear_names or set(editor.conflicts(name)) & indices:
                raise ValueError(f"{option}set {name}: it conflicts with the other changes")
        return cls(system, editor, domain, tuple(set_names), tuple(clear_names))

    @property
    def title(self) -> str:
        """Name the changes."""
        return " ".join([*(f"+{name}" for name in self.set_names), *(f"-{name}" for name in self.clear_names)])

    def apply(self, loaded: LoadedExport, image: Tensor, device: torch.device) -> Tensor:
        """Change one image (3, S, S) in [-1, 1]; alone, because rounding depends on the size of a batch."""
        with torch.inference_mode():
            labels = self.system.read(loaded.nets, image[None].to(device), self.domain).float().cpu()
            for name in self.clear_names:
                labels[:, self.editor.index(name)] = 0
            for name in self.set_names:
                labels = self.editor.set_attribute(labels, name)
            return translate(self.system, loaded.nets, image[None], labels, self.domain, device=device)[0]


@dataclass(frozen=True)
class DomainChange:
    """The domain that an image is translated to."""

    system: SupportsDomains
    target: int

    @classmethod
    def of(cls, loaded: LoadedExport, to: str | None, *, option: str) -> DomainChange:
        """Check the domain.

        Args:
            loaded: export of a system that translates between domains.
            to: name of the domain; None: the only one that it translates to.
            option: what precedes the name of `to` in messages.

        Raises:
            ValueError: there is no such domain, or there are two.
        """
        system = loaded.system
        assert isinstance(system, SupportsDomains)
        names = [system.domains[target] for target in system.targets]
        name = to if to is not None or len(names) > 1 else names[0]
        if name not in names:
            given = f"give {option}to" if name is None else f"{option}to {name}: there is no such domain"
            raise ValueError(f"{given}; this export translates to {' and '.join(names)}")
        return cls(system, system.domains.index(name))

    @property
    def title(self) -> str:
        """Name the change."""
        return f"to {self.system.domains[self.target]}"

    def apply(self, loaded: LoadedExport, image: Tensor, device: torch.device) -> Tensor:
        """Translate one image (3, S, S) in [-1, 1]."""
        return to_domain(self.system, loaded.nets, image[None], self.target, device=device)[0]


def change_of(
    loaded: LoadedExport, set_names: Sequence[str], clear_names: Sequence[str], domain: int, to: str | None
) -> AttributeChanges | DomainChange:
    """Return the change of an image that these arguments name. Raises ValueError if they do not fit the export."""
    where = storage.redact(loaded.url)
    if isinstance(loaded.system, SupportsDomains):
        if set_names or clear_names or domain:
            raise ValueError(f"{where}: this export translates between domains; give to, not set, clear or domain")
        return DomainChange.of(loaded, to, option="")
    if to is not None and isinstance(loaded.system, SupportsTranslate):
        raise ValueError(f"{where}: this export has no domains to translate to; give set or clear")
    return AttributeChanges.of(loaded, set_names, clear_names, domain, option="")


# ------------------------------------------------------------ the command
@command("translate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``t2idist translate``; returns the exit status."""
    return _run(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "translate",
        "Change attributes of images (stargan), or translate images to another domain (cyclegan, pix2pix).\n"
        "Attributes that are neither set nor cleared stay as the export's own classifier finds them; setting an\n"
        "attribute clears those that exclude it (other hair colours).",
        "t2idist translate --export RUN/stargan/export --image face.png --set Blond_Hair --clear Eyeglasses",
    )
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export of a stargan, cyclegan or pix2pix stage")
    add("--image", required=True, nargs="+", metavar="FILE", help="images of any usual format, also by URL")
    add("--set", nargs="+", default=[], metavar="NAME", help="attributes to set")
    add("--clear", nargs="+", default=[], metavar="NAME", help="attributes to clear")
    add("--domain", type=int, default=0, metavar="N", help="index of the data set with these attributes (default: 0)")
    add("--to", metavar="NAME", help="domain to translate to (default: the only one that pix2pix has)")
    add("--outlines", action="store_true", help="translate the outlines of the images (trained with data.outlines)")
    add("--out", metavar="DIR", help="folder or URL (default: translated, or translated-2, ... if others are there)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser


def _run(options: argparse.Namespace) -> int:
    device = open_device(options.device)
    loaded = load_export(options.export, device)
    change: AttributeChanges | DomainChange
    if isinstance(loaded.system, SupportsDomains):
        if options.set or options.clear or options.domain:
            raise ValueError("--set, --clear and --domain are for exports of stargan; this one has --to")
        change = DomainChange.of(loaded, options.to, option="--")
    else:
        if options.to is not None or options.outlines:
            raise ValueError("--to and --outlines are for exports of cyclegan and pix2pix")
        change = AttributeChanges.of(loaded, options.set, options.clear, options.domain, option="--")
    size = loaded.system.sizes[-1]
    images = [read_image(file, size, as_outlines=options.outlines) for file in options.image]
    planned = _plan(options)
    folder = choose_folder(options.out, DEFAULT_FOLDER, planned, options.image)
    with track(images, "image") as tracked:
        translated = torch.stack([change.apply(loaded, image, device) for image in tracked])
    for plan, image in zip(planned, translated, strict=False):
        storage.write_bytes(storage.join(folder, plan.prefix), png_with_settings(to_pil(image), plan.settings))
    sheet = translation_grid(change.title, [("image", torch.stack(images)), ("translated", translated)])
    storage.write_bytes(storage.join(folder, GRID), png_with_settings(sheet, planned[-1].settings))
    print(f"wrote {len(translated)} images to {storage.redact(folder)}, all of them in {GRID}")
    return 0


def _plan(options: argparse.Namespace) -> list[PlannedImages]:
    """Return the name and the settings of each translated image, in the order of the inputs, and of the grid."""
    settings = {"command": "translate", "export_sha256": export_sha256(options.export)}
    settings |= {name: vars(options)[name] for name in ("domain", "set", "clear")}
    if options.to is not None or options.outlines:  # as the files have it that were made before these options
        settings |= {"to": options.to, "outlines": options.outlines}
    hashes = [storage.sha256(storage.read_bytes(file)) for file in options.image]
    names = unique_names([Path(storage.redact(file)).stem for file in options.image], ".png", reserved=[GRID])
    images = [PlannedImages(name, {**settings, "image": sha256}) for name, sha256 in zip(names, hashes, strict=True)]
    return [*images, PlannedImages(GRID, {**settings, "images": storage.sha256(" ".join(hashes).encode())})]
