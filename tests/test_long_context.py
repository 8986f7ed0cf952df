"""Tests of the long-context benchmark: needle prompts, the teacher's steps, captured tensors and decode quality."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rtpurbo.benchmarks import decode_quality
from rtpurbo.benchmarks.long_context_capture import Captured, capture, retrieval_layers
from rtpurbo.benchmarks.long_context_data import Material, source_texts
from rtpurbo.benchmarks.long_context_teacher import TeacherRecipe, exact_match, step_of, tune
from rtpurbo.converter.attention import IMPLEMENTATION
from rtpurbo.converter.checkpoint import open_checkpoint
from rtpurbo.converter.indexer import index_scale, random_indexer
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SMALL = TeacherRecipe(steps=4, step_tokens=1536, text_length=512, needle_lengths=(768, 1536), max_keys=3, warmup=2, max_positions=4096)


@pytest.fixture(scope="module")
def material(tiny_tokenizer):
    tokenizer = tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return Material(tokenizer, source_texts("train", 200_000))


def manifest_of(retrieval, *, heads, groups, head_dim, keys="head", model_type="llama", window=32):
    scores = [[1.0 - 0.1 * i if h in row else 0.0 for h in range(heads)] for i, row in enumerate(retrieval)]
    return Manifest(
        base_model=BaseModel(id="test", revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
        model=ModelShape(
            model_type=model_type,
            num_hidden_layers=len(retrieval),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            max_position_embeddings=4096,
        ),
        granularity="group",
        group_threshold=0.0,
        layers=roles_from_heads(scores, retrieval, heads // groups),
        sliding_window=window,
        sinks=4,
        indexer=Indexer(dim=8, keys=keys, scale=index_scale(head_dim), key_dtype="float32"),
        top_p=0.9,
        decode_block=16,
        prefill_block=32,
        prefill_pattern="dense",
        dense_below=0,
    )


@pytest.mark.parametrize(("keys", "asked"), [(1, 1), (4, 1), (3, 3)])
def test_a_needle_prompt_has_its_length_holds_the_facts_and_marks_the_codes_alone(material, keys, asked):
    prompt = material.needles(random.Random(5), 1500, keys=keys, asked=asked)
    assert prompt.token_ids.shape == prompt.is_answer.shape == (1500,)
    decode = material.tokenizer.decode
    question, answer = decode(prompt.token_ids).rsplit("assistant:", 1)
    assert question.count("Remember it.") == keys
    codes = [line.rsplit(" is ", 1)[1].rstrip(".") for line in answer.strip().splitlines()]
    assert len(codes) == asked
    assert decode(prompt.token_ids[prompt.is_answer]).replace(" ", "") == "".join(codes)
    for line in answer.strip().splitlines():
        assert f"\n{line} Remember it.\n" in question
        owner = line.removeprefix("The secret code of ").rsplit(" is ", 1)[0]
        assert f"What is the secret code of {owner}?" in question
    first = int(np.flatnonzero(prompt.is_answer)[0])
    assert "assistant:" in decode(prompt.token_ids[:first])


def test_the_same_seed_gives_the_same_prompt_and_another_seed_another(material):
    a, b, c = (material.needles(random.Random(seed), 800, keys=2).token_ids for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_length_without_room_for_filler_is_refused(material):
    with pytest.raises(ValueError, match=r"leave .* for filler"):
        material.needles(random.Random(0), 100, keys=3)


def test_held_out_files_are_not_training_files():
    train, heldout = set(source_texts("train", 1 << 30)), set(source_texts("heldout", 1 << 30))
    assert train
    assert heldout
    assert not train & heldout


def test_text_steps_train_every_token_and_needle_steps_the_codes_alone(material):
    text = step_of(material, SMALL, 0)
    assert text.ids_BT.shape == (3, 512)
    assert len(text.predicting_A) == 3 * 511
    lengths = set()
    for n in range(1, 12):
        step = step_of(material, SMALL, n)
        assert step.ids_BT.size == 1536
        if n % SMALL.text_every:
            lengths.add(step.ids_BT.shape[1])
            trained = material.tokenizer.decode(step.targets_A)
            assert set(trained) <= set("0123456789 ")
            assert len(step.predicting_A) < 100
    assert lengths == {768, 1536}


def test_the_learning_rate_warms_up_and_ends_at_five_percent():
    recipe = TeacherRecipe()
    rates = [recipe.rate(step) for step in range(recipe.steps + 1)]
    assert rates[0] == pytest.approx(2e-4 / 30)
    assert max(rates) == rates[29] == pytest.approx(2e-4)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in pairwise(rates[30:]))


def test_tuning_changes_the_rope_base_and_lowers_the_loss(material, tiny_model, tmp_path):
    said = []
    recipe = TeacherRecipe(**{**vars(SMALL), "steps": 30, "learning_rate": 3e-3, "text_every": 1})
    source = open_checkpoint(str(tiny_model("llama")), work=tmp_path)
    model = tune(source, material, recipe, device="cpu", say=said.append)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.max_position_embeddings == 4096
    assert float(said[0].split("text loss ")[1].split(",")[0]) < 0.9 * np.log(len(material.tokenizer))


def test_exact_match_counts_prompts_whose_every_code_token_is_the_arg_max(material):
    prompts = [material.needles(random.Random(n), 700, keys=1) for n in range(3)]

    class Oracle:
        """Predicts the next token of every prompt but the second, where it misses the last code token."""

        def model(self, input_ids, use_cache):
            return type("Out", (), {"last_hidden_state": torch.roll(input_ids, -1, dims=1)[..., None].float()})

        def lm_head(self, hidden):
            logits = torch.nn.functional.one_hot(hidden[:, 0].long(), 400).float()
            if np.array_equal(hidden[:, 0].numpy(), prompts[1].token_ids[prompts[1].is_answer]):
                logits[-1] = logits[-1].roll(1)
            return logits

    assert exact_match(Oracle(), prompts, "cpu") == pytest.approx(2 / 3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("keys", ["head", "group"])
def test_captured_tensors_give_the_attention_of_the_plain_model(tiny_model, family, keys):
    manifest = manifest_of([[], [1, 2, 3], [0]], heads=4, groups=2, head_dim=16, keys=keys, model_type=family)
    folder = tiny_model(family)
    indexer = random_indexer(manifest.index_shapes(), 3)
    ids = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen = {}
    for i, layer in enumerate(plain.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0][0]))
        tap = layer.self_attn.k_norm if family == "qwen3" else layer.self_attn.k_proj
        tap.register_forward_hook(lambda _, args, out, i=i: seen.__setitem__(f"k{i}", out.reshape(90, 2, 16)))
    with torch.no_grad():
        plain(ids[None])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=IMPLEMENTATION).eval()
    assert retrieval_layers(manifest) == [1, 2]
    for captured in capture(model, manifest, indexer, ids, [2, 1]):
        layer, heads = captured.layer, manifest.layers[captured.layer].retrieval_heads
        wanted_THD = seen[layer].unflatten(-1, (4, 16))[:, list(heads)]
        k_THD, v_THD = captured.k_TKD[:, list(captured.kv_heads)], captured.v_TKD[:, list(captured.kv_heads)]
        logits = torch.einsum("thd,shd->hts", captured.q_THD.double(), k_THD.double()) * captured.scale
        future = torch.ones(90, 90).triu(1).bool()
        out_THD = torch.einsum("hts,shd->thd", logits.masked_fill(future, float("-inf")).softmax(-1), v_THD.double())
        torch.testing.assert_close(out_THD.float(), wanted_THD, atol=1e-5, rtol=1e-4)
        weight = indexer[f"layers.{layer}.index_k"]
        for n, key_set in enumerate(captured.key_sets):
            wanted = seen[f"k{layer}"][:, captured.kv_heads[n]] @ weight[key_set].T
            torch.testing.assert_close(captured.index_k_TIR[:, key_set], wanted, atol=1e-5, rtol=1e-4)


def peaked(T, *, seed=0):
    """Two heads of one KV head: every query points at a few keys, and the index keys are the first dimensions of the keys."""
    draw = torch.Generator().manual_seed(seed)
    k_TD = torch.randn(T, 16, generator=draw)
    k_TD[:, 8:] *= 0.2
    target_HT = (torch.rand(2, T, generator=draw) * torch.arange(1, T + 1)).long()
    q_THD = (k_TD[target_HT] * 5 + 0.3 * torch.randn(2, T, 16, generator=draw)).transpose(0, 1).contiguous()
    return Captured(
        layer=0,
        heads=(0, 1),
        kv_heads=(0, 0),
        key_sets=(0, 1),
        q_THD=q_THD,
        k_TKD=k_TD[:, None],
        v_TKD=torch.randn(T, 1, 16, generator=draw),
        index_q_THR=q_THD[..., :8].contiguous(),
        index_k_TIR=k_TD[:, None, :8].repeat(1, 2, 1),
        scale=0.25,
    )


def test_decode_quality_orders_the_sets_and_agrees_with_a_plain_computation():
    captured, manifest = peaked(777), manifest_of([[0, 1]], heads=2, groups=1, head_dim=16)
    rows = [776, 700, 511, 400]
    result = decode_quality.measure(captured, manifest, rows)
    values = {name: dict(zip(decode_quality.MEASURES, result[name].unbind(-1), strict=True)) for name in decode_quality.SETS}
    assert 0.05 < values["selected"]["token_share"].mean() < 0.5
    assert (values["selected"]["blocks"] >= values["exact"]["blocks"]).all()
    assert (values["block_oracle"]["tokens"] >= values["token_oracle"]["tokens"]).all()
    for name in ("block_oracle", "token_oracle"):
        assert (values[name]["mass"] >= 0.9 - 1e-6).all()
    for h in range(2):
        for n, row in enumerate(rows):
            logits = (captured.k_TKD[: row + 1, 0].double() @ captured.q_THD[row, h].double()) * captured.scale
            mass, order = logits.softmax(0).sort(descending=True)
            count = int((mass.cumsum(0) - mass < 0.9).sum())
            assert values["token_oracle"]["tokens"][h, n] == count
            kept = order[:count]
            v_TD = captured.v_TKD[:, 0].double()
            dense = logits.softmax(0) @ v_TD[: row + 1]
            error = ((logits[kept].softmax(0) @ v_TD[kept]) - dense).norm() / dense.norm()
            assert values["token_oracle"]["output_error"][h, n] == pytest.approx(error.item(), abs=1e-4)


def test_the_selection_of_a_row_does_not_see_later_tokens():
    captured, manifest = peaked(600), manifest_of([[0, 1]], heads=2, groups=1, head_dim=16)
    whole = decode_quality.selected_blocks(captured, manifest, torch.tensor([330]))
    changed = captured.index_k_TIR.clone()
    changed[331:] = 100.0
    cut = Captured(**{**vars(captured), "index_k_TIR": changed})
    assert torch.equal(whole, decode_quality.selected_blocks(cut, manifest, torch.tensor([330])))
    assert not whole[..., 331 // 16 + 1 :].any()


def test_the_table_names_every_length_kind_and_set():
    captured, manifest = peaked(600), manifest_of([[0, 1]], heads=2, groups=1, head_dim=16)
    result = decode_quality.measure(captured, manifest, [599, 500, 450])
    records = decode_quality.summary(captured, manifest, result, {"answer": slice(0, 1), "text": slice(1, None)})
    assert len(records) == 2 * 2 * len(decode_quality.SETS)
    table = decode_quality.table([{"length": 600, **record} for record in records])
    assert table.count("| 600 |") == 2 * 2 * len(decode_quality.SETS)
    weak = decode_quality.table([{"length": 600, **record, "score": 0.05} for record in records])
    assert weak.count("| 600 |") == 2 * len(decode_quality.SETS)
