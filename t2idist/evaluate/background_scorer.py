"""Scores during training: a process of its own takes the averaged weights, and training goes on meanwhile.

The first worker writes the weights as an export and names it to the process (`BackgroundScorer`), which scores it piece by piece,
and sleeps between the pieces so that it never takes more of the machine's time than it may; what comes while it is busy
is left out. It leaves a line a score in scored/scores.jsonl, and keeps the export that was best.
"""

from __future__ import annotations

import json
import logging
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
from t2idist.evaluate.feature_extractors import Weights, open_extractor
from t2idist.evaluate.score import Settings, score_in_background

logger = logging.getLogger(__name__)

SCORED, LINES, BEST = "scored", "scores.jsonl", "best.json"
SMALLER_IS_BETTER = ("fid", "kid")
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 5.0
OUT_OF_TIME = 3
"""The process's exit status where its time was not enough."""
T = TypeVar("T")


class BackgroundScorer:
    """The first worker's side. folder: the stage's. index: of an export at so many images."""

    def __init__(self, config: ScoresConfig, folder: str, index: Callable[[int], dict[str, Any]]) -> None:
        settings_of(config, "", "")  # so that what is wrong is said now
        open_extractor(config.extractor, Weights(config.weights, config.weights_sha256), torch.device("cpu"))
        self._stage, self._folder = folder, storage.join(folder, SCORED)
        self._index, self._share = index, config.share
        self._offered: int | None = None
        self._begun = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if config.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t2idist.evaluate.background_scorer"],
            stdin=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._say({"folder": folder, "config": asdict(config)})

    def offer(self, nets: Mapping[str, nn.Module], images: int, *, last: bool) -> None:
        """Have these networks scored, if those before them are done; the last ones in any case."""
        done = {int(line["images"]) for line in read_lines(self._stage)}
        busy = self._offered is not None and self._offered not in done
        if images in done or (busy and not last):
            return
        self._offered = images
        url = storage.join(self._folder, f"{images:012d}")
        export.write(url, nets, self._index(images))
        self._say({"images": images, "export": url})

    def close(self, finished: bool) -> None:
        """End the process; where the stage is finished, what was offered last gets the time that is left to it."""
        patience = 0.0
        if finished:
            self._say({"end": True})
            patience = self._share * (time.monotonic() - self._begun) + PATIENCE_SECONDS
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if finished and self._process.returncode != 0:
            logger.warning("the last weights were not scored: it would have taken more than scores.share of the time")

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            logger.warning("scoring has ended by itself; see what it said")


def settings_of(config: ScoresConfig, url: str, folder: str) -> Settings:
    """What is asked of an export by a run's configuration."""
    names = ("metrics", "n", "real", "train", "extractor", "weights", "weights_sha256", "judge", "device")
    return Settings(url, out=folder, bootstrap=0, **{name: getattr(config, name) for name in names})


def read_lines(folder: str) -> list[dict[str, Any]]:
    """What was scored of a stage so far, in order of images."""
    where = storage.join(folder, SCORED, LINES)
    if not storage.exists(where):
        return []
    return [json.loads(line) for line in storage.read_bytes(where).decode().splitlines()]


def read_best(folder: str) -> dict[str, Any] | None:
    """The best weights of a stage so far: images, metric, value, and the folder of their export in the stage's."""
    where = storage.join(folder, SCORED, BEST)
    found: dict[str, Any] | None = storage.read_json(where) if storage.exists(where) else None
    return found


class TimeShare:
    """Called between pieces of work: sleeps until the work has taken no more than its share of the time.

    used: seconds of work so far; None: all the time in which it did not sleep (what an accelerator does is not seen).
    """

    def __init__(
        self,
        share: float,
        used: Callable[[], float] | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._share, self._clock, self._sleep = share, clock, sleep
        self._begun, self._asleep = clock(), 0.0
        self._used = used if used is not None else lambda: clock() - self._begun - self._asleep
        self.free = False

    def __call__(self) -> None:
        while not self.free and self.left() < 0:
            self.asleep(lambda: self._sleep(LOOK_SECONDS))

    def left(self) -> float:
        """Seconds of work for which there is time now."""
        return self._share * (self._clock() - self._begun) - self._used()

    def asleep(self, wait: Callable[[], T]) -> T:
        """Wait; that is no work."""
        since = self._clock()
        found = wait()
        self._asleep += self._clock() - since
        return found


def _used_cpu() -> float:
    """Seconds of the whole machine that this process has taken."""
    return time.process_time() / (os.cpu_count() or 1)


def main(source: IO[str]) -> int:
    """The process: takes exports by name from `source`, a JSON line each, until it ends."""
    os.nice(10)
    torch.set_num_threads(1)
    first = json.loads(source.readline())
    config, folder = from_dict(ScoresConfig, first["config"]), first["folder"]
    pace = TimeShare(config.share, _used_cpu if config.device == "cpu" else None)
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in source:
            message = json.loads(line)
            if message.get("end"):  # the machine is free, and whoever started this waits
                pace.free = True
                alarm = threading.Timer(max(pace.left(), 0.0), os._exit, (OUT_OF_TIME,))
                alarm.daemon = True
                alarm.start()
                waiting.put(None)
                return
            waiting.put(message)
        os._exit(0)  # the worker is gone, and with it the reason for this

    threading.Thread(target=listen, daemon=True).start()
    while True:
        message = pace.asleep(waiting.get)
        ended = message is None
        while not waiting.empty():
            newer = waiting.get()
            ended, message = ended or newer is None, newer or message
        if message is not None:
            take(config, folder, message, pace)
        if ended:
            return 0


def take(config: ScoresConfig, folder: str, message: Mapping[str, Any], pace: Callable[[], None]) -> None:
    """Score one export, note it, and keep the best one only."""
    scored = storage.join(folder, SCORED)
    _clean(folder, message["images"], message["export"])
    try:
        result = score_in_background(settings_of(config, message["export"], scored), pace)
    except ValueError as error:
        print(f"scores of {message['images']} images: {error}", file=sys.stderr)
        return
    values = {row["name"]: row["value"] for row in result["scores"]}
    lines = [line for line in read_lines(folder) if line["images"] != message["images"]]
    lines.append({"images": message["images"], **values, "protocol": result["protocol"]})
    lines.sort(key=lambda line: int(line["images"]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(scored, LINES), text.encode())
    best = read_best(folder)
    if config.best in values and (best is None or _better(config.best, values[config.best], best["value"])):
        best = {"images": message["images"], "metric": config.best, "value": values[config.best]}
        storage.write_json(storage.join(scored, BEST), {**best, "export": f"{SCORED}/{message['images']:012d}"})
    _clean(folder, message["images"])


def _better(metric: str, value: float, than: float) -> bool:
    return value < than if metric in SMALLER_IS_BETTER else value > than


def _clean(folder: str, images: int, kept: str = "") -> None:
    """Remove the exports up to these images, but for the best one and `kept`."""
    scored, best = storage.join(folder, SCORED), read_best(folder)
    stay = {kept, storage.join(folder, best["export"]) if best else ""}
    for name in storage.list_dir(scored):
        url = storage.join(scored, name)
        if name.isdigit() and int(name) <= images and url not in stay:
            storage.remove(url)


if __name__ == "__main__":
    sys.exit(main(sys.stdin))
