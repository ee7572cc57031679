"""The API: the bytes of the commands whatever else is drawn, and misuse answered in one sentence."""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import random
import re
import resource
import shlex
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import t2idist
from t2idist.sampling import sample, translate
from t2idist.serve.gate import hash_of
from tests.helpers.runs import ROOT
from tests.helpers.served import Client, serving
from tests.sampling.conftest import FIRST, SECOND, write_image

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def attngan(served: dict[str, str]) -> Iterator[Client]:
    with serving(served["attngan"], max_images=32, upload_bytes=1 << 20, upload_pixels=1 << 20) as client:
        yield client


@pytest.fixture(scope="module")
def stargan(served: dict[str, str]) -> Iterator[Client]:
    with serving(served["stargan"], upload_bytes=1 << 20, upload_pixels=1 << 20) as client:
        yield client


def command_files(folder: Path, url: str, *arguments: str) -> dict[str, bytes]:
    """Run ``t2idist sample``; returns its files without the grid."""
    assert sample.main(["--export", url, "--out", str(folder), *arguments]) == 0
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "grid.png"}


# ------------------------------------------------------------ draw
def test_the_files_are_those_of_the_command(attngan: Client, served: dict[str, str], tmp_path: Path) -> None:
    """Byte for byte, with the settings that they hold; also those of a model without text."""
    url, options = served["attngan"], ["--text", FIRST, "--seed", "3"]
    written = list(command_files(tmp_path / "all", url, *options, "--n", "6", "--scale", "all").values())
    answer = attngan.draw(text=FIRST, n=6, seed=3, scale="all")
    assert [file for files in answer.files for file in files] == written
    assert answer.json["images"][0]["sizes"] == [16, 32] and answer.json["words"] == ["a", "red", "heart"]
    (one,) = command_files(tmp_path / "one", url, *options, "--n", "1", "--truncation", "1").values()
    png = attngan.ask("/draw", {"text": FIRST, "n": 1, "seed": 3, "truncation": 1}, Accept="image/png")
    assert (png.headers["content-type"], png.body) == ("image/png", one)
    archive = attngan.ask("/draw", {"text": FIRST, "n": 6, "seed": 3, "scale": "all"}, Accept="application/zip")
    with zipfile.ZipFile(io.BytesIO(archive.body)) as files:
        assert [files.read(name) for name in files.namelist()] == written
        assert files.namelist()[:2] == ["01_16px.png", "01_32px.png"]
    with serving(served["dcgan"]) as client:
        assert client.ask("/model").json["kind"] == "unconditional"
        expected = list(command_files(tmp_path / "dcgan", served["dcgan"], "--n", "3").values())
        assert [files[0] for files in client.draw(n=3).files] == expected


def test_interpolations_are_those_of_the_command(attngan: Client, served: dict[str, str], tmp_path: Path) -> None:
    url, to = served["attngan"], SECOND
    options = ["--interpolate-text", FIRST, to, "--steps", "3", "--n", "2", "--seed", "1"]
    written = list(command_files(tmp_path / "text", url, *options).values())
    answer = attngan.draw(text=FIRST, to=to, steps=3, n=2, seed=1)
    assert [files[0] for files in answer.files] == written
    assert [image["label"] for image in answer.json["images"]][::2] == [FIRST, "50 % of the way", to]
    noise = list(
        command_files(tmp_path / "noise", url, "--text", FIRST, "--interpolate-noise", "--steps", "5").values()
    )
    assert [files[0] for files in attngan.draw(text=FIRST, interpolate_noise=True, steps=5).files] == noise


def test_requests_at_once_get_what_each_gets_alone(attngan: Client, served: dict[str, str]) -> None:
    """From 16 clients, of which every third leaves before it is answered."""
    model = t2idist.load(served["attngan"])
    rng = random.Random(5)
    asked = [(rng.choice((FIRST, SECOND, "heart")), rng.choice((1, 2, 5)), rng.randrange(20)) for _ in range(90)]

    def ask(number: int) -> list[list[bytes]] | None:
        text, n, seed = asked[number]
        if number % 3 == 0:
            attngan.leave(text=text, n=n, seed=seed)
            return None
        return attngan.draw(text=text, n=n, seed=seed).files

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(asked))))
    for (text, n, seed), files in zip(asked, answers, strict=True):
        if files is not None:
            drawn = [Image.open(io.BytesIO(png)).tobytes() for (png,) in files]
            assert drawn == [image.tobytes() for image in model.draw(text, n=n, seed=seed)]
    wait_until_idle(attngan)


