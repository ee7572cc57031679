"""Score a finished run on avatars: ``python tools/score_demo.py RUN_URL [--judge DAMSM_EXPORT_URL]``.

Three questions are answered on held-out captions. Does a classifier trained on real images find what the caption names?
Does an independent DAMSM retrieve the image's own caption from 100? Do two images of one caption differ? Each value is
given with chance and the value of real images. Writes scores.json into the run folder and updates its report.html.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from t2idist import storage
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, parse_yaml
from t2idist.contract import Batch, SupportsEmbed, SupportsSample
from t2idist.data.loader import LoadedSplit, load_split
from t2idist.data.sources import open_dataset
from t2idist.evaluate.attribute_classifier import balanced_accuracy, classify, train_classifier, trait_classes
from t2idist.evaluate.earlier_scores import SCORES_FILE, keep_rows
from t2idist.evaluate.r_precision import embed_batch, r_precision
from t2idist.nn.images import to_float
from t2idist.observability.command import command
from t2idist.report import report
from t2idist.sampling.attribute_edits import TRAITS
from t2idist.sampling.generate import GaussianNoise, encode_captions, generate
from t2idist.sampling.loading import LoadedExport, load_export

CPU = torch.device("cpu")
Row = dict[str, Any]


@command("score_demo")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_URL", help="folder of a finished run on avatars")
    parser.add_argument("--judge", metavar="URL", help="export of a DAMSM of another seed (default: no R-precision)")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, classifier and candidates (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = score(options.run, options.judge, options.seed)
    if (kept := keep_rows(options.run, rows)) is not None:
        print(f"score_demo: earlier, other scores are kept in {storage.redact(kept)}", file=sys.stderr)
    storage.write_json(storage.join(options.run, SCORES_FILE), rows)
    print(table(rows))
    print(f"in {report.write_report(options.run)}")
    return 0


def score(run_url: str, damsm_url: str | None, seed: int) -> list[Row]:
    """Return the rows of scores.json. Raises ValueError if the run cannot be scored."""
    config = _config(run_url)
    loaded, system, stage = _load_generator(run_url, config)
    data = config.stage_data(stage)
    size = int(loaded.system.sizes[-1])
    train, test = (_load_real(data, split, size) for split in ("train", "test"))
    captions = [of_sample[0] for of_sample in test.captions]
    first, second = (_generate(loaded, system, captions, seed, start) for start in (0, len(captions)))
    rows = _attribute_rows(train, test, first, seed)
    if damsm_url is not None:
        rows.append(_r_precision_row(damsm_url, config.stage_seed(stage), captions, test.batch, first, seed))
    rows.append(_difference_row(first, second, test.batch))
    return rows


def _config(run_url: str) -> RunConfig:
    where = storage.join(run_url, "config.yaml")
    try:
        text = storage.read_bytes(where).decode()
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(run_url)}: no run here (config.yaml is missing)") from None
    return from_dict(RunConfig, parse_yaml(text, storage.redact(where)))


def _load_generator(run_url: str, config: RunConfig) -> tuple[LoadedExport, SupportsSample, str]:
    """Load the export of the last stage, which must generate images; returns it, its system and the stage."""
    stage = list(config.stages)[-1]
    loaded = load_export(storage.join(run_url, stage, "export"), CPU)
    if not isinstance(loaded.system, SupportsSample):
        raise ValueError(f"{storage.redact(run_url)}: its last stage, {stage}, does not generate images")
    return loaded, loaded.system, stage


def _load_real(data: DataConfig, split: str, size: int) -> LoadedSplit:
    dataset = open_dataset(data)
    missing = sorted({name for trait in TRAITS for name in trait.attributes} - set(dataset.attribute_names))
    if missing:
        raise ValueError(f"data.source: {data.source}: has no attribute {missing[0]}; this tool scores runs on avatars")
    return load_split(dataset, split, sizes=(size,), max_words=data.max_words, crop=data.crop)


def _generate(
    loaded: LoadedExport, system: SupportsSample, captions: Sequence[str], seed: int, first_position: int
) -> Tensor:
    """Generate an image of each caption, (n, 3, S, S), each with its own noise."""
    encoded = encode_captions(loaded.vocabulary, captions, loaded.build_info.max_words)
    noise = GaussianNoise(seed, range(first_position, first_position + len(captions)), CPU)
    return generate(system, loaded.nets, encoded, noise, device=CPU).images[-1]


def _attribute_rows(train: LoadedSplit, test: LoadedSplit, generated: Tensor, seed: int) -> list[Row]:
    classifier = train_classifier(train.batch.images[-1], trait_classes(train.attributes), seed=seed)
    targets = trait_classes(test.attributes)
    of_generated, of_real = classify(classifier, generated), classify(classifier, test.batch.images[-1])
    rows: list[Row] = []
    for t, trait in enumerate(TRAITS):
        value, n = balanced_accuracy(of_generated[:, t], targets[:, t])
        real, _ = balanced_accuracy(of_real[:, t], targets[:, t])
        kinds = f"mean recall of {trait.classes} classes" if trait.classes > 2 else "mean recall of with and without"
        note = f"balanced accuracy: {kinds}{', captions with hair' if n < len(targets) else ''}"
        rows.append({"name": trait.name, "value": value, "chance": trait.chance, "real": real, "n": n, "note": note})
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("value", "chance", "real")}
    note = f"by a small CNN trained on {len(train.captions):,} real images; captions of combinations never trained on"
    return [*rows, {"name": "mean of the five", **mean, "n": len(targets), "note": note}]


def _r_precision_row(
    damsm_url: str, run_seed: int, captions: Sequence[str], real: Batch, generated: Tensor, seed: int
) -> Row:
    damsm = load_export(damsm_url, CPU)
    where = storage.redact(damsm_url)
    if not isinstance(damsm.system, SupportsEmbed):
        raise ValueError(f"--judge {where}: this export does not embed images and captions; give that of a DAMSM")
    if damsm.meta["seed"] == run_seed:
        raise ValueError(f"--judge {where}: has the run's own seed, {run_seed}; give a DAMSM of another seed")
    encoded = encode_captions(damsm.vocabulary, captions, damsm.build_info.max_words)
    results = []
    for images in (generated, to_float(real.images[-1])):
        batch = replace(real, images=(images,), captions=encoded)
        embeddings = embed_batch(damsm.system, damsm.nets, batch, device=CPU)
        results.append(r_precision(*embeddings, seed=seed, class_ids=real.class_ids))
    of_generated, of_real = results
    return {
        "name": "R-precision, 1 of 100",
        "value": of_generated.mean,
        "chance": of_generated.chance,
        "real": of_real.mean,
        "n": of_generated.n,
        "note": f"{of_generated.mean / of_generated.chance:.1f} times chance, standard error "
        f"{of_generated.standard_error:.3f}; "
        f"by a DAMSM of another seed ({damsm.meta['seed']}); candidates name other combinations",
    }


def _difference_row(first: Tensor, second: Tensor, real: Batch) -> Row:
    """Compare the difference of two images of one caption with that of two real images that share a caption."""
    images = to_float(real.images[-1])
    order = torch.argsort(real.class_ids, stable=True)
    same = real.class_ids[order[1:]] == real.class_ids[order[:-1]]
    between_real = _distance(images[order[1:][same]], images[order[:-1][same]])
    return {
        "name": "two draws of one caption differ by",
        "value": _distance(first, second),
        "chance": None,
        "real": between_real,
        "n": len(first),
        "note": "mean absolute pixel difference in [0, 1], 0 is collapse; real: two images of one combination",
    }


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().mean()) / 2


def table(rows: Sequence[Row]) -> str:
    """Format the rows in columns."""
    lines = [f"{'':36}{'generated':>10}{'chance':>9}{'real':>9}{'n':>7}"]
    for row in rows:
        chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
        lines.append(f"{row['name']:36}{row['value']:10.3f}{chance:>9}{row['real']:9.3f}{row['n']:7d}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
