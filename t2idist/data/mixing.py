"""Train on several data sets, each with its own order and epochs.

They alternate: step s reads data set s % n. Or, for two domains without pairs, a step reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from t2idist import storage
from t2idist.contract import Batch, DataInfo, SupportsDomains, System
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


class _Loaders:
    """The loaders of several data sets, with the attributes of `Loader` summed over them.

    A key in the quarantine is preceded by the name of its set, if the sets have names.
    """

    def __init__(self, loaders: Sequence[Loader], names: Sequence[str]) -> None:
        self.samples_read, self.bad_reads, self.wait_seconds = 0, 0, 0.0
        self.quarantine: dict[str, str] = {}
        self._loaders, self._names = list(loaders), list(names)

    def _next(self, index: int) -> Batch:
        loader, name = self._loaders[index], self._names[index]
        batch = next(loader)
        self.samples_read = sum(each.samples_read for each in self._loaders)
        self.bad_reads = sum(each.bad_reads for each in self._loaders)
        self.wait_seconds = sum(each.wait_seconds for each in self._loaders)
        prefix = f"{name}: " if name else ""
        self.quarantine |= {f"{prefix}{key}": reason for key, reason in loader.quarantine.items()}
        return batch

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


class MixedLoader(_Loaders):
    """The batches of one worker, from each data set in turn; `Batch.domain` is the index of the data set."""

    def __init__(self, loaders: Sequence[Loader], names: Sequence[str], step: int) -> None:
        super().__init__(loaders, names)
        self._step = step

    def __next__(self) -> Batch:
        domain = self._step % len(self._loaders)
        self._step += 1
        return replace(self._next(domain), domain=domain)


class UnpairedLoader(_Loaders):
    """The batches of one worker, with an image of each of two data sets in every sample, independent of each other.

    The image of the second set is the partner. If the sets have pairs, each image is the one of its place in the pair.
    """

    def __next__(self) -> Batch:
        first, second = self._next(0), self._next(1)
        ids = tuple(f"{a}+{b}" for a, b in zip(first.ids, second.ids, strict=True))
        return replace(first, partners=second.partners or second.images, ids=ids)


def training_sets(system: System, datasets: Sequence[Dataset]) -> tuple[Dataset, ...]:
    """Return the sets that the batches of a system are from: its data sets, or one for each of two unpaired domains.

    Raises:
        ValueError: If a domain has no image.
    """
    if not is_unpaired(system):
        return tuple(datasets)
    assert isinstance(system, SupportsDomains)
    first = datasets[0]
    return (first, first) if first.paired else tuple(first.having(domain) for domain in system.domains)


def is_unpaired(system: System) -> bool:
    """Return whether a system trains on an image of each of two domains that do not belong together."""
    return isinstance(system, SupportsDomains) and not system.paired


def open_mixed_loader(
    datasets: Sequence[Dataset], spec: LoaderSpec, seeds: Sequence[int], *, unpaired: bool = False
) -> MixedLoader | UnpairedLoader:
    """Start loading batches from several data sets, in turn or together.

    Args:
        datasets: The data sets, as `training_sets` returns them.
        spec: As for `open_loader`; threads and memory for prefetching are divided among the sets.
        seeds: The seed of each set's order.
        unpaired: Take both sets in every step.
    """
    count = len(datasets)
    threads, prefetch_mib = -(-(spec.config.threads or 2) // count), -(-spec.config.prefetch_mib // count)
    share = replace(spec, config=replace(spec.config, threads=threads, prefetch_mib=prefetch_mib))
    loaders: list[Loader] = []
    try:
        for domain, (dataset, seed) in enumerate(zip(datasets, seeds, strict=True)):
            step0 = spec.step0 if unpaired else steps_of_domain(domain, count, spec.step0)
            loaders.append(open_loader(dataset, replace(share, step0=step0), seed))
    except BaseException:
        for loader in loaders:
            loader.close()
        raise
    if unpaired:
        return UnpairedLoader(loaders, ["", ""])
    names = [storage.redact(dataset.url) if count > 1 else "" for dataset in datasets]
    return MixedLoader(loaders, names, spec.step0)
