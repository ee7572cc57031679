"""Several data sets that take turns: step s reads set s % n, each in an order and with epochs of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import Batch, DataInfo
from t2idist.data.loader import Loader, open_loader
from t2idist.data.shards import Dataset


def data_info(datasets: Sequence[Dataset]) -> DataInfo:
    """What a system may know of them: the vocabulary of the first, the samples of all, the attributes of each."""
    each = [dataset.extent for dataset in datasets]
    return replace(
        each[0],
        epoch_images=sum(extent.epoch_images for extent in each),
        attributes=tuple(extent.attributes[0] for extent in each),
    )


def steps_of_domain(domain: int, domains: int, step: int) -> int:
    """How many of the first `step` steps read set number `domain` of `domains`."""
    return -(-max(step - domain, 0) // domains)


class MixedLoader:
    """The batches of one worker, each of the data set whose turn it is; `Batch.domain` says which.

    Accounts are those of `Loader`, summed; a sample in the quarantine is named with its set.
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
        of_set = f"{self._names[domain]}: " if len(self._loaders) > 1 else ""
        self.quarantine |= {f"{of_set}{key}": reason for key, reason in loader.quarantine.items()}
        return batch

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


def open_mixed_loader(
    datasets: Sequence[Dataset],
    split: str,
    *,
    config: DataConfig,
    sizes: tuple[int, ...],
    groups: Sequence[int],
    total_groups: int,
    group_size: int,
    seeds: Sequence[int],
    step0: int,
) -> MixedLoader:
    """The training batches of this worker's groups from step `step0` on, as `open_loader` gives those of one set.

    seeds: of each set's order. Threads and memory for reading ahead are shared between the sets. Raises ValueError as
    `open_loader` does.
    """
    count = len(datasets)
    own = replace(config, threads=-(-config.threads // count), prefetch_mib=-(-config.prefetch_mib // count))
    loaders: list[Loader] = []
    try:
        for domain, (dataset, seed) in enumerate(zip(datasets, seeds, strict=True)):
            loaders.append(
                open_loader(
                    dataset,
                    split,
                    config=own,
                    sizes=sizes,
                    groups=groups,
                    total_groups=total_groups,
                    group_size=group_size,
                    seed=seed,
                    step0=steps_of_domain(domain, count, step0),
                )
            )
    except BaseException:
        for loader in loaders:
            loader.close()
        raise
    return MixedLoader(loaders, [storage.redact(dataset.url) for dataset in datasets], step0)
