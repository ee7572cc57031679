"""A whole run on a real object store: it reads shards from it and writes its run folder to it."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from tests.helpers.object_store import SECRET, seaweedfs, store
from tests.helpers.runs import ROOT, command_environment, command_line, write_recipe


@pytest.mark.whole
def test_run_in_an_object_store_resumes_and_leaks_no_secret(tmp_path: Path) -> None:
    with seaweedfs() as store_env:
        remote = store(store_env["AWS_ENDPOINT_URL"])
        remote.put(str(files("t2idist.data.embedded").joinpath("emoji")) + "/", "bucket/emoji/", recursive=True)
        file = write_recipe(tmp_path, storage="s3://bucket/runs")
        env = {**store_env, **command_environment(), **{k: v for k, v in store_env.items() if k.startswith("AWS")}}

        def run(*overrides: str) -> subprocess.CompletedProcess[str]:
            data = ["data.source=s3://bucket/emoji", *overrides]
            line = command_line(str(file), "--local", *data)
            return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)

        half = run("stages.attngan.images=32")
        assert half.returncode == 0, half.stderr
        remote.invalidate_cache()
        remote.rm("bucket/runs/tiny/attngan/export", recursive=True)
        done = run()
        assert done.returncode == 0, done.stderr
        assert "restarts 1" in done.stdout
        remote.invalidate_cache()
        names = {name.removeprefix("bucket/runs/tiny/") for name in remote.find("bucket/runs/tiny")}
        assert {"report.html", "config.yaml", "attngan/metrics.jsonl", "attngan/export/generator.safetensors"} <= names
        assert any(name.startswith("attngan/events/") for name in names)
        assert "attngan/pictures/images_000000064.png" in names
        kept = {name.split("/")[2] for name in names if name.startswith("attngan/checkpoints/")}
        assert len(kept) == 2 and all(name.startswith("0000000000") for name in kept)
        everything = b"".join(remote.cat(f"bucket/runs/tiny/{name}") for name in names)
        assert SECRET.encode() not in everything
        assert SECRET not in half.stdout + half.stderr + done.stdout + done.stderr
        missing = run("data.source=s3://bucket/nothere", "name=other")
        assert missing.returncode == 2 and "no dataset.json there" in missing.stderr
