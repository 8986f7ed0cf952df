"""route_tokens against softmax and a sort; on a CPU through Triton's interpreter."""

# T tokens  E experts  X experts a token
import io
import os
import subprocess
import sys

import pytest
import torch

from rtpurbo.kernels.router import route_tokens

# tokens, experts, chosen
SHAPES = [(1, 128, 8), (3, 5, 2), (70, 60, 6), (65, 128, 1), (9, 4, 4)]


def wrong(tokens: int, experts: int, chosen: int, normalize: bool, dtype: torch.dtype, impl: str, device: str) -> list[str]:
    """What is wrong with the answer; many logits are equal, so that the order among equals is tested too."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (torch.randn(tokens, experts, generator=generator) * 4).round().div(2).to(dtype).to(device)
    ids, weights = route_tokens(logits, num_chosen=chosen, normalize=normalize, impl=impl)
    found = []
    for t in range(tokens):
        row = logits[t].double().tolist()
        wanted = sorted(range(experts), key=lambda e: -row[e])[:chosen]
        if ids[t].tolist() != wanted:
            found.append(f"token {t}: ids {ids[t].tolist()}, wanted {wanted}")
    exact = logits.double().softmax(1).gather(1, ids.long())
    exact = exact / exact.sum(1, keepdim=True) if normalize else exact
    if not torch.allclose(weights.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7):
        found.append("weights")
    if ids.dtype != torch.int32 or weights.dtype != dtype:
        found.append("dtypes")
    return found


@pytest.fixture(scope="module")
def interpreted():
    """What is wrong in the interpreter, from a process of its own, because it is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return torch.load(io.BytesIO(done.stdout))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_interpreted_router_picks_the_best_experts(interpreted, shape):
    assert interpreted[shape] == []


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_router_picks_the_best_experts(shape, normalize):
    assert wrong(*shape, normalize, torch.float32, "reference", "cpu") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 128, 8)])
def test_the_compiled_router_picks_the_best_experts(shape, dtype):
    assert wrong(*shape, True, dtype, "triton", "cuda") == []


def test_a_router_that_cannot_run_says_why():
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="num_chosen is 5, wanted 1 to 4"):
        route_tokens(logits, num_chosen=5, normalize=True)
    with pytest.raises(ValueError, match="impl 'cuda' is not one of auto, triton, reference"):
        route_tokens(logits, num_chosen=2, normalize=True, impl="cuda")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="cannot run: needs a GPU and no gradient, found cpu"):
        route_tokens(logits, num_chosen=2, normalize=True, impl="triton")


if __name__ == "__main__":
    buffer = io.BytesIO()
    answers = {s: [x for n in (True, False) for x in wrong(*s, n, torch.float32, "triton", "cpu")] for s in SHAPES}
    torch.save(answers, buffer)
    sys.stdout.buffer.write(buffer.getvalue())
