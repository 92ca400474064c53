"""Puts figures and tables into one HTML file, and beside it as SVG, PNG and CSV."""

import io
import re
from collections.abc import Collection, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from specmoeoff import __version__
from specmoeoff.errors import BadInput
from specmoeoff.estimate.accuracy import report as accuracy
from specmoeoff.files import explain_os_errors, read_text, write_atomic
from specmoeoff.roofline.curves import ceilings
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

    from specmoeoff.report.style import Picture

PICTURES, TABLES = ("roofline", "throughput", "breakdown", "timeline", "memory"), ("numbers", "pairs", "accuracy")
OWN_FILES = [name + suffix for name in PICTURES for suffix in (".svg", ".png", ".csv")] + [
    f"{name}.csv" for name in TABLES
]


def write_report(
    out_html: Path,
    profile: HardwareProfile,
    plan: Plan | None,
    records: Sequence[RunRecord],
    model: ModelSpec | None = None,
    workload: Workload | None = None,
    points_csv: Path | None = None,
) -> list[Path]:
    """Write the report and everything beside it; returns the files, the HTML first.

    What is missing is said in the report, with the command that supplies it. Raises BadInput for a bad points file.
    """
    import pandas as pd

    from specmoeoff.report import figures
    from specmoeoff.report.roofline import roofline

    given = read_points(points_csv, {c.name for c in ceilings(profile) if not c.is_peak}) if points_csv else None
    record = next((r for r in records if r.kind == "validate"), None)
    pictures = [roofline(profile, plan, model, given)]
    missing = []
    if plan:
        pictures += [figures.throughput(plan, record), figures.breakdown(plan, record)]
    else:
        missing.append("No plan was given: `specmoeoff tune` makes one, `report --plan` shows it.")
    if record and record.timeline_measured:
        pictures.append(figures.timeline(record))
    if plan:
        pictures.append(figures.memory(plan, record))
    if not record:
        missing.append(
            "No validation was given: `specmoeoff validate -o record.json` measures, `report --record` shows it."
        )
    if profile.disk is None:
        missing.append(f"The profile has no disk link ({profile.waived.get('disk', 'not measured')}).")
    numbers = all_numbers(profile, plan, records, workload)
    folder = out_html.with_name(out_html.stem + "_files")
    with explain_os_errors(folder):
        folder.mkdir(exist_ok=True)
    written = [out_html]
    sections = []
    for picture in pictures:
        svg = svg_text(picture)
        written += _write_picture(folder, picture, svg)
        sections.append({"picture": picture, "svg": svg, "table": _shown(picture)})
    tables = {"numbers": numbers}
    if record:
        tables["pairs"] = figures.throughput_spread(record)
        tables["accuracy"] = pd.DataFrame(accuracy(record, plan).rows)
    for name, table in tables.items():
        write_atomic(folder / f"{name}.csv", table.to_csv(index=False))
        written.append(folder / f"{name}.csv")
    html = _render(profile, plan, record, sections, missing, numbers)
    write_atomic(out_html, html)
    for path in {folder / name for name in OWN_FILES} - {*written}:  # an earlier report's, which had more to show
        with explain_os_errors(path):
            path.unlink(missing_ok=True)
    return written


def read_points(path: Path, levels: Collection[str]) -> "pd.DataFrame":
    """More roofline points: name, flops_per_byte, gflop_per_s and, where it is not DRAM, level: one of `levels`."""
    import pandas as pd

    text = read_text(path, "points CSV")
    try:
        table = pd.read_csv(io.StringIO(text))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BadInput(f"{path}: not a CSV table: {str(error).strip()}.") from None
    for column in ("name", "flops_per_byte", "gflop_per_s"):
        if column not in table:
            raise BadInput(f"{path}: column {column} is missing; name, flops_per_byte and gflop_per_s are needed.")
        if column != "name":
            values = pd.to_numeric(table[column], errors="coerce")
            for i, value in enumerate(values):
                if not value > 0:
                    raise BadInput(
                        f"{path}: line {i + 2}: {column} must be a positive number, not {table[column][i]!r}."
                    )
            table[column] = values
    for i, level in enumerate(table.get("level", ())):
        if level not in levels:
            raise BadInput(
                f"{path}: line {i + 2}: level {level!r} is not a roof; there are {', '.join(sorted(levels))}."
            )
    return table.astype({"name": str})


