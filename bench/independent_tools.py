"""Our probes against likwid-bench (memory) and fio (disk), taking turns: do they see the same machine?

Prints one row per kind of move and writes bench/independent_tools.csv: median and interval of the paired ratios theirs /
ours, where ours is the mean of a sample just before and just after theirs. Shared machines change speed within seconds: pairs
between which ours changed by more than 5 % are dropped. In memory a sample is the better of two forms, theirs as ours: by wide
or narrow instructions, or fetching ahead. Both use huge pages, since how small ones happen to lie decides a tenth.
Needs Debian's packages likwid and fio; what is missing is left out, visibly. The disk is read into huge pages by both where
the system has some set aside (`sysctl vm.nr_hugepages=32`), else into small ones by both. fio's readers each have a part of
the file, as ours never read the same bytes at once: the second to ask gets them from the host's memory.
About twelve minutes; `--only memory` or `--only disk` replaces those rows.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import pandas as pd

from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.kernels.cpu.probes import Move
from specmoeoff.roofline.probes.disk import Reader, test_file
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.timing import modes, paired_ratios

PAIRS, TRIES, SAME, MIB = 15, 40, 0.05, 1 << 20
DRAM_BYTES, L2_BYTES = 384 * MIB, 512 << 10
DISK_S = 0.5
MOVES = {
    "read": ("load_avx512", "load"),
    "store": ("store_avx512", "store"),
    "nt_store": ("store_mem_avx512", "store_mem_avx"),
    "copy": ("copy_avx512", "copy"),
    "triad": ("stream_avx512", "stream"),
}
# glibc then asks for huge pages for what likwid-bench allocates.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def likwid(kernel: str, n_bytes: int, n_threads: int, passes: int) -> float:
    """GB/s; bytes counted as the program moves them, like ours."""
    command = ["likwid-bench", "-t", kernel, "-w", f"S0:{n_bytes // 1000}kB:{n_threads}", "-i", str(passes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | HUGE_PAGES)
    found = re.search(r"MByte/s:\s+([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1]) / 1e3


def has_huge_pages() -> bool:
    """Whether fio can have them."""
    return int(Path("/proc/sys/vm/nr_hugepages").read_text()) >= 32


def fio(path: Path, reader_count: int, chunk_bytes: int) -> float:
    """GB/s of O_DIRECT reads."""
    command = [
        *("fio", "--name=read", f"--filename={path}", "--direct=1", "--rw=read", f"--bs={chunk_bytes}"),
        *(
            f"--numjobs={reader_count}",
            "--ioengine=psync",
            "--time_based",
            f"--runtime={DISK_S * 1e3:.0f}ms",
            "--group_reporting",
        ),
        *(f"--size={100 // reader_count}%", f"--offset_increment={100 // reader_count}%"),
        *("--readonly", "--thread", "--output-format=json"),
        *(("--mem=shmhuge", "--hugepage-size=2m") if has_huge_pages() else ()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def moved(move: Move, rounds: int) -> float:
    """GB/s."""
    return move.n_bytes * rounds / move.run(rounds).seconds / 1e9


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float], tool: str) -> dict[str, object]:
    """One row of the table."""
    ours(), theirs()
    found: list[tuple[float, float]] = []
    before = ours()
    for _ in range(TRIES):
        other, after = theirs(), ours()
        if abs(before / after - 1) <= SAME:
            found.append((other, fmean([before, after])))
        before = after
        if len(found) == PAIRS:
            break
    ratio, low, high, _ = paired_ratios([f[0] for f in found], [f[1] for f in found])
    row: dict[str, object] = {
        "what": name,
        "tool": tool,
        "ours_gb_per_s": round(median(f[1] for f in found), 2),
        "theirs_gb_per_s": round(median(f[0] for f in found), 2),
        "theirs_over_ours": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "pairs": len(found),
        "our_modes": " ".join(f"{m:.1f}" for m in modes([f[1] for f in found])),
        "their_modes": " ".join(f"{m:.1f}" for m in modes([f[0] for f in found])),
        "cpu": machine().cpu,
    }
    print("  ".join(f"{k} {v}" for k, v in row.items() if k != "cpu"), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("memory", "disk"))
    only = parser.parse_args().only
    rows = []
    n_threads = len(os.sched_getaffinity(0))
    if only == "disk":
        pass
    elif shutil.which("likwid-bench") and "avx512" in machine().isa:
        whole = aligned_empty(DRAM_BYTES)
        whole[:] = 0x3E
        for level, n_bytes, passes in (("dram", DRAM_BYTES, 8), ("l2", L2_BYTES * n_threads, 4_000)):
            for move, kernels in MOVES.items():
                if level == "l2" and move.startswith("nt_"):
                    continue
                n_forms = 2 if level == "dram" else 1
                rounds = 8 if level == "dram" else 2000
                forms = [(move, 0), ("read_ahead", 0) if move == "read" else (move, -1)][:n_forms]
                moves = [Move(kind, n_threads, whole[:n_bytes], form) for kind, form in forms]
                rows.append(
                    compare(
                        f"{level}_{move}",
                        lambda moves=moves, r=rounds: max(moved(m, r) for m in moves),  # type: ignore[misc]
                        lambda kernels=kernels[:n_forms], n=n_bytes, i=passes: max(  # type: ignore[misc]
                            likwid(k, n, n_threads, i) for k in kernels
                        ),
                        "likwid-bench",
                    )
                )
    else:
        print("likwid-bench or AVX-512 is missing: memory is not compared (`apt-get install likwid`)")
    if only == "memory":
        pass
    elif shutil.which("fio"):
        with test_file(None) as path:
            for n_readers, chunk in ((1, 4 * MIB), (4, MIB)):
                pages = "huge" if has_huge_pages() else "small"
                rows.append(
                    compare(
                        f"disk_read, {n_readers} readers of {chunk // MIB} MiB, {pages} pages",
                        # Buffers made anew for every sample, as fio's are.
                        lambda n=n_readers, c=chunk, p=path: (  # type: ignore[misc]
                            Reader(p, n, c, has_huge_pages()).read(DISK_S) / 1e9
                        ),
                        lambda n=n_readers, c=chunk, p=path: fio(p, n, c),  # type: ignore[misc]
                        "fio",
                    )
                )
    else:
        print("fio is missing: the disk is not compared (`apt-get install fio`)")
    table = Path(__file__).with_suffix(".csv")
    if only and table.exists():
        kept = pd.read_csv(table)
        rows += kept[~kept["what"].isin([row["what"] for row in rows])].to_dict("records")
    if rows:
        pd.DataFrame(rows).sort_values("what").to_csv(table, index=False)


if __name__ == "__main__":
    main()
