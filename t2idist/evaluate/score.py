"""Scores of an export that can be trusted: ``python -m t2idist.evaluate.score --export URL --metrics fid,kid``.

Pictures are drawn for the captions of a split that was not trained on, and looked at beside the real ones. The work is
done in pieces by as many processes as --workers says (on a Ray cluster with --address); the numbers do not depend on
how many. All that they do depend on, the protocol, stands beside them. One that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tqdm import tqdm

import t2idist
from t2idist import storage
from t2idist.config import METRICS, DataConfig
from t2idist.config.strict import from_dict
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.engine.checkpoint import export
from t2idist.evaluate import score_chunks, score_sheets
from t2idist.evaluate.feature_extractors import DEFAULT, EXTRACTORS, Weights
from t2idist.evaluate.metrics import NEEDS_TRAIN, READ_BY, Measures, Options, check
from t2idist.evaluate.score_chunks import ExtractorSpec, ScoreChunk, ScoreJob
from t2idist.launch import parallel

RESULT = "scores.json"


@dataclass(frozen=True)
class Settings:
    """What is asked for: the options of the command, by their names."""

    export: str
    system: str = ""
    data: str = ""
    split: str = "test"
    metrics: tuple[str, ...] = ("fid", "kid", "prdc", "r_precision", "memorisation")
    n: int = 30000
    real: int = 0
    train: int = 6000
    extractor: str = DEFAULT
    weights: str = ""
    weights_sha256: str = ""
    background: bool = False
    clip: str = ""
    clip_sha256: str = ""
    judge: str = ""
    truncation: float | None = None
    jpeg: int = 0
    splits: int = 10
    subset: int = 0
    bootstrap: int = 20
    seed: int = 0
    workers: int = 0
    address: str = ""
    device: str = "cpu"
    out: str = ""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"--metrics {unknown[0]}: there are {', '.join(METRICS)}")
        for flag, least in (("n", 2), ("real", 0), ("train", 1), ("splits", 1), ("subset", 0), ("bootstrap", 0)):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} {getattr(self, flag)}: give at least {least}")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: give at least 0, which is this process alone")
        if not 0 <= self.jpeg <= 100:
            raise ValueError(f"--jpeg {self.jpeg}: allowed are 1 to 100, and 0 for none")
        if "damsm_r" in self.metrics and not self.judge:
            raise ValueError("--metrics damsm_r: give a DAMSM of another run with --judge URL")

    @property
    def folder(self) -> str:
        """Where the scores lie: beside the export, if nothing else was asked for."""
        return self.out or storage.join(self.export.rstrip("/").rpartition("/")[0] or ".", "scores")

    @property
    def work(self) -> str:
        """Where the pieces lie."""
        return storage.join(self.folder, "work")


def main(words: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 0, 1 where --fail-above or --fail-below was crossed, 2 for bad input."""
    arguments = _parser().parse_args(words)
    try:
        limits = [*_limits("above", arguments.fail_above), *_limits("below", arguments.fail_below)]
        metrics = tuple(name.strip() for name in arguments.metrics.split(",") if name.strip())
        given = {**vars(arguments), "metrics": metrics}
        settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
        others = [(url, _read(url)) for url in arguments.beside]
        result = score(settings)
        known = {row["name"] for row in result["scores"]}
        if missing := [limit.name for limit in limits if limit.name not in known]:
            raise ValueError(f"--fail-above, --fail-below: {missing[0]} was not measured; there are {', '.join(known)}")
    except ValueError as error:
        print(f"score: {error}", file=sys.stderr)
        return 2
    print(table(result))
    for url, other in others:
        print(beside(result, other, storage.redact(url)))
    print(f"in {storage.redact(storage.join(settings.folder, RESULT))}")
    crossed = [limit.text for limit in limits for row in result["scores"] if limit.crossed(row)]
    for text in crossed:
        print(f"score: {text}", file=sys.stderr)
    return 1 if crossed else 0


