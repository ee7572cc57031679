"""Where a submission stops, what it goes on from, who hears of it, how it is read, and what it never tells."""

from __future__ import annotations

import datetime
import http.server
import io
import json
import shutil
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from t2idist import run, storage
from t2idist.config import RunConfig, load
from t2idist.engine.checkpoint import export
from t2idist.engine.checkpoint.format import images_of, list_committed
from t2idist.engine.preemption import StopRequested
from t2idist.engine.world import World
from t2idist.observability import environment, hook
from t2idist.preflight import dry_run
from t2idist.report import status
from t2idist.training import lifecycle, options, resume, stages
from tests.helpers import small_systems
from tests.helpers.runs import check_finished, copy_run, export_bytes, run_command, write_recipe
from tools import notify_webhook


def config(folder: Path, *words: str) -> RunConfig:
    return stages.with_absolute_paths(load(str(write_recipe(folder)), words))


# ------------------------------------------------------------ where it stops
@pytest.mark.parametrize(
    ("text", "expected"),
    [("damsm", options.StopAfter("damsm", None)), ("attngan:40", options.StopAfter("attngan", 40))],
)
def test_stops_that_are_understood(text: str, expected: options.StopAfter, tmp_path: Path) -> None:
    assert options.parse_stop_after(text, config(tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "dams",
            "--stop-after: dams: give one of the stages damsm, attngan, or images of one of them, such as attngan:32",
        ),
        ("40", "--stop-after: 40: give one of the stages .* such as attngan:40"),
        ("dams:40", "no stage 'dams'; there are damsm, attngan"),
        ("attngan:0", "0 images of stage attngan; allowed are 1 to 64, its budget"),
        ("attngan:65", "65 images of stage attngan; allowed are 1 to 64"),
        ("attngan:x", "x images of stage attngan; allowed"),
    ],
)
def test_stops_that_are_not(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        options.parse_stop_after(text, config(tmp_path))


def test_a_stop_is_at_the_first_step_that_reaches_it(tmp_path: Path) -> None:
    made = config(tmp_path)
    one = replace(made, stages={"damsm": made.stages["damsm"]})
    assert options.parse_stop_after("17", one) == options.StopAfter("damsm", 17)
    stop = options.StopAfter("damsm", 17)
    assert stop.steps("damsm", made.stages["damsm"]) == 3 and stop.steps("attngan", made.stages["attngan"]) == 8
    assert options.StopAfter("damsm", None).steps("damsm", made.stages["damsm"]) == 8


# ------------------------------------------------------------ who hears of it
@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hook's program; what it hears is in `heard`, and its environment in `environment`, beside it."""
    program = tmp_path / "listener"
    program.write_text(f"#!/bin/sh\ncat >> {tmp_path}/heard; env > {tmp_path}/environment; exit $T2IDIST_HOOK_STATUS\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("T2IDIST_HOOK_STATUS", "0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret of the environment")
    return program


def heard(listener: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (listener.parent / "heard").read_text().splitlines()]


def test_the_hook_hears_start_restart_and_end_and_no_secret(listener: Path, tmp_path: Path) -> None:
    made = config(tmp_path)
    message = {"stage": "damsm", "images": 8, "budget_images": 64, "restarts": 0, "losses": {"a": 1.0}, "run": "tiny"}
    with lifecycle.run_lifecycle(made, hook.Hook([str(listener)]), stops=False) as telling:
        telling.follow(message)
        telling.follow({**message, "images": 16, "restarts": 1})
        telling.follow({**message, "images": 24, "restarts": 1})
    events = heard(listener)
    assert [event["event"] for event in events] == ["start", "restart", "end"]
    assert events[1]["images"] == 16 and events[2]["restarts"] == 1 and events[0]["run"] == "tiny"
    environment = (tmp_path / "environment").read_text()
    assert "T2IDIST_HOOK_STATUS=0" in environment and "PATH=" in environment and "AWS_" not in environment
    assert storage.read_json(storage.join(stages.run_url(made), lifecycle.OUTCOME))["state"] == "finished"


@pytest.mark.parametrize(
    ("fault", "state", "last"),
    [
        (RuntimeError("the store said: a secret of the environment"), "failed", "failure"),
        (StopRequested("saved at 8 images"), "stopped", "end"),
        (KeyboardInterrupt(), "interrupted", "end"),
    ],
)
def test_how_it_ended_is_told_and_kept(
    fault: BaseException, state: str, last: str, listener: Path, tmp_path: Path
) -> None:
    made = config(tmp_path)
    with pytest.raises(type(fault)), lifecycle.run_lifecycle(made, hook.Hook([str(listener)]), stops=False):
        raise fault
    kept = storage.read_json(storage.join(stages.run_url(made), lifecycle.OUTCOME))
    assert kept["state"] == state and heard(listener)[-1]["event"] == last
    assert "a secret" not in json.dumps(heard(listener)) + json.dumps(kept)
    assert state != "failed" or kept["error"] == "the store said: ***"


def test_a_hook_that_fails_or_hangs_is_a_warning(
    listener: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("T2IDIST_HOOK_STATUS", "3")
    monkeypatch.setattr(hook, "LONGEST_SECONDS", 1.0)
    for words in ([str(listener)], [sys.executable, "-c", "import time; time.sleep(60)"], ["/nowhere/hook"]):
        told = hook.Hook(words)
        told.tell({"event": "start"})
        told.close()
    assert "exit status 3: nothing on stderr" in caplog.text and "No such file" in caplog.text
    assert "ended after 1 s without an end of its own" in caplog.text


def test_a_hook_is_looked_for_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attngan", "--dry-run", "data.source=emoji", f"storage={tmp_path}"]
    assert run.main([*words, "--hook", "nosuchprogram -x"]) == 2
    assert capsys.readouterr().err == "error: --hook: nosuchprogram: no such program\n"
    with pytest.raises(ValueError, match=r"--hook: \"a 'b\": No closing quotation"):
        hook.parse("a 'b")


class Posts(http.server.BaseHTTPRequestHandler):
    """Takes what is posted; answers "/broken" with an error."""

    taken: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        return


def test_the_hook_that_posts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "restart", "run": "x", "stage": "gan", "images": 1200, "budget_images": 64000, "restarts": 2}
    server = http.server.HTTPServer(("127.0.0.1", 0), Posts)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        for path, status_code in (("/here", 0), ("/broken", 1)):
            monkeypatch.setenv("T2IDIST_HOOK_URL", f"http://127.0.0.1:{server.server_port}{path}")
            monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(event)))
            assert notify_webhook.main() == status_code
    finally:
        server.shutdown()
        server.server_close()
    assert Posts.taken[0] == {**event, "text": "x: restart, stage gan at 1,200 of 64,000 images, restarts 2"}
    said = capsys.readouterr().err
    assert "HTTPError 500" in said and "127.0.0.1" not in said
    monkeypatch.setenv("T2IDIST_HOOK_URL", "")
    assert notify_webhook.main() == 2


