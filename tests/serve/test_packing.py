"""Images of several requests in one batch: equal to the last bit to those that are drawn apart."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

import t2idist
from t2idist.contract import Sample
from t2idist.sampling.figures import to_pil
from t2idist.sampling.generate import empty_captions
from t2idist.serve.drawer import Drawer, ServeConfig
from t2idist.serve.packing import Packing, Row
from tests.sampling.conftest import FIRST, SECOND
from tests.serve.conftest import DRAWING

TEXTS = (FIRST, SECOND, "heart", "a red face word1 word2 word3")


@pytest.mark.parametrize("name", DRAWING)
def test_mixed_requests_give_the_bits_of_each_alone(served: dict[str, str], name: str) -> None:
    """Of every system, in batches that no request fills by itself."""
    model = t2idist.load(served[name])
    unconditional = name == "dcgan"
    rng = random.Random(name)
    requests = [(rng.choice(TEXTS), rng.choice((1, 2, 3, 5)), rng.randrange(9)) for _ in range(12)]
    drawer = Drawer(ServeConfig(served[name]))

    captions = {text: empty_captions(1) if unconditional else model._read_text(text) for text in TEXTS}

    async def draw_all() -> list[Sample]:
        return await asyncio.gather(
            *(
                drawer.queue.draw([Row(captions[text], seed, i, float("inf")) for i in range(n)])
                for text, n, seed in requests
            )
        )

    for (text, n, seed), sample in zip(requests, asyncio.run(draw_all()), strict=True):
        alone = model._draw(None if unconditional else text, n, seed, None)
        for together, expected in zip(sample.images + sample.attention, alone.images + alone.attention, strict=True):
            assert torch.equal(together, expected)
    packed = -(-sum(n for _, n, _ in requests) // 4)
    apart = sum(-(-n // 4) for _, n, _ in requests)
    at_least, at_most = {
        Packing.ANY_ROW: (packed, packed),
        Packing.OWN_ROW: (packed, apart),
        Packing.ALONE: (apart, apart),
    }[drawer.layout.packing]
    assert at_least <= drawer.queue.batches <= at_most


def test_how_a_batch_may_be_shared_is_found_out(served: dict[str, str]) -> None:
    layouts = {name: Drawer(ServeConfig(served[name])).layout for name in ("attngan", "attngan-authors", "mirrorgan")}
    assert layouts["attngan-authors"].packing is Packing.ALONE, "its mask mixes the rows of a batch"
    assert layouts["mirrorgan"].packing is not Packing.ALONE
    assert layouts["attngan"].packing is Packing.ANY_ROW
    assert layouts["attngan"].size == 4 and layouts["attngan"].scales == (16, 32) and layouts["attngan"].attention


def test_truncation_is_that_of_each_request(served: dict[str, str]) -> None:
    model, drawer = t2idist.load(served["attngan"]), Drawer(ServeConfig(served["attngan"]))
    captions = model._read_text(FIRST)

    async def draw(limit: float) -> torch.Tensor:
        return (await drawer.queue.draw([Row(captions, 1, i, limit) for i in range(2)])).images[-1]

    async def both() -> list[torch.Tensor]:
        return await asyncio.gather(draw(0.3), draw(float("inf")))

    truncated, free = asyncio.run(both())
    expected = model.draw(FIRST, n=2, seed=1, truncation=0.3), model.draw(FIRST, n=2, seed=1)
    for images, alone in zip((truncated, free), expected, strict=True):
        assert [to_pil(image).tobytes() for image in images] == [image.tobytes() for image in alone]
    assert not torch.equal(truncated, free)
