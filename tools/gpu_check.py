"""Everything there is to know of a GPU in nine minutes: `make gpu-check`, rehearsed without one by --rehearse.

Each section runs in a process of its own, with a budget: one that fails, hangs or runs out of memory takes nothing from the others.
Writes OUT/gpu_check.json and .csv anew after each.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_sections import SECTIONS, Row, Setting, make_device

from specmoeoff.errors import SpecMoEOffError
from specmoeoff.kernels.cuda.on_cpu import LIBRARY_NAME

GRACE_S = 15.0  # to start Python and a GPU's context


def run_section(name: str, rehearse: bool, out: Path) -> None:
    """Write OUT/name.json: rows so far after every row, and how it ended."""
    section, seconds = SECTIONS[name]
    rows: list[Row] = []
    found: dict[str, Any] = {"status": "cut short", "error": "", "rows": rows}
    path = out / f"{name}.json"

    def write() -> None:
        found["rows"] = [row._asdict() for row in rows]
        path.write_text(json.dumps(found, indent=1))

    write()
    library = out.resolve() / LIBRARY_NAME
    try:
        for row in section(Setting(make_device(rehearse, library), rehearse, seconds, library)):
            rows.append(row)
            write()
        found["status"] = "done"
    except (SpecMoEOffError, ImportError) as error:
        found |= {"status": "missing", "error": str(error)}
    except Exception:
        found |= {"status": "failed", "error": traceback.format_exc()[-4000:]}
    write()


def supervise(name: str, rehearse: bool, out: Path) -> dict[str, Any]:
    """A section in its own process, for no longer than its time."""
    command = [sys.executable, __file__, "--section", name, "--out", str(out), *(["--rehearse"] if rehearse else [])]
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECTIONS[name][1] + GRACE_S)
        ended = done.stderr[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        ended = "its time was up"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"status": "failed", "rows": []}
    if ended:
        found["error"] = ended
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def write_all(found: dict[str, Any], rehearse: bool, out: Path) -> None:
    """The whole as JSON, and its rows as CSV."""
    whole = {"rehearsal": rehearse, "sections": found}
    (out / "gpu_check.json").write_text(json.dumps(whole, indent=1))
    with (out / "gpu_check.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["section", *Row._fields])
        for name, section in found.items():
            writer.writerows([name, *(row[field] for field in Row._fields)] for row in section["rows"])


def main() -> int:
    """0: every section is done; 1: one is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"))
    parser.add_argument("--rehearse", action="store_true", help="on a GPU played by a CPU, tiny: numbers mean nothing")
    parser.add_argument("--section", choices=SECTIONS)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        run_section(options.section, options.rehearse, options.out)
        return 0
    found: dict[str, Any] = {}
    for name in options.only:
        found[name] = supervise(name, options.rehearse, options.out)
        write_all(found, options.rehearse, options.out)
        section = found[name]
        print(f"{name}: {section['status']}, {len(section['rows'])} rows, {section['seconds']} s", flush=True)
        if section.get("error"):
            print(f"  {section['error'].strip().splitlines()[-1]}", flush=True)
    return int(any(section["status"] != "done" for section in found.values()))


if __name__ == "__main__":
    sys.exit(main())