# ------------------------------------------------------------ what it fine-tunes
def test_an_export_to_fine_tune_goes_to_the_stage_of_its_system(tmp_path: Path) -> None:
    made = config(tmp_path)
    small_systems.write_export("attngan", str(tmp_path / "attngan"), ["", "a"])
    url = str(tmp_path / "attngan")
    assert options.apply_init_from(made, [url]).stages["attngan"].init_from == url
    assert options.apply_init_from(made, [f"attngan={url}"]).stages["attngan"].init_from == url
    twice = replace(made, stages={**made.stages, "second": made.stages["attngan"]})
    for other, text, sentence in (
        (twice, url, "is of system attngan, and attngan, second do train that; give STAGE=EXPORT"),
        (replace(made, stages={"damsm": made.stages["damsm"]}), url, "and no stage of damsm does train that"),
        (made, f"dams={url}", "no stage 'dams'; there are damsm, attngan"),
        (made, str(tmp_path / "nothing"), "no export here"),
    ):
        with pytest.raises(ValueError, match=sentence):
            options.apply_init_from(other, [text])


def test_what_does_not_fit_is_said_in_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path)
    small_systems.write_export("attngan", str(tmp_path / "attngan"), ["", "a"])
    small_systems.write_export("damsm", str(tmp_path / "damsm"), ["", "a"])
    small_systems.write_export("dcgan", str(tmp_path / "dcgan"), ["", "a"])
    for words, sentence in (
        (["--init-from", f"{tmp_path}/damsm"], "is .* there and .* here"),
        (["--init-from", f"damsm={tmp_path}/dcgan"], "holds generator of system dcgan; the stage trains"),
        (["--init-from", f"{tmp_path}/attngan", "stages.attngan.model.z_dim=7"], "network 'generator': .* there and"),
    ):
        assert run.main([str(file), "--dry-run", *words]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(said[0])
    assert run.main([str(file), "--dry-run", "--init-from", f"{tmp_path}/attngan"]) == 0
    assert f"init_from: {tmp_path}/attngan" in capsys.readouterr().out


# ------------------------------------------------------------ whole runs
def refused(made: RunConfig, text: str, sentence: str) -> None:
    def go_on() -> None:
        dry_run.check(made, resume.find(made, text))

    with pytest.raises(ValueError, match=sentence):
        go_on()


def without_last_stage(finished: Path, folder: Path) -> Path:
    """The small recipe in a folder, its run done up to the DAMSM."""
    file = copy_run(finished, folder)
    shutil.rmtree(folder / "runs/tiny/attngan")
    return file


@pytest.mark.whole
def test_a_run_that_was_stopped_and_rewound_gives_the_same_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, at = without_last_stage(finished, tmp_path), tmp_path / "runs/tiny"
    assert run.main([str(file), "--local", "--stop-after", "attngan:30", "checkpoint.keep=5"]) == 0
    assert "the same command without --stop-after goes on" in capsys.readouterr().out
    checkpoints = str(at / "attngan/checkpoints")
    assert [images_of(name) for name in list_committed(checkpoints)] == [32, 16]
    assert not (at / "attngan/export").exists()
    state = status.read_status(str(at), datetime.datetime.now(datetime.UTC))
    assert (state.state, state.current_stage.name, state.current_stage.images, state.restarts) == ("stopped", "attngan", 32, 1)
    page = status.format_status(str(at))
    assert "tiny: stopped" in page and "attngan (attngan): 32 of 64 images; newest checkpoint at 32 images" in page
    assert "damsm (damsm): done, 64 images" in page and "git " in page
    assert "tiny  stopped  attngan 2/2  32/64   32          1" in status.format_run_list(str(tmp_path / "runs"))

    made = config(tmp_path, "checkpoint.keep=5")
    refused(made, "24", "stage attngan of tiny has no checkpoint at 24 images; it has 32, 16")
    refused(made, str(at / "attngan"), "give images seen, or a checkpoint's folder")
    refused(made, str(at / "attngan/checkpoints/000000000016-x"), "missing; the checkpoint was never completed")
    refused(
        made, str(at / "damsm/checkpoints" / list_committed(str(at / "damsm/checkpoints"))[0]), "damsm of tiny is done"
    )
    folder = storage.join(checkpoints, list_committed(checkpoints)[1])
    for words, sentence in (
        (("stages.attngan.groups=1", "cluster.workers=1"), "was made with stages.attngan.groups 2, and here it is 1"),
        (("stages.attngan.model.z_dim=7",), "is .* there and .* in this configuration"),
        (("stages.attngan.images=16",), "has seen 16 images, and .* is 16"),
        (("data.source=avatars", "data.samples=8"), "knows .* words"),
    ):
        refused(config(tmp_path, "name=other", *words), folder, sentence)

    # another run goes on from there, with the exports before; submitted again, it goes on from where it is
    for _ in range(2):
        assert run.main([str(file), "--local", "name=other", "--resume-from", folder, "stages.attngan.images=32"]) == 0
    there = tmp_path / "runs/other"
    assert json.loads((there / "attngan/metrics.jsonl").read_text().splitlines()[0])["images"] == 24
    assert json.loads((there / "attempts.json").read_text())[0]["resumed"]["attngan"]["images"] == 16
    assert export_bytes(tmp_path, "damsm") == {file.name: file.read_bytes() for file in there.glob("damsm/export/*.s*")}

    # the run itself goes back, and on to its end; that is what an undisturbed one gives
    for _ in range(2):
        assert run.main([str(file), "--local", "checkpoint.keep=5", "--resume-from", "16"]) == 0
    assert json.loads((at / "attempts.json").read_text())[-2]["resumed"]["attngan"]["images"] == 16
    check_finished(tmp_path)
    assert export_bytes(tmp_path, "attngan") == export_bytes(finished, "attngan")


@pytest.mark.whole
def test_a_run_starts_from_the_weights_of_an_export(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = without_last_stage(finished, tmp_path)
    source = str(finished / "runs/tiny/attngan/export")
    rates = [f"stages.attngan.model.{name}_lr=1e-30" for name in ("generator", "discriminator")]
    words = [str(file), "--local", "name=fine", "stages.attngan.images=8", *rates]
    shutil.copytree(tmp_path / "runs/tiny/damsm/export", tmp_path / "runs/fine/damsm/export")
    assert run.main([*words, "--init-from", source]) == 0
    made, before = export.read(str(tmp_path / "runs/fine/attngan/export")), export.read(source)
    for name, value in before.weights["generator"].items():
        if "running" not in name and value.is_floating_point():
            assert float((made.weights["generator"][name] - value).abs().max()) < 1e-5, name
    assert made.meta["init_from"] == source
    assert run.main(words) == 2
    assert "stages.attngan.init_from: '', but the run fine" in capsys.readouterr().err


@pytest.mark.whole
def test_nothing_that_a_run_leaves_or_says_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG", "RAY_AUTH_TOKEN": "f00dfeed" * 8}
    for name, value in {**secrets, "RAY_AUTH_MODE": "token", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}.items():
        monkeypatch.setenv(name, value)
    words = ["report.json_logs=true", "report.ledger=true", "stages.attngan.images=16", "stages.damsm.images=16"]
    file, listener = write_recipe(tmp_path), f"tee -a {tmp_path}/heard"
    done = run_command(str(file), "--local", "--hook", listener, *words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert {"run", "stage", "rank", "images", "message", "level"} <= lines[-1].keys() and lines[-1]["images"] == 16
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {
        "heard",
        "commit.json",
        "config.yaml",
        "report.html",
        "export.json",
        "outcome.json",
        "versions.json",
    } <= names
    said = [("output", (done.stdout + done.stderr).encode()), *((str(file), file.read_bytes()) for file in files)]
    for where, data in said:
        for name, value in secrets.items():
            assert value.encode() not in data, f"{where} holds {name}"
    ran_on = json.loads((tmp_path / "runs/tiny/versions.json").read_text())
    assert ran_on["git"] and ran_on["torch"] and ran_on["ray"]


# ------------------------------------------------------------ how it is read
def test_a_run_is_read_as_it_stands(tmp_path: Path) -> None:
    at = tmp_path / "runs/tiny"
    at.mkdir(parents=True)
    shutil.copy(write_recipe(tmp_path), at / "config.yaml")
    noon = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
    assert status.read_status(str(at), noon).state == "new"
    told = {"stage": "damsm", "images": 8, "time": "2026-11-22T11:59:00+00:00", "workers": 2, "images_per_second": 5.0}
    storage.write_json(str(at / "progress.json"), told)
    assert status.read_status(str(at), noon).state == "training"
    assert status.read_status(str(at), noon + datetime.timedelta(minutes=5)).state == "silent"
    attempt = {"time": "2026-11-22T11:00:00+00:00", "workers": 2}
    again = {**attempt, "resumed": {"damsm": {"images": 8, "from": "copy in memory"}}}
    storage.write_json(str(at / "attempts.json"), [attempt, again])
    assert "1: 2026-11-22 11:00:00, 2 workers, damsm from 8 images (copy in memory)" in status.format_status(str(at))
    storage.write_json(str(at / "fatal.json"), {"error": "data.max_bad: too many"})
    assert "tiny: failed: data.max_bad: too many" in status.format_status(str(at))
    best = {"metric": "kid", "value": 0.05, "images": 8, "export": "scored/000000000008"}
    storage.write_json(str(at / "damsm/scored/best.json"), best)
    storage.write_json(str(at / "scores.json"), [{"name": "hat", "value": 0.8546}])
    page = status.format_status(str(at))
    assert "damsm: kid 0.05 at 8 images" in page and "hat 0.8546" in page
    with pytest.raises(ValueError, match="no runs here"):
        status.format_run_list(str(at))
    storage.write_bytes(str(at / "config.yaml"), b"a: 1\n")
    with pytest.raises(ValueError, match="not the folder of a run"):
        status.format_status(str(at))
    assert "not the folder of a run" in status.format_run_list(str(tmp_path / "runs"))


def test_reading_needs_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--status", str(tmp_path)]) == 2
    assert "no run here (config.yaml is missing)" in capsys.readouterr().err
    assert run.main(["attngan", "--list", str(tmp_path)]) == 2
    assert "they take no recipe" in capsys.readouterr().err
    assert run.main([]) == 2
    assert "give a recipe: attngan" in capsys.readouterr().err


def test_the_commit_is_known_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(environment.environment_info(World())["git"]) <= set("0123456789abcdef+")
    monkeypatch.setattr(environment.t2idist, "__file__", str(tmp_path / "t2idist/__init__.py"))
    assert environment.environment_info(World())["git"] == "unknown"
    monkeypatch.setenv("T2IDIST_GIT", "5707fd98dd7d+")
    assert environment.environment_info(World())["git"] == "5707fd98dd7d+"
