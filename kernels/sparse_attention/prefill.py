"""attend_prefill: the chunk form, causal attention of many queries over a cache by position, all of it or listed key blocks."""

# B batch  T chunk tokens  S cached tokens  K kv heads  G query heads per kv head  D head dim  H = K * G  Q query blocks  N key blocks
import torch

from rtpurbo.kernels.local_attention import crossover, head_axis, obstacle_of
from rtpurbo.kernels.sparse_attention import prefill_reference

IMPLEMENTATIONS = ("reference", "triton", "gluon", "fa4")
# The kernels keep a tile of as many queries as a block has.
KERNEL_BLOCK = 128


def attend_prefill(
    q_BTKGD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    lengths_B: torch.Tensor | None,
    counts_B: torch.Tensor,
    scale: float,
    ids_BHQN: torch.Tensor | None = None,
    count_BHQ: torch.Tensor | None = None,
    block: int = 128,
    out_BTKGD: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax over the keys j <= i (in the listed blocks) of scale * q . k, times v, for queries at i = length + t.

    Args:
        q_BTKGD: the chunk's queries, post-RoPE; G heads for each KV head, any view with a contiguous last axis.
        k_BSKD, v_BSKD: cache by position, post-RoPE, the chunk already written; rows at or beyond lengths + counts may hold anything.
        lengths_B, counts_B: int32, tokens before the chunk and valid rows of it; rows beyond return 0 and an LSE of -inf. lengths None:
            no token before the chunk, S = T, and the values are finite in all rows.
        scale: logit scale, usually head_dim ** -0.5 (dimensionless).
        ids_BHQN, count_BHQ: int32, from `select_prefill`: for query head kv * G + g and rows n * block ... of the chunk the
            key blocks (positions m * block ...), ascending, none beyond the newest of these rows. None: all keys (dense).
        block: queries and keys per block.
        out_BTKGD: written (default: a new tensor); any view with a contiguous last axis.
        return_lse: also return the LSE.
        impl: "auto" or one of IMPLEMENTATIONS; `choose_prefill_impl` says what "auto" picks and when a kernel can run. "fa4" wants
            finite values in rows that hold no token.

    Returns (out in q's dtype, lse fp32 [B, H, T], natural log, or None); a query whose list is empty gives 0 and -inf.
    Raises ValueError for shapes that do not fit and for an impl that cannot run. Source: lists as in arXiv 2605.16928 section 3.4
    for decode; for prefill: ours.
    """
    B, T, K, G, D = q_BTKGD.shape
    S = k_BSKD.shape[1]
    if k_BSKD.shape != (B, S, K, D) or v_BSKD.shape != k_BSKD.shape:
        raise ValueError(f"attend_prefill: q {tuple(q_BTKGD.shape)}, k {tuple(k_BSKD.shape)}, v {tuple(v_BSKD.shape)} do not fit")
    start_B = lengths_B
    if lengths_B is None:
        if S != T:
            raise ValueError(f"attend_prefill: without lengths k has the chunk's {T} rows, found {S}")
        lengths_B = torch.zeros_like(counts_B)
    if lengths_B.shape != (B,) or counts_B.shape != (B,):
        raise ValueError(f"attend_prefill: lengths {tuple(lengths_B.shape)} or counts {tuple(counts_B.shape)}, wanted {(B,)}")
    if (ids_BHQN is None) != (count_BHQ is None):
        raise ValueError("attend_prefill: give ids and count together")
    if ids_BHQN is not None and count_BHQ is not None:
        wanted = (B, K * G, -(-T // block))
        if ids_BHQN.shape[:3] != wanted or count_BHQ.shape != wanted or ids_BHQN.dtype != torch.int32 or count_BHQ.dtype != torch.int32:
            raise ValueError(
                f"attend_prefill: ids {tuple(ids_BHQN.shape)} {ids_BHQN.dtype} and count {tuple(count_BHQ.shape)} {count_BHQ.dtype}, "
                f"wanted int32 {(*wanted, 'N')} and {wanted}"
            )
    if out_BTKGD is None:
        out_BTKGD = torch.empty((B, T, K, G, D), dtype=q_BTKGD.dtype, device=q_BTKGD.device)
    elif out_BTKGD.shape != q_BTKGD.shape or out_BTKGD.dtype != q_BTKGD.dtype or out_BTKGD.stride(4) != 1:
        raise ValueError(f"attend_prefill: out {tuple(out_BTKGD.shape)} {out_BTKGD.dtype} does not fit q {tuple(q_BTKGD.shape)}")
    chosen = choose_prefill_impl(
        q_BTKGD, k_BSKD, v_BSKD, scale=scale, block=None if ids_BHQN is None else block, from_start=start_B is None, impl=impl
    )
    lse_BHT = torch.empty((B, K * G, T), dtype=torch.float32, device=q_BTKGD.device) if return_lse else None
    if chosen == "reference":
        prefill_reference.attend_prefill(
            q_BTKGD, k_BSKD, v_BSKD, lengths_B, counts_B, ids_BHQN, count_BHQ, scale, block, out_BTKGD, lse_BHT
        )  # fmt: skip
        return out_BTKGD, lse_BHT
    from rtpurbo.kernels.local_attention.tiles import UNBOUNDED

    if chosen == "fa4":
        from rtpurbo.kernels.local_attention import fa4

        q_BTHD, out_BTHD = head_axis(q_BTKGD), head_axis(out_BTKGD)
        assert q_BTHD is not None
        if out_BTHD is None:
            raise ValueError(f"attend_prefill: impl 'fa4' writes heads of one stride, found out with strides {out_BTKGD.stride()}")
        start_B = None if start_B is None else start_B.to(torch.int32).contiguous()
        fa4.launch(
            q_BTHD, k_BSKD, v_BSKD, start_B, counts_B.to(torch.int32).contiguous(), out_BTHD, lse_BHT, window=None, sinks=0, scale=scale
        )  # fmt: skip
        return out_BTKGD, lse_BHT
    if chosen == "triton":
        from rtpurbo.kernels.local_attention.kernel import launch
    else:
        from rtpurbo.kernels.local_attention.hopper_kernel import launch
    lists = None if ids_BHQN is None or count_BHQ is None else (ids_BHQN.contiguous(), count_BHQ.contiguous())
    lengths_B, counts_B = (x.to(torch.int32).contiguous() for x in (lengths_B, counts_B))
    launch(
        q_BTKGD, k_BSKD, v_BSKD, lengths_B, counts_B, None, None, out_BTKGD, lse_BHT,
        window=UNBOUNDED.value, sinks=0, scale=scale, by_position=True, lists=lists,
    )  # fmt: skip
    return out_BTKGD, lse_BHT


def choose_prefill_impl(
    q_BTKGD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    scale: float = 1.0,
    block: int | None = None,
    from_start: bool = False,
    impl: str = "auto",
) -> str:
    """The implementation that `attend_prefill` runs for these tensors; block: that of the lists (None: none); from_start: no lengths.

    "auto" picks "fa4" (FlashAttention-4, extra `fa4`) where it is installed, can run and was measured faster (see
    local_attention/crossover.py), "gluon" on Hopper (compute capability 9.0), "triton" on other NVIDIA GPUs, and "reference" on the CPU,
    for head dims other than 64 and 128, for lists of other blocks than 128, for inputs that need gradients, and for a scale <= 0. A
    named one is returned as it is, or raises ValueError with what is in its way.
    """
    if impl == "reference":
        return impl
    tensors = [q_BTKGD, k_BSKD, v_BSKD]
    if impl == "auto":
        if not q_BTKGD.is_cuda:
            return "reference"
        preferred = ["gluon", "triton"]
        if block is None and from_start and crossover.prefers_fa4(q_BTKGD.device, "dense", q_BTKGD.shape[1], k_BSKD.shape[1]):
            preferred.insert(0, "fa4")
        return next((name for name in preferred if _obstacle(name, tensors, scale, block) is None), "reference")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attend_prefill: impl {impl!r} is not one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    obstacle = _obstacle(impl, tensors, scale, block)
    if obstacle is not None:
        raise ValueError(f"attend_prefill: impl {impl!r} cannot run: {obstacle}")
    return impl


def _obstacle(impl: str, tensors: list[torch.Tensor], scale: float, block: int | None) -> str | None:
    if impl == "fa4" and block is not None:
        return "it does not take lists of blocks"
    if block not in (None, KERNEL_BLOCK):
        return f"lists of blocks of {block}, wanted {KERNEL_BLOCK}"
    return obstacle_of(impl, tensors, scale)