def all_numbers(
    profile: HardwareProfile, plan: Plan | None, records: Sequence[RunRecord], workload: Workload | None
) -> "pd.DataFrame":
    """Every number with its unit and where it comes from."""
    import pandas as pd

    rows: list[tuple[str, float, str, str]] = []
    for roof in (*profile.peaks, *profile.memory):
        m = roof.rate
        rows.append(
            (
                f"{roof.name}, {f'{roof.n_threads} threads' if roof.device == 'cpu' else 'GPU'}",
                m.value,
                m.unit,
                f"{m.provenance}, {m.statistic} of {len(m.samples)}",
            )
        )
    if profile.disk:
        d = profile.disk
        rows.append(
            (
                "disk read",
                d.read_gb_per_s.value,
                "GB/s",
                f"{d.read_gb_per_s.provenance}, {d.read_gb_per_s.statistic} of {len(d.read_gb_per_s.samples)}, O_DIRECT, {d.n_readers} readers of {d.chunk_bytes:,} bytes",
            )
        )
        rows.append(("disk latency", d.latency_s.value, "s", f"fitted, largest error {d.fit_error:.0%}"))
    for link in profile.links:
        name = f"{link.direction}, {link.host_memory}, beside {link.beside.replace('_', ' ')}"
        how, lanes = link.provenance, f"PCIe {link.pcie_generation}.0 x{link.pcie_width}" if link.pcie_width else ""
        for what, value, unit, interval in (
            (name, link.gb_per_s, "GB/s", link.interval_gb_per_s),
            (f"{name}: latency", link.latency_s, "s", link.latency_interval_s),
        ):
            if value is not None:
                width = f"95 % {interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
                rows.append((what, value, unit, ", ".join(filter(None, (how, width, lanes)))))
    for level, latency in profile.latency_s.items():
        rows.append((f"{level} latency", latency.value, latency.unit, f"{latency.provenance}, {latency.statistic}"))
    for table in profile.operators:
        for slowed in table.beside:
            name = f"{table.operator} of {table.shape}, {table.n_threads} threads, {table.axes[0]} {slowed.size:g}, beside {slowed.lane}"
            ratio = slowed.ratio
            rows.append((name, ratio.value, "times slower", f"{ratio.provenance}, {ratio.statistic}"))
    rows.append(("process before any model", profile.process_bytes, "bytes", "measured"))
    if workload:
        for name, a in workload.acceptance.items():
            rows += [
                (f"acceptance of {name}, token {i + 1}", v, "share", f"{a.provenance}, {a.n_rounds} rounds")
                for i, v in enumerate(a.conditional)
            ]
        rows.append(("union exponent", workload.union_exponent, "", f"fitted to {len(workload.union)} measured unions"))
    if plan:
        for label, part in (("plain", plan.plain), ("tuned", plan)):
            p = part.predicted
            rows += [
                (f"{label}: window", p.window_s, "s", "predicted"),
                (f"{label}: tokens per second", p.tokens_per_s, "1/s", "predicted"),
                (f"{label}: tokens per round", p.tokens_per_round, "", "predicted from measured acceptance"),
                (f"{label}: bytes read per window", p.disk_bytes, "bytes", "predicted"),
            ]
        rows += [
            (f"memory, {tier}: {k}", v, "bytes", "computed")
            for tier in ("fast", "host", "disk")
            for k, v in getattr(plan.memory, tier).items()
        ]
        if plan.limits.disk_limit_gb_per_s:
            rows.append(("disk cap", plan.limits.disk_limit_gb_per_s, "GB/s", "given"))
    for record in records:
        rows.append((f"{record.kind}: bytes read from disk", record.disk_bytes_read, "bytes", "counted by the kernel"))
        rows.append((f"{record.kind}: bytes asked for", record.disk_bytes_planned, "bytes", "counted by the run"))
        rows.append((f"{record.kind}: peak RSS", record.rss_peak_bytes, "bytes", "counted by the kernel"))
        for c in record.comparisons:
            rows.append((f"{c.name}, measured", c.measured, c.unit, "measured here, median"))
            rows.append((c.name, c.predicted, c.unit, c.provenance))
        for s in record.speed_ups:
            rows.append(
                (
                    f"speed-up, {s.label}",
                    s.median,
                    "x",
                    f"measured, median of {len(s.pairs)} pairs, {s.confidence:.1%} interval {s.low:.2f} to {s.high:.2f}",
                )
            )
            rows.append((f"limit of the speed-up, {s.label}", s.limit, "x", s.limit_reason))
    return pd.DataFrame(rows, columns=["name", "value", "unit", "provenance"])


