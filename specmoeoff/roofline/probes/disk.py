"""The disk link: O_DIRECT reads by several threads into aligned memory, never through the page cache."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.files import cache_dir
from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.roofline.fits import fit_transfer
from specmoeoff.roofline.timing import measurement, modes
from specmoeoff.specs.profile import DiskLink

KIB, MIB = 1 << 10, 1 << 20
CHUNKS = (256 * KIB, MIB, 4 * MIB)
READERS = (1, 2, 4)
TEST_BYTES = 512 * MIB
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
    """Reads a file round and round."""

    def __init__(self, path: Path, n_readers: int, chunk_bytes: int) -> None:
        self._path, self._chunk = path, chunk_bytes
        self._n_chunks = max(1, path.stat().st_size // chunk_bytes)
        self._buffers = [aligned_empty(chunk_bytes) for _ in range(n_readers)]
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
                        counts[index] += os.preadv(descriptor, [memoryview(self._buffers[index])], chunk * self._chunk)
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


def measure_disk(path: Path | None, budget_s: float) -> DiskLink:
    """Best chunk and number of readers, then many samples of those. Raises MissingCapability without O_DIRECT."""
    with test_file(path) as file:
        os.close(open_direct(file))
        trials = {(c, n): Reader(file, n, c) for c in CHUNKS for n in READERS}
        share_s = budget_s * 0.35 / len(trials) / 2
        rates = {key: [reader.read(share_s) for _ in range(2)] for key, reader in trials.items()}
        best = max(rates, key=lambda key: float(np.median(rates[key])))
        reader = trials[best]
        samples = [reader.read(SAMPLE_S) / 1e9 for _ in range(max(8, int(budget_s * 0.55 / SAMPLE_S)))]
        latency, bandwidth, error = _fit(file, best[1])
    return DiskLink(
        read_gb_per_s=measurement(samples, "GB/s", "median", f"{bandwidth / 1e9:.2f} GB/s from the fit of one request"),
        latency_s=measurement([latency], "s", note="from the fit of one request"),
        chunk_bytes=best[0],
        n_readers=best[1],
        modes_gb_per_s=modes(samples),
        fit_error=error,
    )


def _fit(file: Path, n_readers: int) -> tuple[float, float, float]:
    """Latency and bandwidth of single requests of growing size."""
    sizes = (4 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
    descriptor = open_direct(file)
    rng = np.random.default_rng(n_readers)
    medians = []
    try:
        n_blocks = max(1, file.stat().st_size // sizes[-1])
        for size in sizes:
            buffer, times = memoryview(aligned_empty(size)), []
            for _ in range(12):
                offset = int(rng.integers(n_blocks)) * sizes[-1]
                begun = time.perf_counter()
                os.preadv(descriptor, [buffer], offset)
                times.append(time.perf_counter() - begun)
            medians.append(float(np.median(times)))
    finally:
        os.close(descriptor)
    return fit_transfer(sizes, medians)
