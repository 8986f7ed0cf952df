"""Quality of a conversion over several seeds: attention mass kept by the indexer, and the sparse model beside the original.

python benchmarks/conversion.py MODEL --seed 0 --seed 1 --seed 2 --out benchmarks/conversion_NAME.json -- [options of rtpurbo convert]
"""

import json
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

import rtpurbo
from rtpurbo.cli import main as commands
from rtpurbo.converter.catalog import resolve_model

INDEXERS = ("random", "initial", "trained", "oracle")
MODELS = ("full", "sparse_before", "sparse_after", "full_after")
MEASURES = ("distillation_loss", "perplexity", "needle_accuracy", "mass_on_teacher_ids")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file; the table appears beside it as .md.")
@click.argument("options", nargs=-1)
def main(model: str, seeds: tuple[int, ...], out: Path, options: tuple[str, ...]) -> None:
    """Convert MODEL once per seed and write what the manifests measured on held-out text."""
    runs = []
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="conversion-"))
        arguments = ["convert", model, "--out", str(folder / "artifact"), "--seed", str(seed), *options]
        commands.main(args=arguments, standalone_mode=False)
        body = json.loads((folder / "artifact" / "rtpurbo.json").read_text(encoding="utf-8"))
        counts = {name: body[name] for name in ("num_retrieval_heads", "num_retained_groups")}
        runs.append({"seed": seed, **counts, "rank_stability": body["calibration"]["rank_stability"], **body["metrics"]})
        recipe = body["recipe"]
        shutil.rmtree(folder)
    result = {"model": resolve_model(model).target, "command": shown_command(), "recipe": recipe, "versions": versions(), "runs": runs}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    click.echo(table(result))


def shown_command() -> str:
    """The command that reruns this."""
    return "python benchmarks/conversion.py " + " ".join(sys.argv[1:])


def versions() -> dict[str, str]:
    """Device and libraries of the run."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "rtpurbo": rtpurbo.__version__}


def table(result: dict[str, Any]) -> str:
    """The runs as Markdown: median over seeds, and every seed's value in brackets."""

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.4g} ({' / '.join(f'{value:.4g}' for value in values)})"

    runs = result["runs"]
    measures = ("mass_5_percent", "mass_5_percent_without_sinks", "kl", "top_p_mass", "top_p_tokens")
    lines = [f"`{result['command']}`", "", f"{result['model']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}", ""]
    lines += ["| indexer | " + " | ".join(measures) + " |", "|---|" + "---|" * len(measures)]
    for name in INDEXERS:
        lines.append(f"| {name} | " + " | ".join(cell([run["indexer"][name][m] for run in runs]) for m in measures) + " |")
    lines += ["", "| model | " + " | ".join(MEASURES) + " |", "|---|" + "---|" * len(MEASURES)]
    for name in MODELS:
        lines.append(f"| {name} | " + " | ".join(cell([run["model"][name].get(m, float("nan")) for run in runs]) for m in MEASURES) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