def svg_text(picture: "Picture") -> str:
    """The figure with its marks as titles and `data-groups`; all text is text, all ids begin with the figure's name."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):
        picture.figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    # Inline SVGs share one document: ids of one figure must not be found by another.
    text = (
        text[text.index("<svg") :]
        .replace('id="', f'id="{picture.name}-')
        .replace('"#', f'"#{picture.name}-')
        .replace("url(#", f"url(#{picture.name}-")
    )

    def marked(found: re.Match[str]) -> str:
        mark = picture.marks.get(found[1])
        if mark is None:
            return found[0]
        groups = escape("|".join(mark.groups))
        return f'{found[0][:-1]} data-groups="{groups}"><title>{escape(mark.tip)}</title>'

    return re.sub(f'<g id="{picture.name}-([^"]*)">', marked, text)


def _write_picture(folder: Path, picture: "Picture", svg: str) -> list[Path]:
    png = io.BytesIO()
    picture.figure.savefig(png, format="png", dpi=150)
    paths = [folder / f"{picture.name}{suffix}" for suffix in (".svg", ".png", ".csv")]
    for path, content in zip(paths, (svg, png.getvalue(), picture.table.to_csv(index=False)), strict=True):
        write_atomic(path, content)
    return paths


def _shown(picture: "Picture") -> dict[str, object] | None:
    """The roofline's points as a table beside it; the other figures' numbers are in their CSVs."""
    from specmoeoff.report.points import SWEEP

    if picture.name != "roofline" or "percent_of_roof" not in picture.table:
        return None
    columns = ["name", "level", "flops_per_byte", "gflop_per_s", "percent_of_roof", "limiter", "provenance"]
    # The sweep's many rows are in its line and in the CSV.
    part = picture.table[picture.table["percent_of_roof"].notna() & (picture.table["kind"] != SWEEP)][columns]
    return {"columns": columns, "rows": [[_text(v) for v in row] for row in part.itertuples(index=False)]}


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _render(
    profile: HardwareProfile,
    plan: Plan | None,
    record: RunRecord | None,
    sections: list[dict[str, object]],
    missing: list[str],
    numbers: "pd.DataFrame",
) -> str:
    from jinja2 import Environment

    template, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("report.html.jinja", "report.js")
    )
    ups = []
    for s in record.speed_ups if record else ():
        ups.append(
            {
                "label": s.label,
                "plain": f"{median(p.plain_tokens_per_s for p in s.pairs):.1f}",
                "tuned": f"{median(p.tuned_tokens_per_s for p in s.pairs):.1f}",
                "ratio": f"{s.median:.2f}",
                "interval": f"{s.low:.2f} to {s.high:.2f} ({s.confidence:.1%}, {len(s.pairs)} pairs)",
                "limit": f"{s.limit:.2f}",
                "reason": s.limit_reason,
            }
        )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        profile=profile,
        plan=plan,
        record=record,
        ups=ups,
        accuracy=accuracy(record, plan) if record else None,
        sections=sections,
        script=script,
        missing=missing,
        numbers=[[_text(v) for v in row] for row in numbers.itertuples(index=False)],
        version=__version__,
    )
