"""What `rtpurbo doctor` tries, each in a process of its own: `python -m rtpurbo.runtime.doctor_checks NAME` prints what was seen.

A check returns one line of facts or raises; a fault of a native library then ends its own process only. This file imports libraries by
name to see whether they work; the code that uses TensorRT lies in plugins/trt.
"""

# B batch  T query tokens  H query heads  K kv heads  D head dim  I index-key sets  R index dim
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def reference() -> str:
    """The eager definition on the CPU against torch's own causal attention."""
    return f"largest error {_local_error('reference', 'cpu', torch.float32):.1e} on the CPU"


def triton() -> str:
    """The portable kernels: window attention, and selection against its reference."""
    error = _local_error("triton", "cuda", torch.bfloat16)
    _selection_like_its_reference("triton")
    return f"window attention within {error:.1e}, selection equal to its reference"


def cuda_cpp() -> str:
    """The kernels that NVRTC compiles: selection against its reference."""
    _selection_like_its_reference("cuda")
    return "selection equal to its reference"


def gluon() -> str:
    """The Hopper kernel for window attention."""
    return f"window attention within {_local_error('gluon', 'cuda', torch.bfloat16):.1e}"


def fa4() -> str:
    """FlashAttention-4's CuTe-DSL kernel behind the same function."""
    return f"window attention within {_local_error('fa4', 'cuda', torch.bfloat16):.1e}"


def cuda_graphs() -> str:
    """A captured sampling step replayed against the same steps run eagerly."""
    from rtpurbo.runtime.sampling import Sampler, SamplingOptions

    device, options = torch.device("cuda"), SamplingOptions(temperature=1.0, top_k=20, seed=1)
    logits_BV = torch.randn(2, 4096, device=device)
    captured, eager = Sampler(options, [0, 1], device), Sampler(options, [0, 1], device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.pick(logits_BV)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_B = captured.pick(logits_BV)
    captured.step_B.zero_()
    for _ in range(3):
        graph.replay()
        wanted = eager.pick(logits_BV).tolist()
        if out_B.tolist() != wanted:
            raise RuntimeError(f"a replay gives tokens {out_B.tolist()}, the eager step {wanted}")
    return "captured sampling equals the eager one"


def tensorrt() -> str:
    """Build an engine of one addition with the library `tensorrt`."""
    return _tiny_engine("tensorrt")


def tensorrt_rtx() -> str:
    """Build an engine of one addition with the library `tensorrt_rtx`."""
    return _tiny_engine("tensorrt_rtx")


CHECKS: dict[str, Callable[[], str]] = {
    check.__name__: check for check in (reference, triton, cuda_cpp, gluon, fa4, cuda_graphs, tensorrt, tensorrt_rtx)
}


def _selection_like_its_reference(impl: str) -> None:
    from rtpurbo.kernels.block_selection import plan_selection, score_and_select

    torch.manual_seed(0)
    q_BHR, k_BISR = torch.randn(1, 2, 16), torch.randn(1, 2, 1000, 16).to(torch.bfloat16)
    found = []
    for device, form in (("cpu", "reference"), ("cuda", impl)):
        plan = plan_selection((0, 1), num_sets=2, batch=1, capacity=1024, device=torch.device(device))
        lengths_B = torch.tensor([1000], dtype=torch.int32, device=device)
        inputs: Any = {"plan": plan, "lengths_B": lengths_B, "scale": 0.5, "top_p": 0.5, "sinks": 4, "impl": form}
        ids_BHN, count_BH = score_and_select(q_BHR.to(device), k_BISR.to(device).transpose(1, 2), **inputs)
        found.append([ids_BHN[0, h, : int(count_BH[0, h])].tolist() for h in range(2)])
    if found[0] != found[1]:
        raise RuntimeError(f"selection gives blocks {found[1]}, its reference {found[0]}")


def _qkv(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 200, heads, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))


def _local_error(impl: str, device: str, dtype: torch.dtype) -> float:
    """Error of attend_local with a window beyond the chunk, where it is plain causal attention."""
    from rtpurbo.kernels.local_attention import attend_local

    q_BTHD, k_BTKD, v_BTKD = _qkv(device, dtype)
    out_BTHD, _ = attend_local(q_BTHD, k_BTKD, v_BTKD, window=256, sinks=4, scale=0.125, impl=impl)
    return _causal_error(out_BTHD, q_BTHD, k_BTKD, v_BTKD)


def _causal_error(out_BTHD: torch.Tensor, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> float:
    q_BHTD, k_BKTD, v_BKTD = (x.float().cpu().transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    wanted_BHTD = torch.nn.functional.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)
    error = float((out_BTHD.float().cpu().transpose(1, 2) - wanted_BHTD).abs().max())
    if not error <= TOLERANCE[q_BTHD.dtype]:
        raise RuntimeError(f"the result is off by {error:.1e}, wanted at most {TOLERANCE[q_BTHD.dtype]}")
    return error


def _tiny_engine(name: str) -> str:
    trt: Any = importlib.import_module(name)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    entry = network.add_input("x", trt.float32, (4,))
    total = network.add_elementwise(entry, entry, trt.ElementWiseOperation.SUM).get_output(0)
    total.name = "y"
    network.mark_output(total)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError(f"{name} {trt.__version__} built no engine")
    if not torch.cuda.is_available():
        return f"{name} {trt.__version__} builds an engine; it cannot run without a GPU"
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"{name} {trt.__version__} builds an engine but does not load it on this GPU")
    context, x, y = engine.create_execution_context(), torch.arange(4.0, device="cuda"), torch.full((4,), float("nan"), device="cuda")
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    torch.cuda.synchronize()
    context.execute_async_v3(torch.cuda.Stream().cuda_stream)
    torch.cuda.synchronize()
    if y.tolist() != [0.0, 2.0, 4.0, 6.0]:
        raise RuntimeError(f"{name} {trt.__version__} gives {y.tolist()} for a sum, wanted [0, 2, 4, 6]")
    return f"{name} {trt.__version__} builds an engine and runs it"


if __name__ == "__main__":
    try:
        print(CHECKS[sys.argv[1]]())
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}")
