"""norm_linear for a few tokens in Triton: each program fetches rows of weights, then waits for the tokens that they multiply."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# T tokens  C hidden  M outputs  r rows of a program
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch

# Weights that a program holds in registers, and its warps.
TILE_VALUES, NUM_WARPS = 8192, 4


@triton.jit
def matvec_rows(
    x_ptr,  # [T, C], rows contiguous
    residual_ptr,  # [T, C]
    norm_ptr,  # [C]
    weight_ptr,  # [M, C]
    bias_ptr,  # [M]
    out_ptr,  # [T, M]
    sum_ptr,  # [T, C]
    normed_ptr,  # [T, C]
    stride_xt,
    M,
    eps,
    T: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    program = tl.program_id(0)
    row_r = program * ROWS + tl.arange(0, ROWS)
    c_C = tl.arange(0, C_PADDED)
    inside_C = c_C < C
    mask_rC = (row_r < M)[:, None] & inside_C[None, :]
    weight_rC = tl.load(weight_ptr + row_r.to(tl.int64)[:, None] * C + c_C[None, :], mask=mask_rC, other=0.0)
    if HAS_NORM:
        norm_C = tl.load(norm_ptr + c_C, mask=inside_C, other=0.0).to(tl.float32)
    # Weights do not depend on the launch before this one; everything below does.
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for t in tl.static_range(T):
        x_C = tl.load(x_ptr + t * stride_xt + c_C, mask=inside_C, other=0.0).to(tl.float32)
        if HAS_NORM:
            if HAS_RESIDUAL:
                x_C += tl.load(residual_ptr + t * C + c_C, mask=inside_C, other=0.0).to(tl.float32)
            rounded_C = x_C.to(sum_ptr.dtype.element_ty)
            x_C = rounded_C.to(tl.float32)
            scale = tl.rsqrt(tl.sum(x_C * x_C, axis=0) / C + eps)
            normed_C = (x_C * scale * norm_C).to(normed_ptr.dtype.element_ty)
            # All programs make the same sums; one writes them, and not where the others still read.
            if program == 0:
                tl.store(sum_ptr + t * C + c_C, rounded_C, mask=inside_C)
                tl.store(normed_ptr + t * C + c_C, normed_C, mask=inside_C)
            x_C = normed_C.to(tl.float32)
        out_r = tl.sum(weight_rC.to(tl.float32) * x_C[None, :], axis=1)
        if HAS_BIAS:
            out_r += tl.load(bias_ptr + row_r, mask=row_r < M, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * M + row_r, out_r.to(out_ptr.dtype.element_ty), mask=row_r < M)


def norm_linear(
    x_TC: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    weight_MC: torch.Tensor,
    bias_M: torch.Tensor | None,
    residual_TC: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.norm_linear.norm_linear`."""
    sum_TC, normed_TC = (torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device) for _ in range(2))
    out_TM = torch.empty(x_TC.shape[0], weight_MC.shape[0], dtype=x_TC.dtype, device=x_TC.device)
    norm = (norm_C, eps, residual_TC, sum_TC, normed_TC)
    describe(x_TC, weight_MC, bias_M, out_TM, norm, early_launch=_launches_early(x_TC)).run()
    return out_TM, sum_TC, normed_TC


def linear(x_TC: torch.Tensor, weight_MC: torch.Tensor, bias_M: torch.Tensor | None) -> torch.Tensor:
    """See `kernels.norm_linear.linear`."""
    out_TM = torch.empty(x_TC.shape[0], weight_MC.shape[0], dtype=x_TC.dtype, device=x_TC.device)
    describe(x_TC, weight_MC, bias_M, out_TM, early_launch=_launches_early(x_TC)).run()
    return out_TM


def _launches_early(x_TC: torch.Tensor) -> bool:
    return x_TC.is_cuda and torch.cuda.get_device_capability(x_TC.device) >= (9, 0)


def describe(
    x_TC: torch.Tensor,
    weight_MC: torch.Tensor,
    bias_M: torch.Tensor | None,
    out_TM: torch.Tensor,
    norm: tuple[torch.Tensor, float, torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None,
    *,
    early_launch: bool,
) -> Launch:
    """The launch that writes out. norm: (norm_C, eps, residual_TC or None, sum_TC, normed_TC) of a norm before it, the last two written."""
    (T, C), M = x_TC.shape, weight_MC.shape[0]
    padded = triton.next_power_of_2(C)
    rows = max(1, TILE_VALUES // padded)
    norm_C, eps, residual_TC, sum_TC, normed_TC = norm or (None, 0.0, None, x_TC, x_TC)
    # A pointer that no branch reads still has to be one.
    residual, norm_weight, bias = (x_TC if tensor is None else tensor for tensor in (residual_TC, norm_C, bias_M))
    return Launch(
        kernel=matvec_rows, grid=(triton.cdiv(M, rows),),
        arguments=(x_TC, residual, norm_weight, weight_MC, bias, out_TM, sum_TC, normed_TC, x_TC.stride(0), M, eps),
        constants={
            "T": T, "C": C, "C_PADDED": padded, "ROWS": rows, "HAS_NORM": norm_C is not None, "HAS_RESIDUAL": residual_TC is not None,
            "HAS_BIAS": bias_M is not None, "EARLY_LAUNCH": early_launch,
        },
        num_warps=NUM_WARPS, early_launch=early_launch,
    )  # fmt: skip
