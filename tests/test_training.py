"""What training and calibration compute, against plain definitions: losses, sparse attention, needle scores, indexer, schedules."""

# T tokens  H query heads  K kv heads  D head dim  R index dim  A answer tokens  V vocabulary  J top logits
import dataclasses
import itertools
import json
import math
from typing import Any

import eager_model as eager
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import tiny_checkpoint
from transformers import AutoModelForCausalLM

from rtpurbo.converter.attention import IMPLEMENTATION, SparseAttention, SparseSpec, dense_attention, local_attention
from rtpurbo.converter.calibrate import Calibration, calibrate, choose_roles, needle_scores, rank_stability
from rtpurbo.converter.checkpoint import config_with_rope_scaling, load_model, load_rotary, open_checkpoint
from rtpurbo.converter.convert import sparse_spec
from rtpurbo.converter.data import Document
from rtpurbo.converter.distill import answer_logits, cache_teacher, read_teacher
from rtpurbo.converter.indexer import initial_indexer, mean_rotation, random_indexer
from rtpurbo.converter.losses import distillation_kl, indexer_kl, mass_on_teacher
from rtpurbo.converter.needle import NeedleDocument, calibration_documents, needle_questions
from rtpurbo.converter.schedule import document_at, learning_rate
from rtpurbo.converter.work import StepLog
from rtpurbo.kernels.local_attention import attend_local
from rtpurbo.manifests.architectures import PreRopeTap, architecture_of
from rtpurbo.runtime.loader import load


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- losses ---


def plain_indexer_kl(
    iq: torch.Tensor, ik: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float, index_scale: float
) -> torch.Tensor:
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    p = (q @ k.transpose(1, 2) * scale).masked_fill(future, -torch.inf).softmax(-1)
    r = (iq @ ik.transpose(1, 2) * index_scale).masked_fill(future, -torch.inf).softmax(-1)
    terms = torch.where(future, 0.0, p * (p.clamp_min(1e-300).log() - r.clamp_min(1e-300).log()))
    return terms.sum(-1).mean(-1)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 600])
def test_the_indexer_loss_and_its_gradients_equal_autograd_of_the_formula_in_fp64(length):
    H, D, R = 3, 8, 4
    q, k = normal(H, length, D, seed=1) * 2, normal(H, length, D, seed=2)
    iq, ik = (normal(H, length, R, seed=seed).requires_grad_() for seed in (3, 4))
    weight = torch.tensor([1.0, -2.0, 0.5])
    loss = indexer_kl(iq, ik, q, k, scale=0.7, index_scale=0.35)
    (loss * weight).sum().backward()
    exact_q, exact_k = iq.detach().double().requires_grad_(), ik.detach().double().requires_grad_()
    wanted = plain_indexer_kl(exact_q, exact_k, q.double(), k.double(), 0.7, 0.35)
    (wanted * weight).sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, atol=2e-6, rtol=2e-5)
    for found, exact in ((iq.grad, exact_q.grad), (ik.grad, exact_k.grad)):
        assert found is not None
        torch.testing.assert_close(found.double(), exact, atol=2e-7, rtol=2e-4)


def test_the_indexer_loss_is_zero_where_the_index_logits_are_the_attentions_up_to_a_constant_a_row():
    q, k = normal(2, 300, 8, seed=1), normal(2, 300, 8, seed=2)
    shifted = k + normal(2, 1, 8, seed=3)
    loss = indexer_kl(q.requires_grad_(), shifted, q.detach(), k, scale=0.5, index_scale=0.5)
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-6


def test_the_distillation_loss_by_hand():
    student = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    ids = torch.tensor([[3, 1], [0, 2]])
    teacher = torch.log(torch.tensor([[0.6, 0.2], [0.1, 0.3]]))
    # Renormalised: teacher (3/4, 1/4) and (1/4, 3/4); student (2/3, 1/3) and (1/2, 1/2).
    first = 0.75 * math.log(0.75 / (2 / 3)) + 0.25 * math.log(0.25 / (1 / 3))
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert distillation_kl(student, ids, teacher).item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert mass_on_teacher(student, ids).item() == pytest.approx((0.6 + 0.5) / 2, abs=1e-6)
    # Neither side depends on what is added to a row of logits.
    assert distillation_kl(student + 7, ids, teacher - 3).item() == pytest.approx((first + second) / 2, abs=1e-5)