def _parser() -> argparse.ArgumentParser:
    default = Settings("")
    parser = argparse.ArgumentParser(prog="python -m t2idist.evaluate.score", description="Score an export.")
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export of a system that draws")
    add("--system", default="", metavar="MODULE", help="for an export of a system of your own")
    add("--data", default="", metavar="SOURCE", help="real pictures and captions (default: what it was trained on)")
    add("--split", default="test", help="of the data (default: %(default)s)")
    add("--metrics", default=",".join(default.metrics), help=f"of {', '.join(METRICS)} (default: %(default)s)")
    add("--n", type=int, default=default.n, help="generated pictures (default: %(default)s)")
    add("--real", type=int, default=0, help="real pictures (default: all of the split)")
    add("--train", type=int, default=default.train, help="training pictures, for r_precision (default: %(default)s)")
    add("--extractor", default=DEFAULT, choices=tuple(EXTRACTORS), help="looks at the pictures (default: %(default)s)")
    add("--weights", default="", metavar="URL", help="of the extractor")
    add("--weights-sha256", default="", metavar="HEX", help="of that file")
    add("--background", action="store_true", help="is: the classifier's class 0 does not count (CUB)")
    add("--clip", default="", metavar="FOLDER", help="clip_r: of a CLIP model")
    add("--clip-sha256", default="", metavar="HEX", help="of its model.safetensors")
    add("--judge", default="", metavar="URL", help="damsm_r: export of a DAMSM")
    add("--truncation", type=float, help="no noise of a size above it")
    add("--jpeg", type=int, default=0, metavar="Q", help="encode all pictures at this quality first")
    add("--splits", type=int, default=default.splits, help="is: how many (default: %(default)s)")
    add("--subset", type=int, default=0, help="kid: pictures of a subset (default: 1000, or half of what there is)")
    add("--bootstrap", type=int, default=default.bootstrap, help="draws for standard errors (default: %(default)s)")
    add("--seed", type=int, default=0, help="of noise, samples and subsets (default: 0)")
    add("--workers", type=int, default=0, help="processes (default: 0, this one alone)")
    add("--address", default="", help="of a Ray cluster for the workers; --out must then be seen by all of it")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--out", default="", metavar="URL", help="folder to write to (default: scores, beside the export)")
    add("--beside", action="append", default=[], metavar="URL", help="a folder of other scores, shown beside these")
    add("--fail-above", action="append", default=[], metavar="NAME=VALUE", help="exit status 1 above it")
    add("--fail-below", action="append", default=[], metavar="NAME=VALUE", help="exit status 1 below it")
    return parser


@dataclass(frozen=True)
class _Limit:
    name: str
    side: str
    value: float

    @property
    def text(self) -> str:
        return f"{self.name} is {self.side} {self.value:g}"

    def crossed(self, row: Mapping[str, Any]) -> bool:
        value = float(row["value"])
        return row["name"] == self.name and (value > self.value if self.side == "above" else value < self.value)


def _limits(side: str, words: Iterable[str]) -> list[_Limit]:
    found = []
    for word in words:
        name, _, value = word.partition("=")
        try:
            found.append(_Limit(name, side, float(value)))
        except ValueError:
            raise ValueError(f"--fail-{side} {word}: expected NAME=VALUE, as kid=0.05") from None
    return found


# ------------------------------------------------------------ the work
def score(settings: Settings) -> dict[str, Any]:
    """Score, and write scores.json and sheets of pictures into the folder; gives what scores.json holds.

    Raises ValueError, one sentence, for what cannot be scored.
    """
    job, dataset = make_job(settings)
    work = score_chunks.score_chunks(job)
    with tqdm(total=len(work), unit="piece", desc="pictures", file=sys.stderr) as bar:
        tasks = [(job, piece, settings.work) for piece in work]
        gpus = int(settings.device != "cpu")
        for _ in parallel.map_unordered(_do, tasks, settings.workers, settings.address, gpus=gpus):
            bar.update()
    measures = _measures(settings, job, dataset)
    result = _result(settings, job, dataset, measures)
    result["sheets"] = score_sheets.write(job, measures, dataset, settings.folder)
    storage.write_json(storage.join(settings.folder, RESULT), result)
    return result


def score_in_background(settings: Settings, pace: Callable[[], None]) -> dict[str, Any]:
    """The same in this process, with `pace` called before each piece of work; writes nothing that stays."""
    job, dataset = make_job(settings)
    for piece in score_chunks.score_chunks(job):
        pace()
        score_chunks.do(job, piece, settings.work)
    pace()
    result = _result(settings, job, dataset, _measures(settings, job, dataset))
    score_chunks.forget(job, settings.work)
    return result


def _options(settings: Settings) -> Options:
    return Options(settings.background, settings.splits, settings.subset, settings.bootstrap)


def _measures(settings: Settings, job: ScoreJob, dataset: Dataset) -> Measures:
    return Measures(job, _options(settings), dataset, settings.work)


def _result(settings: Settings, job: ScoreJob, dataset: Dataset, measures: Measures) -> dict[str, Any]:
    rows = measures.rows(settings.metrics)
    return {
        "protocol": _protocol(settings, job, dataset, measures),
        "scores": [asdict(row) for row in rows],
        "breakdown": measures.breakdown(),
    }


def _do(task: tuple[ScoreJob, ScoreChunk, str]) -> None:
    score_chunks.do(*task)


