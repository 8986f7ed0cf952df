"""The two training losses: forward KL of the indexer against full attention, and KL on the teacher's top logits."""

# T tokens  H retrieval query heads  I index-key sets  D head dim  R index dim  A answer tokens  V vocabulary  J top logits
import torch

# Rows of one chunk of the N x N comparison: memory is H x rows x T, linear in the length.
_ROWS = 256


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q_HTR, index_k_HTR, q_HTD, k_HTD, scale, index_scale):  # type: ignore[override]
        T = q_HTD.shape[1]
        loss_H = torch.zeros(q_HTD.shape[0], dtype=torch.float32, device=q_HTD.device)
        grad_q, grad_k = torch.zeros_like(index_q_HTR), torch.zeros_like(index_k_HTR)
        for start in range(0, T, _ROWS):
            end = min(T, start + _ROWS)
            future = torch.arange(end, device=q_HTD.device) > torch.arange(start, end, device=q_HTD.device)[:, None]
            full = torch.matmul(q_HTD[:, start:end], k_HTD[:, :end].transpose(1, 2)).float().mul_(scale)
            full = full.masked_fill_(future, float("-inf")).log_softmax(dim=-1)
            index = torch.matmul(index_q_HTR[:, start:end], index_k_HTR[:, :end].transpose(1, 2)).mul_(index_scale)
            index = index.masked_fill_(future, float("-inf")).log_softmax(dim=-1)
            target = full.exp()
            loss_H += (target * (full - index).masked_fill_(future, 0.0)).sum(dim=(1, 2))
            # d KL / d logit = a_idx - a_full; rows are averaged, so that one document's length does not set the step.
            grad_logits = index.exp_().sub_(target).mul_(index_scale / T)
            grad_q[:, start:end] = torch.matmul(grad_logits, index_k_HTR[:, :end])
            grad_k[:, :end] += torch.matmul(grad_logits.transpose(1, 2), index_q_HTR[:, start:end])
        ctx.save_for_backward(grad_q, grad_k)
        return loss_H / T

    @staticmethod
    def backward(ctx, grad_loss_H):  # type: ignore[override]
        grad_q, grad_k = ctx.saved_tensors
        return grad_q * grad_loss_H[:, None, None], grad_k * grad_loss_H[:, None, None], None, None, None, None


def indexer_kl(
    index_q_HTR: torch.Tensor,
    index_k_HTR: torch.Tensor,
    q_HTD: torch.Tensor,
    k_HTD: torch.Tensor,
    *,
    scale: float,
    index_scale: float,
) -> torch.Tensor:
    """Per head, mean over rows t of KL(softmax_j(scale q_t . k_j) || softmax_j(index_scale iq_t . ik_j)), j <= t.

    q, k are post-RoPE and constant; gradients flow to index_q and index_k (fp32) by the closed form a_idx - a_full, so nothing of
    size T x T outlives a chunk of rows. Returns fp32 [H]. Source: arXiv 2605.16928 section 4 stage 1; mean over rows: ours.
    """
    return _IndexerKL.apply(index_q_HTR, index_k_HTR, q_HTD, k_HTD, scale, index_scale)  # type: ignore[return-value]


def distillation_kl(student_AV: torch.Tensor, teacher_ids_AJ: torch.Tensor, teacher_logits_AJ: torch.Tensor) -> torch.Tensor:
    """Mean over answer tokens of KL(softmax(teacher's top logits) || softmax(student's logits at the same ids)).

    Both sides are renormalised over the J ids; no temperature, no cross-entropy. Returns a scalar in fp32.
    Source: arXiv 2605.16928 section 4 stage 2.
    """
    teacher = teacher_logits_AJ.float().log_softmax(dim=-1)
    student = student_AV.gather(-1, teacher_ids_AJ).float().log_softmax(dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def mass_on_teacher(student_AV: torch.Tensor, teacher_ids_AJ: torch.Tensor) -> torch.Tensor:
    """Mean probability that the student puts on the teacher's top ids: nothing in the loss penalises mass outside them."""
    student = student_AV.float()
    return (student.gather(-1, teacher_ids_AJ).logsumexp(dim=-1) - student.logsumexp(dim=-1)).exp().mean()
