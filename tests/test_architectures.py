"""Which config.json files are accepted, which are refused and why, and what PreRopeTap hands out."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rtpurbo.manifests.architectures import (
    ARCHITECTURES,
    PreRopeTap,
    architecture_of,
    head_dim_of,
    key_value_heads_of,
    num_experts_of,
    rope_type_of,
)

TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}
EXTRA = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 5e5,
    },
}


def tiny_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**TINY, **EXTRA.get(model_type, {}), **changes})


def as_written(config):
    """The object that save_pretrained puts into config.json."""
    return json.loads(config.to_json_string())


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_config_that_transformers_writes_is_accepted(model_type, rope):
    config = tiny_config(model_type, rope_parameters=ROPES[rope])
    for written in (as_written(config), config.to_dict(), json.loads(config.to_json_string(use_diff=False))):
        assert architecture_of(written) is ARCHITECTURES[model_type]
        assert rope_type_of(written) == rope
        assert (head_dim_of(written), key_value_heads_of(written)) == (16, 2)


def test_the_spelling_of_older_releases_is_accepted():
    config = dict(TINY, model_type="llama", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert rope_type_of(config) == "linear"
    assert architecture_of(config).class_name == "LlamaForCausalLM"
    assert architecture_of(dict(TINY, model_type="qwen2", sliding_window=4096, use_sliding_window=False)).query_tap == "q_proj"


def test_head_dim_and_key_value_heads_fall_back_as_transformers_does():
    config = {k: v for k, v in TINY.items() if k not in ("head_dim", "num_key_value_heads")}
    assert architecture_of(dict(config, model_type="llama")).model_type == "llama"
    assert (head_dim_of(config), key_value_heads_of(config)) == (8, 6)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {}, "model_type is 'gpt2', supported are: llama, mistral, qwen2, qwen3, qwen3_moe"),
        ("gemma3_text", {}, "model_type is 'gemma3_text'"),
        ("qwen3_next", {}, "linear-attention"),
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("mistral", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}, "sliding"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}, "sliding"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 256}, "sliding_window is 256"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' changes"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "'longrope' changes",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason(model_type, changes, message):
    config = AutoConfig.for_model(model_type, **changes)
    with pytest.raises(ValueError, match=message) as error:
        architecture_of(as_written(config), "model/config.json")
    assert str(error.value).startswith("model/config.json: ")


def test_sliding_layers_are_refused_under_a_supported_name_too():
    for layer in ("sliding_attention", "linear_attention", "chunked_attention"):
        config = dict(TINY, model_type="llama", layer_types=["full_attention", layer, layer])
        with pytest.raises(ValueError, match=f"layer_types has {layer}"):
            architecture_of(config)


@pytest.mark.parametrize("found", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, "awq"])
def test_a_quantised_checkpoint_is_refused(found):
    with pytest.raises(ValueError, match=r"quantization_config .*: convert the unquantised checkpoint"):
        architecture_of(dict(TINY, model_type="llama", quantization_config=found))


@pytest.mark.parametrize("value", [0, -1, True, 2.5, 64.0, "64", [64], {}, 10**12, float("nan")])
@pytest.mark.parametrize("key", TINY)
def test_an_impossible_shape_is_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"{key} is "):
        architecture_of({**TINY, "model_type": "llama", key: value})


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_an_impossible_or_missing_expert_shape_is_refused_by_key(key):
    config = as_written(tiny_config("qwen3_moe"))
    config["num_experts"] = config.pop("num_local_experts")
    for value in (0, 1.5, False, 10**12):
        with pytest.raises(ValueError, match=f"{key} is {value}"):
            architecture_of({**config, key: value})
    del config[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        architecture_of(config)


def test_both_spellings_of_the_number_of_experts_are_read_and_must_agree():
    config = as_written(tiny_config("qwen3_moe"))
    assert "num_experts" not in config
    assert num_experts_of(config) == 4
    assert num_experts_of({**config, "num_experts": 4}) == 4
    older = {k: v for k, v in config.items() if k != "num_local_experts"}
    assert num_experts_of({**older, "num_experts": 4}) == 4
    assert num_experts_of(TINY) == 0
    with pytest.raises(ValueError, match="num_experts 8 and num_local_experts 4 differ"):
        architecture_of({**config, "num_experts": 8})
    with pytest.raises(ValueError, match="num_local_experts is 0"):
        architecture_of({**config, "num_local_experts": 0})
    with pytest.raises(ValueError, match="num_experts_per_tok 5 is more than num_experts 4"):
        architecture_of({**config, "num_experts_per_tok": 5})


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
def test_a_missing_shape_is_refused_by_key(key):
    with pytest.raises(ValueError, match=f"{key} is None"):
        architecture_of({k: v for k, v in dict(TINY, model_type="llama").items() if k != key})


def test_a_key_for_which_transformers_would_invent_a_value_must_be_there():
    for model_type, key in (("mistral", "num_key_value_heads"), ("qwen2", "num_key_value_heads"), ("qwen3", "head_dim")):
        config = as_written(tiny_config(model_type))
        del config[key]
        with pytest.raises(ValueError, match=f"{key} is missing"):
            architecture_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim is 15, wanted an even number"),
        ({"head_dim": None, "hidden_size": 50}, "head_dim is missing and hidden_size 50"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', wanted a list"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', wanted an object"),
        ({"rope_scaling": {"type": "magic"}}, "rope scaling is 'magic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_an_inconsistent_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        architecture_of({**TINY, "model_type": "llama", **changes})


@pytest.mark.parametrize("body", [None, [], "llama", 3])
def test_a_config_that_is_no_object_is_refused(body):
    with pytest.raises(ValueError, match="wanted an object"):
        architecture_of(body)


def tiny_model(model_type, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norm weights start at 0 and 1, where leaving them out would go unnoticed.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rotate(x_BTHD, cos_TD, sin_TD):
    half = x_BTHD.shape[-1] // 2
    turned = torch.cat((-x_BTHD[..., half:], x_BTHD[..., :half]), dim=-1)
    return x_BTHD * cos_TD[:, None] + turned * sin_TD[:, None]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_tap_yields_what_enters_rope(model_type):
    """The tapped q and k, rotated here, are the keys in the cache and give the attention weights that the model reports."""
    model = tiny_model(model_type, **({"attention_bias": True} if model_type in ("llama", "qwen3", "qwen3_moe") else {}))
    tokens = torch.randint(0, 97, (2, 11))
    with torch.no_grad(), PreRopeTap(model, ARCHITECTURES[model_type]) as tap:
        out = model(tokens, use_cache=True, output_attentions=True)
        assert sorted(tap.q) == sorted(tap.k) == [0, 1, 2]
        positions = torch.arange(11)[None]
        cos, sin = model.model.rotary_emb(out.logits, positions)
        for layer in range(3):
            q_BTHD, k_BTKD = tap.pop(layer)
            assert q_BTHD.shape == (2, 11, 6, 16)
            assert k_BTKD.shape == (2, 11, 2, 16)
            q, k = rotate(q_BTHD, cos[0], sin[0]), rotate(k_BTKD, cos[0], sin[0])
            torch.testing.assert_close(k.transpose(1, 2), out.past_key_values.layers[layer].keys)
            logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(3, dim=2)) / 16**0.5
            logits.masked_fill_(torch.ones(11, 11, dtype=torch.bool).triu(1), float("-inf"))
            torch.testing.assert_close(logits.softmax(-1), out.attentions[layer])
        assert not tap.q
        assert not tap.k


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_tap_carries_gradients_and_leaves_no_hook(model_type):
    model = tiny_model(model_type)
    with PreRopeTap(model, ARCHITECTURES[model_type]) as tap:
        model(torch.randint(0, 97, (1, 5)))
        q, k = tap.pop(1)
        (q.sum() + k.sum()).backward()
    for name in ("q_proj", "k_proj"):
        assert getattr(model.model.layers[1].self_attn, name).weight.grad.abs().sum() > 0
    assert all(not module._forward_hooks for module in model.modules())


def test_the_tap_takes_its_hooks_off_when_the_forward_pass_fails():
    model = tiny_model("qwen2")
    with pytest.raises(IndexError), PreRopeTap(model, ARCHITECTURES["qwen2"]):
        model(torch.tensor([[1000]]))
    assert all(not module._forward_hooks for module in model.modules())
