"""Heat map of retrieval scores and head roles: one picture that shows where a model retrieves."""

from pathlib import Path
from typing import Any

from rtpurbo.manifests.manifest import Manifest

# Okabe-Ito vermillion stands out from every blue, also for colour-blind readers and in grey print.
_MARK = "#D55E00"
_BORDER = "0.35"


def plot(manifest: Manifest, path: Path) -> None:
    """Heat map of the retrieval scores, layers x query heads, retrieval heads marked, as .png or .svg by suffix.

    The file appears by rename. ValueError for another suffix, or when matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: suffix is {path.suffix!r}, wanted .png or .svg")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install 'rtpurbo[plot]'") from error
    partial = path.with_name(path.name + ".partial")
    # Fixed ids and no date: the same manifest gives the same file.
    try:
        with matplotlib.rc_context({"svg.hashsalt": "rtpurbo", "font.size": 9}):
            metadata = {"Date": None} if path.suffix == ".svg" else None
            _figure(manifest).savefig(partial, format=path.suffix[1:], dpi=160, metadata=metadata)
        partial.replace(path)
    except OSError as error:
        # A failed write, unlike a failed open, does not say of which file.
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _figure(manifest: Manifest) -> Any:
    """Layers to the right, query heads downwards, with the number of retrieval heads per layer above."""
    from matplotlib.figure import Figure

    shape = manifest.model
    num_layers, num_heads = shape.num_hidden_layers, shape.num_attention_heads
    cell = min(0.24, 18 / num_layers, 14 / num_heads)
    map_width, map_height = max(num_layers * cell, 4.5), max(num_heads * cell, 1.2)
    left, right, bottom, bar, top = 0.95, 0.95, 0.72, 0.6, 0.72
    width, height = left + map_width + right, bottom + map_height + 0.12 + bar + top
    figure = Figure(figsize=(width, height), facecolor="white")
    heat = figure.add_axes((left / width, bottom / height, map_width / width, map_height / height))
    bars = figure.add_axes((left / width, (bottom + map_height + 0.12) / height, map_width / width, bar / height), sharex=heat)
    colours = figure.add_axes(((left + map_width + 0.15) / width, bottom / height, 0.14 / width, map_height / height))
    image = _draw_scores(manifest, heat, min(map_width / num_layers, map_height / num_heads))
    colour_bar = figure.colorbar(image, cax=colours)
    colour_bar.set_label("retrieval score (square-root scale)" if map_height > 2 else "retrieval\nscore (sqrt)", fontsize=8)
    colour_bar.ax.tick_params(length=2, labelsize=8)
    colour_bar.outline.set_linewidth(0.5)

    bars.bar(range(num_layers), [len(layer.retrieval_heads) for layer in manifest.layers], color=_MARK, width=0.8)
    bars.set_ylabel("retrieval\nheads", rotation=0, ha="right", va="center", fontsize=8, labelpad=8)
    most = max(len(layer.retrieval_heads) for layer in manifest.layers)
    bars.set_yticks([0, most] if most else [0])
    bars.tick_params(labelbottom=False, length=2, labelsize=8)
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)
    _draw_texts(manifest, figure, left / width, 1 / height)
    return figure


def _draw_scores(manifest: Manifest, axes: Any, cell_inches: float) -> Any:
    """Draw the map on `axes`; `cell_inches` sizes the marks. Returns the image for the colour bar."""
    from matplotlib.colors import PowerNorm

    shape = manifest.model
    num_heads = shape.num_attention_heads
    columns = [layer.scores for layer in manifest.layers]
    highest = max(max(column) for column in columns) or 1.0
    image = axes.imshow(
        [[column[h] for column in columns] for h in range(num_heads)],
        cmap="Blues",
        norm=PowerNorm(0.5, vmin=0, vmax=highest),
        aspect="auto",
        interpolation="nearest",
    )
    for edge in range(shape.group_size, num_heads, shape.group_size):
        axes.axhline(edge - 0.5, color=_BORDER, linewidth=0.8)
    marks = [(i, h) for i, layer in enumerate(manifest.layers) for h in layer.retrieval_heads]
    # Markers are sized in points squared; a third of a cell leaves the colour of the score visible around it.
    axes.scatter(
        [i for i, _ in marks],
        [h for _, h in marks],
        s=max((72 * cell_inches * 0.42) ** 2, 2),
        facecolor=_MARK,
        edgecolor="white",
        linewidth=0.6,
        gid="retrieval-heads",
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("query head")
    axes.set_xticks(range(0, len(columns), 2 if len(columns) <= 32 else 4 if len(columns) <= 64 else 8))
    # The first head of every KV group, as long as the labels have room.
    axes.set_yticks(range(0, num_heads, shape.group_size * max(1, -(-num_heads // (24 * shape.group_size)))))
    axes.tick_params(length=2, labelsize=8)
    return image


def _draw_texts(manifest: Manifest, figure: Any, left: float, inch: float) -> None:
    """Name and counts above the map, the legend below; `inch` is one inch as a share of the height."""
    from matplotlib.lines import Line2D

    shape = manifest.model
    name = manifest.base_model.id if len(manifest.base_model.id) <= 48 else "..." + manifest.base_model.id[-45:]
    num_heads = shape.num_hidden_layers * shape.num_attention_heads
    num_groups = shape.num_hidden_layers * shape.num_key_value_heads
    counts = (
        f"{manifest.num_retrieval_heads} of {num_heads} query heads retrieve, "
        f"{manifest.num_retained_groups} of {num_groups} KV groups keep their full cache"
    )
    figure.text(left, 1 - 0.24 * inch, name, fontsize=11, fontweight="bold", va="center", parse_math=False)
    figure.text(left, 1 - 0.47 * inch, counts, va="center", color="0.25")
    mark = Line2D([], [], marker="o", markersize=5, color=_MARK, markeredgecolor="white", linestyle="none")
    border = Line2D([], [], color=_BORDER, linewidth=0.8)
    figure.legend(
        [mark, border],
        ["retrieval head", "border between KV groups"],
        loc="lower left",
        bbox_to_anchor=(left, 0.04 * inch),
        ncols=2,
        frameon=False,
        fontsize=8,
        borderpad=0,
        borderaxespad=0,
        handletextpad=0.5,
    )
