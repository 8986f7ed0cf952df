"""Rows of `rtpurbo bench` for people and for scripts: a line, a table, CSV, JSON values and a plot."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rtpurbo.manifests.report import format_bytes
from rtpurbo.runtime.bench_rows import BenchRow

# Okabe-Ito blue and vermillion, apart for colour-blind readers and in grey print.
_COLOURS = {"sparse": "#0072B2", "dense": "#D55E00"}


def line(row: BenchRow) -> str:
    """One sentence a row, for the progress of a long run."""
    head = f"{row.mode}, {row.tokens} tokens, batch {row.batch}"
    if row.ttft_s is None or row.token_ms is None or row.cache_bytes is None:
        return f"{head}: skipped, {row.note}"
    said = f"{head}: first token {row.ttft_s:.3g} s, {row.token_ms:.3g} ms a token, cache {format_bytes(row.cache_bytes)}"
    return f"{said} ({row.note})" if row.note else said


def as_json(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """The rows as JSON values; times of a skipped row are null."""
    return [asdict(row) for row in rows]


def render(rows: Sequence[BenchRow], console: Any) -> None:
    """Print the table on a rich console, notes below it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{rows[0].device}, {rows[0].dtype}"), caption=Text(rows[0].versions), box=box.SIMPLE_HEAD, padding=0)
    on_gpu = any(row.peak_bytes is not None for row in rows)
    for column in ("tokens", "batch", "mode", "first token", "a token", "tok/s", "cache", "of plan", *(["peak"] if on_gpu else [])):
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row.tokens}", f"{row.batch}", row.mode, *(_cells(row) if row.ran else ["skipped"]))
    console.print(table)
    for row in rows:
        for said in _said(row):
            console.print(f"{row.mode}, {row.tokens} tokens, batch {row.batch}: {said}", markup=False, highlight=False, soft_wrap=True)


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """One CSV row a measurement, empty cells where there is none; the file appears by rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [field.name for field in fields(BenchRow)])
            writer.writeheader()
            writer.writerows(as_json(rows))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_outputs(csv_file: Path | None, plot_file: Path | None) -> None:
    """ValueError, before anything is measured, for a file that could not be written at the end."""
    for path in (csv_file, plot_file):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if path is not None and path.exists() and not path.is_file():
            raise ValueError(f"{path} is there and not a file")
    if plot_file is None:
        return
    if plot_file.suffix not in (".png", ".svg"):
        raise ValueError(f"{plot_file}: suffix is {plot_file.suffix!r}, wanted .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install 'rtpurbo[plot]'") from error


def plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Time to first token and time per token over the prompt length, a curve for every mode and batch size; appears by rename."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2)
    batches = sorted({row.batch for row in rows})
    for axes, name, title in ((panels[0], "ttft_s", "time to first token (s)"), (panels[1], "token_ms", "time per token (ms)")):
        for mode, colour in _COLOURS.items():
            for marker, batch in zip("osd^v<>p" * len(batches), batches, strict=False):
                points = sorted((row.tokens, getattr(row, name)) for row in rows if (row.mode, row.batch) == (mode, batch) and row.ran)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{mode}, batch {batch}")
        axes.set(xscale="log", yscale="log", xlabel="prompt tokens", title=title)
        axes.set_xticks(ticks := sorted({row.tokens for row in rows if row.ran}), [str(tick) for tick in ticks])
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{rows[0].device}, {rows[0].dtype}", fontsize=10)
    partial = path.with_name(path.name + ".partial")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "rtpurbo"}):
            figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cells(row: BenchRow) -> list[str]:
    """Medians, their spread below them."""
    assert row.ttft_s is not None
    assert row.cache_bytes is not None
    unit, factor = ("s", 1) if row.ttft_s >= 1 else ("ms", 1e3)
    first, low, high = (_figure(seconds * factor) for seconds in (row.ttft_s, row.ttft_low_s or 0, row.ttft_high_s or 0))
    step, step_low, step_high = map(_figure, (row.token_ms, row.token_low_ms, row.token_high_ms))
    return [
        f"{first} {unit}\n{low}-{high}",
        f"{step} ms\n{step_low}-{step_high}",
        _figure(row.tokens_per_s),
        format_bytes(row.cache_bytes),
        f"{row.cache_bytes / row.plan_cache_bytes:.1%}" if row.plan_cache_bytes else "",
        *([format_bytes(row.peak_bytes)] if row.peak_bytes is not None else []),
    ]


def _figure(value: float | None) -> str:
    """Three digits, without an exponent."""
    assert value is not None
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _said(row: BenchRow) -> list[str]:
    if not row.ran:
        return [f"skipped, {row.note}"]
    faster = "" if row.ttft_speedup is None else f"{row.ttft_speedup:.2f}x dense to the first token, {row.token_speedup:.2f}x a token"
    kept = "" if row.kept_blocks is None else f"{row.kept_blocks:.1%} of the blocks kept"
    return [said for said in (", ".join(filter(None, (faster, kept))), row.note) if said]
