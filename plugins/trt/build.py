"""From an artifact to an engine's folder: export, TensorRT's build, cubins of the kernels that the engine launches."""

import contextlib
import hashlib
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rtpurbo import __version__
from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest, file_digest
from rtpurbo.manifests.output import appearing, refuse_existing
from rtpurbo.plugins.trt.cache import CAPACITY_STEP
from rtpurbo.plugins.trt.cubins import CAPABILITIES, compile_cubins, distinct, kernels_digest
from rtpurbo.plugins.trt.folder import CUBINS_NAME, PLAN_NAME, CacheInfo, EngineInfo
from rtpurbo.plugins.trt.library import load_library, uses_carrier
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL
from rtpurbo.plugins.trt.plugins import Session, registered

# What a tokenizer and a sampler read; weights are in the engine.
_KEPT = (
    MANIFEST_NAME, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


class Reporter(Protocol):
    """Told what a build is at."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""

    def advance(self, facts: Mapping[str, Any]) -> None:
        """One unit of the stage is done."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """library: tensorrt or tensorrt-rtx (None: the first installed). capabilities: what cubins are compiled for, as 10 x major + minor.

    dtype: "auto" (as stored), float16, bfloat16 or float32. batch, prefill_chunk: the largest ones. capacity: most tokens of a sequence
    (None: max_position_embeddings). dense: an engine for prompts below the manifest's dense_below, all of whose heads attend fully.
    Raises ValueError for values out of range.
    """

    library: str | None = None
    capabilities: tuple[int, ...] = CAPABILITIES
    dtype: str = "auto"
    batch: int = 4
    capacity: int | None = None
    prefill_chunk: int = 8192
    dense: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "prefill_chunk", "capacity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        if not self.capabilities or not set(self.capabilities) <= set(CAPABILITIES):
            raise ValueError(f"capabilities are {list(self.capabilities)}, wanted some of {list(CAPABILITIES)}")


def check_can_build(library: str | None = None) -> None:
    """ValueError in one sentence when this machine cannot build engines: no TensorRT, no ONNX or no Triton."""
    name, trt = load_library(library)
    uses_carrier(name, trt.__version__)
    for module, extra in (("onnx", "trt-rtx"), ("triton", "dev")):
        try:
            __import__(module)
        except ImportError as error:
            raise ValueError(f"{module} is not installed, and an engine cannot be built without it: install rtpurbo[{extra}]") from error


def build(artifact: Path, out: Path, options: BuildOptions, report: Reporter) -> EngineInfo:
    """Build the engine of an artifact into the new folder `out`, which appears complete or not at all.

    Raises ValueError for an artifact or options that do not fit, for a library that cannot build here, and when `out` exists.
    """
    refuse_existing(out)
    check_can_build(options.library)
    name, trt = load_library(options.library)
    from rtpurbo.plugins.trt.carrier import to_carrier
    from rtpurbo.plugins.trt.export import ExportOptions, export

    began = time.perf_counter()
    manifest = Manifest.load(artifact / MANIFEST_NAME)
    capacity = _capacity(options.capacity, manifest)
    with appearing(out) as partial:
        report.stage("export", 1)
        positions = min(capacity, manifest.model.max_position_embeddings)
        exported = export(artifact, ExportOptions(dtype=options.dtype, positions=positions, dense=options.dense))
        model = to_carrier(exported.model) if uses_carrier(name, trt.__version__) else exported.model
        phased = any(port.name == "phase" for port in model.graph.input)
        caches = caches_of(model, exported.caches)
        vocab_size = int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
        dtype = next(entry.value for entry in model.metadata_props if entry.key == "rtpurbo.dtype")
        onnx = model.SerializeToString()
        del exported, model
        report.advance({})
        report.stage("engine", 1)
        session = Session(capabilities=options.capabilities)
        built = time.perf_counter()
        plan = _build_plan(trt, onnx, artifact, session, options, capacity, caches, phased)
        with (partial / PLAN_NAME).open("wb") as file:
            file.write(plan)
        del plan
        engine_s = time.perf_counter() - built
        report.advance({})
        kinds = {capability: list(session.launches(capability)) for capability in options.capabilities}
        report.stage("cubins", sum(len(distinct(launches)) for launches in kinds.values()))
        compiled = time.perf_counter()
        compile_cubins(kinds, partial / CUBINS_NAME, progress=lambda done, total: report.advance({}))
        for kept in _KEPT:
            if (artifact / kept).is_file():
                shutil.copyfile(artifact / kept, partial / kept)
        digest = file_digest(partial / PLAN_NAME)
        info = EngineInfo(
            library=name, library_version=trt.__version__, rtpurbo=__version__, capabilities=options.capabilities, dtype=dtype,
            batch=options.batch, capacity=capacity, prefill_chunk=min(options.prefill_chunk, capacity), dense=options.dense, phased=phased,
            vocab_size=vocab_size, caches=caches, manifest_digest=manifest.to_dict()["digest"], kernels_sha256=kernels_digest(),
            onnx_sha256=hashlib.sha256(onnx).hexdigest(), plan_sha256=digest.sha256, plan_bytes=digest.size_bytes,
            build={
                "seconds": round(time.perf_counter() - began, 1), "engine_seconds": round(engine_s, 1),
                "cubins_seconds": round(time.perf_counter() - compiled, 1),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
        )  # fmt: skip
        info.save(partial)
    return info


def _capacity(wanted: int | None, manifest: Manifest) -> int:
    limit = manifest.model.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ValueError(f"capacity {wanted} exceeds the model's max_position_embeddings {limit}")
    return -(-(wanted or limit) // CAPACITY_STEP) * CAPACITY_STEP


def caches_of(model: Any, outputs: dict[str, str]) -> dict[str, CacheInfo]:
    """Shape, dtype and aliasing output of every cache input."""
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
        TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
    }  # fmt: skip
    found = {}
    for port in model.graph.input:
        if port.name in outputs:
            tensor = port.type.tensor_type
            shape = tuple(None if dim.dim_param == "capacity" else int(dim.dim_value) for dim in tensor.shape.dim[1:])
            found[port.name] = CacheInfo(shape=shape, dtype=names[tensor.elem_type], output=outputs[port.name])
    return found


def _build_plan(
    trt: Any,
    onnx: bytes,
    artifact: Path,
    session: Session,
    options: BuildOptions,
    capacity: int,
    caches: dict[str, CacheInfo],
    phased: bool,
) -> Any:
    """The serialized engine. Two profiles: a chunk of one sequence in prefill, one token of each sequence in decode."""
    log = _Log(trt)
    with registered(trt, session):
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log.logger)
        # External data is looked up beside this path.
        if not parser.parse(onnx, str(artifact / "model.onnx")):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise _failed("does not take the exported model", errors, session)
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        # The only products in fp32 are the index projections of a 16-bit engine: rounded to TF32 they would select other blocks.
        config.clear_flag(trt.BuilderFlag.TF32)
        chunk = min(options.prefill_chunk, capacity)
        for sizes, phase in (((1, 1, 1), (1, chunk, chunk)), PREFILL), (((1, 1, options.batch), (1, 1, 1)), DECODE):
            config.add_optimization_profile(_profile(builder, *sizes, phase, capacity, caches, phased))
        with _interruptible(trt) as monitor:
            config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
    if plan is None or session.failures:
        raise _failed("cannot build the engine", log.last, session)
    return plan


def _profile(
    builder: Any,
    batch: tuple[int, int, int],
    chunk: tuple[int, int, int],
    phase: int,
    capacity: int,
    caches: dict[str, CacheInfo],
    phased: bool,
) -> Any:
    profile = builder.create_optimization_profile()
    profile.set_shape("input_ids", *zip(batch, chunk, strict=True))
    for name in ("lengths", "counts"):
        profile.set_shape(name, *((size,) for size in batch))
    if phased:
        profile.set_shape("phase", *[(phase,)] * 3)
    least = min(CAPACITY_STEP, capacity)
    for name, cache in caches.items():
        sizes = zip(batch, (least, capacity, capacity), strict=True)
        profile.set_shape(name, *((b, *(s if axis is None else axis for axis in cache.shape)) for b, s in sizes))
    return profile


@contextlib.contextmanager
def _interruptible(trt: Any) -> Iterator[Any]:
    """A progress monitor that ends the build when Ctrl-C is pressed; KeyboardInterrupt then follows.

    An exception that is raised while TensorRT asks a plugin something is an answer of that plugin, and the build would go on.
    """
    pressed = threading.Event()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

        def phase_finish(self, phase_name: str) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not pressed.is_set()

    monitor = Monitor()
    if threading.current_thread() is not threading.main_thread():
        yield monitor
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield monitor
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt


class _Log:
    """TensorRT's log: its last error, for the one sentence that a refusal has."""

    def __init__(self, trt: Any) -> None:
        self.last = ""
        outer = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    outer.last = message

        self.logger = Logger()


def _failed(what: str, reason: str, session: Session) -> ValueError:
    causes = [str(error) or type(error).__name__ for error in session.failures[:1]] or [" ".join(reason.split())[:300]]
    return ValueError(f"TensorRT {what}: {causes[0]}")
