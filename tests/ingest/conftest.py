"""Fixtures for tests of sentence vectors."""

from __future__ import annotations

import pytest

from t2idist.data.shards import Dataset
from tests.helpers.shard_sets import write_set
from tests.ingest.vector_sets import make_vector_sample


@pytest.fixture(scope="session")
def vector_set(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 training and 6 test samples, each with five captions and their vectors."""
    samples = [make_vector_sample(n, "train" if n < 40 else "test") for n in range(46)]
    return write_set(tmp_path_factory.mktemp("vectors") / "set", samples, encoder={"name": "made up"})