def wait_until_idle(client: Client) -> None:
    deadline = time.monotonic() + 20
    while client.ask("/healthz").json != {"ok": True, "waiting": 0}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_attention_has_a_map_for_each_word(attngan: Client, served: dict[str, str]) -> None:
    answer = attngan.draw(text=f"zeppelin {FIRST}", n=2, seed=4, attention=True).json
    drawn = t2idist.load(served["attngan"])._draw(FIRST, 2, 4, None)
    assert answer["words"] == ["a", "red", "heart"] and "zeppelin" in answer["warnings"][0]
    for i, image in enumerate(answer["images"]):
        assert len(image["attention"]) == 3
        for word, stages in enumerate(image["attention"]):
            for weights, stage in zip(drawn.attention, stages, strict=True):
                expected = weights[i, word]
                grey = Image.open(io.BytesIO(base64.b64decode(stage["png"])))
                assert grey.size == expected.shape[::-1] and grey.getextrema()[1] == 255
                assert stage["peak"] == pytest.approx(float(expected.max()), abs=1e-4)  # four digits are sent
                error = np.asarray(grey) / 255 - (expected / expected.max()).numpy()
                assert np.abs(error).max() < 1 / 255


def test_a_model_without_attention_and_one_that_translates_say_so(stargan: Client, served: dict[str, str]) -> None:
    with serving(served["stackgan_pp"]) as client:
        assert client.ask("/model").json["attention"] is False
        assert client.draw(text=FIRST, n=1, attention=True).json["images"][0]["attention"] == []
    assert "use /translate" in stargan.draw(text=FIRST).error


LONG = "a red heart " * 834
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"text": ""}, "text is ''; give a sentence"),
    ({}, "text is missing: "),
    ({"text": 5}, "text is 5; input should be a valid string"),
    ({"text": "zeppelins"}, "no word of this sentence is in the vocabulary of the export: 'zeppelins'"),
    ({"text": "a {} heart"}, "has a placeholder, {}; put words in its place"),
    ({"text": LONG[:10_001]}, "this sentence has 10,001 characters; at most 10,000 are read"),
    ({"text": FIRST, "n": 0}, "n 0: give at least 1 and at most 32"),
    ({"text": FIRST, "n": 10**6}, "n 1000000: give at least 1 and at most 32"),
    ({"text": FIRST, "n": 2.5}, "n is 2.5; give a whole number"),
    ({"text": FIRST, "n": True}, "n is True; give a whole number"),
    ({"text": FIRST, "seed": "x"}, "seed is 'x'; give a whole number"),
    ({"text": FIRST, "truncation": 0}, "truncation 0: give at least 0.01"),
    ({"text": FIRST, "truncation": float("nan")}, "truncation nan: give at least 0.01"),
    ({"text": FIRST, "truncation": 10**400}, "truncation is 1000"),
    ({"text": FIRST, "truncation": "1"}, "truncation is '1'; input should be a valid number"),
    ({"text": "\ud800 red"}, "this sentence has characters that are not valid Unicode; give it as UTF-8"),
    ({"text": FIRST, "to": "\ud800 red"}, "this sentence has characters that are not valid Unicode"),
    ({"text": FIRST, "number": 3}, "there is no field 'number'; there are text, n, seed"),
    ({"text": FIRST, "steps": 3}, "steps is for to and interpolate_noise"),
    ({"text": FIRST, "to": SECOND, "steps": 1}, "steps 1: give at least 2, the two ends"),
    ({"text": FIRST, "to": SECOND, "attention": True}, "attention: there are no words to show between two sentences"),
    ({"text": FIRST, "to": SECOND, "interpolate_noise": True}, "give one of them"),
    ({"text": FIRST, "to": SECOND, "steps": 9, "n": 9}, "9 steps of 9 images are 81; at most 32 in one request"),
]


