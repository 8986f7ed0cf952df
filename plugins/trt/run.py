"""An engine behind the runtime's interface: caches in torch tensors, prefill in chunks, decode steps as one CUDA graph."""

# B batch  T chunk tokens  V vocabulary
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.plugins.trt.cubins import CubinTable
from rtpurbo.plugins.trt.execution import Execution
from rtpurbo.plugins.trt.folder import CUBINS_NAME, PLAN_NAME, EngineInfo, check_folder, read_info
from rtpurbo.plugins.trt.library import load_library
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL
from rtpurbo.plugins.trt.plugins import Session, registered
from rtpurbo.runtime.cache import require_memory
from rtpurbo.runtime.loader import load_tokenizer
from rtpurbo.runtime.sampling import Sampler

CAPACITY_STEP = 256
# TensorRT wants the memory of a binding to begin at a multiple of this many bytes.
ADDRESS_STEP = 256
# A chunk is padded to a multiple of an eighth of the largest one (at least this many tokens): every new shape costs time once.
CHUNK_STEP = 64


class EngineCache:
    """The caches of a batch, by name, zeros at first; `lengths` mirrors lengths_B on the host."""

    def __init__(self, info: EngineInfo, batch: int, capacity: int, device: torch.device) -> None:
        shapes = {name: (batch, *(capacity if size is None else size for size in cache.shape)) for name, cache in info.caches.items()}
        dtypes = {name: getattr(torch, cache.dtype) for name, cache in info.caches.items()}
        wanted = sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
        what = f"a cache for {batch} sequences of {capacity} tokens"
        require_memory(wanted, device, what)
        try:
            self.tensors = {name: torch.zeros(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{what} needs {wanted / 2**30:.2f} GiB on {device}, which could not be allocated") from error
        self.batch, self.capacity = batch, capacity
        self.lengths = [0] * batch
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_room(self, counts: Sequence[int]) -> None:
        """ValueError if a sequence would grow past the capacity."""
        for b, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.capacity:
                raise ValueError(
                    f"sequence {b} has {length} tokens in the cache and gets {count} more, but the capacity is {self.capacity}"
                )


class EngineState:
    """A batch in progress: its cache, the inputs of a decode step, and the step captured as a CUDA graph (made at the first one)."""

    def __init__(self, cache: EngineCache, vocab_size: int, sampler: Sampler | None = None) -> None:
        device = cache.lengths_B.device
        self.cache, self.sampler = cache, sampler
        self.ids_B1 = torch.zeros(cache.batch, 1, dtype=torch.int32, device=device)
        self.counts_B = torch.zeros(cache.batch, dtype=torch.int32, device=device)
        self.logits_BV = torch.zeros(cache.batch, vocab_size, dtype=torch.float32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None


class EngineRuntime:
    """A loaded engine; `load_engine` makes it. manifest: the roles and top_p that it was built with."""

    def __init__(self, folder: Path, info: EngineInfo, manifest: Manifest, executions: dict[int, Execution], session: Session) -> None:
        self.info, self.manifest, self.device = info, manifest, torch.device("cuda", torch.cuda.current_device())
        self.tokenizer = load_tokenizer(folder)
        self._folder, self._session = folder, session
        self._prefill, self._decode = executions[PREFILL], executions[DECODE]
        step = max(CHUNK_STEP, info.prefill_chunk // 8)
        self._chunk_step = step if step <= info.prefill_chunk else info.prefill_chunk

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the generation config's and the tokenizer's."""
        path = self._folder / "generation_config.json"
        configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, getattr(self.tokenizer, "eos_token_id", None)) if i is not None)

    def start(self, batch: int, capacity: int, dense: bool = False, *, sampler: Sampler | None = None) -> EngineState:
        """An empty batch whose sequences may grow to `capacity` tokens.

        sampler: picks the next tokens inside the decode step (see `advance`). Raises ValueError beyond the engine's profiles, for a mode
        that it was not built for, or when the memory is not there.
        """
        info = self.info
        if dense != info.dense:
            built, asked = ("dense", "sparse") if info.dense else ("sparse", "dense")
            raise ValueError(f"{self._folder}: the engine was built for {built} attention, asked for {asked} attention")
        if batch < 1 or batch > info.batch or capacity < 1 or capacity > info.capacity:
            raise ValueError(
                f"{self._folder}: {batch} sequences of {capacity} tokens, but the engine's profiles hold at most "
                f"{info.batch} of {info.capacity}"
            )
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        return EngineState(EngineCache(info, batch, capacity, self.device), info.vocab_size, sampler)

    @torch.no_grad()
    def prefill(
        self, state: EngineState, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, chunk: int | None = None
    ) -> torch.Tensor:
        """Append tokens [B, T] with the prefill pattern, one sequence after the other, `chunk` tokens at a time.

        attention_mask [B, T] marks the real tokens (left or right padding). Returns the logits after each sequence's last token [B, V].
        Raises ValueError, before anything is written, for an empty row, more tokens than there is room for, or a chunk out of range.
        """
        chunk = self.info.prefill_chunk if chunk is None else chunk
        if not 1 <= chunk <= self.info.prefill_chunk:
            raise ValueError(f"prefill chunk is {chunk}, wanted 1 ... {self.info.prefill_chunk}, the engine's profile")
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.ndim != 2 or input_ids.shape[0] != state.cache.batch or mask_BT.shape != input_ids.shape:
            raise ValueError(f"prefill: input_ids {tuple(input_ids.shape)} do not fit a batch of {state.cache.batch}")
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids.cpu(), mask_BT.cpu(), strict=True)]
        counts = [len(row) for row in rows]
        if min(counts) == 0:
            raise ValueError(f"prefill: sequence {counts.index(0)} has no token")
        state.cache.check_room(counts)
        for b, row in enumerate(rows):
            self._prefill_sequence(state, b, row.to(torch.int32), chunk)
        return state.logits_BV.clone()

    def _prefill_sequence(self, state: EngineState, b: int, ids_T: torch.Tensor, chunk: int) -> None:
        """All chunks of one sequence; its logits land in the state's row b."""
        cache = state.cache
        caches = {name: tensor[b : b + 1] for name, tensor in cache.tensors.items()}
        # A slice that begins where TensorRT does not allow it is worked on in a copy.
        copies = {name: x.clone() for name, x in caches.items() if x.data_ptr() % ADDRESS_STEP}
        for begin in range(0, len(ids_T), chunk):
            part = ids_T[begin : begin + chunk]
            width = min(-(-len(part) // self._chunk_step) * self._chunk_step, self.info.prefill_chunk)
            padded_1T = torch.zeros(1, width, dtype=torch.int32)
            padded_1T[0, : len(part)] = part
            inputs = {
                "input_ids": padded_1T.to(self.device),
                "lengths": torch.tensor([cache.lengths[b]], dtype=torch.int32).to(self.device),
                "counts": torch.tensor([len(part)], dtype=torch.int32).to(self.device),
            }
            logits_1V = torch.empty(1, self.info.vocab_size, dtype=torch.float32, device=self.device)
            self._prefill.bind(inputs, caches | copies, logits_1V)
            self._prefill.run()
            cache.lengths[b] += len(part)
        state.logits_BV[b].copy_(logits_1V[0])
        for name, copy in copies.items():
            caches[name].copy_(copy)
        cache.lengths_B[b] = cache.lengths[b]

    def decode(self, state: EngineState, token_ids: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        """Append one token [B] to each active sequence (default: all) with the decode pattern; logits [B, V].

        Rows that are not active are neither read nor written; their logits mean nothing. Raises ValueError when a sequence has no room.
        """
        if token_ids.shape != (state.cache.batch,):
            raise ValueError(f"decode: token_ids {tuple(token_ids.shape)} do not fit a batch of {state.cache.batch}")
        active = [True] * state.cache.batch if active is None else list(active)
        state.cache.check_room([int(on) for on in active])
        state.ids_B1.copy_(token_ids[:, None], non_blocking=True)
        return self.advance(state, active).clone()

    @torch.no_grad()
    def advance(self, state: EngineState, active: Sequence[bool]) -> torch.Tensor:
        """Append state.ids_B1 to the active sequences; with a sampler their next tokens land in state.ids_B1. Does not wait.

        Returns logits [B, V], valid until the next step. Raises ValueError, before anything is written, when a sequence has no room.
        """
        counts = [int(on) for on in active]
        state.cache.check_room(counts)
        if state.graph is None:
            state.graph = self._captured(state)
        state.counts_B.copy_(torch.tensor(counts, dtype=torch.int32), non_blocking=True)
        state.graph.replay()
        state.cache.lengths = [length + count for length, count in zip(state.cache.lengths, counts, strict=True)]
        return state.logits_BV

    def _captured(self, state: EngineState) -> torch.cuda.CUDAGraph:
        """One decode step as a CUDA graph: the engine, the sampler, the new lengths."""
        kept = state.logits_BV.clone()
        state.counts_B.zero_()
        inputs = {"input_ids": state.ids_B1, "lengths": state.cache.lengths_B, "counts": state.counts_B}
        self._decode.bind(inputs, state.cache.tensors, state.logits_BV)
        # Idle sequences are neither read nor written: this execution only makes what later ones find ready.
        for _ in range(2):
            self._decode.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._decode.stream):
            self._decode.enqueue()
            if state.sampler is not None:
                picked_B1 = state.sampler.pick(state.logits_BV)[:, None].to(torch.int32)
                state.ids_B1.copy_(torch.where(state.counts_B[:, None] > 0, picked_B1, state.ids_B1))
            state.cache.lengths_B.add_(state.counts_B)
        state.logits_BV.copy_(kept)
        return graph


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
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine((folder / PLAN_NAME).read_bytes())
    if engine is None:
        reason = f" ({session.failures[0]})" if session.failures else ""
        raise ValueError(f"{folder / PLAN_NAME}: {name} {trt.__version__} cannot load this engine on this GPU{reason}")
    executions = {
        phase: Execution(engine, runtime, info, session, profile=profile, phase=phase) for profile, phase in enumerate((PREFILL, DECODE))
    }
    return EngineRuntime(folder, info, manifest, executions, session)


OnText = Callable[[int, str], None]
__all__ = ["EngineCache", "EngineRuntime", "EngineState", "load_engine"]
