"""Whatever shapes an engine meets within its profiles, what its nodes launch was compiled when it was built."""

import random
import sys
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from trt_attention_case import AttentionCase

from rtpurbo.kernels.launch import Launch
from rtpurbo.plugins.trt.cubins import distinct, variant_of
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL
from rtpurbo.plugins.trt.operators import launches, port_shapes
from rtpurbo.plugins.trt.plugins import Session

DTYPES = {"model": torch.bfloat16, "index": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}
BATCH, CHUNK, CAPACITY = 5, 700, 9000


def cases():
    """Name -> (attributes, sizes of its fixed axes) of the nodes that an export writes."""
    for name in NODES:
        if name.startswith("Attention"):
            case = AttentionCase(name, ((0,), (1,), 1), D=64, dtype=torch.bfloat16)
            sizes = {
                "O": (case.H + 2 * case.K) * case.D, "U": 32, "Q": CAPACITY, "Z": 2, "K": len(case.counts_K), "L": case.local, "D": 64,
                "W": 27, "I": 3, "J": len(case.heads), "R": 16, "H": case.H,
            }  # fmt: skip
            yield pytest.param(name, case.attributes, sizes, id=name)
        elif "Linear" in name:
            yield pytest.param(name, {"eps": 1e-6} if "Norm" in name else {}, {"C": 320, "O": 200}, id=name)
    yield pytest.param("GatedSilu", {}, {"G": 640}, id="GatedSilu")
    yield pytest.param("Route", {"num_chosen": 8, "normalize": 1}, {"E": 128, "X": 8}, id="Route")
    yield pytest.param("Experts", {}, {"C": 256, "F": 128, "G": 256, "E": 16, "X": 4}, id="Experts")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "attributes", "fixed"), cases())
def test_every_shape_within_the_profiles_finds_its_cubins(name, attributes, fixed, capability):
    check_profiles(name, attributes, fixed, capability, CAPACITY, lambda draw: draw.randint(256, CAPACITY))


# Multiprocessors that make numbers of programs multiples of 16 where the build's do not, and the other way round.
@pytest.mark.parametrize("processors", [56, 108, 132, 142, 144])
@pytest.mark.parametrize("batch", [1, 8, 9])
@pytest.mark.parametrize("capability", [80, 90])
def test_gpus_of_any_size_find_the_cubins_of_a_decode_step(processors, batch, capability):
    for case in cases():
        if case.id in ("AttentionSelectedLocal", "AttentionNormPooled", "AttentionCausal"):
            check_profiles(
                *case.values, capability, CAPACITY, lambda draw: draw.randint(256, CAPACITY), most=batch, processors=processors
            )  # fmt: skip


# Sizes of a cache whose powers of two all have a multiple of 16 blocks, and the largest one that a selection can have.
@pytest.mark.parametrize("capacity", [139008, 1056512, 1 << 21])
def test_every_capacity_of_a_selection_finds_its_cubins(capacity):
    ((name, attributes, fixed),) = (case.values for case in cases() if case.id == "AttentionSelectedLocal")
    parameters = name, attributes | {"block": 64}, fixed
    check_profiles(*parameters, 90, capacity, lambda draw: 256 * draw.randint(1, max(1, capacity >> draw.randint(8, 20))))
    check_profiles(*parameters, 90, capacity, lambda draw: min(capacity, draw.choice((16640, 192000, capacity))))


@contextmanager
def gpu_of(processors):
    """While entered, plans are made for so many multiprocessors (None: for what a build takes)."""
    with pytest.MonkeyPatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if processors and name.startswith("rtpurbo.")]:
            if hasattr(module, "num_processors_of"):
                patch.setattr(module, "num_processors_of", lambda device: processors)
        yield


def check_profiles(name, attributes, fixed, capability, capacity, drawn, *, most=BATCH, processors=None):
    """Random executions up to the largest sizes launch nothing that a build for these sizes does not compile.

    processors: multiprocessors of the GPU that executes.
    """
    node, session = NODES[name], Session(capabilities=(capability,))
    ports = [[DTYPES[port.dtype] for port in side] for side in (node.inputs, node.outputs)]
    for largest in ({"B": 1, "T": CHUNK, "P": PREFILL, "M": CHUNK}, {"B": most, "T": 1, "P": DECODE, "M": most}):
        session.seen[str(largest)] = (name, attributes, {**fixed, **largest, "S": capacity}, *ports)
    compiled = {variant.shape: variant for variant, _ in distinct(session.launches(capability))}
    draw, checked = random.Random(0), 0
    for trial in range(40):
        decode = trial % 2
        batch, rows = (draw.randint(1, most), 1) if decode else (1, draw.randint(1, CHUNK))
        sizes = {**fixed, "B": batch, "T": rows, "P": DECODE if decode else PREFILL, "M": batch * rows, "S": min(capacity, drawn(draw))}
        shapes = port_shapes(node, attributes, sizes)
        described = [list(zip(found, dtypes, strict=True)) for found, dtypes in zip(shapes, ports, strict=True)]
        with gpu_of(processors):
            works = launches(name, attributes, *described, capability)[0]
        for work in works:
            if isinstance(work, Launch):
                wanted, checked = variant_of(work), checked + 1
                assert wanted.shape in compiled, (sizes, wanted)
                assert compiled[wanted.shape].suits(wanted.aligned), (sizes, wanted)
    assert checked or name in ("Linear", "LinearBias")