def make_job(settings: Settings) -> tuple[ScoreJob, Dataset]:
    """What is to be done. Raises ValueError, one sentence, where export, data and extractors do not go together."""
    index = export.read_index(settings.export)
    where = storage.redact(settings.export)
    trained_on = (index.get("data") or {}).get("settings")
    data = from_dict(DataConfig, trained_on, f"{where}: data") if trained_on else DataConfig(crop=1.0)
    if settings.data:
        data = replace(data, source=settings.data, beside=())
    dataset = open_dataset(data)
    if settings.split not in dataset.splits:
        raise ValueError(f"--split {settings.split}: the data has {', '.join(dataset.splits)}")
    in_split = len(dataset.split(settings.split))
    train = 0
    if set(settings.metrics) & set(NEEDS_TRAIN):
        if "train" not in dataset.splits:
            raise ValueError(f"--metrics {settings.metrics}: the data has no split 'train' to compare with")
        train = min(settings.train, len(dataset.split("train")))
    looks = [ExtractorSpec(settings.extractor, Weights(settings.weights, settings.weights_sha256))]
    given = {"clip_r": Weights(settings.clip, settings.clip_sha256), "damsm_r": Weights(settings.judge)}
    looks += [ExtractorSpec(look, given[metric]) for metric, look in READ_BY.items() if metric in settings.metrics]
    job = ScoreJob(
        export=storage.absolute(settings.export),
        export_sha256=storage.sha256(storage.read_bytes(storage.join(settings.export, export.INDEX))),
        own_system=settings.system,
        data=data,
        split=settings.split,
        pixels=0,
        n=settings.n,
        real=min(settings.real or in_split, in_split),
        train=train,
        seed=settings.seed,
        truncation=settings.truncation,
        jpeg=settings.jpeg,
        looks=tuple(looks),
        device=settings.device,
    )
    check(job, _options(settings), settings.metrics, dataset)
    for number in range(len(looks)):
        score_chunks.looker(job, number)  # whatever is wrong with one is said before the work begins
    return replace(job, pixels=score_chunks.drawn_size(job, dataset)), dataset


def _protocol(settings: Settings, job: ScoreJob, dataset: Dataset, measures: Measures) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    return {
        "generated": len(measures.generated.rows),
        "real": len(measures.real.rows),
        "train": 0 if measures.train is None else len(measures.train.rows),
        "split": job.split,
        "data": dataset.source,
        "captions": "the captions of each sample in turn, samples in an order drawn by the seed",
        "seed": job.seed,
        "truncation": job.truncation,
        "pixels": job.pixels,
        "jpeg": job.jpeg,
        "crop": job.data.crop,
        "extractors": [score_chunks.looker(job, number).facts for number in range(len(job.looks))],
        "inception_splits": settings.splits,
        "kid_subset": measures.kid_subset,
        "export": storage.redact(settings.export),
        "export_sha256": job.export_sha256,
        "version": t2idist.__version__,
    }


# ------------------------------------------------------------ for people
NOT_PROTOCOL = ("export", "export_sha256")
"""What may differ between two results that are compared."""


def _read(folder: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = storage.read_json(storage.join(folder, RESULT))
    except FileNotFoundError:
        raise ValueError(f"--beside {storage.redact(folder)}: no {RESULT} there") from None
    return found


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What is not the same in two protocols, a sentence each; none: their numbers can be compared."""
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in NOT_PROTOCOL]
    return [
        f"{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def beside(result: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """Another result's values beside these; where the protocols differ, that is said first."""
    apart = differences(result["protocol"], other["protocol"])
    lines = [f"beside {name}, {'the same protocol' if not apart else 'ANOTHER PROTOCOL:'}", *(f"  {x}" for x in apart)]
    theirs = {row["name"]: row for row in other["scores"]}
    for row in result["scores"]:
        if row["name"] in theirs:
            lines.append(f"{row['name']:14}{row['value']:>10.4g}{theirs[row['name']]['value']:>12.4g}")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """The scores in columns, under their protocol."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    lines = [f"{key}: {value}" for key, value in result["protocol"].items() if key != "extractors"]
    for facts in result["protocol"]["extractors"]:
        lines.append("extractor: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    lines.append(f"{'':14}{'generated':>11}{'error':>11}{'95 %':>22}{'real':>11}{'chance':>8}{'n':>8}")
    for row in result["scores"]:
        reach = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        lines.append(
            f"{row['name']:14}{number(row['value']):>11}{number(row['error']):>11}{reach:>22}{number(row['real']):>11}"
            f"{number(row['chance']):>8}{row['n']:8d}  {row['note']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