@pytest.mark.parametrize(("body", "sentence"), INVALID)
def test_a_request_that_cannot_be_drawn_is_answered_in_a_sentence(
    attngan: Client, body: dict[str, Any], sentence: str
) -> None:
    answer = attngan.ask("/draw", body)
    assert answer.status == 422 and sentence in answer.error and "\n" not in answer.error


def test_what_is_no_request_is_answered_in_a_sentence(attngan: Client) -> None:
    long = b'"' + b"a" * (2 << 20) + b'"'
    cases = [
        (attngan.ask("/draw", b"{", Content_Type="application/json"), 422, "the body is not JSON: "),
        (attngan.ask("/draw", b"[]", Content_Type="Application/JSON"), 422, "the body is []; give an object, such as"),
        (attngan.ask("/draw", b'{"text": "\xff"}', Content_Type="application/json"), 422, "give an object in UTF-8"),
        (attngan.ask("/draw", b"[" * 100_000, Content_Type="application/json"), 422, "the body is not JSON"),
        (attngan.ask("/draw", b'{"n": 1%s}' % (b"0" * 5000), Content_Type="application/json"), 422, "is not JSON"),
        (attngan.ask("/draw?n=1", {"text": FIRST}), 422, "the URL has no parameter 'n'; give it in the JSON body"),
        (attngan.ask("/draw", b"{}", Content_Type="text/plain"), 415, "the body must be JSON"),
        (attngan.ask("/draw", long, Content_Type="application/json"), 413, "larger than 1 MB"),
        (attngan.ask("/draw"), 405, "this path has the method POST"),
        (attngan.ask("/nowhere"), 404, "there is no such path"),
        (attngan.ask("/draw", {"text": FIRST, "n": 2}, Accept="image/png"), 422, "Accept: image/png is for one image"),
        (attngan.ask("/translate", b"x", Content_Type="image/png"), 422, "this export does not translate images"),
    ]
    for answer, status, sentence in cases:
        assert (answer.status, sentence in answer.error) == (status, True), answer.body
    assert attngan.ask("/draw").headers["allow"] == "POST"


def test_a_server_is_watched_by_head_requests(attngan: Client) -> None:
    for path in ("/", "/healthz", "/model"):
        head, got = attngan.ask(path, method="HEAD"), attngan.ask(path)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]


def test_answers_do_not_name_the_folder_of_the_export(served: dict[str, str], attngan: Client) -> None:
    for answer in (attngan.draw(), attngan.ask("/translate", b"x", Content_Type="image/png")):
        assert answer.error.startswith(("attngan: ", "text is missing: attngan "))
        assert served["attngan"] not in answer.error


def test_a_full_queue_answers_503_in_a_sentence(served: dict[str, str]) -> None:
    with serving(served["attngan"], max_images=64, queue=64) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: client.draw(text=FIRST, n=64, seed=seed), range(8)))
        refused = [answer for answer in answers if answer.status != 200]
        assert 1 <= len(refused) < 8
        for answer in refused:
            assert answer.status == 503 and "the queue is full: 64 images wait, of at most 64" in answer.error
            assert int(answer.headers["retry-after"]) > 0
        assert client.draw(text=FIRST, n=64).status == 200


def test_the_api_is_described(attngan: Client, stargan: Client) -> None:
    card = attngan.ask("/model").json
    assert (card["name"], card["kind"], card["sizes"], card["attention"]) == ("attngan", "text", [16, 32], True)
    assert card["words"] == len(attngan.ask("/vocabulary").json) == 39 and card["limits"]["images"] == 32
    card = stargan.ask("/model").json
    assert card["kind"] == "attributes" and card["attributes"][0] == ["Black_Hair", "Blond_Hair", "Smiling"]
    assert card["conflicts"][0]["Black_Hair"] == ["Blond_Hair"]
    schema = attngan.ask("/openapi.json").json
    assert schema["openapi"].startswith("3.") and {"/draw", "/translate", "/healthz"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["DrawRequest"]["properties"]
    assert {"text", "n", "seed", "truncation"} <= set(fields) and all("description" in each for each in fields.values())


def test_a_failure_of_the_networks_makes_the_server_unhealthy(served: dict[str, str]) -> None:
    with serving(served["attngan"]) as client:
        assert client.drawer is not None
        del client.drawer._loaded.nets["generator"].h_net1  # as a damaged device would
        answer = client.draw(text=FIRST, n=1)
        assert answer.status == 500 and answer.error.startswith("drawing failed: ")
        answer = client.ask("/healthz")
        assert answer.status == 503 and answer.error.startswith("drawing failed: ")


# ------------------------------------------------------------ translate
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3))
    return Path(write_image(tmp_path / "photo.png", pixels))


