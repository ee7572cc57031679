"""Score a finished run that translates images: ``python tools/score_translation.py --run RUN_URL``.

Held-out images are translated to every other class of each trait (each other hair colour; glasses if there are none).
The score is how often a classifier trained on real images sees the new class, given with its answers for the same
images before translation and its accuracy on real images. A second score is the distance of an image from itself after
a change and the change back. Writes scores.json into the run folder and updates its report.html.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import from_dict
from t2idist.contract import SupportsTranslate
from t2idist.data.loader import load_split
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_datasets
from t2idist.evaluate.attribute_classifier import (
    balanced_accuracy,
    classify,
    train_classifier,
    trait_classes,
)
from t2idist.evaluate.earlier_scores import SCORES_FILE, keep_rows
from t2idist.nn.images import to_float
from t2idist.observability.command import command
from t2idist.report import report, run_folder
from t2idist.sampling.attribute_edits import NOT_APPLICABLE, AttributeEditor, Trait
from t2idist.sampling.loading import LoadedExport, load_export
from t2idist.sampling.translate import held_out_split, translate

CPU = torch.device("cpu")
TRAIN_IMAGES = 20_000
TEST_IMAGES = 1000
Row = dict[str, Any]


@command("score_translation")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="URL", help="folder of a finished run of stargan")
    parser.add_argument("--seed", type=int, default=0, help="seed of the classifier (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = score(options.run, options.seed)
    if (kept := keep_rows(options.run, rows)) is not None:
        print(f"score_translation: earlier, other scores are kept in {storage.redact(kept)}", file=sys.stderr)
    storage.write_json(storage.join(options.run, SCORES_FILE), rows)
    print(table(rows))
    print(f"in {report.write_report(options.run)}")
    return 0


def score(run_url: str, seed: int) -> list[Row]:
    """Return the rows of scores.json. Raises ValueError if the run cannot be scored."""
    config = from_dict(RunConfig, dict(run_folder.read_run(run_url).config))
    stage = list(config.stages)[-1]
    loaded = load_export(storage.join(run_url, stage, "export"), CPU)
    if not isinstance(loaded.system, SupportsTranslate):
        raise ValueError(f"{storage.redact(run_url)}: its last stage, {stage}, does not translate images")
    data = config.stage_data(stage)
    datasets = open_datasets(data)
    rows = []
    for domain, dataset in enumerate(datasets):
        prefix = f"{dataset.source}: " if len(datasets) > 1 else ""
        for row in _DomainScorer(loaded, loaded.system, dataset, domain, data.crop, seed).rows():
            rows.append({**row, "name": f"{prefix}{row['name']}"})
    return rows


class _DomainScorer:
    """Scores the traits of one domain on a held-out split."""

    def __init__(
        self,
        loaded: LoadedExport,
        system: SupportsTranslate,
        dataset: Dataset,
        domain: int,
        crop: float,
        seed: int,
    ) -> None:
        self._loaded, self._system, self._domain = loaded, system, domain
        names = system.labels[domain]
        self._editor = AttributeEditor.from_names(names, system.exclusive[domain], dataset.split("train"))
        sizes, split = loaded.system.sizes, held_out_split(dataset)
        if split == "train":
            raise ValueError(f"{storage.redact(dataset.url)}: has no test and no val split to score on")
        train = load_split(dataset, "train", sizes=sizes, max_words=1, limit=TRAIN_IMAGES, crop=crop)
        test = load_split(dataset, split, sizes=sizes, max_words=1, limit=TEST_IMAGES, crop=crop)
        traits = self._editor.traits
        self._classifier = train_classifier(
            train.batch.images[-1], trait_classes(train.attributes, traits), seed=seed, traits=traits
        )
        self._trained_on = len(train.captions)
        self._images = test.batch.images[-1]
        self._labels = test.batch.attributes[:, [dataset.attribute_names.index(name) for name in names]]

    def rows(self) -> list[Row]:
        rows = [self._trait_row(index) for index in range(len(self._editor.traits))]
        return [*rows, _mean_row(rows), self._reconstruction_row()]

    def _translate(self, images: Tensor, labels: Tensor) -> Tensor:
        return translate(self._system, self._loaded.nets, images, labels, self._domain, device=CPU)

    def _trait_row(self, index: int) -> Row:
        """Score how often a changed trait is seen, over the images that have a class of it."""
        trait: Trait = self._editor.traits[index]
        own = self._editor.trait_classes(self._labels, trait)
        kept = own != NOT_APPLICABLE
        images, labels = self._images[kept], self._labels[kept]
        of_real = classify(self._classifier, images)[:, index]
        predicted, targets, unchanged = [], [], []
        for edited in self._editor.alternatives(labels, trait):
            predicted.append(classify(self._classifier, self._translate(images, edited))[:, index])
            targets.append(self._editor.trait_classes(edited, trait))
            unchanged.append(of_real)
        value, n = balanced_accuracy(torch.cat(predicted), torch.cat(targets))
        return {
            "name": trait.name,
            "value": value,
            "chance": balanced_accuracy(torch.cat(unchanged), torch.cat(targets))[0],
            "real": balanced_accuracy(of_real, own[kept])[0],
            "n": n,
            "note": f"share of changes that a small CNN trained on {self._trained_on:,} real images sees, mean over "
            "the new answers; chance: the same images not translated",
        }

    def _reconstruction_row(self) -> Row:
        """Measure the mean absolute difference of images from themselves after each trait's change and back."""
        images = to_float(self._images)
        differences = []
        for trait in self._editor.traits:
            changed = self._translate(images, self._editor.change_trait(self._labels, trait))
            restored = self._translate(changed, self._labels)
            differences.append(float((images - restored).abs().mean()))
        return {
            "name": "there and back, L1",
            "value": sum(differences) / len(differences),
            "chance": None,
            "real": None,
            "n": len(images) * len(differences),
            "note": "mean absolute difference in [-1, 1]; 0 is the image itself",
        }


def _mean_row(rows: Sequence[Row]) -> Row:
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("value", "chance", "real")}
    return {"name": "mean of the traits", **mean, "n": sum(row["n"] for row in rows), "note": ""}


def table(rows: Sequence[Row]) -> str:
    """Format the rows in columns."""
    lines = [f"{'':36}{'translated':>12}{'not translated':>16}{'real':>8}{'n':>8}"]
    for row in rows:
        chance, real = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("chance", "real"))
        lines.append(f"{row['name']:36}{row['value']:12.3f}{chance:>16}{real:>8}{row['n']:8d}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
