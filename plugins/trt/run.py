"""An engine behind the runtime's interface: prefill in chunks, decode steps in a CUDA graph; batching and sampling are the runtime's."""

# B batch  T chunk tokens  V vocabulary
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.plugins.trt.cache import EngineCache
from rtpurbo.plugins.trt.cubins import CubinTable
from rtpurbo.plugins.trt.execution import Execution
from rtpurbo.plugins.trt.folder import CUBINS_NAME, PLAN_NAME, EngineInfo, check_folder, read_info
from rtpurbo.plugins.trt.library import load_library
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL
from rtpurbo.plugins.trt.plugins import Session, registered
from rtpurbo.runtime.bench import Subject
from rtpurbo.runtime.cache import require_memory
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load_tokenizer
from rtpurbo.runtime.state import State

# A chunk is padded to a multiple of an eighth of the largest one, at least of this: a new shape costs time once.
CHUNK_STEP = 64


class Executes(Protocol):
    """An Execution, or what stands in for one."""

    def run(self, inputs: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor], logits_BV: torch.Tensor) -> None:
        """Execute once: caches are updated in place, the logits overwritten."""


class EngineRuntime(Runtime):
    """A loaded engine; `load_engine` makes it. manifest: the roles and top_p that it was built with."""

    def __init__(
        self, folder: Path, info: EngineInfo, manifest: Manifest, executions: Mapping[int, Executes], device: torch.device
    ) -> None:
        self.info, self.manifest, self.device = info, manifest, device
        self.tokenizer = load_tokenizer(folder)
        self.folder, self._executions = folder, executions

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.info.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the generation config's and the tokenizer's."""
        path = self.folder / "generation_config.json"
        configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, getattr(self.tokenizer, "eos_token_id", None)) if i is not None)

    def start(self, batch: int, capacity: int, dense: bool = False, *, graph: bool | None = None) -> State:
        """An empty batch whose sequences may grow to `capacity` tokens; graph: as in Runtime.start.

        Raises ValueError beyond the engine's profiles, for a mode that it was not built for, or when the memory is not there.
        """
        info = self.info
        if dense != info.dense:
            built, asked = ("dense", "sparse") if info.dense else ("sparse", "dense")
            raise ValueError(f"{self.folder}: built for {built} attention, but {asked} attention is wanted: it takes an engine of its own")
        if batch < 1 or batch > info.batch or capacity < 1 or capacity > info.capacity:
            raise ValueError(
                f"{self.folder}: {batch} sequences of {capacity} tokens, but the engine's profiles hold at most {info.batch} of "
                f"{info.capacity}"
            )
        cache = EngineCache(info, batch, capacity, self.device)
        nothing = torch.empty(0, device=self.device)
        return State.of(cache, (), (nothing, nothing), graph=self.device.type == "cuda" if graph is None else graph)

    @torch.no_grad()
    def prefill(
        self,
        state: State,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        chunk: int | None = None,
        all_logits: bool = False,
        slot: int | None = None,
    ) -> torch.Tensor:
        """Append tokens [B, T] with the prefill pattern, one sequence after the other, `chunk` tokens at a time.

        attention_mask, slot: as in Runtime.prefill. Returns the logits after each sequence's last token [B, V]. Raises ValueError,
        before anything is written, for what Runtime.prefill refuses, a chunk beyond the engine's profile, and all_logits.
        """
        chunk = self.info.prefill_chunk if chunk is None else min(chunk, self.info.prefill_chunk)
        if chunk < 1 or all_logits:
            raise ValueError(f"prefill chunk is {chunk}, wanted at least 1; an engine gives the logits of the last token alone")
        slots = list(range(state.cache.batch)) if slot is None else [slot]
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.ndim != 2 or input_ids.shape[0] != len(slots) or mask_BT.shape != input_ids.shape:
            raise ValueError(f"prefill: input_ids {tuple(input_ids.shape)} do not fit a batch of {len(slots)}")
        rows = [ids[mask.bool()].to(torch.int32) for ids, mask in zip(input_ids.cpu(), mask_BT.cpu(), strict=True)]
        added = [0] * state.cache.batch
        for b, row in zip(slots, rows, strict=True):
            added[b] = len(row)
        if empty := [b for b in slots if not added[b]]:
            raise ValueError(f"prefill: sequence {empty[0]} has no token")
        state.cache.check_room(added)
        assert isinstance(state.cache, EngineCache)
        return torch.cat([self._prefill_slot(state.cache, b, row, chunk) for b, row in zip(slots, rows, strict=True)])

    def _prefill_slot(self, cache: EngineCache, slot: int, ids_T: torch.Tensor, chunk: int) -> torch.Tensor:
        """All chunks of one sequence; the logits [1, V] after its last token."""
        execution, largest = self._executions[PREFILL], self.info.prefill_chunk
        step = min(max(CHUNK_STEP, largest // 8), largest)
        views, copies = cache.slot(slot)
        length_1 = cache.lengths_B[slot : slot + 1].clone()
        logits_1V = torch.empty(1, self.vocab_size, dtype=torch.float32, device=self.device)
        for begin in range(0, len(ids_T), chunk):
            part = ids_T[begin : begin + chunk]
            padded_1T = torch.zeros(1, min(-(-len(part) // step) * step, largest), dtype=torch.int32)
            padded_1T[0, : len(part)] = part
            count_1 = torch.tensor([len(part)], dtype=torch.int32).to(self.device)
            inputs = {"input_ids": padded_1T.to(self.device), "lengths": length_1, "counts": count_1}
            execution.run(inputs, views | copies, logits_1V)
            length_1 += count_1
        for name, copy in copies.items():
            views[name].copy_(copy)
        cache.lengths[slot] += len(ids_T)
        cache.lengths_B[slot] = cache.lengths[slot]
        return logits_1V

    def _decode_logits(self, state: State) -> torch.Tensor:
        cache = state.cache
        assert isinstance(cache, EngineCache)
        cache.ids_B1.copy_(state.ids_B[:, None])
        inputs = {"input_ids": cache.ids_B1, "lengths": cache.lengths_B, "counts": state.active_B}
        self._executions[DECODE].run(inputs, cache.tensors, cache.logits_BV)
        cache.lengths_B.add_(state.active_B)
        return cache.logits_BV


def bench_subject(runtime: EngineRuntime) -> Subject:
    """An engine as `rtpurbo bench` measures it."""
    info = runtime.info
    config = json.loads((runtime.folder / "config.json").read_text(encoding="utf-8"))
    form = f"{info.library} {info.library_version}"
    return Subject(runtime=runtime, config=config, dtype=getattr(torch, info.dtype), chunk=info.prefill_chunk, form=form)


def load_engine(folder: str | Path, *, library: str | None = None) -> EngineRuntime:
    """The engine of a folder on the current GPU.

    Raises ValueError in one sentence: no TensorRT, no GPU, an engine of another library, release, manifest or compute capability, a
    missing or damaged file, or not enough memory.
    """
    folder = Path(folder)
    name, trt = load_library(library or read_info(folder).library)
    info, manifest = check_folder(folder, name, trt.__version__)
    if not torch.cuda.is_available():
        raise ValueError(f"{folder}: an engine runs on an NVIDIA GPU, and this machine has none that torch can use")
    major, minor = torch.cuda.get_device_capability()
    session = Session(table=CubinTable(folder / CUBINS_NAME, 10 * major + minor))
    require_memory(info.plan_bytes, torch.device("cuda", torch.cuda.current_device()), f"{folder}: the engine")
    with registered(trt, session):
        log = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine((folder / PLAN_NAME).read_bytes())
        if engine is None:
            reason = f" ({session.failures[0]})" if session.failures else ""
            raise ValueError(f"{folder / PLAN_NAME}: {name} {trt.__version__} cannot load this engine on this GPU{reason}")
        # Some releases make the plugins only now.
        executions = {
            phase: Execution(trt, engine, (log, runtime), info, session, profile=profile, phase=phase)
            for profile, phase in enumerate((PREFILL, DECODE))
        }
    return EngineRuntime(folder, info, manifest, executions, torch.device("cuda", torch.cuda.current_device()))
