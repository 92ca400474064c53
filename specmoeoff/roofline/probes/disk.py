"""The disk link: O_DIRECT reads by several threads into aligned memory, never through the page cache."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.files import cache_dir
from specmoeoff.kernels.cpu import HUGE_PAGE, aligned_empty
from specmoeoff.roofline.fits import TransferFit, fit_transfer
from specmoeoff.roofline.timing import measurement, modes
from specmoeoff.specs.profile import DiskLink, DiskPoint

T = TypeVar("T")

KIB, MIB = 1 << 10, 1 << 20
CHUNKS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
READERS = (1, 2, 4)
TEST_BYTES = 512 * MIB
READING_S = 60.0  # no traffic beside another measurement lasts longer
SAMPLE_S = 0.05  # as long as a slice of recalibration: what is compared is measured alike


@contextmanager
def test_file(path: Path | None) -> Iterator[Path]:
    """The given file, or one of random bytes that is gone afterwards."""
    if path is not None:
        yield path
        return
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".disk-probe-{os.getpid()}"
    try:
        block = np.random.default_rng(0).bytes(16 * MIB)
        with temporary.open("wb") as stream:
            for _ in range(TEST_BYTES // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def open_direct(path: Path) -> int:
    """A descriptor that passes the page cache by."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise MissingCapability(f"{path}: O_DIRECT reads are not allowed here ({error.strerror})") from None


class Reader:
    """Reads a file round and round, into huge pages: small ones split a request into many, at a third of the speed."""

    def __init__(self, path: Path, n_readers: int, chunk_bytes: int, huge_pages: bool = True) -> None:
        self._path, self._chunk = path, chunk_bytes
        self._n_chunks = max(1, path.stat().st_size // chunk_bytes)
        # One piece: a buffer of less than a huge page would get small ones.
        arena = aligned_empty(max(n_readers * chunk_bytes, HUGE_PAGE), huge_pages=huge_pages)
        self._buffers = [arena[i * chunk_bytes : (i + 1) * chunk_bytes] for i in range(n_readers)]
        self._next = 0
        self._lock = threading.Lock()

    def read(self, seconds: float, stop: threading.Event | None = None) -> float:
        """Read for about `seconds` (or until told to stop) on all readers; bytes per second."""
        end = time.perf_counter() + seconds
        counts = [0] * len(self._buffers)
        errors: list[Exception] = []

        def work(index: int) -> None:
            try:
                descriptor = open_direct(self._path)
                try:
                    while time.perf_counter() < end and not (stop and stop.is_set()):
                        with self._lock:
                            chunk = self._next % self._n_chunks
                            self._next += 1
                        counts[index] += os.preadv(descriptor, [self._buffers[index].data], chunk * self._chunk)
                finally:
                    os.close(descriptor)
            except (OSError, MissingCapability) as error:
                errors.append(error)

        begun = time.perf_counter()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(counts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(counts) / (time.perf_counter() - begun)


class Disk:
    """The best chunk and number of readers, then ever more samples of those: shared disks change speed within seconds.

    Raises MissingCapability without O_DIRECT. What fails later is told in `error`, and nothing is read any more.
    """

    def __init__(self, file: Path, budget_s: float) -> None:
        os.close(open_direct(file))
        self._file = file
        self.error: str | None = None
        self._readers = {(c, n): Reader(file, n, c) for c in CHUNKS for n in READERS}
        self._rates: dict[tuple[int, int], list[float]] = {key: [] for key in self._readers}
        for _ in range(max(2, int(budget_s / len(self._readers) / SAMPLE_S))):
            for key in self._readers:
                self._read(key)
        self._best = max(self._rates, key=lambda key: float(np.median(self._rates[key])))

    def _read(self, key: tuple[int, int]) -> None:
        self._rates[key].append(self._readers[key].read(SAMPLE_S) / 1e9)

    def sample(self) -> None:
        """Two samples more of the best."""
        for _ in range(2):
            self._unless_failed(lambda: self._read(self._best))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Meanwhile the disk is read at its full speed."""
        stop, reader = threading.Event(), self._readers[self._best]
        thread = threading.Thread(target=self._unless_failed, args=(lambda: reader.read(READING_S, stop),))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _unless_failed(self, work: Callable[[], T]) -> T | None:
        if self.error is None:
            try:
                return work()
            except (OSError, MissingCapability) as error:
                self.error = str(error)
        return None

    def link(self) -> DiskLink | None:
        """All of it; None where a read failed."""
        chunk_bytes, n_readers = self._best
        samples, fit = self._rates[self._best], self._unless_failed(lambda: _fit(self._file, n_readers))
        if fit is None:
            return None
        note = f"{fit.bytes_per_s / 1e9:.2f} GB/s from the fit of one request"
        return DiskLink(
            read_gb_per_s=measurement(samples, "GB/s", "median", note),
            latency_s=measurement([fit.latency_s], "s", note="from the fit of one request"),
            chunk_bytes=chunk_bytes,
            n_readers=n_readers,
            modes_gb_per_s=modes(samples),
            fit_error=fit.fit_error,
            sweep=tuple(
                DiskPoint(chunk_bytes=c, n_readers=n, gb_per_s=measurement(found, "GB/s"))
                for (c, n), found in self._rates.items()
            ),
        )


def _fit(file: Path, n_readers: int) -> TransferFit:
    """Latency and bandwidth of single requests of growing size."""
    sizes = (4 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
    descriptor = open_direct(file)
    rng = np.random.default_rng(n_readers)
    medians = []
    try:
        n_blocks = max(1, file.stat().st_size // sizes[-1])
        for size in sizes:
            buffer, times = aligned_empty(size).data, []
            for _ in range(12):
                offset = int(rng.integers(n_blocks)) * sizes[-1]
                begun = time.perf_counter()
                os.preadv(descriptor, [buffer], offset)
                times.append(time.perf_counter() - begun)
            medians.append(float(np.median(times)))
    finally:
        os.close(descriptor)
    return fit_transfer(sizes, medians)
