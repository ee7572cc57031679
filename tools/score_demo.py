"""Score a finished run on avatars: ``python tools/score_demo.py RUN_URL [--judge DAMSM_EXPORT_URL]``.

Three questions, on held-out captions: does a classifier trained on real pictures find what the caption names; does a
DAMSM that the run never saw pick the picture's own caption out of 100; do two draws of one caption differ. Each answer
stands beside chance and beside what real pictures score. Writes scores.json into the run folder and renews its
report.html.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from t2idist import storage
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, parse_yaml
from t2idist.contract import Batch, SupportsEmbed, SupportsSample, to_float
from t2idist.data.loader import LoadedSplit, load_split
from t2idist.data.sources import open_dataset
from t2idist.evaluate.attribute_classifier import TRAITS, answers, balanced_accuracy, classify, train_classifier
from t2idist.evaluate.monitor import can_draw, can_match, embed_all
from t2idist.evaluate.r_precision import r_precision
from t2idist.report import report
from t2idist.sampling.generate import NormalDraw, encode, generate
from t2idist.sampling.loading import Loaded, load

CPU = torch.device("cpu")
Row = dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_URL", help="folder of a finished run on avatars")
    parser.add_argument("--judge", metavar="URL", help="export of a DAMSM of another seed (none: no R-precision)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the judge and the candidates (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        rows = score(arguments.run, arguments.judge, arguments.seed)
    except ValueError as error:
        print(f"score_demo: {error}", file=sys.stderr)
        return 2
    storage.write_json(storage.join(arguments.run, "scores.json"), rows)
    print(table(rows))
    print(f"in {report.write(arguments.run)}")
    return 0


def score(run_url: str, judge_url: str | None, seed: int) -> list[Row]:
    """The rows of scores.json. Raises ValueError, one sentence, for what cannot be scored."""
    config = _config(run_url)
    loaded, stage = _drawing_export(run_url, config)
    data = config.stage_data(stage)
    size = int(loaded.system.sizes[-1])
    train, test = (_real(data, split, size) for split in ("train", "test"))
    captions = [of_sample[0] for of_sample in test.captions]
    drawn = [_draw(loaded, captions, seed, first) for first in (0, len(captions))]
    rows = _attribute_rows(train, test, drawn[0], seed)
    if judge_url is not None:
        rows.append(_matching_row(judge_url, config.stage_seed(stage), captions, test.batch, drawn[0], seed))
    rows.append(_difference_row(drawn[0], drawn[1], test.batch))
    return rows


def _config(run_url: str) -> RunConfig:
    where = storage.join(run_url, "config.yaml")
    try:
        text = storage.read_bytes(where).decode()
    except FileNotFoundError:
        raise ValueError(f"{storage.redact(run_url)}: no run here (config.yaml is missing)") from None
    return from_dict(RunConfig, parse_yaml(text, storage.redact(where)))


def _drawing_export(run_url: str, config: RunConfig) -> tuple[Loaded, str]:
    """The last stage's export, which must draw."""
    stage = list(config.stages)[-1]
    loaded = load(storage.join(run_url, stage, "export"), CPU)
    if not can_draw(loaded.system):
        raise ValueError(f"{storage.redact(run_url)}: its last stage, {stage}, does not draw pictures")
    return loaded, stage


def _real(data: DataConfig, split: str, size: int) -> LoadedSplit:
    dataset = open_dataset(data)
    missing = sorted({name for trait in TRAITS for name in trait.attributes} - set(dataset.attribute_names))
    if missing:
        raise ValueError(f"data.source: {data.source}: has no attribute {missing[0]}; this tool scores runs on avatars")
    return load_split(dataset, split, sizes=(size,), max_words=data.max_words, crop=data.crop)


def _draw(loaded: Loaded, captions: Sequence[str], seed: int, first_place: int) -> Tensor:
    """(n, 3, S, S): a picture of each caption, each with noise of its own."""
    encoded = encode(loaded.vocabulary, captions, loaded.plan.max_words)
    draw = NormalDraw(seed, range(first_place, first_place + len(captions)), CPU)
    return generate(cast(SupportsSample, loaded.system), loaded.nets, encoded, draw, device=CPU).images[-1]


def _attribute_rows(train: LoadedSplit, test: LoadedSplit, drawn: Tensor, seed: int) -> list[Row]:
    judge = train_classifier(train.batch.images[-1], answers(train.attributes), seed=seed)
    wanted = answers(test.attributes)
    of_drawn, of_real = classify(judge, drawn), classify(judge, test.batch.images[-1])
    rows: list[Row] = []
    for t, trait in enumerate(TRAITS):
        value, n = balanced_accuracy(of_drawn[:, t], wanted[:, t])
        real, _ = balanced_accuracy(of_real[:, t], wanted[:, t])
        kinds = f"mean recall of {trait.classes} classes" if trait.classes > 2 else "mean recall of with and without"
        note = f"balanced accuracy: {kinds}{', captions with hair' if n < len(wanted) else ''}"
        rows.append({"name": trait.name, "value": value, "chance": trait.chance, "real": real, "n": n, "note": note})
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("value", "chance", "real")}
    note = f"by a small CNN trained on {len(train.captions):,} real pictures; captions of combinations never trained on"
    return [*rows, {"name": "mean of the five", **mean, "n": len(wanted), "note": note}]


def _matching_row(judge_url: str, run_seed: int, captions: Sequence[str], real: Batch, drawn: Tensor, seed: int) -> Row:
    judge = load(judge_url, CPU)
    where = storage.redact(judge_url)
    if not can_match(judge.system):
        raise ValueError(f"--judge {where}: this export does not match pictures with captions; give that of a DAMSM")
    if judge.meta["seed"] == run_seed:
        raise ValueError(f"--judge {where}: has the run's own seed, {run_seed}; a judge must be of another seed")
    encoded = encode(judge.vocabulary, captions, judge.plan.max_words)
    scores = []
    for images in (drawn, to_float(real.images[-1])):
        batch = replace(real, images=(images,), captions=encoded)
        codes = embed_all(cast(SupportsEmbed, judge.system), judge.nets, batch, device=CPU)
        scores.append(r_precision(*codes, seed=seed, class_ids=real.class_ids))
    generated, of_real = scores
    return {
        "name": "R-precision, 1 of 100",
        "value": generated.mean,
        "chance": generated.chance,
        "real": of_real.mean,
        "n": generated.n,
        "note": f"{generated.mean / generated.chance:.1f} times chance, standard error {generated.standard_error:.3f}; "
        f"by a DAMSM of another seed ({judge.meta['seed']}); candidates name other combinations",
    }


def _difference_row(first: Tensor, second: Tensor, real: Batch) -> Row:
    """Whether noise matters: two draws of one caption, beside two real pictures that share a caption."""
    pictures = to_float(real.images[-1])
    order = torch.argsort(real.class_ids, stable=True)
    same = real.class_ids[order[1:]] == real.class_ids[order[:-1]]
    between_real = _distance(pictures[order[1:][same]], pictures[order[:-1][same]])
    return {
        "name": "two draws of one caption differ by",
        "value": _distance(first, second),
        "chance": None,
        "real": between_real,
        "n": len(first),
        "note": "mean absolute pixel difference in [0, 1], 0 is collapse; real: two pictures of one combination",
    }


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().mean()) / 2


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    lines = [f"{'':36}{'generated':>10}{'chance':>9}{'real':>9}{'n':>7}"]
    for row in rows:
        chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
        lines.append(f"{row['name']:36}{row['value']:10.3f}{chance:>9}{row['real']:9.3f}{row['n']:7d}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
