"""Units of weights, read ahead by several threads in the order in which they will be asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3_tools.model.cores import sharing_cores
from dsv3_tools.model.staging import make_reader
from dsv3_tools.model.weights import Encoded, Prepared, Unit, WeightSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Order", "Prefetcher", "Readers"]

_MAX_QUEUED = 3
"""Units whose computation may be queued on a GPU and not done: their memory is not free yet."""


class Order(NamedTuple):
    """A unit and what it is asked for by."""

    key: Hashable
    unit: Unit


class _Ahead(NamedTuple):
    key: Hashable
    nbytes: int
    loaded: Future[Encoded | dict[str, Tensor]]


class Readers:
    """Threads that read, with their pinned memory, until the context ends.

    Args:
        device: where weights go.
        count: of threads.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        self.reader = make_reader(device)
        is_cpu = device.type == "cpu"
        self.pool = ThreadPoolExecutor(count, "dsv3-read", _use_one_thread if is_cpu else None)

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.pool.shutdown(cancel_futures=True)


class Prefetcher:
    """Reads units ahead, never more than `budget` bytes (or one unit) beyond the one that was taken last.

    Args:
        source: of the weights.
        orders: all units, in the order in which they will be taken; some may be skipped.
        budget: bytes of units that wait, in the memory in which they wait.
        readers: that read.
    """

    def __init__(
        self, source: WeightSource, orders: Sequence[Order], *, budget: int, readers: Readers
    ) -> None:
        self._source = source
        self._orders = orders
        self._places = {order.key: place for place, order in enumerate(orders)}
        self._budget = budget
        self._readers = readers
        self._cores = ExitStack()
        if source.device.type == "cpu":
            self._cores.enter_context(sharing_cores(readers.count))
        self._ahead: deque[_Ahead] = deque()
        self._prepared: Prepared | None = None  # the unit that comes next, if it had to wait
        self._waiting = 0
        self._next_read = 0
        self._next_taken = 0
        self._queued: deque[Any] = deque()

    def __enter__(self) -> Prefetcher:
        try:
            self._fill()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading and lets go of everything."""
        for ahead in self._ahead:
            ahead.loaded.cancel()
        wait([ahead.loaded for ahead in self._ahead if not ahead.loaded.cancelled()])
        self._cores.close()
        self._ahead.clear()
        self._next_read = self._next_taken = len(self._orders)

    def take(self, key: Hashable, unit: Unit) -> dict[str, Tensor]:
        """Returns a unit, decoded; units before it that were not taken are skipped.

        One that has been taken or skipped before is read now.

        Raises:
            CheckpointError: it could not be read.
        """
        self._throttle()
        place = self._places.get(key, -1)
        if place < self._next_taken:
            return self._decode(self._source.load(self._source.prepare(unit), self._readers.reader))
        while self._next_taken <= place:
            if not self._ahead:
                self._next_read = self._next_taken = place  # nothing is read that will be skipped
                self._prepared = None
                self._fill()
            found = self._ahead.popleft()
            self._waiting -= found.nbytes
            self._next_taken += 1
            if found.key != key:
                found.loaded.cancel()
        self._fill()
        return self._decode(found.loaded.result())

    def _fill(self) -> None:
        while self._next_read < len(self._orders):
            order = self._orders[self._next_read]
            prepared = self._prepared or self._source.prepare(order.unit)
            if self._ahead and self._waiting + prepared.nbytes > self._budget:
                self._prepared = prepared  # for the next time
                return
            self._prepared = None
            loaded = self._readers.pool.submit(self._source.load, prepared, self._readers.reader)
            self._ahead.append(_Ahead(order.key, prepared.nbytes, loaded))
            self._waiting += prepared.nbytes
            self._next_read += 1

    def _decode(self, loaded: Encoded | dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(loaded, Encoded):
            import torch

            loaded.loaded.hand_over(torch.cuda.current_stream(self._source.device))
        return self._source.decode(loaded)

    def _throttle(self) -> None:
        """Waits until no more than a few units are queued on the GPU without being done."""
        if self._source.device.type != "cuda":
            return
        import torch

        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._source.device))
        self._queued.append(done)
        if len(self._queued) > _MAX_QUEUED:
            self._queued.popleft().synchronize()


def _use_one_thread() -> None:
    """Keeps torch from starting, for each thread that reads, as many more as there are cores."""
    import torch

    torch.set_num_threads(1)
