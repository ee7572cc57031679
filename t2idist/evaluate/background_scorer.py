"""Scores during training, computed by a process in parallel with the training.

The first worker writes the averaged weights as an export and sends its URL to the process (`BackgroundScorer`). The
process scores it chunk by chunk and sleeps in between, so that it stays within its share of the machine's time.
Weights that arrive while it is busy are skipped. It appends a line per score to scored/scores.jsonl and keeps the best
export.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import IO, Any, TypeVar

import torch
from torch import nn

from t2idist import storage
from t2idist.config import ScoresConfig
from t2idist.config.strict import from_dict
from t2idist.engine.checkpoint import export
from t2idist.evaluate.feature_extractors import WeightsFile, open_extractor
from t2idist.evaluate.score import Settings, score_in_background
from t2idist.evaluate.score_chunks import DamsmExtractor

logger = logging.getLogger(__name__)

SCORED_FOLDER, SCORES_FILE, BEST_FILE = "scored", "scores.jsonl", "best.json"
SMALLER_IS_BETTER = ("fid", "kid")
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
EXIT_OUT_OF_TIME = 3
"""Exit status of the process if its share of the time was not enough."""
T = TypeVar("T")
OnScores = Callable[[int, Mapping[str, float]], None]
"""Takes the images that scored weights have seen, and the scores by name."""


class BackgroundScorer:
    """The worker's side: starts the process and sends it exports.

    Args:
        config: what is scored.
        folder: URL of the stage.
        index: returns the index of an export of the stage at a number of images.
        on_scores: called with every score of this attempt, from another thread.

    Raises:
        ValueError: the configuration is invalid.
    """

    def __init__(
        self,
        config: ScoresConfig,
        folder: str,
        index: Callable[[int], dict[str, Any]],
        on_scores: OnScores = lambda images, scores: None,
    ) -> None:
        check(config)
        self._stage, self._folder = folder, storage.join(folder, SCORED_FOLDER)
        self._index, self._share = index, config.share
        self._submitted: int | None = None
        self._started = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if config.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t2idist.evaluate.background_scorer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._follower = threading.Thread(target=self._follow, args=(on_scores,), name="scores", daemon=True)
        self._follower.start()
        self._send({"folder": folder, "config": asdict(config)})

    def submit(self, nets: Mapping[str, nn.Module], images: int, *, last: bool) -> None:
        """Have the networks scored, unless the process is busy; the last ones always."""
        done = {int(line["images"]) for line in read_scores(self._stage)}
        busy = self._submitted is not None and self._submitted not in done
        if images in done or (busy and not last):
            return
        self._submitted = images
        url = storage.join(self._folder, f"{images:012d}")
        export.write(url, nets, self._index(images))
        self._send({"images": images, "export": url})

    def close(self, finished: bool) -> None:
        """End the process. If the stage is finished, first wait while the process has time left for the last scores."""
        timeout: float | None = 0.0
        if finished:
            self._send({"end": True})
            elapsed = time.monotonic() - self._started
            timeout = self._share * elapsed + GRACE_SECONDS if self._share < 1 else None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._follower.join(GRACE_SECONDS)
        if finished and self._process.returncode != 0:
            logger.warning("the last weights were not scored: that would take more than scores.share of the time")

    def _follow(self, on_scores: OnScores) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            on_scores(message["images"], message["scores"])

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            logger.warning("the scoring process has ended; its last output says why")


def check(config: ScoresConfig, with_judge: bool = True) -> None:
    """Check the configuration, and that its extractors can be opened.

    Args:
        with_judge: the judge has been trained.

    Raises:
        ValueError: They cannot; the message has the options of ``t2idist score``, which the keys are named like.
    """
    cpu = torch.device("cpu")
    try:
        score_settings(config, "", "")
        open_extractor(config.extractor, WeightsFile(config.weights, config.weights_sha256), cpu)
        if "clip_r" in config.metrics:
            raise ValueError("--metrics clip_r: not during training; give it to t2idist score")
        if "damsm_r" in config.metrics and with_judge:
            DamsmExtractor(config.judge, cpu)
    except ValueError as error:
        raise ValueError(f"scores: {error}") from None


def score_settings(config: ScoresConfig, url: str, folder: str) -> Settings:
    """Return the settings that score an export as a run's configuration asks."""
    names = ("metrics", "n", "real", "train", "extractor", "weights", "weights_sha256", "judge", "device")
    return Settings(url, out=folder, bootstrap=0, **{name: getattr(config, name) for name in names})


def read_scores(folder: str) -> list[dict[str, Any]]:
    """Read the scores of a stage so far, in order of images."""
    url = storage.join(folder, SCORED_FOLDER, SCORES_FILE)
    if not storage.exists(url):
        return []
    return [json.loads(line) for line in storage.read_bytes(url).decode().splitlines()]


