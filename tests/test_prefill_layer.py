"""prefill_layer against a naive fp64 mask of every head by its role, on the CPU and on the GPU."""

# B batch  T chunk tokens  S all tokens of a sequence  W ring slots  H query heads  K kv heads  G query heads per kv head  D head dim
import dataclasses

import pytest
import torch

from rtpurbo.kernels.local_attention import ring_positions
from rtpurbo.kernels.prefill_layer import prefill_layer
from rtpurbo.kernels.prefill_selection import select_prefill
from rtpurbo.kernels.testing import error_bound, relative_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A chunk of T rows after `lengths` tokens; counts: valid rows (default T)."""

    T: int
    retrieval_counts: tuple[int, ...]
    lengths: tuple[int, ...] = (0,)
    counts: tuple[int, ...] | None = None
    K: int = 2
    G: int = 4
    D: int = 16
    window: int = 24
    sinks: int = 4
    block: int = 16
    dense: bool = False


CASES = {
    "one token": Case(T=1, retrieval_counts=(2,)),
    "one retained group": Case(T=77, retrieval_counts=(2,)),
    "no retrieval head": Case(T=77, retrieval_counts=(), lengths=(50,)),
    "every head retrieves": Case(T=77, retrieval_counts=(4, 4), lengths=(50,)),
    "every group retained, two runs": Case(T=60, retrieval_counts=(2, 1, 1), K=3, lengths=(33,)),
    "groups of one": Case(T=60, retrieval_counts=(1, 1), K=3, G=1, lengths=(33,)),
    "groups of eight": Case(T=40, retrieval_counts=(5,), K=2, G=8, lengths=(80,)),
    "no sinks": Case(T=77, retrieval_counts=(3,), sinks=0, lengths=(64,)),
    "window larger than the sequence": Case(T=77, retrieval_counts=(1,), window=500, lengths=(20,)),
    "different lengths in one call": Case(T=70, retrieval_counts=(2, 1), lengths=(0, 13, 96, 200), counts=(70, 64, 0, 33)),
    "dense before any role": Case(T=50, retrieval_counts=(1,), dense=True, lengths=(40,)),
}

LARGE = {
    "layout A": Case(T=1500, retrieval_counts=(5,), lengths=(3000,), K=4, G=8, D=128, window=700, block=128),
    "layout B": Case(T=700, retrieval_counts=(2, 1, 1, 1), lengths=(2304,), K=4, G=8, D=128, window=700, block=128),
    "layout C": Case(T=700, retrieval_counts=(8,), lengths=(2304,), K=4, G=8, D=128, window=700, block=128),
    "one token": Case(T=1, retrieval_counts=(2,), lengths=(500,), K=2, G=3, D=64, window=100, block=128),
    "no retrieval head": Case(T=300, retrieval_counts=(), lengths=(1000,), K=2, G=4, D=64, window=200, block=128),
    "different lengths in one call": Case(
        T=600, retrieval_counts=(2, 1), lengths=(0, 13, 2500, 3000), counts=(600, 517, 0, 333), K=3, G=4, D=64, window=400, block=128
    ),
    "dense before any role": Case(T=500, retrieval_counts=(1,), dense=True, lengths=(400,), K=2, G=4, D=128, window=100, block=128),
}


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Arguments of prefill_layer with NaN wherever nothing was written, and the whole keys and values [B, S, K, D]."""
    generator = torch.Generator(device).manual_seed(11)
    B, H, T = len(case.lengths), case.K * case.G, case.T
    counts = case.counts or (T,) * B
    S = max(case.lengths) + T + 5
    nan = float("nan")

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    retained = case.K if case.dense else len(case.retrieval_counts)
    lengths_B, counts_B = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.lengths, counts))
    k_all, v_all = random(B, S, case.K, case.D), random(B, S, case.K, case.D)
    q = 3 * random(B, T, H, case.D)
    k, v = (torch.full((B, T, case.K, case.D), nan, device=device, dtype=dtype) for _ in range(2))
    cache = [x[:, :, :retained].clone() for x in (k_all, v_all)]
    rings = [torch.full((B, case.sinks + case.window, case.K - retained, case.D), nan, device=device, dtype=dtype) for _ in range(2)]
    slots_BW = ring_positions(lengths_B, case.window, case.sinks)
    heads = case.K * case.G if case.dense else sum(case.retrieval_counts)
    index_q, index_k = 4 * random(B, T, heads, 16), random(B, S, heads, 16)
    for b, count in enumerate(counts):
        end = case.lengths[b] + count
        k[b, :count], v[b, :count] = k_all[b, case.lengths[b] : end], v_all[b, case.lengths[b] : end]
        q[b, count:], index_q[b, count:], index_k[b, end:] = nan, nan, nan
        for x in cache:
            x[b, end:] = nan
        for ring, x in zip(rings, (k_all, v_all), strict=True):
            filled = slots_BW[b] >= 0
            ring[b, filled] = x[b, slots_BW[b][filled], retained:]
    arguments = {
        "retrieval_counts": case.retrieval_counts, "lengths_B": lengths_B, "counts_B": counts_B,
        "newest": max(length + count for length, count in zip(case.lengths, counts, strict=True)),
        "k_BSKD": cache[0] if retained else None, "v_BSKD": cache[1] if retained else None,
        "ring_k_BWKD": rings[0] if retained < case.K else None, "ring_v_BWKD": rings[1] if retained < case.K else None,
        "window": case.window, "sinks": case.sinks, "scale": case.D**-0.5, "prefill_block": case.block, "dense": case.dense,
        "index_q_BTHR": index_q, "index_k_BSIR": index_k, "key_sets": tuple(range(heads)), "index_scale": 0.25, "top_p": 0.7,
    }  # fmt: skip
    return {"q_BTHD": q, "k_BTKD": k, "v_BTKD": v, **arguments}, k_all, v_all


