"""What the kernel says about this process."""

from pathlib import Path


def peak_rss_bytes() -> int:
    """The most memory this process ever held (VmHWM)."""
    return _kibibytes("VmHWM")


def disk_bytes_read() -> int:
    """Bytes this process made the disks deliver; page cache hits do not count."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _kibibytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
