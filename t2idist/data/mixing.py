"""Alternate between data sets: step s reads data set s % n. Each has its own order and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from t2idist import storage
from t2idist.contract import Batch, DataInfo
from t2idist.data.loader import Loader, LoaderSpec, open_loader
from t2idist.data.shards import Dataset


def data_info(datasets: Sequence[Dataset]) -> DataInfo:
    """Return what a system is built from: the first set's vocabulary, the number of all images, each set's attributes.

    The first set also provides the sentence vectors.
    """
    infos = [dataset.info for dataset in datasets]
    return replace(
        infos[0],
        epoch_images=sum(info.epoch_images for info in infos),
        attributes=tuple(info.attributes[0] for info in infos),
    )


def steps_of_domain(domain: int, domains: int, step: int) -> int:
    """Return how many of the first `step` steps read data set `domain` out of `domains`."""
    return -(-max(step - domain, 0) // domains)


class MixedLoader:
    """The batches of one worker, from each data set in turn; `Batch.domain` is the index of the data set.

    The attributes are those of `Loader`, summed over the data sets. If there are several, a key in the quarantine is
    preceded by the URL of its set.
    """

    def __init__(self, loaders: Sequence[Loader], names: Sequence[str], step: int) -> None:
        self.samples_read, self.bad_reads, self.wait_seconds = 0, 0, 0.0
        self.quarantine: dict[str, str] = {}
        self._loaders, self._names, self._step = list(loaders), list(names), step

    def __next__(self) -> Batch:
        domain = self._step % len(self._loaders)
        self._step += 1
        loader = self._loaders[domain]
        batch = replace(next(loader), domain=domain)
        self.samples_read = sum(each.samples_read for each in self._loaders)
        self.bad_reads = sum(each.bad_reads for each in self._loaders)
        self.wait_seconds = sum(each.wait_seconds for each in self._loaders)
        prefix = f"{self._names[domain]}: " if len(self._loaders) > 1 else ""
        self.quarantine |= {f"{prefix}{key}": reason for key, reason in loader.quarantine.items()}
        return batch

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


def open_mixed_loader(datasets: Sequence[Dataset], spec: LoaderSpec, seeds: Sequence[int]) -> MixedLoader:
    """Start loading batches from several data sets in turn.

    Args:
        datasets: The data sets.
        spec: As for `open_loader`; threads and memory for prefetching are divided among the sets.
        seeds: The seed of each set's order.
    """
    count = len(datasets)
    threads, prefetch_mib = -(-(spec.config.threads or 2) // count), -(-spec.config.prefetch_mib // count)
    share = replace(spec, config=replace(spec.config, threads=threads, prefetch_mib=prefetch_mib))
    loaders: list[Loader] = []
    try:
        for domain, (dataset, seed) in enumerate(zip(datasets, seeds, strict=True)):
            step0 = steps_of_domain(domain, count, spec.step0)
            loaders.append(open_loader(dataset, replace(share, step0=step0), seed))
    except BaseException:
        for loader in loaders:
            loader.close()
        raise
    return MixedLoader(loaders, [storage.redact(dataset.url) for dataset in datasets], spec.step0)
