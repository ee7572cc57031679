"""Score a finished run that translates pictures: ``python tools/score_translation.py --run RUN_URL``.

Held-out pictures get every other answer to each trait (each other hair colour; glasses where there are none). Does a
classifier that was trained on real pictures only find the new answer? Beside each share stand what it says of the same
pictures untranslated, and how well it knows real ones. And: how far is a picture from itself after a change there and
back. Writes scores.json into the run folder and renews its report.html.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from t2idist import storage
from t2idist.config import RunConfig
from t2idist.config.strict import from_dict
from t2idist.contract import SupportsTranslate, to_float
from t2idist.data.loader import LoadedSplit, load_split
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_datasets
from t2idist.evaluate.attribute_classifier import (
    ABSENT,
    AttributeClassifier,
    Trait,
    answers,
    balanced_accuracy,
    classify,
    train_classifier,
)
from t2idist.evaluate.monitor import can_translate
from t2idist.report import report, run_folder
from t2idist.sampling.attribute_edits import Labels
from t2idist.sampling.loading import Loaded, load
from t2idist.sampling.translate import held_out, translate

CPU = torch.device("cpu")
TRAIN_PICTURES = 20_000
TEST_PICTURES = 1000
Row = dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="URL", help="folder of a finished run of stargan")
    parser.add_argument("--seed", type=int, default=0, help="of the judge (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        rows = score(arguments.run, arguments.seed)
    except ValueError as error:
        print(f"score_translation: {error}", file=sys.stderr)
        return 2
    storage.write_json(storage.join(arguments.run, "scores.json"), rows)
    print(table(rows))
    print(f"in {report.write(arguments.run)}")
    return 0


def score(run_url: str, seed: int) -> list[Row]:
    """The rows of scores.json. Raises ValueError, one sentence, for what cannot be scored."""
    config = from_dict(RunConfig, dict(run_folder.read(run_url).config))
    stage = list(config.stages)[-1]
    loaded = load(storage.join(run_url, stage, "export"), CPU)
    if not can_translate(loaded.system):
        raise ValueError(f"{storage.redact(run_url)}: its last stage, {stage}, changes no pictures")
    data = config.stage_data(stage)
    datasets = open_datasets(data)
    rows = []
    for domain, dataset in enumerate(datasets):
        of_set = f"{dataset.source}: " if len(datasets) > 1 else ""
        for row in _score_domain(loaded, dataset, domain, data.crop, seed):
            rows.append({**row, "name": f"{of_set}{row['name']}"})
    return rows


def _score_domain(loaded: Loaded, dataset: Dataset, domain: int, crop: float, seed: int) -> list[Row]:
    system = cast(SupportsTranslate, loaded.system)
    names = system.labels[domain]
    labels = Labels.of(names, system.exclusive[domain], dataset.split("train"))
    sizes, split = loaded.system.sizes, held_out(dataset)
    if split == "train":
        raise ValueError(f"{storage.redact(dataset.url)}: has no test and no val split to score on")
    train = load_split(dataset, "train", sizes=sizes, max_words=1, limit=TRAIN_PICTURES, crop=crop)
    test = load_split(dataset, split, sizes=sizes, max_words=1, limit=TEST_PICTURES, crop=crop)
    judge = train_classifier(
        train.batch.images[-1], answers(train.attributes, labels.traits), seed=seed, traits=labels.traits
    )
    own = test.batch.attributes[:, [dataset.attribute_names.index(name) for name in names]]
    rows = [
        _trait_row(loaded, judge, test, own, labels, place, domain, len(train.captions))
        for place in range(len(labels.traits))
    ]
    return [*rows, _mean_row(rows), _reconstruction_row(loaded, test, own, labels, domain)]


def _trait_row(
    loaded: Loaded,
    judge: AttributeClassifier,
    test: LoadedSplit,
    own: Tensor,
    labels: Labels,
    place: int,
    domain: int,
    trained: int,
) -> Row:
    """How often a changed trait is seen, over pictures that have an answer to it."""
    trait: Trait = labels.traits[place]
    has = labels.answers(own, trait)
    kept = has != ABSENT
    pictures, before = test.batch.images[-1][kept], own[kept]
    system = cast(SupportsTranslate, loaded.system)
    of_real = classify(judge, pictures)[:, place]
    seen, wanted, unchanged = [], [], []
    for after in labels.others(before, trait):
        made = translate(system, loaded.nets, pictures, after, domain, device=CPU)
        seen.append(classify(judge, made)[:, place])
        wanted.append(labels.answers(after, trait))
        unchanged.append(of_real)
    value, n = balanced_accuracy(torch.cat(seen), torch.cat(wanted))
    return {
        "name": trait.name,
        "value": value,
        "chance": balanced_accuracy(torch.cat(unchanged), torch.cat(wanted))[0],
        "real": balanced_accuracy(of_real, has[kept])[0],
        "n": n,
        "note": f"share of changes that a small CNN trained on {trained:,} real pictures sees, mean over the new "
        "answers; chance: the same pictures not translated",
    }


def _mean_row(rows: Sequence[Row]) -> Row:
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("value", "chance", "real")}
    return {"name": "mean of the traits", **mean, "n": sum(row["n"] for row in rows), "note": ""}


def _reconstruction_row(loaded: Loaded, test: LoadedSplit, own: Tensor, labels: Labels, domain: int) -> Row:
    """Mean absolute difference of pictures in [-1, 1] from themselves after each trait's change there and back."""
    system = cast(SupportsTranslate, loaded.system)
    pictures = to_float(test.batch.images[-1])
    apart = []
    for trait in labels.traits:
        there = translate(system, loaded.nets, pictures, labels.changed(own, trait), domain, device=CPU)
        back = translate(system, loaded.nets, there, own, domain, device=CPU)
        apart.append(float((pictures - back).abs().mean()))
    return {
        "name": "there and back, L1",
        "value": sum(apart) / len(apart),
        "chance": None,
        "real": None,
        "n": len(pictures) * len(apart),
        "note": "mean absolute difference in [-1, 1]; 0 is the picture itself",
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    lines = [f"{'':36}{'translated':>12}{'not translated':>16}{'real':>8}{'n':>8}"]
    for row in rows:
        chance, real = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("chance", "real"))
        lines.append(f"{row['name']:36}{row['value']:12.3f}{chance:>16}{real:>8}{row['n']:8d}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