# --- attention ---


@pytest.mark.parametrize(
    ("length", "window", "sinks"),
    [(1, 1, 0), (7, 1, 0), (7, 1, 3), (20, 5, 30), (20, 64, 2), (511, 13, 4), (512, 512, 4), (513, 511, 0), (1100, 40, 4), (1100, 700, 9)],
)
def test_local_attention_equals_the_kernel_and_a_dense_mask_with_its_gradients(length, window, sinks):
    H, D, scale = 2, 8, 0.6
    q, k, v = (normal(1, H, length, D, seed=seed).requires_grad_() for seed in (1, 2, 3))
    out = local_attention(q, k, v, window=window, sinks=sinks, scale=scale)
    by_kernel, _ = attend_local(*(x.detach().transpose(1, 2) for x in (q, k, v)), window=window, sinks=sinks, scale=scale, impl="reference")
    torch.testing.assert_close(out.transpose(1, 2), by_kernel, atol=1e-5, rtol=1e-5)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (j <= i) & ((i - j < window) | (j < sinks))
    plain = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    logits = (plain[0] @ plain[1].transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    wanted = logits.softmax(-1) @ plain[2]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    upstream = normal(1, H, length, D, seed=4)
    out.backward(upstream)
    wanted.backward(upstream)
    for found, exact in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(found.grad, exact.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "keys"), [("llama", "head"), ("qwen3", "group"), ("qwen2", "head")])
def test_training_sees_the_logits_that_the_runtime_decodes(family, keys, tmp_path):
    """Context by prefill, then the answer token by token: the same logits as SparseAttention's one pass, with a real selection."""
    config = eager.tiny_config(family, heads=6 if family == "qwen2" else 8, groups=2)
    manifest = eager.save_artifact(tmp_path / "m", config, [[0, 1, 3], [4, 5], []], keys=keys)
    ids, start = torch.randint(eager.VOCABULARY, (330,), generator=torch.Generator().manual_seed(5)), 285
    runtime = load(tmp_path / "m", device="cpu")
    state = runtime.start(1, len(ids))
    decoded = [runtime.prefill(state, ids[None, :start], chunk=64)]
    decoded += [runtime.decode(state, token[None]) for token in ids[start:-1]]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=IMPLEMENTATION, dtype=torch.float32).eval()
    kept: list[float] = []

    def observe(_layer: int, selected_HAT: torch.Tensor, *_: Any) -> None:
        for a in range(selected_HAT.shape[1]):
            blocks = selected_HAT[:, a, : start + a + 1 : manifest.decode_block]
            kept.append(blocks.float().mean().item())

    document = Document(token_ids=ids.numpy().astype(np.int32), answer_start=start, key="test")
    architecture = architecture_of(json.loads((tmp_path / "m" / "config.json").read_text()), "test")
    index = load_file(tmp_path / "m" / "indexer.safetensors")
    with torch.no_grad(), PreRopeTap(model, architecture) as tap:
        attention = SparseAttention(sparse_spec(manifest), index, tap, start, observe)
        trained = answer_logits(model, document, attention, torch.float32)
    assert start // manifest.decode_block >= 16
    assert 0.05 <= sum(kept) / len(kept) <= 0.5
    assert trained.shape == (len(ids) - start, eager.VOCABULARY)
    assert (trained - torch.cat(decoded)).abs().max() < 1e-4


