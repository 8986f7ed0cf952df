"""silu(gate) * up in Triton."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# T tokens  F MLP width
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch

BLOCK = 1024


@triton.jit
def _gated_silu(gate_up_ptr, out_ptr, F, BLOCK: tl.constexpr, EARLY_LAUNCH: tl.constexpr):
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < F
    gate = tl.load(gate_up_ptr + row * 2 * F + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + place, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def launch(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """See `kernels.gated_silu.gated_silu`."""
    out_TF = torch.empty(gate_up_TG.shape[0], gate_up_TG.shape[1] // 2, dtype=gate_up_TG.dtype, device=gate_up_TG.device)
    if out_TF.numel():
        early_launch = out_TF.is_cuda and torch.cuda.get_device_capability(out_TF.device) >= (9, 0)
        describe(gate_up_TG, out_TF, early_launch=early_launch).run()
    return out_TF


def describe(gate_up_TG: torch.Tensor, out_TF: torch.Tensor, *, early_launch: bool) -> Launch:
    """The launch that writes out."""
    T, F = out_TF.shape
    return Launch(
        kernel=_gated_silu, grid=(T, triton.cdiv(F, BLOCK)), arguments=(gate_up_TG, out_TF, F),
        constants={"BLOCK": BLOCK, "EARLY_LAUNCH": early_launch}, early_launch=early_launch,
    )  # fmt: skip