def test_a_translation_is_that_of_the_command(
    stargan: Client, attngan: Client, served: dict[str, str], tmp_path: Path
) -> None:
    file = photo(tmp_path)
    image = file.read_bytes()
    options = ["--export", served["stargan"], "--image", str(file), "--out", str(tmp_path / "out")]
    assert translate.main([*options, "--set", "Smiling", "--clear", "Black_Hair"]) == 0
    expected = Image.open(tmp_path / "out/photo.png").tobytes()
    answer = stargan.ask("/translate?set=Smiling&clear=Black_Hair", image, Content_Type="image/png")
    assert answer.json["title"] == "+Smiling -Black_Hair"
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["png"]))).tobytes() == expected
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["given"]))).size == (16, 16)
    png = stargan.ask(
        "/translate?set=Smiling&clear=Black_Hair", image, Content_Type="application/octet-stream", Accept="image/png"
    )
    assert Image.open(io.BytesIO(png.body)).tobytes() == expected
    with serving(served["cyclegan"]) as client:
        to = client.ask("/model").json["domains"][1]
        answer = client.ask(f"/translate?to={to}", image, Content_Type="image/png")
        model = t2idist.load(served["cyclegan"])
        made = Image.open(io.BytesIO(base64.b64decode(answer.json["png"])))
        assert made.tobytes() == model.translate(file, to=to).tobytes()


def gif_bomb(side: int) -> bytes:
    """Return a GIF of side x side pixels in 50 bytes."""
    screen = struct.pack("<HHBBB", side, side, 0xF0, 0, 0)
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02D\x01\x00;"
    return b"GIF89a" + screen + bytes(6) + frame


def test_an_upload_that_cannot_be_used_is_answered_in_a_sentence(stargan: Client, tmp_path: Path) -> None:
    many = io.BytesIO()
    Image.new("L", (1100, 1000)).save(many, format="PNG")
    cut = photo(tmp_path).read_bytes()[:600]
    kind = "image/png"
    cases = [
        ("?set=Smiling", gif_bomb(60000), "image/gif", 422, "3600000000 pixels"),
        ("?set=Smiling", gif_bomb(9000), "image/gif", 422, "9000 x 9000 pixels; at most 1048576"),
        ("?set=Smiling", many.getvalue(), kind, 422, "1100 x 1000 pixels; at most 1048576"),
        ("?set=Smiling", b"not an image", kind, 422, "image: does not decode: not JPEG"),
        ("?set=Smiling", b"", kind, 422, "image: does not decode"),
        ("?set=Smiling", cut, kind, 422, "image: does not decode"),
        ("?set=Smiling", b"/etc/passwd", kind, 422, "image: does not decode: not JPEG"),
        ("?set=Wings", b"", kind, 422, "'Wings' is not among the attributes"),
        ("", b"", kind, 422, "give set or clear: Black_Hair"),
        ("?set=Smiling&domain=x", b"", kind, 422, "domain is 'x'; give a whole number"),
        (f"?set=Smiling&domain={'9' * 5000}", b"", kind, 422, "give a whole number"),
        ("?set=Smiling&domain=0&domain=1", b"", kind, 422, "domain is given 2 times; give it once"),
        ("?set=Smiling&claer=x", b"", kind, 422, "the URL has no parameter 'claer'; there are set, clear, domain, to"),
        ("?set=Smiling", b"not an image", "IMAGE/PNG", 422, "image: does not decode: not JPEG"),
        ("?to=x", b"", kind, 422, "this export has no domains to translate to"),
        ("?set=Smiling", b"x", "multipart/form-data", 415, "the body must be an image file"),
        ("?set=Smiling", b"x" * (2 << 20), kind, 413, "larger than 1 MB"),
    ]
    for query, body, content_type, status, sentence in cases:
        answer = stargan.ask(f"/translate{query}", body, method="POST", Content_Type=content_type)
        assert (answer.status, sentence in answer.error) == (status, True), answer.body


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_of_a_gigabyte_is_refused_without_keeping_it(stargan: Client, chunked: bool) -> None:
    host, port = stargan.url.removeprefix("http://").split(":")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 30}"
    block = b"x" * (1 << 20)
    sent = 0
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /translate?set=Smiling HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        try:
            while sent < 1 << 30:
                connection.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
                sent += len(block)
        except OSError:
            pass  # the server has closed the connection
        with connection.makefile("rb") as file:
            assert b" 413 " in file.readline()
            assert b"the request is larger than 1 MB" in file.read()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB, of server and client
    assert grown < 100 << 10


