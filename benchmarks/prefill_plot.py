"""Picture of benchmarks/prefill.py's CSV: how many times faster than FlashAttention-2 one layer's prefill is, over the prompt's length."""

import argparse
import csv
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PAPER = {32768: 2.83, 65536: 4.25, 131072: 5.92, 262144: 7.47, 524288: 8.62, 1048576: 9.36}


def curves(rows: list[dict[str, str]]) -> dict[str, dict[int, float]]:
    """Label -> tokens -> time of FlashAttention-2 over that of the case."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        tokens, ms = int(row["tokens"]), float(row["median_ms"])
        if row["case"] == "layer, all heads dense":
            times.setdefault({"fa2": "FA2", "cudnn": "dense, cuDNN", "fa4": "dense, FA4"}[row["impl"]], {})[tokens] = ms
        if row["case"] == "single shot" and row["layout"] == "A":
            kind = "dense retrieval" if row["pattern"] == "dense" else f"blocks, {float(row['planted']):.0%} planted"
            times.setdefault(f"layout A, {kind}, {row['impl']}", {})[tokens] = ms
    base = times.pop("FA2")
    return {label: {n: base[n] / ms for n, ms in points.items() if n in base} for label, points in sorted(times.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=pathlib.Path)
    parser.add_argument("png", type=pathlib.Path)
    options = parser.parse_args()
    with options.csv.open(newline="") as file:
        lines = {**curves(list(csv.DictReader(file))), "paper, dense retrieval (H20)": PAPER}
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), dpi=90)
    for label, points in lines.items():
        axes.plot(list(points), list(points.values()), ":" if label.startswith("paper") else "-", marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = sorted({n for points in lines.values() for n in points})
    axes.set_xticks(ticks, [f"{n >> 10}K" if n < 1 << 20 else "1M" for n in ticks])
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("times faster than FlashAttention-2")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.png)


if __name__ == "__main__":
    main()
