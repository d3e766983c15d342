"""The adapters that can be asked for: on disk, in memory, on the device."""

from __future__ import annotations

from pathlib import Path

from lorakit.serve.request import AdapterInfo


class AdapterPool:
    """Names and the tiers behind them; every method may be called from any thread."""

    def list(self) -> list[AdapterInfo]:
        """Every adapter that can be asked for, by name; reads no tensors."""
        raise NotImplementedError

    def load(self, name: str, path: str | Path | None = None, *, pin: bool = False) -> AdapterInfo:
        """Read an adapter into memory, check that it binds, and serve it under `name`.

        Waits for the disk: not for an event loop. A name that is served already means the new
        adapter from now on; requests under way keep the old one.

        Args:
            name: what requests will call it.
            path: its directory; None takes the directory of that name in `adapters_dir`.
            pin: never evict it.

        Raises:
            AdapterFileError: it cannot be read, does not bind, or cannot be served; with the
                reason.
            BaseMismatchError: it was made for another base.
            RequestError: the path lies outside `adapters_dir`, or the name cannot be one.
        """
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Serve the name no longer; requests under way are finished.

        Raises:
            UnknownAdapterError: no such name.
        """
        raise NotImplementedError

    def info(self, name: str) -> AdapterInfo:
        """What is known of one adapter.

        Raises:
            UnknownAdapterError: no such name; the nearest ones are named.
        """
        raise NotImplementedError