def naive(case: Case, arguments: dict, k_all: torch.Tensor, v_all: torch.Tensor, pattern: str, working: torch.dtype) -> torch.Tensor:
    """Every head's softmax over its mask; `working` is the dtype of both products' inputs, sums are fp64 (or fp32)."""
    sums = torch.float64 if working == torch.float64 else torch.float32
    q = arguments["q_BTHD"].nan_to_num().to(working).to(sums)
    k, v = (x.to(working).to(sums).repeat_interleave(case.G, dim=2) for x in (k_all, v_all))
    lengths, counts = arguments["lengths_B"].long(), arguments["counts_B"].long()
    t = torch.arange(case.T, device=q.device)
    i, j = (lengths[:, None] + t)[:, None, :, None], torch.arange(k.shape[1], device=q.device)
    valid = (t < counts[:, None])[:, None, :, None]
    causal = (j <= i) & valid
    window = causal & ((i - j < case.window) | (j < case.sinks))
    n = (case.G,) * case.K if case.dense else case.retrieval_counts
    seen = window.repeat(1, case.K * case.G, 1, 1)
    retrieval = [g * case.G + x for g, count in enumerate(n) for x in range(count)]
    seen[:, retrieval] = causal
    if pattern == "topp" and retrieval and not case.dense:
        ids, count = select_prefill(
            arguments["index_q_BTHR"], arguments["index_k_BSIR"][:, : arguments["newest"]],
            key_set_H=torch.tensor(arguments["key_sets"], device=q.device), lengths_B=arguments["lengths_B"],
            counts_B=arguments["counts_B"], scale=arguments["index_scale"], top_p=arguments["top_p"], sinks=case.sinks,
            block=case.block,
        )  # fmt: skip
        listed = torch.zeros(*ids.shape[:3], k.shape[1] // case.block + 2, dtype=torch.bool, device=q.device)
        for place in range(ids.shape[3]):
            here = place < count
            listed[..., :-1] |= here[..., None] & (torch.arange(listed.shape[3] - 1, device=q.device) == ids[..., place, None])
        seen[:, retrieval] &= listed.repeat_interleave(case.block, dim=2)[:, :, : case.T].index_select(3, j // case.block)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * arguments["scale"]
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num().to(working).to(sums)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(working)


def check(case: Case, pattern: str, dtype: torch.dtype, device: str, impl: str) -> None:
    arguments, k_all, v_all = build(case, dtype, device)
    poison = torch.full_like(arguments["q_BTHD"], float("nan"))
    del poison  # The allocator hands this memory to the next empty tensor of its size: an unwritten row reads NaN.
    out = prefill_layer(**arguments, pattern=pattern, impl=impl)
    exact = naive(case, arguments, k_all, v_all, pattern, torch.float64)
    eager = naive(case, arguments, k_all, v_all, pattern, dtype)
    assert torch.isfinite(out).all()
    assert relative_error(out, exact) <= error_bound(eager, exact)
    for b, count in enumerate(arguments["counts_B"].tolist()):
        assert (out[b, count:] == 0).all()


@pytest.mark.parametrize("pattern", ["dense", "topp"])
@pytest.mark.parametrize("name", CASES)
def test_every_head_attends_by_its_role(name, pattern):
    check(CASES[name], pattern, torch.float32, "cpu", "auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("pattern", ["dense", "topp"])
@pytest.mark.parametrize("name", LARGE)
def test_every_head_attends_by_its_role_on_the_gpu(name, pattern, impl):
    check(LARGE[name], pattern, torch.bfloat16, "cuda", impl)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pattern", ["dense", "topp"])
def test_the_layer_never_waits_for_the_gpu(pattern):
    arguments, _, _ = build(LARGE["layout A"], torch.bfloat16, "cuda")
    prefill_layer(**arguments, pattern=pattern)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill_layer(**arguments, pattern=pattern)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", ["dense", "topp"])
def test_a_prompt_in_one_chunk_needs_neither_rings_nor_cache(pattern):
    case = dataclasses.replace(CASES["every group retained, two runs"], lengths=(0, 0), counts=(60, 41), K=4)
    arguments, _, _ = build(case, torch.float32, "cpu")
    wanted = prefill_layer(**arguments, pattern=pattern)
    nothing = {"k_BSKD": None, "v_BSKD": None, "ring_k_BWKD": None, "ring_v_BWKD": None}
    out = prefill_layer(**{**arguments, **nothing}, pattern=pattern, from_start=True)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_named():
    arguments, _, _ = build(CASES["one retained group"], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"retrieval_counts \(5,\), wanted at most 2 numbers from 1 to 4"):
        prefill_layer(**{**arguments, "retrieval_counts": (5,)})
    with pytest.raises(ValueError, match="1 local groups of 2 want ring_k and ring_v"):
        prefill_layer(**{**arguments, "ring_k_BWKD": None})
    with pytest.raises(ValueError, match="1 retained groups want k and v by position"):
        prefill_layer(**{**arguments, "k_BSKD": None})
    with pytest.raises(ValueError, match="pattern 'sparse' is neither dense nor topp"):
        prefill_layer(**arguments, pattern="sparse")
    with pytest.raises(ValueError, match="wants index_q, index_k, index_scale, top_p and 2 key_sets, found 0 key_sets"):
        prefill_layer(**{**arguments, "key_sets": ()}, pattern="topp")
