"""R-precision of known embeddings, and of the val split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from t2idist.contract import Batch, SupportsEmbed
from t2idist.evaluate.r_precision import metric_name, r_precision, validation_score
from t2idist.sampling.generate import encode_captions
from t2idist.sampling.loading import load_export
from tests.helpers import small_systems
from tests.sampling.conftest import WORDS

CPU = torch.device("cpu")


def test_random_embeddings_score_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(3000, 16, generator=generator) for _ in range(2)]
    score = r_precision(embeddings[0], embeddings[1], seed=0)
    assert abs(score.mean - 0.01) < 4 * score.standard_error and score.n == 3000
    assert 0.0005 < score.standard_error < 0.004


def test_equal_embeddings_score_one_at_any_length() -> None:
    embeddings = torch.randn(203, 16, generator=torch.Generator().manual_seed(0))
    score = r_precision(embeddings, 3 * embeddings, seed=0)
    assert (score.mean, score.n, score.fold_std) == (1.0, 203, 0.0)


def test_collapsed_embeddings_score_chance() -> None:
    score = r_precision(torch.ones(150, 8), torch.ones(150, 8), seed=0)
    assert score.mean == pytest.approx(score.chance)


def test_captions_of_one_class_are_not_candidates_for_each_other() -> None:
    embeddings = torch.randn(60, 32, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    twins = torch.arange(120) // 2
    assert r_precision(embeddings, embeddings, seed=0, class_ids=twins).mean == 1.0
    assert r_precision(embeddings, embeddings, seed=0).mean < 0.8  # the twin ties wherever it is among the candidates
    with pytest.raises(ValueError, match="only 119"):
        r_precision(embeddings, embeddings, seed=0, class_ids=twins, candidates=120)


def test_r_precision_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    images, captions = (torch.randn(40, 4, generator=generator) for _ in range(2))
    cosine = torch.nn.functional.cosine_similarity(images[:, None], captions[None], dim=-1)
    first = (cosine.argmax(1) == torch.arange(40)).float().mean()
    assert r_precision(images, captions, seed=0, candidates=40).mean == pytest.approx(float(first))


def test_metric_name_holds_the_number_of_candidates(tmp_path: Path) -> None:
    small_systems.write_export("damsm", str(tmp_path), WORDS)
    loaded = load_export(str(tmp_path), CPU)
    assert isinstance(loaded.system, SupportsEmbed)
    captions = encode_captions(loaded.vocabulary, [f"word{i}" for i in range(12)], 6)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    batch = Batch((images,), captions, torch.arange(12), torch.zeros(12, 0), tuple(map(str, range(12))), 1)
    score = validation_score(loaded.system, loaded.nets, batch, seed=0, device=CPU)
    assert score is not None and score.n == 12 and 0 <= score.mean <= 1
    assert metric_name(score) == "val/r_precision_of_12"
    assert metric_name(dataclasses.replace(score, candidates=100)) == "val/r_precision"
    one_class = dataclasses.replace(batch, class_ids=torch.zeros(12, dtype=torch.int64))
    assert validation_score(loaded.system, loaded.nets, one_class, seed=0, device=CPU) is None
