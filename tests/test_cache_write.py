"""write_cache: the kernel (interpreted, and compiled on a GPU) against the eager definition, over positions and rings."""

# B batch  T chunk tokens  S slots
import pytest
import torch
from interpreter_process import interpreting, serve

from rtpurbo.kernels.cache_write import write_cache

# name: (chunk tokens, lengths, counts, window, sinks, rows)
CASES = {
    "one token by position": (1, (0, 31, 7), (1, 1, 0), None, 0, ((2, 16), (2, 16), (3, 4))),
    "a chunk by position": (37, (0, 5, 26), (37, 0, 11), None, 0, ((2, 16), (2, 16), (3, 4))),
    "one token into a ring": (1, (0, 3, 4, 12, 13, 40), (1, 1, 1, 1, 1, 0), 9, 4, ((2, 16), (2, 16))),
    "a chunk that wraps once": (6, (0, 2, 10, 100), (6, 6, 5, 1), 9, 4, ((2, 16), (2, 16))),
    "a chunk longer than the ring": (50, (0, 7, 200), (50, 33, 49), 9, 4, ((2, 16), (2, 16))),
    "no sinks, one slot": (3, (0, 5), (3, 2), 1, 0, ((1, 4),)),
    "rows wider than a step": (3, (0, 9), (3, 2), None, 0, ((4, 128),)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def build(name, dtype, device="cpu"):
    T, lengths, counts, window, sinks, rows = CASES[name]
    generator = torch.Generator().manual_seed(1)
    B = len(lengths)
    slots = sinks + window if window else max(length + count for length, count in zip(lengths, counts, strict=True))
    chunks = [torch.randn(B, T, *row, generator=generator).to(dtype).to(device) for row in rows]
    # Untouched slots must keep their bits, whatever they are.
    caches = [torch.full((B, slots, *row), float("nan")).to(dtype).to(device) for row in rows]
    vectors = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, counts)]
    return caches, chunks, {"lengths_B": vectors[0], "counts_B": vectors[1], "window": window, "sinks": sinks}


def written(name, dtype, impl, device="cpu"):
    caches, chunks, options = build(name, dtype, device)
    write_cache(caches, chunks, **options, impl=impl)
    return [cache.cpu().contiguous().view(torch.uint8) for cache in caches]


@pytest.fixture(scope="module")
def interpreter():
    pytest.importorskip("triton")
    with interpreting(__file__) as call:
        yield call


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreted_write_cache_writes_the_same_bits(interpreter, name, dtype):
    found = interpreter("written", {"name": name, "dtype": DTYPES.index(dtype)})
    assert all(torch.equal(a, b) for a, b in zip(found, written(name, dtype, "reference"), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_write_cache_writes_the_same_bits(name, dtype):
    found = written(name, dtype, "triton", "cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, written(name, dtype, "reference"), strict=True))


def test_of_the_rows_of_one_slot_the_newest_is_written():
    cache, chunk = torch.zeros(1, 3, 1, 4), torch.arange(1.0, 8.0).view(1, 7, 1, 1).expand(1, 7, 1, 4).contiguous()
    one = torch.ones(1, dtype=torch.int32)
    write_cache([cache], [chunk], lengths_B=0 * one, counts_B=7 * one, window=2, sinks=1)
    assert cache[0, :, 0, 0].tolist() == [1, 6, 7]


def test_write_cache_refuses_tensors_that_do_not_fit():
    one = torch.ones(1, dtype=torch.int32)
    cache, chunk = torch.zeros(1, 8, 2, 4), torch.zeros(1, 3, 2, 4)
    for caches, chunks, options, message in (
        ([], [], {}, "wanted 1 to 3"),
        ([cache], [chunk[..., :2]], {}, "does not fit a cache"),
        ([cache], [chunk.bfloat16()], {}, "does not fit a cache"),
        ([cache[:, :, :1, :1].bfloat16().contiguous()], [chunk[:, :, :1, :1].bfloat16().contiguous()], {}, "not a multiple of 4 bytes"),
        ([cache], [chunk], {"window": 4, "sinks": 3}, "a ring of 8 slots, wanted 3 sinks and a window of 4"),
        ([cache], [chunk], {"lengths_B": one.long()}, "wanted int32"),
        ([cache], [chunk], {"impl": "cuda"}, "not one of auto, triton, reference"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cache(caches, chunks, **{"lengths_B": one, "counts_B": one, **options})


if __name__ == "__main__":
    serve({"written": lambda request: written(request["name"], DTYPES[request["dtype"]], "triton")})