def read_best(folder: str) -> dict[str, Any] | None:
    """Read the best score of a stage so far: images, metric, value, and its export relative to the stage."""
    url = storage.join(folder, SCORED_FOLDER, BEST_FILE)
    best: dict[str, Any] | None = storage.read_json_if_present(url)
    return best


class TimeShare:
    """Limits work to a share of the time: a call sleeps until the work so far is within it.

    Args:
        share: largest share of the time; 1 is no limit.
        used: returns the seconds of work so far. None counts all time outside of `exclude` (the use of an accelerator
            cannot be measured).
        clock: returns the time in seconds.
        sleep: sleeps a number of seconds.
    """

    def __init__(
        self,
        share: float,
        used: Callable[[], float] | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._share, self._clock, self._sleep = share, clock, sleep
        self._started, self._excluded = clock(), 0.0
        self._used = used if used is not None else lambda: clock() - self._started - self._excluded
        self.unlimited = share == 1

    def __call__(self) -> None:
        while self.seconds_left() < 0:
            self.exclude(lambda: self._sleep(POLL_SECONDS))

    def seconds_left(self) -> float:
        """Return how many seconds of work are within the share now."""
        if self.unlimited:
            return math.inf
        return self._share * (self._clock() - self._started) - self._used()

    def exclude(self, wait: Callable[[], T]) -> T:
        """Call `wait` without counting its time as work."""
        since = self._clock()
        result = wait()
        self._excluded += self._clock() - since
        return result


def _cpu_seconds() -> float:
    """Return the CPU time of this process in seconds of the whole machine."""
    return time.process_time() / (os.cpu_count() or 1)


def main(messages: IO[str]) -> int:
    """Run the process: score the exports that `messages`, one JSON object per line, name, until it ends.

    Its standard output is a JSON object per score; what libraries print goes to standard error.
    """
    os.nice(10)
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    first = json.loads(messages.readline())
    config, folder = from_dict(ScoresConfig, first["config"]), first["folder"]
    time_share = TimeShare(config.share, _cpu_seconds if config.device == "cpu" else None)
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def receive() -> None:
        for line in messages:
            message = json.loads(line)
            if message.get("end"):  # training is over and its worker waits
                if not time_share.unlimited:
                    timer = threading.Timer(max(time_share.seconds_left(), 0.0), os._exit, (EXIT_OUT_OF_TIME,))
                    timer.daemon = True
                    timer.start()
                    time_share.unlimited = True
                waiting.put(None)
                return
            waiting.put(message)
        os._exit(0)  # the worker has ended

    threading.Thread(target=receive, daemon=True).start()
    while True:
        message = time_share.exclude(waiting.get)
        ended = message is None
        while not waiting.empty():
            newer = waiting.get()
            ended, message = ended or newer is None, newer or message
        if message is not None:
            scores = score_export(config, folder, message, time_share)
            if scores is not None:
                print(json.dumps({"images": message["images"], "scores": scores}), file=results, flush=True)
        if ended:
            return 0


def score_export(
    config: ScoresConfig, folder: str, message: Mapping[str, Any], before_chunk: Callable[[], None]
) -> dict[str, float] | None:
    """Score one export, record the result, and keep only the best export; return the scores, None if there are none."""
    scored = storage.join(folder, SCORED_FOLDER)
    _clean(folder, message["images"], message["export"])
    try:
        result = score_in_background(score_settings(config, message["export"], scored), before_chunk)
    except ValueError as error:
        print(f"scores of {message['images']} images: {error}", file=sys.stderr)
        return None
    values: dict[str, float] = {row["name"]: row["value"] for row in result["scores"]}
    lines = [line for line in read_scores(folder) if line["images"] != message["images"]]
    lines.append({"images": message["images"], **values, "protocol": result["protocol"]})
    lines.sort(key=lambda line: int(line["images"]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(scored, SCORES_FILE), text.encode())
    best = read_best(folder)
    if config.best in values and (best is None or _better(config.best, values[config.best], best["value"])):
        best = {"images": message["images"], "metric": config.best, "value": values[config.best]}
        url = f"{SCORED_FOLDER}/{message['images']:012d}"
        storage.write_json(storage.join(scored, BEST_FILE), {**best, "export": url})
    _clean(folder, message["images"])
    return values


def _better(metric: str, value: float, than: float) -> bool:
    return value < than if metric in SMALLER_IS_BETTER else value > than


def _clean(folder: str, images: int, kept: str = "") -> None:
    """Remove the exports up to a number of images, except the best one and `kept`."""
    scored, best = storage.join(folder, SCORED_FOLDER), read_best(folder)
    keep = {kept, storage.join(folder, best["export"]) if best else ""}
    for name in storage.list_dir(scored):
        url = storage.join(scored, name)
        if name.isdigit() and int(name) <= images and url not in keep:
            storage.remove(url)


if __name__ == "__main__":
    sys.exit(main(sys.stdin))