def test_selection_carries_no_gradient_but_queries_keys_and_values_do():
    manifest_spec = {"retrieval_heads": [[0, 1]], "key_sets": [[0, 1]], "window": 8, "sinks": 2, "top_p": 0.5, "block_size": 4}

    class Tap:
        def pop(self, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            return q_pre, k_pre

    q_pre, k_pre = (normal(1, 80, heads, 8, seed=heads).requires_grad_() for heads in (2, 1))
    q, k, v = (normal(1, heads, 80, 8, seed=seed).requires_grad_() for heads, seed in ((2, 5), (1, 6), (1, 7)))
    indexer = {"layers.0.index_q": normal(2, 4, 8, seed=8) * 3, "layers.0.index_k": normal(2, 4, 8, seed=9)}
    spec = SparseSpec(**manifest_spec, index_scale=1.0)
    selected: list[torch.Tensor] = []
    attention = SparseAttention(spec, indexer, Tap(), 70, lambda _layer, mask, *_: selected.append(mask))  # type: ignore[arg-type]
    out = attention(0, q, k, v, 0.5)
    out[:, :, 70:].sum().backward()
    assert q_pre.grad is None
    assert k_pre.grad is None
    assert v.grad is not None
    assert q.grad is not None
    unread = ~selected[0].any(dim=(0, 1))
    assert 0 < unread.sum() < 80
    assert v.grad[0, 0, unread].abs().max() == 0
    assert v.grad[0, 0, ~unread].abs().min() > 0


def test_teacher_logits_are_those_that_predict_the_answer_and_are_computed_once(tmp_path):
    source = tiny_checkpoint(tmp_path / "m", "qwen2")
    model: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation=IMPLEMENTATION).eval()
    document = Document(token_ids=np.arange(40, dtype=np.int32), answer_start=30, key="a")
    folder = tmp_path / "teacher"
    cache_teacher(model, [document], folder, top_k=5, dtype=torch.float32, inputs="x")
    answer = read_teacher(folder, 0, "cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = plain(input_ids=torch.arange(40)[None]).logits[0, 29:39].topk(5)
    assert torch.equal(answer.ids_AJ, wanted.indices)
    torch.testing.assert_close(answer.logits_AJ, wanted.values, atol=1e-5, rtol=1e-5)
    before = (folder / "00000.safetensors").stat().st_mtime_ns
    cache_teacher(model, [document], folder, top_k=5, dtype=torch.float32, inputs="x")
    assert (folder / "00000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another model or other data"):
        cache_teacher(model, [document], folder, top_k=5, dtype=torch.float32, inputs="y")


# --- calibration ---


def test_needle_scores_equal_the_whole_attention_matrix():
    H, K, T, D, scale = 6, 2, 90, 8, 0.8
    q, k = normal(H, T, D, seed=1) * 2, normal(K, T, D, seed=2)
    document = NeedleDocument(token_ids=tuple(range(T)), earlier=11, later=78, needle=12)
    full = (q @ k.repeat_interleave(3, 0).transpose(1, 2) * scale).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = [sum(full[h, t, j].item() for t in range(78, 90) for j in range(11, 23)) / 12 for h in range(H)]
    torch.testing.assert_close(needle_scores(q, k, document, scale), torch.tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_calibration_scores_equal_the_attention_maps_of_the_eager_model(family, tmp_path):
    source = tiny_checkpoint(tmp_path / "m", family)
    checkpoint = open_checkpoint(str(source), work=tmp_path / "work")
    rng = np.random.default_rng(0)
    documents = []
    for earlier, length in ((9, 100), (20, 80)):
        ids = rng.integers(0, 64, size=length)
        ids[length - 8 :] = ids[earlier : earlier + 8]
        documents.append(NeedleDocument(token_ids=tuple(ids.tolist()), earlier=earlier, later=length - 8, needle=8))
    layers: list[int] = []
    found = calibrate(checkpoint, documents, dtype=torch.float32, device="cpu", on_layer=layers.append)
    model: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    assert layers == [0, 1, 2]
    queries, keys = [], []
    for n, document in enumerate(documents):
        with torch.no_grad(), PreRopeTap(model, checkpoint.architecture) as tap:
            maps = model(input_ids=torch.tensor([document.token_ids]), output_attentions=True).attentions
            pairs = [tap.pop(layer) for layer in range(3)]
        queries.append(torch.stack([q[0] for q, _ in pairs], 1))
        keys.append(torch.stack([k[0] for _, k in pairs], 1))
        wanted = torch.stack([m[0, :, -8:, document.earlier : document.earlier + 8].sum(-1).mean(-1) for m in maps])
        torch.testing.assert_close(found.scores_NLH[n], wanted, atol=1e-5, rtol=1e-4)
    q_TLHD, k_TLKD = torch.cat(queries).double(), torch.cat(keys).double()
    moment = torch.einsum("tlhd,tlhe->lhde", q_TLHD, q_TLHD) / 180
    torch.testing.assert_close(found.query_moment_LHDD.double(), moment, atol=1e-5, rtol=1e-4)
    centred = k_TLKD - k_TLKD.mean(0)
    covariance = torch.einsum("tlkd,tlke->lkde", centred, centred) / 180
    torch.testing.assert_close(found.key_covariance_LKDD.double(), covariance, atol=1e-5, rtol=1e-4)
    found.save(tmp_path / "calibration.safetensors")
    assert torch.equal(Calibration.load(tmp_path / "calibration.safetensors").scores_LH, found.scores_NLH.mean(0))


def test_roles_by_hand_for_heads_groups_threshold_and_ties(tiny_recipe):
    scores = [[0.9, 0.1, 0.2, 0.2], [0.3, 0.3, 0.5, 0.0]]

    def roles(**changes: Any) -> list[list[int]]:
        return choose_roles(scores, tiny_recipe(**changes), 2)

    assert roles(granularity="head", retrieval_ratio=0.25) == [[0], [2]]
    # 0.3 and 0.3 of layer 1 tie: the lower head goes first.
    assert roles(granularity="head", retrieval_ratio=0.375) == [[0], [0, 2]]
    assert roles(granularity="group", retrieval_ratio=0.25) == [[0, 1], []]
    assert roles(granularity="group", retrieval_ratio=0.5) == [[0, 1], [0, 1]]
    assert roles(granularity="group", retrieval_ratio=0.75) == [[0, 1], [0, 1, 2, 3]]
    assert roles(granularity="group", retrieval_ratio=0.75, group_threshold=0.25) == [[0], [0, 1, 2]]
    assert roles(retrieval_ratio=0.0) == [[], []]
    assert roles(retrieval_ratio=1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    tied = choose_roles([[0.5] * 4, [0.5] * 4], tiny_recipe(granularity="head", retrieval_ratio=0.625), 2)
    assert tied == [[0, 1, 2, 3], [0]]


def test_rank_stability_is_one_for_equal_rankings_and_minus_one_for_opposite_ones():
    up = torch.linspace(0, 1, 12).reshape(3, 4)
    assert rank_stability(torch.stack([up, up * 0.5]), 3) == {"spearman": 1.0, "top_overlap": 1.0, "num_top": 3}
    assert rank_stability(torch.stack([up, 1 - up]), 3) == {"spearman": -1.0, "top_overlap": 0.0, "num_top": 3}
    assert rank_stability(up[None], 3) == {"spearman": 1.0, "top_overlap": 1.0, "num_top": 3}
    assert rank_stability(torch.stack([up, 1 - up]), 0)["num_top"] == 1
    assert rank_stability(torch.stack([up, 1 - up]), 99)["top_overlap"] == 1.0
    for seed in range(5):
        values = rank_stability(normal(4, 3, 4, seed=seed), 4)
        assert -1 <= values["spearman"] <= 1
        assert 0 <= values["top_overlap"] <= 1


# --- indexer ---


@pytest.mark.parametrize("scaling", ["", "yarn:4", "linear:2"])
def test_the_mean_rotation_equals_the_brute_force_mean_over_all_pairs_of_a_document(scaling, tmp_path):
    checkpoint = open_checkpoint(str(tiny_checkpoint(tmp_path / "m", "llama")), work=tmp_path / "work")
    if scaling:
        checkpoint = dataclasses.replace(checkpoint, config=config_with_rope_scaling(checkpoint.config, scaling))
    rotary, D, first, last = load_rotary(checkpoint, device="cpu"), 16, 5, 30
    cos, sin = (table[0] for table in rotary(torch.zeros(1, 1, 1), torch.arange(last + 1)[None]))
    assert scaling != "yarn:4" or float(rotary.attention_scaling) > 1  # type: ignore[arg-type]

    def rope(x: torch.Tensor, position: int) -> torch.Tensor:
        turned = torch.cat([-x[D // 2 :], x[: D // 2]])
        return x * cos[position] + turned * sin[position]

    q, k = normal(D, seed=1), normal(D, seed=2)
    # A document of last + 1 positions has last + 1 - d causal pairs at distance d.
    pairs = [rope(q, m) @ rope(k, n) for m in range(last + 1) for n in range(m + 1) if m - n >= first]
    found = q @ mean_rotation(rotary, D, first, last, "cpu") @ k
    assert found.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=2e-5)


def _calibration(q_HTD: torch.Tensor, k_KTD: torch.Tensor) -> Calibration:
    centred = k_KTD - k_KTD.mean(1, keepdim=True)
    return Calibration(
        scores_NLH=torch.zeros(1, 1, q_HTD.shape[0]),
        query_moment_LHDD=(torch.einsum("htd,hte->hde", q_HTD, q_HTD) / q_HTD.shape[1])[None],
        key_covariance_LKDD=(torch.einsum("ktd,kte->kde", centred, centred) / k_KTD.shape[1])[None],
    )


@pytest.mark.parametrize("key_sets", [[0, 1, 2], [0, 0, 1]], ids=["head", "group"])
def test_an_indexer_of_the_heads_own_dimension_recovers_the_logits_up_to_a_constant_a_row(key_sets):
    D, T = 8, 200
    heads, kv = [0, 1, 3], [0, 0, 1]
    q, k, M = normal(4, T, D, seed=1), normal(2, T, D, seed=2) @ normal(D, D, seed=3) + 2, normal(D, D, seed=4)
    indexer = initial_indexer(_calibration(q, k), [heads], [key_sets], M, D)
    for n, h in enumerate(heads):
        wanted = q[h] @ M @ k[kv[n]].T
        index_q, index_k = indexer["layers.0.index_q"][n], indexer["layers.0.index_k"][key_sets[n]]
        found = (q[h] @ index_q.T) @ (k[kv[n]] @ index_k.T).T
        gap = found - wanted
        assert (gap - gap.mean(1, keepdim=True)).abs().max() < 1e-3 * wanted.abs().max()


def test_the_initial_indexer_beats_a_random_one_of_equal_dimension_on_planted_low_rank_data():
    """Logits live in 3 of 16 dimensions: 3 index dimensions find them, 2 do better than a random 2."""
    D, T = 16, 400
    basis = torch.linalg.qr(normal(D, D, seed=1))[0][:3]
    q = normal(2, T, 3, seed=2) @ basis * 4 + normal(2, T, D, seed=3) * 0.05
    k = normal(1, T, 3, seed=4) @ basis * 2 + normal(1, T, D, seed=5) * 0.05
    calibration, M = _calibration(q, k), torch.eye(D)
    keys = k.expand(2, -1, -1)

    def loss(indexer: dict[str, torch.Tensor]) -> float:
        index_q, index_k = indexer["layers.0.index_q"], indexer["layers.0.index_k"]
        iq, ik = torch.einsum("htd,hrd->htr", q, index_q), torch.einsum("htd,hrd->htr", keys, index_k)
        return indexer_kl(iq, ik, q, keys, scale=0.25, index_scale=0.25).mean().item()

    found = {dim: loss(initial_indexer(calibration, [[0, 1]], [[0, 1]], M, dim)) for dim in (1, 2, 3)}
    for dim in found:
        shapes = dict.fromkeys(("layers.0.index_q", "layers.0.index_k"), (2, dim, D))
        assert found[dim] < 0.8 * min(loss(random_indexer(shapes, seed)) for seed in range(5))
    assert found[3] < found[2] < found[1]
    assert found[3] < 0.02


def test_layers_without_retrieval_heads_have_no_indexer_and_random_ones_depend_on_the_seed_alone():
    calibration = _calibration(normal(2, 50, 8, seed=1), normal(1, 50, 8, seed=2))
    two = Calibration(
        **{
            name: getattr(calibration, name).repeat(*([1, 2, 1] if "scores" in name else [2, 1, 1, 1]))
            for name in calibration.__dataclass_fields__
        }
    )
    indexer = initial_indexer(two, [[], [1]], [[], [0]], torch.eye(8), 4)
    assert {name: tuple(tensor.shape) for name, tensor in indexer.items()} == {
        "layers.1.index_q": (1, 4, 8),
        "layers.1.index_k": (1, 4, 8),
    }
    shapes = {"layers.0.index_q": (2, 4, 8)}
    assert torch.equal(random_indexer(shapes, 1)["layers.0.index_q"], random_indexer(shapes, 1)["layers.0.index_q"])
    assert not torch.equal(random_indexer(shapes, 1)["layers.0.index_q"], random_indexer(shapes, 2)["layers.0.index_q"])


# --- schedules, documents and logs ---


def test_learning_rates_warm_up_and_then_stay_or_fall_to_zero():
    assert [learning_rate(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [learning_rate(step, 2.0, 2, cosine_steps=10) for step in range(11)]
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(1.0)
    assert cosine[10] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(cosine[2:]))
    assert learning_rate(0, 1.0, 0) == 1.0
    assert learning_rate(3, 1.0, 10, cosine_steps=5) == 0.4


def test_every_epoch_is_another_permutation_of_the_documents():
    orders = [[document_at(epoch * 9 + place, 9, seed=3) for place in range(9)] for epoch in range(4)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != [document_at(place, 9, seed=4) for place in range(9)]
    assert [document_at(n, 1, seed=0) for n in range(3)] == [0, 0, 0]


def test_needle_documents_have_the_same_tokens_at_both_spans_and_the_earlier_outside_the_window(tiny_tokenizer):
    filler = [[5 + (i * 7 + n) % 300 for i in range(600)] for n in range(3)]
    documents = calibration_documents(tiny_tokenizer, filler, count=6, tokens=512, needle_tokens=40, window=64, seed=1)
    for document in documents:
        ids = document.token_ids
        assert ids[document.earlier : document.earlier + 40] == ids[document.later : document.later + 40]
        assert document.later + 40 == len(ids)
        assert document.later - (document.earlier + 40) >= 64 - 40
        assert document.later - document.earlier >= 64
    assert len({len(document.token_ids) for document in documents}) == 4
    assert len({document.earlier / len(document.token_ids) for document in documents}) == 6
    assert len({document.token_ids[-40:] for document in documents}) == 6
    assert documents == calibration_documents(tiny_tokenizer, filler, count=6, tokens=512, needle_tokens=40, window=64, seed=1)
    with pytest.raises(ValueError, match="too short for needles"):
        calibration_documents(tiny_tokenizer, filler, count=1, tokens=512, needle_tokens=40, window=480, seed=1)
    with pytest.raises(ValueError, match="give longer documents"):
        calibration_documents(tiny_tokenizer, [[1] * 100], count=1, tokens=512, needle_tokens=40, window=64, seed=1)


def test_needle_questions_put_the_fact_outside_the_window_of_the_question(tiny_tokenizer):
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 80
    filler = [tiny_tokenizer(text)["input_ids"]]
    for question in needle_questions(tiny_tokenizer, filler, count=8, tokens=640, window=200, seed=2):
        prompt = tiny_tokenizer.decode(question.prompt)
        assert tiny_tokenizer.decode(question.prompt + question.answer).endswith(question.answer_text)
        assert prompt.count(question.answer_text) == 1
        fact = prompt[: prompt.index(question.answer_text) + len(question.answer_text)]
        assert len(question.prompt) - len(tiny_tokenizer(fact)["input_ids"]) > 200
        assert len(question.prompt) + len(question.answer) <= 640
    with pytest.raises(ValueError, match="no place for a fact outside"):
        needle_questions(tiny_tokenizer, filler, count=1, tokens=640, window=400, seed=2)


def test_a_step_log_drops_the_steps_that_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, 0)
    for step in range(5):
        log.append({"step": step, "kl": 0.5})
    log = StepLog(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    log.append({"step": 3, "kl": 0.25})
    assert path.read_text().splitlines()[-1] == '{"kl": 0.25, "step": 3}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"step": 4, "kl": math.nan})
    StepLog(path, 0)
    assert path.read_text() == ""


def test_a_new_log_replaces_the_one_of_another_run(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n')
    StepLog(path, 0)
    assert path.read_text() == ""


def test_the_model_of_stage_1_and_the_plain_model_agree(tmp_path):
    """load_model builds the model that calibration streams: one layer at a time or whole, the hidden states are the same."""
    source = tiny_checkpoint(tmp_path / "m", "mistral")
    checkpoint = open_checkpoint(str(source), work=tmp_path / "work")
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation=IMPLEMENTATION)
    plain: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    ids = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, use_cache=False, rtpurbo=dense_attention).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