def test_the_examples_of_the_documentation_work(
    attngan: Client, stargan: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python block, and the curl commands as they would be sent; the sentence has other words."""
    monkeypatch.chdir(tmp_path)
    photo(tmp_path).rename("face.png")
    text = (ROOT / "docs/serving.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    words = {"http://127.0.0.1:8000": attngan.url, "a person with long red hair": FIRST}
    names: dict[str, Any] = {}
    exec(compile(functools.reduce(lambda t, w: t.replace(*w), words.items(), block), "page", "exec"), names)
    assert len(names["files"]) == 4 and names["files"][0].startswith(b"\x89PNG")
    curls = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("curl ")]
    assert len(curls) == 2
    parser = argparse.ArgumentParser()
    for option in ("-d", "-o", "--data-binary"):
        parser.add_argument(option)
    parser.add_argument("-H", action="append")
    parser.add_argument("url")
    for curl in curls:
        given = parser.parse_args(curl)
        headers = dict(header.split(": ") for header in given.H)
        path = given.url.removeprefix("http://127.0.0.1:8000").replace("Blond_Hair", "Smiling")
        client, body = stargan, Path("face.png").read_bytes()
        if given.d:
            client, body = attngan, given.d.replace("a person with long red hair", FIRST).encode()
        answer = client.ask(path, body, **{name.replace("-", "_"): value for name, value in headers.items()})
        assert answer.status == 200 and answer.body.startswith(b"\x89PNG"), answer.body


# ------------------------------------------------------------ who may ask
def test_a_token_is_needed_for_all_but_the_page(served: dict[str, str]) -> None:
    with serving(served["attngan"], host="0.0.0.0", token_sha256=hash_of(TOKEN)) as client:
        for path in ("/", "/page.js", "/page.css", "/healthz", "/openapi.json"):
            assert client.ask(path).status == 200
        for value in ("", TOKEN, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"):
            for answer in (
                client.ask("/model", Authorization=value),
                client.ask("/draw", {"text": FIRST}, Authorization=value),
            ):
                assert answer.status == 401 and "this server needs its token" in answer.error
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.ask("/nowhere").status == 401
        assert client.ask("/draw", {"text": FIRST, "n": 1}, Authorization=f"Bearer {TOKEN}").status == 200
        assert client.ask("/model", Authorization=f"Bearer {TOKEN}", Host="any.name").status == 200


def test_pages_of_other_sites_are_refused(attngan: Client) -> None:
    port = attngan.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::1", "[zz]", ""):
        answer = attngan.ask("/model", Host=host)
        assert answer.status in (400, 421), "DNS rebinding"
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]"):
        assert attngan.ask("/model", Host=host).status == 200
    body = {"text": FIRST, "n": 1}
    for origin in ("http://evil.example", "null", "http://[", f"http://localhost:{port}"):
        answer = attngan.ask("/draw", body, Origin=origin)
        assert answer.status == 403 and "comes from a page of" in answer.error
    assert attngan.ask("/draw", body, Origin=attngan.url).status == 200
    assert "access-control-allow-origin" not in attngan.ask("/draw", body, Origin=attngan.url).headers


def test_every_answer_has_the_headers_that_protect_the_page(attngan: Client) -> None:
    for answer in (
        attngan.ask("/"),
        attngan.ask("/draw", {}),
        attngan.ask("/nowhere"),
        attngan.ask("/model", Host="x"),
    ):
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
    page = attngan.ask("/").body.decode()
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page
    assert json.dumps(attngan.ask("/openapi.json").json).count("://") == 0
