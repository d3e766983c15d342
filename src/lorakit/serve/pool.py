"""The adapters that can be asked for: on disk, in memory, on the device."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import torch
from torch import nn

from lorakit.adapters.attachments import check_name
from lorakit.adapters.fingerprint import Fingerprint
from lorakit.adapters.identity import require_same_base
from lorakit.errors import AdapterFileError, LorakitError, RequestError
from lorakit.formats.peft import read_adapter
from lorakit.serve.catalog import Catalog, Source, content_key
from lorakit.serve.request import AdapterChoice, AdapterInfo, AdapterState, EngineOptions
from lorakit.serve.served import ServedAdapter, refuse_layers, served_form, weighted_sum


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asked for, fixed when it came: a name that is re-loaded later is another.

    Attributes:
        parts: each adapter's files and weight; one of weight 1 unless adapters are composed.
    """

    parts: tuple[tuple[Source, float], ...]


class AdapterPool:
    """Names and the tiers behind them; every method may be called from any thread.

    Requests name an adapter; the tiers know only the hash of its content. What is in use is never
    evicted; of the rest the least recently used goes first.

    Args:
        model: the base; read only.
        device: where factors are needed; on a CPU memory and device are one tier.
        options: how many adapters each tier holds, and where they may come from.
        on_ready: called, in a loader's thread, when an adapter has come or failed.
        closed: layers that no adapter may change, because rows are not apart there.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        options: EngineOptions,
        *,
        on_ready: Callable[[], None],
        closed: Collection[str] = (),
    ) -> None:
        self._closed = frozenset(closed)
        self._model, self._device, self._options = model, device, options
        self._on_ready = on_ready
        self._catalog = Catalog(options.adapters_dir)
        self._lock = RLock()
        self._ram: OrderedDict[str, ServedAdapter] = OrderedDict()
        on_cpu = device.type == "cpu"
        self._active = self._ram if on_cpu else OrderedDict[str, ServedAdapter]()
        self._limit = options.max_adapters_ram if on_cpu else options.max_adapters_device
        self._keys: dict[Wanted, str] = {}
        self._read_from: dict[Path, str] = {}
        self._in_use: Counter[str] = Counter()
        self._fresh: dict[str, Wanted] = {}  # loaded for a request that has not taken it yet
        self._loading: set[Wanted] = set()
        self._failed: dict[Wanted, LorakitError] = {}
        self._pinned: dict[str, str] = {}  # name -> key
        self._orphans: set[str] = set()  # keys that no name means any more
        self._fingerprints: dict[tuple[str, ...], Fingerprint] = {}
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="lorakit-load")

    # What users of the pool call.

    def list(self) -> list[AdapterInfo]:
        """Every adapter that can be asked for, by name; reads no tensors."""
        return [self._info(name) for name in self._catalog.names()]

    def info(self, name: str) -> AdapterInfo:
        """What is known of one adapter.

        Raises:
            UnknownAdapterError: no such name; the nearest ones are named.
            AdapterFileError: its files are not there any more.
        """
        self._catalog.find(name)
        return self._info(name)

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
            RequestError: the path lies outside `adapters_dir`, the name cannot be one, or no
                place is left to pin it.
        """
        check_name(name)
        where = self._catalog.default_path(name) if path is None else Path(path)
        source = self._catalog.source(where)
        wanted = Wanted(((source, 1.0),))
        served = self._read(source)
        with self._lock:
            if pin:
                self._refuse_full_of_pins(name)
            before = self._path_of(name)
            self._catalog.add(name, source.path)
            self._keys[wanted] = served.key
            self._orphans.discard(served.key)
            self._put(self._ram, served)
            self._pinned.pop(name, None)
            if pin:
                self._pinned[name] = served.key
            if before != source.path:
                self._orphan(before)
            self._evict()
        return self._info(name)

    def unload(self, name: str) -> None:
        """Serve the name no longer, and give its memory back; requests under way are finished.

        Raises:
            UnknownAdapterError: no such name.
        """
        with self._lock:
            path = self._path_of(name)
            self._catalog.remove(name)
            self._pinned.pop(name, None)
            self._orphan(path)
            self._evict()

    # What the engine calls.

    def resolve(self, choice: AdapterChoice) -> Wanted | None:
        """What a request's choice means now; None is the base.

        Raises:
            UnknownAdapterError: no such name.
            RequestError: an empty composition, or a weight that is not a finite number.
        """
        if choice is None:
            return None
        if isinstance(choice, str):
            return Wanted(((self._catalog.find(choice), 1.0),))
        if not choice or not all(math.isfinite(weight) for weight in choice.values()):
            raise RequestError(
                "adapters cannot be composed with these weights",
                where="adapter",
                expected="names with finite weights",
                found=repr(dict(choice)),
            )
        parts = ((self._catalog.find(name), float(w)) for name, w in sorted(choice.items()))
        return Wanted(tuple(parts))

    def acquire(self, wanted: Wanted) -> ServedAdapter | None:
        """The adapter, kept until `release`; None while it is on its way or there is no place.

        Never waits: what is not there is loaded by another thread.

        Raises:
            LorakitError: it could not be loaded; asked again, it is tried again.
        """
        with self._lock:
            key = self._keys.get(wanted)
            if key is not None and key in self._active:
                self._active.move_to_end(key)
                self._fresh.pop(key, None)
                self._in_use[key] += 1
                return self._active[key]
            if wanted in self._failed:
                raise self._failed.pop(wanted)
            self.prepare(wanted)
            return None

    def prepare(self, wanted: Wanted) -> None:
        """Have an adapter loaded that will be acquired soon, if there is a place for it."""
        with self._lock:
            there = self._keys.get(wanted) in self._active
            if there or wanted in self._loading or wanted in self._failed:
                return
            if self._has_place():
                self._loading.add(wanted)
                self._loaders.submit(self._bring, wanted)

    def release(self, served: ServedAdapter) -> None:
        """The request that held it is finished."""
        with self._lock:
            self._in_use[served.key] -= 1
            if not self._in_use[served.key]:
                del self._in_use[served.key]
                self._evict()

    def settle(self, waiting: Iterable[Wanted]) -> None:
        """Keep no place for adapters that were loaded for requests that have gone.

        Nor a failure: whoever asks next has it tried again.
        """
        with self._lock:
            if self._fresh or self._failed:
                still = set(waiting)
                self._failed = {w: error for w, error in self._failed.items() if w in still}
                self._fresh = {k: w for k, w in self._fresh.items() if w in still}
                self._evict()

    def counts(self) -> tuple[int, int]:
        """Adapters in memory and on the device."""
        with self._lock:
            return len(self._ram), len(self._active)

    def close(self) -> None:
        """End the loaders and let every adapter go."""
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._ram.clear()
            self._active.clear()
            self._keys.clear()

    # How adapters come and go.

    def _bring(self, wanted: Wanted) -> None:
        """Load what a request wants as far as the device; in a loader's thread."""
        try:
            parts = [(self._read(source), weight) for source, weight in wanted.parts]
            served = parts[0][0]
            if len(parts) > 1 or parts[0][1] != 1.0:
                served = weighted_sum(parts, _sum_key(parts))
                self._refuse_rank(served, wanted.parts[0][0].path)
            served = served.to(self._device)
        except LorakitError as error:
            failure: LorakitError | None = error
        except Exception as error:
            failure = AdapterFileError(
                "the adapter could not be loaded",
                where=str(wanted.parts[0][0].path),
                found=f"{type(error).__name__}: {error}".splitlines()[0],
            )
        else:
            failure = None
            with self._lock:
                self._keys[wanted] = served.key
                self._fresh[served.key] = wanted
                self._put(self._active, served)
                self._evict()
        with self._lock:
            self._loading.discard(wanted)
            if failure is not None:
                self._failed[wanted] = failure
        self._on_ready()

    def _read(self, source: Source) -> ServedAdapter:
        """An adapter in memory, from there or from disk."""
        wanted = Wanted(((source, 1.0),))
        with self._lock:
            known = self._ram.get(self._keys.get(wanted, ""))
            if known is not None:
                self._ram.move_to_end(known.key)
                return known
        key = content_key(source)
        with self._lock:
            known = self._ram.get(key)
        if known is None:
            adapter = read_adapter(source.path)
            if not self._options.any_base:
                require_same_base(self._model, adapter.passport, taken=self._fingerprints)
            known = served_form(self._model, adapter, key)
            refuse_layers(known, self._closed)
            self._refuse_rank(known, source.path)
        with self._lock:
            if self._read_from.get(source.path, key) != key:
                # The directory was written anew: what it held before is asked for no more.
                self._orphan(source.path)
            self._read_from[source.path] = key
            self._orphans.discard(key)
            self._keys[wanted] = key
            self._put(self._ram, known)
        return known

    def _refuse_rank(self, served: ServedAdapter, path: Path) -> None:
        if served.r > self._options.max_rank:
            raise AdapterFileError(
                "the adapter's rank is higher than this server allows",
                where=str(path),
                expected=f"at most {self._options.max_rank}, parts of a fused layer added up",
                found=str(served.r),
                remedy="raise max_rank, or compress the adapter",
            )

    def _refuse_full_of_pins(self, name: str) -> None:
        others = {key for other, key in self._pinned.items() if other != name}
        if len(others) + 1 >= self._limit:
            raise RequestError(
                "too many adapters are pinned: nothing else could be loaded",
                where=name,
                expected=f"fewer than {self._limit - 1} pinned adapters",
                found=str(len(others)),
            )

    def _has_place(self) -> bool:
        kept = {*self._in_use, *self._fresh, *self._pinned.values()}
        return len(kept) + len(self._loading) < self._limit

    def _put(self, tier: OrderedDict[str, ServedAdapter], served: ServedAdapter) -> None:
        tier[served.key] = tier.get(served.key, served)
        tier.move_to_end(served.key)

    def _evict(self) -> None:
        kept = {*self._in_use, *self._fresh, *self._pinned.values()}
        tiers = [(self._active, self._limit)]
        if self._ram is not self._active:
            tiers.append((self._ram, self._options.max_adapters_ram))
        for tier, limit in tiers:
            for key in [k for k in self._orphans if k in tier and k not in kept]:
                del tier[key]
            for key in [k for k in tier if k not in kept][: max(0, len(tier) - limit)]:
                del tier[key]
        self._orphans = {k for k in self._orphans if k in self._active or k in self._ram}
        alive = {*self._active, *self._ram}
        # Names that were asked for long ago are hashed again when they come back.
        for wanted in [w for w, key in self._keys.items() if key not in alive]:
            del self._keys[wanted]

    def _orphan(self, path: Path | None) -> None:
        """Note that what was read from this directory is meant no longer.

        If another name means the same content, it is read again when it is asked for.
        """
        key = None if path is None else self._read_from.pop(path, None)
        if key is not None:
            self._orphans.add(key)

    def _path_of(self, name: str) -> Path | None:
        try:
            return self._catalog.find(name).path
        except LorakitError:
            return None

    def _info(self, name: str) -> AdapterInfo:
        source, facts = self._catalog.facts(name)
        with self._lock:
            key = None if source is None else self._keys.get(Wanted(((source, 1.0),)))
            state: AdapterState = "disk"
            if key in self._active and self._active is not self._ram:
                state = "device"
            elif key in self._ram:
                state = "ram"
            return AdapterInfo(
                name=name,
                path=self._catalog.path(name),
                state=state,
                pinned=name in self._pinned,
                key=key,
                r=facts.r,
                passport=facts.passport,
                problem=facts.problem,
            )


def _sum_key(parts: Iterable[tuple[ServedAdapter, float]]) -> str:
    text = "+".join(f"{weight!r}*{served.key}" for served, weight in parts)
    return hashlib.sha256(text.encode()).hexdigest()
