"""Supported transformer architectures as data, and the checks that refuse every other model by name with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between families, in the words of the transformers modules.

    class_name: the architecture in config.json. query_tap, key_tap: submodules of self_attn whose output is the query and key
    that enter RoPE. required: keys that transformers would fill with a default of its own when config.json lacks them, so that
    guessing them here could disagree with the model that is loaded.
    """

    model_type: str
    class_name: str
    query_tap: str = "q_proj"
    key_tap: str = "k_proj"
    num_experts_key: str | None = None
    required: tuple[str, ...] = ("num_key_value_heads",)


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture(model_type="llama", class_name="LlamaForCausalLM", required=()),
        Architecture(model_type="mistral", class_name="MistralForCausalLM"),
        Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM"),
        Architecture(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            query_tap="q_norm",
            key_tap="k_norm",
            required=("num_key_value_heads", "head_dim"),
        ),
        Architecture(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            query_tap="q_norm",
            key_tap="k_norm",
            num_experts_key="num_experts",
            required=("num_key_value_heads", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ),
    )
}

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
# Largest values that a manifest can hold or that any published model comes near; beyond them a config.json is damaged.
_LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
_OPTIONAL_LIMITS = {
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 24,
    "decoder_sparse_step": 1024,
}


def architecture_of(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture of a config.json, or a ValueError that says why the model cannot be converted.

    Refused: unknown model types, linear-attention or hybrid layers, MLA (latent KV), sliding-window layers, RoPE scalings whose
    frequencies depend on the length (cached keys would be inconsistent), quantised checkpoints, missing or impossible shapes.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{source}: the top level is {type(config).__name__}, wanted an object")
    model_type = config.get("model_type")
    names = ", ".join(ARCHITECTURES)
    if "kv_lora_rank" in config:
        raise ValueError(f"{source}: model_type {model_type!r} uses multi-head latent attention (kv_lora_rank), supported are: {names}")
    if any(
        key in config
        for key in (
            "linear_attn_config",
            "linear_num_key_heads",
            "ssm_state_size",
            "mamba_d_state",
            "attn_layer_period",
        )
    ):
        raise ValueError(
            f"{source}: model_type {model_type!r} mixes linear-attention or state-space layers; roles need softmax attention everywhere"
        )
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"{source}: model_type is {model_type!r}, supported are: {names}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"{source}: layer_types is {layer_types!r}, wanted a list")
    if odd := sorted({str(kind) for kind in layer_types} - {"full_attention"}):
        raise ValueError(f"{source}: layer_types has {', '.join(odd)}; only full_attention layers can be converted")
    # transformers' MistralConfig has a window of 4096 unless the file says null; the Qwen families need use_sliding_window.
    window = config.get("sliding_window", 4096) if model_type == "mistral" else config.get("sliding_window")
    if window is not None and (model_type == "mistral" or config.get("use_sliding_window", False)):
        raise ValueError(f"{source}: sliding_window is {window}: a model with sliding-window layers is not full attention")
    if config.get("quantization_config"):
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise ValueError(f"{source}: quantization_config ({method}): convert the unquantised checkpoint")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{source}: {key} is {config[key]!r}, wanted an object")
    rope_type = rope_type_of(config)
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"{source}: rope scaling {rope_type!r} changes its frequencies with the length, so cached keys would be inconsistent"
        )
    if rope_type not in SUPPORTED_ROPE:
        raise ValueError(f"{source}: rope scaling is {rope_type!r}, supported are: {', '.join(SUPPORTED_ROPE)}")
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor is {partial}, wanted 1.0")
    for key in ARCHITECTURES[model_type].required:
        if key not in config and not (key == "num_experts" and "num_local_experts" in config):
            raise ValueError(f"{source}: {key} is missing, wanted a positive integer")
    _check_shape(config, source)
    return ARCHITECTURES[model_type]


def rope_type_of(config: dict[str, Any]) -> str:
    """RoPE type from either spelling (`rope_parameters` of transformers 5, `rope_scaling` before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type", rope.get("type", "default")))


def head_dim_of(config: dict[str, Any]) -> int:
    """head_dim, or hidden_size / num_attention_heads where the config has none."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_value_heads_of(config: dict[str, Any]) -> int:
    """num_key_value_heads, or num_attention_heads where the config has none."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def num_experts_of(config: dict[str, Any]) -> int:
    """Routed experts per layer from either spelling (`num_local_experts` of transformers 5, `num_experts` before); 0 without."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _check_shape(config: dict[str, Any], source: str) -> None:
    for key, limit in (_LIMITS | _OPTIONAL_LIMITS).items():
        value = config.get(key)
        if value is None and key in _OPTIONAL_LIMITS:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ValueError(f"{source}: {key} is {str(value)[:80]}, wanted an integer from 1 to {limit}")
    heads, groups = config["num_attention_heads"], key_value_heads_of(config)
    if heads % groups:
        raise ValueError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ValueError(
            f"{source}: head_dim is missing and hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}"
        )
    if head_dim_of(config) % 2:
        raise ValueError(f"{source}: head_dim is {head_dim_of(config)}, wanted an even number (RoPE turns pairs)")
    spellings = {config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None}
    if len(spellings) > 1:
        raise ValueError(f"{source}: num_experts {config['num_experts']} and num_local_experts {config['num_local_experts']} differ")
    experts, active = num_experts_of(config), config.get("num_experts_per_tok")
    if experts and active is not None and active > experts:
        raise ValueError(f"{source}: num_experts_per_tok {active} is more than num_experts {experts}")


class PreRopeTap:
    """Hands out each layer's queries and keys as they enter RoPE, by hooks on the modules the architecture names.

    Inside `with PreRopeTap(model, architecture) as tap:` every forward pass stores, per layer, `tap.q[layer]` [B, T, H, D] and
    `tap.k[layer]` [B, T, K, D]; `pop(layer)` returns the pair and forgets it. They carry gradients when the model does.
    Recomputing them by undoing RoPE would lose bits in bfloat16.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.q: dict[int, Any] = {}
        self.k: dict[int, Any] = {}
        self._model, self._architecture, self._handles = model, architecture, []

    def __enter__(self) -> "PreRopeTap":
        for layer in self._model.model.layers:
            attention = layer.self_attn
            for store, name in ((self.q, self._architecture.query_tap), (self.k, self._architecture.key_tap)):
                hook = self._keep(store, attention.layer_idx, attention.head_dim)
                self._handles.append(getattr(attention, name).register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.q.clear()
        self.k.clear()

    def pop(self, layer: int) -> tuple[Any, Any]:
        """(q [B, T, H, D], k [B, T, K, D]) of the layer's latest forward pass."""
        return self.q.pop(layer), self.k.pop(layer)

    @staticmethod
    def _keep(store: dict[int, Any], layer: int, head_dim: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            # q_proj gives [B, T, H * D], q_norm [B, T, H, D]
            store[layer] = output if output.ndim == 4 else output.unflatten(-1, (-1, head_dim))

        return hook
