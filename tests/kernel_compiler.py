"""Kernels built without a GPU, from the description of their launch."""

from typing import Any

import torch

from rtpurbo.kernels.launch import Launch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def compile_for_hopper(launch: Launch) -> Any:
    """Triton's compiled kernel for compute capability 9.0; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, arguments = launch.kernel.arg_names, iter(launch.arguments)
    signature, constants = {}, dict(launch.constants)
    for name in names:
        value = constants[name] if name in constants else next(arguments)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(launch.kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.num_warps})
