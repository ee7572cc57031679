"""Translated pictures: the grid that training writes, and a command for pictures of one's own.

``python -m t2idist.sampling.translate --export URL --image FILE --set Blond_Hair --clear Eyeglasses``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import SupportsTranslate, System, to_float
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.evaluate.monitor import can_translate, evaluating
from t2idist.sampling.attribute_edits import Labels
from t2idist.sampling.figures import png_bytes, read_picture, stacked, to_picture, translation_grid
from t2idist.sampling.loading import Loaded, load, open_device

GRID_PICTURES = 8
MOST_COLUMNS = 16


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
    """Pictures (N, 3, S, S) with labels (N, A) of a domain, on the host in float32, made batch by batch."""
    dtype = next(weight.dtype for net in nets.values() for weight in net.parameters())
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pictures = to_float(images[rows].to(device), dtype)
            made = system.translate(nets, pictures, labels[rows].to(device, dtype), domain)
            parts.append(made.float().cpu())
    return torch.cat(parts)


class Translations:
    """Changes the same pictures in the same ways at every cadence: a grid for each domain, on one sheet.

    Rows: pictures of a set's held-out split. Columns: the picture, each attribute of its domain set or flipped,
    combinations, and then each attribute of every other domain alone. folder: URL under which the sheet is written.
    """

    def __init__(
        self, system: System, datasets: Sequence[Dataset], *, crop: float, folder: str, device: torch.device
    ) -> None:
        self._system = cast(SupportsTranslate, system)
        self._folder, self._device = folder, device
        self._titles = [dataset.source for dataset in datasets]
        self._labels: list[Labels] = []
        self._pictures: list[tuple[Tensor, Tensor]] = []
        for domain, dataset in enumerate(datasets):
            split = held_out(dataset)
            loaded = load_split(dataset, split, sizes=system.sizes, max_words=1, limit=GRID_PICTURES, crop=crop)
            names = self._system.labels[domain]
            columns = [dataset.attribute_names.index(name) for name in names]
            self._labels.append(Labels.of(names, self._system.exclusive[domain], dataset.split("train")))
            self._pictures.append((to_float(loaded.batch.images[-1]), loaded.batch.attributes[:, columns]))

    def write(self, nets: Mapping[str, nn.Module], images_seen: int) -> str:
        """Translate by `nets` (the exported networks) and write the sheet; gives its URL. Changes no mode of `nets`."""
        with evaluating(nets):
            sheets = [
                translation_grid(f"{self._titles[domain]}, after {images_seen:,} images", self._columns(nets, domain))
                for domain in range(len(self._pictures))
            ]
        url = storage.join(self._folder, f"translated_{images_seen:09d}.png")
        storage.write_bytes(url, png_bytes(stacked(sheets)))
        return url

    def _columns(self, nets: Mapping[str, nn.Module], domain: int) -> list[tuple[str, Tensor]]:
        pictures, own = self._pictures[domain]
        made = [("picture", pictures)]
        for name, change in self._labels[domain].columns(MOST_COLUMNS):
            made.append((name, self._made(nets, pictures, change(own), domain)))
        for other, labels in enumerate(self._labels):
            if other == domain:
                continue
            for name in labels.names[:MOST_COLUMNS]:
                alone = labels.with_set(torch.zeros(len(pictures), len(labels.names)), name)
                made.append((name, self._made(nets, pictures, alone, other)))
        return made

    def _made(self, nets: Mapping[str, nn.Module], pictures: Tensor, labels: Tensor, domain: int) -> Tensor:
        return translate(self._system, nets, pictures, labels, domain, device=self._device)


def held_out(dataset: Dataset) -> str:
    """The first of test, val and train that a set has."""
    return next(name for name in ("test", "val", "train") if name in dataset.splits)


# ------------------------------------------------------------ the command
def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    arguments = _parser().parse_args(words)
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"translate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t2idist.sampling.translate",
        description="Change attributes of pictures. What is neither set nor cleared stays as the export's own "
        "classifier finds it; setting an attribute clears those that exclude it (other hair colours).",
    )
    parser.add_argument("--export", required=True, metavar="URL", help="folder of an export of a stargan stage")
    parser.add_argument(
        "--image", required=True, nargs="+", metavar="FILE", help="pictures: .png, .jpg or .webp; a URL, too"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME", help="attributes that they shall have")
    parser.add_argument("--clear", nargs="+", default=[], metavar="NAME", help="attributes that they shall not have")
    parser.add_argument("--domain", type=int, default=0, metavar="N", help="number of the data set whose attributes "
                        "are meant, of an export that was trained on several (default: 0)")  # fmt: skip
    parser.add_argument("--out", default="translated", metavar="DIR", help="folder or URL to write to")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    device = open_device(arguments.device)
    loaded = load(arguments.export, device)
    if not can_translate(loaded.system):
        raise ValueError(f"{storage.redact(arguments.export)}: this export changes no pictures; give that of a stargan")
    system = cast(SupportsTranslate, loaded.system)
    if not 0 <= arguments.domain < len(system.labels):
        raise ValueError(f"--domain {arguments.domain}: this export has {len(system.labels)}, counted from 0")
    if not arguments.set and not arguments.clear:
        raise ValueError(f"give --set or --clear: {', '.join(system.labels[arguments.domain])}")
    images = torch.stack([read_picture(file, loaded.system.sizes[-1]) for file in arguments.image])
    labels = _wanted(arguments, loaded, system, images, device)
    made = translate(system, loaded.nets, images, labels, arguments.domain, device=device)
    for file, picture in zip(arguments.image, made, strict=True):
        url = storage.join(arguments.out, f"{Path(file).stem}.png")
        storage.write_bytes(url, png_bytes(to_picture(picture)))
    title = " ".join([*(f"+{name}" for name in arguments.set), *(f"-{name}" for name in arguments.clear)])
    sheet = translation_grid(title, [("picture", images), ("translated", made)])
    storage.write_bytes(storage.join(arguments.out, "grid.png"), png_bytes(sheet))
    print(f"{len(made)} pictures in {storage.redact(arguments.out)}, for a first look: grid.png")
    return 0


def _wanted(
    arguments: argparse.Namespace, loaded: Loaded, system: SupportsTranslate, images: Tensor, device: torch.device
) -> Tensor:
    known = Labels.of(system.labels[arguments.domain], system.exclusive[arguments.domain])
    with torch.no_grad():
        labels = system.read(loaded.nets, images.to(device), arguments.domain).float().cpu()
    for name in arguments.clear:
        labels[:, known.place(name)] = 0
    for name in arguments.set:
        if name in arguments.clear or set(known.rivals(name)) & {known.place(other) for other in arguments.set}:
            raise ValueError(f"--set {name}: it cannot hold with the other changes")
        labels = known.with_set(labels, name)
    return labels


if __name__ == "__main__":
    sys.exit(main())
