"""Score an export with a recorded protocol: the command ``t2idist score``.

Images are generated for the captions of a split that was not trained on, and compared with the real ones. The work is
done in chunks by --workers processes (on a Ray cluster with --address); the values do not depend on their number. All
that they do depend on is stored next to them as the protocol. An interrupted scoring resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import t2idist
from t2idist import storage
from t2idist.config import METRICS, DataConfig
from t2idist.config.arguments import command_parser
from t2idist.config.strict import from_dict
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.engine.checkpoint import export
from t2idist.evaluate import earlier_scores, score_chunks, score_sheets
from t2idist.evaluate.earlier_scores import SCORES_FILE
from t2idist.evaluate.feature_extractors import DEFAULT, EXTRACTORS, WeightsFile
from t2idist.evaluate.metrics import (
    EXTRACTOR_OF_METRIC,
    NEEDS_TRAIN,
    MetricCalculator,
    MetricOptions,
    check_sample_counts,
)
from t2idist.evaluate.score_chunks import ExtractorSpec, ScoreChunk, ScoreJob
from t2idist.observability.command import BAD_INPUT, command
from t2idist.observability.progress_bar import ProgressBar

NOT_PROTOCOL = ("export", "export_sha256", "captions_per_image")
"""Keys of the protocol that `differences` ignores: scores of two exports can be compared, and n gives the captions."""
COCO = "coco"
"""Source of the sets that tools/shard_coco.py makes."""
T = TypeVar("T")


class MapUnordered(Protocol):
    def __call__(
        self, work: Callable[[T], Any], tasks: Iterable[T], workers: int, address: str = "", *, gpus: int = 0
    ) -> Iterator[Any]:
        """Call `work` on every task; yields the results in any order (see launch.parallel.map_unordered)."""
        ...


def map_in_process(
    work: Callable[[T], Any], tasks: Iterable[T], workers: int, address: str = "", *, gpus: int = 0
) -> Iterator[Any]:
    """Call `work` on every task in this process. Raises ValueError for `workers` > 0."""
    if workers:
        raise ValueError(f"--workers {workers}: only the command t2idist score starts worker processes; give 0")
    yield from map(work, tasks)


@dataclass(frozen=True)
class Settings:
    """The options of the command that define a scoring, under their names."""

    export: str
    system: str = ""
    data: str = ""
    split: str = ""
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
            raise ValueError(f"--metrics {unknown[0]}: allowed are {', '.join(METRICS)}")
        for flag, least in (("n", 2), ("real", 0), ("train", 1), ("splits", 1), ("subset", 0), ("bootstrap", 0)):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} {getattr(self, flag)}: give at least {least}")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers}: give at least 0, which is this process alone")
        if not 0 <= self.jpeg <= 100:
            raise ValueError(f"--jpeg {self.jpeg}: allowed are 1 to 100, or 0 for no encoding")
        if self.export.startswith("hf://") and not self.out:
            raise ValueError(f"--export {self.export}: give --out, a folder for the scores")
        if "damsm_r" in self.metrics and not self.judge:
            raise ValueError("--metrics damsm_r: give a DAMSM of another run with --judge URL")

    @property
    def folder(self) -> str:
        """Folder of the scores; by default next to the export."""
        return self.out or storage.join(self.export.rstrip("/").rpartition("/")[0] or ".", "scores")

    @property
    def work(self) -> str:
        """Folder of the chunks."""
        return storage.join(self.folder, "work")


# ------------------------------------------------------------ the command
@command("score", failed=BAD_INPUT)
def main(arguments: Sequence[str] | None = None, map_unordered: MapUnordered = map_in_process) -> int:
    """Run ``t2idist score``.

    Args:
        arguments: command line; None: that of the process.
        map_unordered: distributes the chunks over worker processes.

    Returns:
        The exit status: 0, 1 if a limit of --fail-above or --fail-below was crossed, 2 for any error.
    """
    options = _parser().parse_args(arguments)
    limits = [*_limits("above", options.fail_above), *_limits("below", options.fail_below)]
    metrics = tuple(name.strip() for name in options.metrics.split(",") if name.strip())
    values = {**vars(options), "metrics": metrics}
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    others = [(url, _read(url)) for url in options.beside]
    result = score(settings, map_unordered)
    measured = {row["name"] for row in result["scores"]}
    if missing := [limit.name for limit in limits if limit.name not in measured]:
        raise ValueError(f"--fail-above, --fail-below: {missing[0]} was not measured; use {', '.join(measured)}")
    print(table(result))
    for url, other in others:
        print(compare(result, other, storage.redact(url)))
    print(f"in {storage.redact(storage.join(settings.folder, SCORES_FILE))}")
    crossed = [limit.text for limit in limits for row in result["scores"] if limit.crossed(row)]
    for text in crossed:
        print(f"score: {text}", file=sys.stderr)
    return 1 if crossed else 0


def _parser() -> argparse.ArgumentParser:
    default = Settings("")
    parser = command_parser(
        "score", "Score an export.", "t2idist score --export RUN/attngan/export --metrics fid,kid,r_precision --n 6000"
    )
    parser.usage = "%(prog)s --export URL [options]"
    add = parser.add_argument
    add("--export", required=True, metavar="URL", help="folder of an export of a system that generates images")
    add("--system", default="", metavar="MODULE", help="module of a custom system, as the export names it")
    add("--data", default="", metavar="SOURCE", help="real images and captions (default: the training data)")
    add("--split", default="", help="split of the data (default: test, or val if there is none; COCO: val)")
    add("--metrics", default=",".join(default.metrics), help=f"of {','.join(METRICS)} (default: %(default)s)")
    add("--n", type=int, default=default.n, help="generated images (default: %(default)s)")
    add("--real", type=int, default=0, metavar="N", help="real images (default: all of the split)")
    add("--train", type=int, default=default.train, metavar="N", help="training images (default: %(default)s)")
    add("--extractor", default=DEFAULT, metavar="NAME", choices=tuple(EXTRACTORS), help=f"of {', '.join(EXTRACTORS)}")
    add("--weights", default="", metavar="URL", help="weights of the extractor")
    add("--weights-sha256", default="", metavar="HEX", help="hash of that file")
    add("--background", action="store_true", help="is: ignore class 0 of the classifier (CUB)")
    add("--clip", default="", metavar="FOLDER", help="clip_r: folder of a CLIP model")
    add("--clip-sha256", default="", metavar="HEX", help="clip_r: hash of its model.safetensors")
    add("--judge", default="", metavar="URL", help="damsm_r: export of a DAMSM of another run")
    add("--truncation", type=float, metavar="T", help="redraw noise of a magnitude above T")
    add("--jpeg", type=int, default=0, metavar="Q", help="encode all images as JPEG of quality Q first")
    add("--splits", type=int, default=default.splits, metavar="N", help="is: splits (default: %(default)s)")
    add("--subset", type=int, default=0, metavar="N", help="kid: images in a subset (default: 1000, or half of them)")
    add("--bootstrap", type=int, default=default.bootstrap, metavar="N", help="draws for errors (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of noise, samples and subsets (default: 0)")
    add("--workers", type=int, default=0, metavar="N", help="worker processes (default: 0, this process alone)")
    add("--address", default="", help="Ray cluster of the workers, all of which must see --out")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--out", default="", metavar="URL", help="folder to write to (default: scores, next to the export)")
    add("--beside", action="append", default=[], metavar="URL", help="folder of other scores to compare with")
    add("--fail-above", action="append", default=[], metavar="NAME=VALUE", help="exit with status 1 above the value")
    add("--fail-below", action="append", default=[], metavar="NAME=VALUE", help="exit with status 1 below the value")
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


def _limits(side: str, arguments: Iterable[str]) -> list[_Limit]:
    limits = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            limits.append(_Limit(name, side, float(value)))
        except ValueError:
            raise ValueError(f"--fail-{side} {argument}: expected NAME=VALUE, such as kid=0.05") from None
    return limits


# ------------------------------------------------------------ the work
def score(settings: Settings, map_unordered: MapUnordered = map_in_process) -> dict[str, Any]:
    """Score an export; writes scores.json and sheets of images, and returns the content of scores.json.

    Raises ValueError if the export cannot be scored as asked.
    """
    job, dataset = make_job(settings)
    tasks = [(job, chunk, settings.work) for chunk in score_chunks.score_chunks(job)]
    gpus = int(settings.device != "cpu")
    with ProgressBar(unit="chunk") as bar:
        bar.update(0, len(tasks))
        computed = map_unordered(_compute_chunk, tasks, settings.workers, settings.address, gpus=gpus)
        for done, _ in enumerate(computed, 1):
            bar.update(done, len(tasks))
    metrics = _metrics(settings, job, dataset)
    result = _result(settings, job, dataset, metrics)
    earlier, copy = earlier_scores.set_aside(settings.folder, result["protocol"])
    if copy is not None:
        print(f"score: earlier scores of another protocol are kept in {storage.redact(copy)}", file=sys.stderr)
    result["sheets"] = score_sheets.write(job, metrics, dataset, settings.folder)
    result = earlier_scores.merge(earlier, result)
    storage.write_json(storage.join(settings.folder, SCORES_FILE), result)
    return result


def score_in_background(settings: Settings, before_chunk: Callable[[], None]) -> dict[str, Any]:
    """Score in this process and write nothing permanent; `before_chunk` is called before each chunk."""
    job, dataset = make_job(settings)
    for chunk in score_chunks.score_chunks(job):
        before_chunk()
        score_chunks.compute_chunk(job, chunk, settings.work)
    before_chunk()
    result = _result(settings, job, dataset, _metrics(settings, job, dataset))
    score_chunks.remove_generated_chunks(job, settings.work)
    return result


def _compute_chunk(task: tuple[ScoreJob, ScoreChunk, str]) -> None:
    score_chunks.compute_chunk(*task)


def _metric_options(settings: Settings) -> MetricOptions:
    return MetricOptions(settings.background, settings.splits, settings.subset, settings.bootstrap)


def _metrics(settings: Settings, job: ScoreJob, dataset: Dataset) -> MetricCalculator:
    return MetricCalculator(job, _metric_options(settings), dataset, settings.work)


def _result(settings: Settings, job: ScoreJob, dataset: Dataset, metrics: MetricCalculator) -> dict[str, Any]:
    rows = metrics.rows(settings.metrics)
    return {
        "protocol": _protocol(settings, job, dataset, metrics),
        "scores": [asdict(row) for row in rows],
        "breakdown": metrics.breakdown(),
    }


def make_job(settings: Settings) -> tuple[ScoreJob, Dataset]:
    """Return the job and its data set. Raises ValueError if export, data and extractors do not fit together."""
    index = export.read_index(settings.export)
    trained_on = (index.get("data") or {}).get("settings")
    where = f"{storage.redact(settings.export)}: data"
    data = from_dict(DataConfig, trained_on, where) if trained_on else DataConfig(crop=1.0)
    if settings.data:
        data = replace(data, source=settings.data, beside=())
    dataset = open_dataset(data)
    split = settings.split or default_split(dataset)
    if split not in dataset.splits:
        raise ValueError(f"--split {split}: the data has {', '.join(dataset.splits)}")
    in_split = len(dataset.split(split))
    train = 0
    if set(settings.metrics) & set(NEEDS_TRAIN):
        if "train" not in dataset.splits:
            raise ValueError(f"--metrics {settings.metrics}: the data has no split 'train' to compare with")
        train = min(settings.train, len(dataset.split("train")))
    extractors = [ExtractorSpec(settings.extractor, WeightsFile(settings.weights, settings.weights_sha256))]
    weights = {"clip_r": WeightsFile(settings.clip, settings.clip_sha256), "damsm_r": WeightsFile(settings.judge)}
    extractors += [
        ExtractorSpec(name, weights[metric])
        for metric, name in EXTRACTOR_OF_METRIC.items()
        if metric in settings.metrics
    ]
    job = ScoreJob(
        export=storage.absolute(settings.export),
        export_sha256=storage.sha256(storage.read_bytes(storage.join(settings.export, export.INDEX))),
        custom_system=settings.system,
        data=data,
        split=split,
        pixels=0,
        n=settings.n,
        real=min(settings.real or in_split, in_split),
        train=train,
        seed=settings.seed,
        truncation=settings.truncation,
        jpeg=settings.jpeg,
        extractors=tuple(extractors),
        device=settings.device,
    )
    check_sample_counts(job, _metric_options(settings), settings.metrics, dataset)
    for extractor in range(len(extractors)):
        score_chunks.extractor_of(job, extractor)  # reports an invalid extractor before the work begins
    return replace(job, pixels=score_chunks.generated_size(job, dataset)), dataset


def default_split(dataset: Dataset) -> str:
    """Return the split that is scored unless the user names one: test, or val if there is no test split with captions.

    Of COCO it is val, as in the papers: the captions of its test images are not public.
    """
    test = dataset.splits.get("test")
    if (val := dataset.splits.get("val")) is None:
        return "test"
    uncaptioned = test is not None and not test.has_captions() and val.has_captions()
    return "val" if test is None or uncaptioned or dataset.source == COCO else "test"


def _captions_per_image(job: ScoreJob, dataset: Dataset) -> int:
    """Return the largest number of captions of one sample that images are generated for."""
    return -(-job.n // len(dataset.split(job.split)))


def _protocol(settings: Settings, job: ScoreJob, dataset: Dataset, metrics: MetricCalculator) -> dict[str, Any]:
    """Return everything that the values depend on."""
    return {
        "generated": len(metrics.generated.rows),
        "real": len(metrics.real.rows),
        "train": 0 if metrics.train is None else len(metrics.train.rows),
        "split": job.split,
        "data": dataset.source,
        "captions": "the captions of each sample in turn, samples in an order drawn by the seed",
        "captions_per_image": _captions_per_image(job, dataset),
        "seed": job.seed,
        "truncation": job.truncation,
        "pixels": job.pixels,
        "jpeg": job.jpeg,
        "crop": job.data.crop,
        "extractors": [score_chunks.extractor_of(job, extractor).facts for extractor in range(len(job.extractors))],
        "inception_splits": settings.splits,
        "kid_subset": metrics.kid_subset,
        "export": storage.redact(settings.export),
        "export_sha256": job.export_sha256,
        "version": t2idist.__version__,
        **({"background": True} if settings.background else {}),
    }


# ------------------------------------------------------------ output
def _read(folder: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = storage.read_json(storage.join(folder, SCORES_FILE))
    except FileNotFoundError:
        raise ValueError(f"--beside {storage.redact(folder)}: has no {SCORES_FILE}") from None
    return result


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Describe each difference of two protocols; if there is none, their values can be compared."""
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in NOT_PROTOCOL]
    return [
        f"{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def compare(result: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """Format the values of two results next to each other, after the differences of their protocols."""
    different = differences(result["protocol"], other["protocol"])
    protocol = "DIFFERENT PROTOCOL:" if different else "the same protocol"
    lines = [f"compared with {name}, {protocol}", *(f"  {difference}" for difference in different)]
    theirs = {row["name"]: row for row in other["scores"]}
    for row in result["scores"]:
        if row["name"] in theirs:
            lines.append(f"{row['name']:14}{row['value']:>10.4g}{theirs[row['name']]['value']:>12.4g}")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """Format the scores in columns, after their protocol."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    lines = [f"{key}: {value}" for key, value in result["protocol"].items() if key != "extractors"]
    for facts in result["protocol"]["extractors"]:
        lines.append("extractor: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    lines.append(f"{'':14}{'generated':>11}{'error':>11}{'95 %':>22}{'real':>11}{'bias':>10}{'chance':>8}{'n':>8}")
    for row in result["scores"]:
        interval = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        lines.append(
            f"{row['name']:14}{number(row['value']):>11}{number(row['error']):>11}{interval:>22}"
            f"{number(row['real']):>11}{number(row.get('bias')):>10}{number(row['chance']):>8}{row['n']:8d}"
            f"  {row['note']}"
        )
    return "\n".join(lines)
