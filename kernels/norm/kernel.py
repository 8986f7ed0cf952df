"""Residual addition + RMS norm in Triton, one program a token."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# T tokens  C hidden
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch


@triton.jit
def _add_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,  # may be residual_ptr
    stride_xt,
    eps,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place_C = tl.arange(0, C_PADDED)
    inside_C = place_C < C
    x_C = tl.load(x_ptr + row * stride_xt + place_C, mask=inside_C, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        before_C = tl.load(residual_ptr + row * C + place_C, mask=inside_C, other=0.0).to(tl.float32)
        # What the next layers read is the rounded sum, so the norm is taken of it too.
        sum_C = (x_C + before_C).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + place_C, sum_C, mask=inside_C)
        x_C = sum_C.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_C * x_C, axis=0) / C + eps)
    weight_C = tl.load(weight_ptr + place_C, mask=inside_C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + place_C, (x_C * scale * weight_C).to(out_ptr.dtype.element_ty), mask=inside_C)


def describe(
    x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float, residual_TC: torch.Tensor | None, out_TC: torch.Tensor, sum_TC: torch.Tensor,
    *, early_launch: bool,
) -> Launch:  # fmt: skip
    """The launch that writes the norm to out and x + residual to sum, which may be the residual; without one sum is not written."""
    C = x_TC.shape[1]
    padded = triton.next_power_of_2(C)
    return Launch(
        kernel=_add_norm, grid=(x_TC.shape[0],),
        arguments=(x_TC, x_TC if residual_TC is None else residual_TC, weight_C, out_TC, sum_TC, x_TC.stride(0), eps),
        constants={"C": C, "C_PADDED": padded, "HAS_RESIDUAL": residual_TC is not None, "EARLY_LAUNCH": early_launch},
        num_warps=max(1, min(8, padded // 256)), early_launch=early_launch,
    )  # fmt: skip


def launch(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float, residual_TC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_norm`."""
    out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    residual = x_TC if residual_TC is None else residual_TC
    if x_TC.shape[0]:
        early_launch = x_TC.is_cuda and torch.cuda.get_device_capability(x_TC.device) >= (9, 0)
        describe(x_TC, weight_C, eps, residual_TC, out_TC, residual, early_launch=early_launch).run()
    return out_TC, residual
