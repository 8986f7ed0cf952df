"""score_and_select in CUDA C++ (kernels/cuda/score_and_select.cu): its scratch memory, what it can run, and the launcher."""

# B batch  S cached tokens  H retrieval query heads  I index-key sets  R index dim  N blocks  V groups of readers  C programs
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rtpurbo.kernels.cuda import CudaKernel, Long, nvrtc_obstacle
from rtpurbo.kernels.division import num_processors_of
from rtpurbo.kernels.launch import Launch

# As in the sources: warps of a program, keys of a block, index dimensions, heads that share a product, words of a part's histogram.
WARPS, BLOCK, INDEX_DIM, COLUMNS, HISTOGRAM_BINS = 16, 64, 16, 8, 257
KEY_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# Blocks of a head that one program selects among, in items of a thread: what is fastest, and the most that sums hold.
PART_ITEMS = (4, 8)
MOST_PARTS = 32
# Bytes from a token's index key to the next one's: a tile's are addressed by 32 bits.
MOST_STEP = 1 << 24
# Sequences for which it was measured faster than the launch in Triton.
FEW_SEQUENCES = 16
# Programs for each that only selects, at least, itself among them.
PROGRAMS_A_SELECTOR = 16


@dataclass(frozen=True, kw_only=True)
class CudaSelectionPlan:
    """Static facts and scratch memory of the launch; calls that share one must not overlap in time."""

    rows: int
    num_heads: int
    capacity_blocks: int
    programs: int
    part_items: int
    readers_V4: torch.Tensor
    scores_BHN4: torch.Tensor
    tops_C4: torch.Tensor
    histograms_C: torch.Tensor
    launches_C: torch.Tensor
    started: torch.Tensor

    @property
    def most_parts(self) -> int:
        """Into how many parts a head's selection is cut at most."""
        return -(-self.capacity_blocks // (self.part_items * 32 * WARPS))

    @property
    def selectors(self) -> int:
        """Programs that select a head each and score nothing; 0: all score, and must run at once (heads in parts, or many of them)."""
        return self.rows if self.most_parts == 1 and self.rows * PROGRAMS_A_SELECTOR <= self.programs else 0


def readers_of(key_sets: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(set, first head, heads, 0) of every up to eight neighbouring heads that read one set of index keys; key_sets ascend."""
    readers: list[tuple[int, int, int, int]] = []
    for head, key_set in enumerate(key_sets):
        if readers and readers[-1][0] == key_set and readers[-1][2] < COLUMNS:
            readers[-1] = (key_set, readers[-1][1], readers[-1][2] + 1, 0)
        else:
            readers.append((key_set, head, 1, 0))
    return readers


def part_items_for(rows: int, blocks: int, programs: int) -> int | None:
    """Blocks a thread of a selecting program holds, so that all parts of all heads are selected at once; None: it cannot be."""
    for items in PART_ITEMS:
        parts = -(-blocks // (items * 32 * WARPS))
        if parts <= MOST_PARTS and (rows * parts <= programs or parts == 1):
            return items
    return None


def plan_cuda_selection(
    key_sets: Sequence[int], *, batch: int, capacity: int, device: torch.device, block_size: int, programs: int | None = None
) -> CudaSelectionPlan | None:  # fmt: skip
    """Scratch memory (16 bytes a head and block, 4 KB a program), or None where the launch cannot serve such heads.

    programs: one a multiprocessor; None: as many as the device has.
    """
    H, N, programs = len(key_sets), max(1, -(-capacity // block_size)), programs or num_processors_of(device)
    items = part_items_for(batch * H, N, programs)
    if items is None or block_size != BLOCK or list(key_sets) != sorted(key_sets):
        return None

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    # Records hold the number of their launch: what is here before the first must be zero.
    return CudaSelectionPlan(
        rows=batch * H, num_heads=H, capacity_blocks=N, programs=programs, part_items=items,
        readers_V4=torch.tensor(readers_of(key_sets), dtype=torch.int32, device=device), scores_BHN4=zeros(batch, H, N, 4),
        tops_C4=zeros(programs, 4), histograms_C=zeros(programs, HISTOGRAM_BINS, 4), launches_C=zeros(programs, dtype=torch.int32),
        # Read before the launch before has ended: a copy, which no launch overtakes.
        started=torch.tensor([0], dtype=torch.int32, device=device),
    )  # fmt: skip


def index_obstacle(capability: tuple[int, int], index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor) -> str | None:
    """Why these tensors cannot be scored in CUDA C++ here, or None."""
    # Records of 16 bytes are one operation of memory from Volta on; nothing older than Hopper was tried.
    if capability[0] < 9:
        return f"it needs compute capability 9.0 or later, found {capability[0]}.{capability[1]}"
    if index_k_BSIR.dtype not in KEY_DTYPES or index_k_BSIR.shape[3] != INDEX_DIM:
        return f"it takes {INDEX_DIM} index dimensions in bf16 or fp8 e4m3, found {index_k_BSIR.shape[3]} of {index_k_BSIR.dtype}"
    if index_k_BSIR.stride(1) * index_k_BSIR.element_size() >= MOST_STEP:
        return f"it takes index keys of a set less than {MOST_STEP} bytes apart, found {index_k_BSIR.stride()}"
    if index_q_BHR.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes index queries in fp32 or bf16, found {index_q_BHR.dtype}"
    return alignment_obstacle([("index_q", index_q_BHR, 16), ("index_k", index_k_BSIR, 16)]) or nvrtc_obstacle()


def alignment_obstacle(tensors: Sequence[tuple[str, torch.Tensor | None, int]]) -> str | None:
    """Which tensor does not begin, or step, in multiples of so many bytes with a contiguous last axis, or None."""
    for name, x, size in tensors:
        if x is not None and (x.stride(-1) != 1 or x.data_ptr() % size or any(step * x.element_size() % size for step in x.stride()[:-1])):
            return f"{name} needs a contiguous last axis and other strides in multiples of {size} bytes, found {x.stride()}"
    return None


def suits_cuda(capability: tuple[int, int], batch: int) -> bool:
    """Where it was measured faster than the launch in Triton (benchmarks/decode.md: H200, up to 16 sequences); see `is_faster`."""
    return capability == (9, 0) and batch <= FEW_SEQUENCES


def is_faster(capability: tuple[int, int], batch: int, index_k_BSIR: torch.Tensor, top_p: float) -> bool:
    """Whether it was measured faster than the launch in Triton: with keys stored set by set."""
    return suits_cuda(capability, batch) and top_p < 1 and index_k_BSIR.stride(1) == index_k_BSIR.shape[3]


def index_constants(plan_items: int, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, top_p: float) -> dict[str, object]:
    """Macros of the sources that score and select."""
    return {
        "TOP_P": float(top_p), "PART_ITEMS": plan_items, "INDEX_QUERY": "float" if index_q_BHR.dtype == torch.float32 else "half_bits",
        "KEY_BITS": 8 * index_k_BSIR.element_size(), "KEY_STRIDE": index_k_BSIR.stride(1) * index_k_BSIR.element_size(),
    }  # fmt: skip


def index_strides(index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor) -> tuple[Long, ...]:
    """Strides of queries in elements; of keys in bytes, but that of tokens."""
    size, strides = index_k_BSIR.element_size(), index_k_BSIR.stride()
    return *map(Long, index_q_BHR.stride()[:2]), Long(strides[0] * size), Long(strides[2] * size)


def describe(
    plan: CudaSelectionPlan, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, scale: float, top_p: float,
    sinks: int, ids_BHN: torch.Tensor, count_BH: torch.Tensor, *, early_launch: bool = True,
) -> Launch:  # fmt: skip
    """The launch that fills ids and count."""
    return Launch(
        kernel=CudaKernel("score_and_select", 0),
        grid=(plan.programs,),
        arguments=(
            index_q_BHR, index_k_BSIR, lengths_B, plan.readers_V4, plan.scores_BHN4, plan.tops_C4, plan.histograms_C, plan.launches_C,
            plan.started, ids_BHN, count_BH, index_q_BHR.shape[0], index_k_BSIR.shape[1], plan.num_heads, plan.readers_V4.shape[0],
            plan.capacity_blocks, plan.most_parts, plan.selectors, sinks, float(scale), *index_strides(index_q_BHR, index_k_BSIR),
        ),
        constants=index_constants(plan.part_items, index_q_BHR, index_k_BSIR, top_p),
        num_warps=WARPS,
        early_launch=early_launch,
        all_at_once=plan.selectors == 0,
    )  # fmt: skip


def launch(
    plan: CudaSelectionPlan, index_q_BHR: torch.Tensor, index_k_BSIR: torch.Tensor, lengths_B: torch.Tensor, scale: float, top_p: float,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run the kernel with the plan's workspace; returns ids int32 [B, H, N] and count int32 [B, H]."""
    B, H, _ = index_q_BHR.shape
    ids_BHN = torch.empty(B, H, plan.capacity_blocks, dtype=torch.int32, device=index_q_BHR.device)
    count_BH = torch.empty(B, H, dtype=torch.int32, device=index_q_BHR.device)
    describe(plan, index_q_BHR, index_k_BSIR, lengths_B, scale, top_p, sinks, ids_BHN, count_BH).run()
    return ids_BHN, count_BH
