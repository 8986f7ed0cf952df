"""Kernels built without a GPU, from the description of their launch."""

from typing import Any

import torch

from rtpurbo.kernels.launch import Launch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def compile_for(launch: Launch, capability: int = 90) -> Any:
    """Triton's compiled kernel for a compute capability (10 x major + minor); raises what the compiler raises.

    Specialised as a launch does it: ones are constants, pointers and multiples of 16 are known as such.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = iter(launch.arguments)
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else next(arguments)
        if name in launch.constants or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            values[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if name.endswith("_ptr") or (signature[name] == "i32" and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, values, aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.max_registers},
    )
