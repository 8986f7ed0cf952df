"""Plans from a config alone: parameters against the real modules, sizes against tensors and closed forms against brute force."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from rtpurbo.manifests.architectures import num_experts_of
from rtpurbo.manifests.assumptions import count_roles
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads
from rtpurbo.manifests.parameters import count_parameters, shape_of
from rtpurbo.manifests.plan import Plan, PlanOptions, plan
from rtpurbo.manifests.stages import dense_pairs, local_pairs

QWEN3_CODER_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
}
SMALL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def manifest(keys="head", **changes):
    layers = roles_from_heads([[0.0] * 8] * 4, [[], [5], [0, 1, 7], [4, 5, 6, 7]], 4)
    values = {
        "base_model": BaseModel(id="m", revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
        "model": ModelShape(
            model_type="qwen3",
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=8192,
        ),
        "granularity": "head",
        "group_threshold": 0.0,
        "layers": layers,
        "sliding_window": 100,
        "sinks": 3,
        "indexer": Indexer(dim=8, keys=keys, scale=0.25, key_dtype="float8_e4m3fn"),
        "top_p": 0.9,
        "decode_block": 64,
        "prefill_block": 128,
        "prefill_pattern": "dense",
        "dense_below": 0,
    }
    return Manifest(**{**values, **changes})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3_moe", MOE),
        ("qwen3_moe", {**MOE, "attention_bias": True, "mlp_only_layers": [1]}),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 2}),
        ("qwen3_moe", {**MOE, "mlp_only_layers": [0, 1, 2, 3]}),
    ],
)
def test_parameters_equal_those_of_the_transformers_model(model_type, extra, tied):
    shape = {k: v for k, v in SMALL.items() if k != "model_type"}
    config = AutoConfig.for_model(model_type, **{**shape, **extra, "tie_word_embeddings": tied})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = dict(model.named_parameters())
    size = {name: p.numel() for name, p in named.items()}
    written = json.loads(config.to_json_string())
    found = count_parameters(written)
    experts = sum(n for name, n in size.items() if ".experts." in name)
    assert found.total == sum(size.values())
    assert found.attention == sum(n for name, n in size.items() if ".self_attn." in name)
    assert found.experts == experts
    assert found.router == sum(n for name, n in size.items() if ".mlp.gate.weight" in name)
    assert found.lm_head == size.get("lm_head.weight", 0)
    assert found.largest_layer == max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    idle = experts * (num_experts_of(written) - 2) // num_experts_of(written) if experts else 0
    assert found.active == found.total - idle


def test_the_published_size_of_qwen3_coder_30b_a3b_is_met():
    found = count_parameters(QWEN3_CODER_30B)
    assert found.total == 30_532_122_624
    assert round(found.active / 1e9, 1) == 3.4
    config = AutoConfig.for_model(**QWEN3_CODER_30B)
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == found.total


def test_sizes_of_qwen3_coder_30b_a3b_at_a_million_tokens():
    made = plan(QWEN3_CODER_30B, context=1 << 20)
    assert (made.roles.retained_groups, made.roles.num_groups) == (29, 192)
    assert made.dense_kv_bytes_per_token == 48 * 4 * 2 * 128 * 2 == 98304
    assert made.retained_kv_bytes_per_token == 29 * 512
    assert made.index_bytes_per_token == 29 * 8 * 16 * 2
    fp8 = plan(QWEN3_CODER_30B, context=1 << 20, options=PlanOptions(index_key_dtype="float8_e4m3fn"))
    assert fp8.index_bytes_per_token == 29 * 8 * 16
    assert made.ring_bytes == 163 * 512 * 8196
    saved = 1 - plan(QWEN3_CODER_30B, context=1 << 20, options=PlanOptions(index_keys="group")).cache_bytes(1 << 20) / (98304 << 20)
    assert 0.83 < saved < 0.84
    totals = {stage.name: stage.total_bytes for stage in made.stages}
    assert totals["serving, dense"] > 141e9 > totals["serving, converted"]
    assert any("serving, dense needs" in warning for warning in made.warnings)
    assert not any("serving, converted needs" in warning for warning in made.warnings)


def test_roles_scattered_over_query_heads_keep_most_groups():
    roles = plan(QWEN3_CODER_30B, context=4096, options=PlanOptions(granularity="head")).roles
    assert roles.retrieval_heads == 230
    assert roles.packed == 29
    assert roles.scattered_late == 91
    assert roles.scattered == roles.retained_groups == 140
    assert round(roles.scattered / 192, 2) == 0.73


@pytest.mark.parametrize("retrieval", range(0, 9))
def test_expected_groups_equal_the_average_over_all_choices(retrieval):
    config = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4}
    roles = count_roles(shape_of(config), PlanOptions(granularity="head", retrieval_ratio=retrieval / 8))
    assert roles.retrieval_heads == retrieval
    choices = [len({h // 2 for h in heads}) for heads in itertools.combinations(range(8), retrieval)]
    assert roles.scattered == round(sum(choices) / len(choices))
    late = [len({h // 2 for h in heads}) for heads in itertools.combinations(range(4), min(retrieval, 4))]
    early = [len({h // 2 for h in heads}) for heads in itertools.combinations(range(4), max(retrieval - 4, 0))]
    assert roles.scattered_late == round(sum(late) / len(late)) + round(sum(early) / len(early))


@pytest.mark.parametrize(("tokens", "window", "sinks"), [(1, 1, 0), (7, 3, 2), (50, 8, 4), (9, 20, 4), (12, 5, 30), (33, 32, 1)])
def test_window_pairs_equal_brute_force(tokens, window, sinks):
    pairs = [(i, j) for i in range(tokens) for j in range(i + 1)]
    assert dense_pairs(tokens) == len(pairs)
    assert local_pairs(tokens, window, sinks) == sum(i - j < window or j < sinks for i, j in pairs)


@pytest.mark.parametrize("keys", ["head", "group"])
def test_cache_bytes_equal_the_tensors_that_a_cache_allocates(keys):
    roles, batch, capacity = manifest(keys), 3, 640
    made = plan(SMALL, context=capacity, batch=batch, options=PlanOptions(roles=roles))
    assert made.roles.source == "manifest"
    assert (made.roles.retrieval_heads, made.roles.retained_groups) == (8, 4)
    tensors = [torch.empty(batch, dtype=torch.int32, device="meta")]
    for layer in roles.layers:
        growing, local = len(layer.retained_groups), 2 - len(layer.retained_groups)
        sets = len(layer.retrieval_heads) if keys == "head" else growing
        for shape, dtype in (
            ((2, batch, growing, capacity, 16), torch.bfloat16),
            ((2, batch, local, 100 + 3, 16), torch.bfloat16),
            ((batch, capacity, sets, 8), torch.float8_e4m3fn),
        ):
            tensors.append(torch.empty(shape, dtype=dtype, device="meta"))
    assert made.cache_bytes(capacity, batch) == sum(t.nbytes for t in tensors)


def test_a_manifest_replaces_the_assumed_window_indexer_and_top_p():
    options = plan(SMALL, context=64, options=PlanOptions(roles=manifest("group"))).options
    assert (options.sliding_window, options.sinks, options.index_dim) == (100, 3, 8)
    assert (options.index_keys, options.index_key_dtype) == ("group", "float8_e4m3fn")


def test_a_manifest_of_another_geometry_is_refused():
    with pytest.raises(ValueError, match=r"roles: model\.num_hidden_layers is 4, wanted 5"):
        plan({**SMALL, "num_hidden_layers": 5}, context=64, options=PlanOptions(roles=manifest()))
    with pytest.raises(ValueError, match=r"roles: model\.model_type is qwen3, wanted llama"):
        plan({**SMALL, "model_type": "llama"}, context=64, options=PlanOptions(roles=manifest()))


def stage_of(made: Plan, name: str):
    return next(stage for stage in made.stages if stage.name.startswith(name))


def test_stage_two_memory_follows_what_is_trained():
    total = {}
    for train in ("all", "attention", "lora"):
        made = plan(QWEN3_CODER_30B, context=4096, options=PlanOptions(train=train))
        parts = stage_of(made, "stage 2").memory_bytes
        p = made.parameters
        trained = {"all": p.total - p.experts - p.router, "attention": p.attention, "lora": p.lora(made.shape, 16)}[train]
        assert parts["fp32 masters"] == 4 * trained
        assert parts["Adam"] == 8 * trained
        assert parts["gradients"] == 4 * trained
        total[train] = stage_of(made, "stage 2").total_bytes
    assert total["all"] > total["attention"] > total["lora"]


def test_lora_parameters_equal_two_factors_per_projection():
    shape = shape_of(SMALL)
    by_hand = sum(4 * (rows + columns) for rows, columns in ((128, 64), (32, 64), (32, 64), (64, 128)))
    assert count_parameters(SMALL).lora(shape, 4) == 4 * by_hand


def test_teacher_logits_on_disk_are_ids_and_values_for_every_answer_token():
    made = plan(SMALL, context=64, options=PlanOptions(distill_steps=3, distill_batch=2, answer_tokens=5, teacher_top_k=7))
    assert stage_of(made, "stage 2").disk_bytes == 3 * 2 * 5 * 7 * 8


def test_time_is_the_longer_of_arithmetic_and_traffic():
    slow = PlanOptions(gemm_flops=1e12, efficiency=1.0, bandwidth=1e15)
    made = plan(SMALL, context=1000, options=slow)
    p = made.parameters
    linear = 2 * p.active_backbone * 1000 + 2 * p.embedding
    attention = 4 * 16 * 32 * dense_pairs(1000)
    assert stage_of(made, "serving, dense").seconds == pytest.approx((linear + attention) / 1e12)
    thin = plan(SMALL, context=1, options=PlanOptions(bandwidth=1.0))
    assert stage_of(thin, "serving, dense").seconds == pytest.approx(2 * p.total)


def test_decode_reads_less_after_conversion_and_everything_at_top_p_one():
    made = plan(QWEN3_CODER_30B, context=1 << 20)
    ms = {name: row["ms_per_token"] for name, row in made.decode().items()}
    assert ms["converted_shared"] < ms["converted_disjoint"] < ms["dense"]
    assert ms["dense"] == pytest.approx((made.parameters.read_per_step(1) * 2 + (98304 << 20)) / 4.2e12 * 1e3)
    everything = plan(QWEN3_CODER_30B, context=1 << 20, options=PlanOptions(top_p=1.0))
    assert everything.index_bytes_per_token == 0
    full = everything.decode()
    assert full["converted_shared"] == full["converted_disjoint"]
    assert full["converted_shared"]["cache_bytes"] == (29 * 512 << 20) + made.ring_bytes


def test_a_batch_reads_more_experts_but_none_twice():
    p = count_parameters(QWEN3_CODER_30B)
    assert p.read_per_step(1) == p.active - p.embedding
    assert p.read_per_step(1) < p.read_per_step(8) < p.total
    assert p.read_per_step(10_000) == p.total - p.embedding


def test_a_model_without_retrieval_heads_keeps_rings_only():
    made = plan(SMALL, context=4096, options=PlanOptions(retrieval_ratio=0, sliding_window=64))
    assert made.roles.retained_groups == made.roles.index_sets == 0
    assert made.cache_bytes(4096) == made.ring_bytes + 4
    assert made.decode()["converted_shared"]["cache_bytes"] == made.ring_bytes


def warnings_of(config, context, **options):
    return " | ".join(plan(config, context=context, options=PlanOptions(**options)).warnings)


def test_a_context_beyond_the_positions_names_the_yarn_factor():
    assert "--rope-scaling yarn:4" in warnings_of(QWEN3_CODER_30B, 1 << 20)
    assert "--rope-scaling yarn:1.01" in warnings_of(QWEN3_CODER_30B, 262145)
    assert "rope" not in warnings_of(QWEN3_CODER_30B, 262144)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    assert "rope" not in warnings_of({**QWEN3_CODER_30B, "rope_scaling": yarn}, 1 << 20)
    assert "--rope-scaling yarn:8" in warnings_of({**QWEN3_CODER_30B, "rope_scaling": yarn}, 1 << 21)


def test_what_does_not_fit_or_does_not_pay_is_said():
    assert "stage 1: indexer needs" in warnings_of(QWEN3_CODER_30B, 4096, gpu_memory_bytes=10**9)
    assert "lies within sinks and window" in warnings_of(SMALL, 8192)
    assert "more than 80 % of the dense one" in warnings_of(SMALL, 8192, sliding_window=64, retrieval_ratio=0.9)
    assert warnings_of(SMALL, 8192, sliding_window=64) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval_ratio": 1.5}, "retrieval_ratio is 1.5, wanted a number from 0 to 1"),
        ({"retrieval_ratio": float("nan")}, "retrieval_ratio is nan"),
        ({"retrieval_ratio": "15%"}, "retrieval_ratio is '15%'"),
        ({"granularity": "layer"}, "granularity is 'layer', wanted one of head, group"),
        ({"index_keys": None}, "index_keys is None"),
        ({"index_key_dtype": "int8"}, "index_key_dtype is 'int8', wanted one of float32, bfloat16, float8_e4m3fn"),
        ({"train": "none"}, "train is 'none', wanted one of all, attention, lora"),
        ({"sliding_window": 0}, "sliding_window is 0, wanted a whole number from 1"),
        ({"sliding_window": 8192.0}, "sliding_window is 8192.0, wanted a whole number"),
        ({"sinks": True}, "sinks is True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"kv_bytes": 8}, "kv_bytes is 8"),
        ({"efficiency": 0}, "efficiency is 0"),
        ({"indexer_min_tokens": 100_000}, "indexer_min_tokens is 100000, wanted at most indexer_max_tokens 81920"),
        ({"roles": {"layers": []}}, "roles is a dict, wanted a Manifest"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        PlanOptions(**options)


@pytest.mark.parametrize(("arguments", "message"), [({"context": 0}, "context is 0"), ({"context": 9, "batch": 1.0}, "batch is 1.0")])
def test_context_and_batch_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(SMALL, **arguments)


def test_an_index_wider_than_the_head_and_an_unsupported_model_are_refused():
    with pytest.raises(ValueError, match="index_dim is 17, wanted at most head_dim 16"):
        plan(SMALL, context=64, options=PlanOptions(index_dim=17))
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        plan({"model_type": "gpt2"}, context=64)


@pytest.mark.parametrize("granularity", ["head", "group"])
def test_a_plan_becomes_json_and_a_table(granularity):
    made = plan(QWEN3_CODER_30B, context=1 << 20, batch=2, options=PlanOptions(granularity=granularity))
    body = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert body["cache"]["converted_bytes"] == made.cache_bytes(1 << 20, 2)
    assert body["parameters"]["active"] == made.parameters.active
    console = Console(width=120, record=True, file=io.StringIO())
    made.render(console)
    text = console.export_text()
    assert "30.532 B" in text
    assert "yarn:4" in text
    assert ("91 (expected)" in text) == (granularity == "head")
    digest = plan(SMALL, context=64, options=PlanOptions(roles=manifest())).to_dict()["options"]["roles"]
    assert digest == manifest().to_dict()["digest"]
