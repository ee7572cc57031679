"""Credentials that expire while a process runs: when a client is made anew from the credential chain.

A client keeps the keys that it found when it was made. `Renewal` replaces the clients of this process after a store
refuses their keys, so that new keys in a shared credentials file, or of a role, are used from then on.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from t2idist.storage.errors import describe, refusal

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 60.0
"""How long a store that worked before may refuse expired keys until new ones are found."""
_SECONDS_BETWEEN_CLIENTS = 1.0

Store = tuple[object, ...]
"""What a success is remembered by: bucket, endpoint and environment."""


class _Clients:
    """The generation of this process's clients, and the stores that have accepted them."""

    def __init__(self) -> None:
        self.generation = 0
        self._made = float("-inf")
        self._accepted: set[Store] = set()
        self._lock = threading.Lock()

    def replace(self, refused: int) -> None:
        """Begin a new generation unless another thread has, or the last one is less than a second old."""
        with self._lock:
            if self.generation == refused and time.monotonic() - self._made >= _SECONDS_BETWEEN_CLIENTS:
                self.generation += 1
                self._made = time.monotonic()

    def accept(self, store: Store) -> None:
        if store not in self._accepted:
            with self._lock:
                self._accepted.add(store)

    def has_accepted(self, store: Store) -> bool:
        return store in self._accepted


_CLIENTS = _Clients()


def generation() -> int:
    """Return the number of times that the clients of this process were replaced."""
    return _CLIENTS.generation


class Renewal:
    """Decides for one request whether a refusal is answered with new clients and another attempt."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._used = generation()
        self._refused_since: float | None = None

    def begin(self) -> None:
        """Note which clients the next attempt uses."""
        self._used = generation()

    def accepted(self) -> None:
        _CLIENTS.accept(self._store)
        self._refused_since = None

    def after(self, error: Exception) -> bool:
        """Return whether to try again after this error; if so, the next attempt has new clients.

        Keys that have expired are looked up again once, at a store that worked before for RENEWAL_SECONDS if they do
        not come from the environment, which nobody else can change. Other refusals are repeated once, if the store
        worked before.
        """
        worked = _CLIENTS.has_accepted(self._store)
        kind = refusal(error)
        if kind == "" or (not worked and kind != "expired"):
            return False
        first = self._refused_since is None
        if first:
            self._refused_since = time.monotonic()
        patient = worked and kind != "denied" and "AWS_ACCESS_KEY_ID" not in os.environ
        if not first and (not patient or time.monotonic() - (self._refused_since or 0.0) > RENEWAL_SECONDS):
            return False
        if first:
            logger.info("%s: refused (%s); the credentials are looked up again", self._name, describe(error))
        _CLIENTS.replace(self._used)
        return True
