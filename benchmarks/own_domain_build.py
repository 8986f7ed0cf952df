"""Builds an artifact's ONNX export in the form that `tensorrt` takes, custom nodes in the domain rtpurbo, with tensorrt-rtx 1.7.

The library in which this form runs, `tensorrt`, builds no engine on a machine without a GPU; tensorrt-rtx 1.7 parses the same nodes and
does. Nothing runs here. Needs an environment with tensorrt-rtx 1.7.1 and libtensorrt_rtx.so beside its libtensorrt_rtx.so.1.

python benchmarks/own_domain_build.py ARTIFACT [--dtype bfloat16 --capacity 8192 --chunk 2048 --batch 4]
"""

import resource
import time
from pathlib import Path

import click

from rtpurbo.plugins.trt.export import ExportOptions, export
from rtpurbo.plugins.trt.library import load_library
from rtpurbo.plugins.trt.nodes import DECODE, DOMAIN, PREFILL
from rtpurbo.plugins.trt.plugins import Session, registered


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--dtype", default="auto", show_default=True)
@click.option("--capacity", default=8192, show_default=True)
@click.option("--chunk", default=2048, show_default=True)
@click.option("--batch", default=4, show_default=True)
def main(folder: Path, dtype: str, capacity: int, chunk: int, batch: int) -> None:
    """Export FOLDER, parse and build it with two profiles, and print what came out."""
    _, trt = load_library("tensorrt-rtx")
    if not trt.__version__.startswith("1.7."):
        raise click.UsageError(f"tensorrt_rtx is {trt.__version__}, wanted 1.7.x")
    model = export(folder, ExportOptions(dtype=dtype)).model
    custom = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    logger = trt.Logger(trt.Logger.WARNING)
    session, begin = Session(), time.perf_counter()
    with registered(trt, session):
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        # The path tells the parser where the weights' files lie; no file of this name needs to exist.
        if not parser.parse(model.SerializeToString(), str(folder / "model.onnx")):
            raise click.ClickException("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
        plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
        if plugins != len(custom):
            raise click.ClickException(f"{plugins} of {len(custom)} custom nodes became plugins")
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        for phase in (PREFILL, DECODE):
            rows = (1, chunk, chunk) if phase == PREFILL else (1, 1, 1)
            ranges = {"batch": (1, 1, batch), "chunk": rows, "capacity": (1, capacity, capacity), "phase": (phase,) * 3}
            profile = builder.create_optimization_profile()
            for port in model.graph.input:
                shape = [ranges[d.dim_param] if d.dim_param else (d.dim_value,) * 3 for d in port.type.tensor_type.shape.dim]
                profile.set_shape(port.name, *zip(*shape, strict=True))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is None or session.failures:
        raise click.ClickException(f"no engine: {session.failures}")
    click.echo(
        f"tensorrt-rtx {trt.__version__}: {plugins} plugins of {len(set(custom))} kinds, {plan.nbytes:,} bytes, "
        f"{time.perf_counter() - begin:.1f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )


if __name__ == "__main__":
    main()
