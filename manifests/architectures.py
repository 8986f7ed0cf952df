"""Supported transformer architectures as data, and the checks that refuse every other model by name with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between families, in the words of the transformers modules.

    class_name: the architecture in config.json. query_tap, key_tap: submodules of self_attn whose output is the query and key
    that enter RoPE.
    """

    model_type: str
    class_name: str
    query_tap: str = "q_proj"
    key_tap: str = "k_proj"
    num_experts_key: str | None = None


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture(model_type="llama", class_name="LlamaForCausalLM"),
        Architecture(model_type="mistral", class_name="MistralForCausalLM"),
        Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM"),
        Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM", query_tap="q_norm", key_tap="k_norm"),
        Architecture(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            query_tap="q_norm",
            key_tap="k_norm",
            num_experts_key="num_experts",
        ),
    )
}

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")


def architecture_of(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture of a config.json, or a ValueError that says why the model cannot be converted.

    Refused: unknown model types, linear-attention or hybrid layers, MLA (latent KV), sliding-window layers, RoPE scalings whose
    frequencies depend on the length (cached keys would be inconsistent), quantised checkpoints, missing or impossible shapes.
    """
    model_type = config.get("model_type")
    names = ", ".join(ARCHITECTURES)
    if "kv_lora_rank" in config:
        raise ValueError(
            f"{source}: model_type {model_type!r} uses multi-head latent attention (kv_lora_rank), supported are: {names}"
        )
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
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{source}: model_type is {model_type!r}, supported are: {names}")
    layer_types = config.get("layer_types") or []
    if odd := sorted({str(t) for t in layer_types} - {"full_attention"}):
        raise ValueError(f"{source}: layer_types has {', '.join(odd)}; only full_attention layers can be converted")
    # transformers' MistralConfig has a window of 4096 unless the file says null; the Qwen families need use_sliding_window.
    window = config.get("sliding_window", 4096) if model_type == "mistral" else config.get("sliding_window")
    if window is not None and (model_type == "mistral" or config.get("use_sliding_window", False)):
        raise ValueError(f"{source}: sliding_window is {window}: a model with sliding-window layers is not full attention")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"{source}: quantization_config ({method}): convert the unquantised checkpoint")
    rope_type = rope_type_of(config)
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"{source}: rope scaling {rope_type!r} changes its frequencies with the length, so cached keys would be inconsistent"
        )
    if rope_type not in SUPPORTED_ROPE:
        raise ValueError(f"{source}: rope scaling is {rope_type!r}, supported are: {', '.join(SUPPORTED_ROPE)}")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is {config['partial_rotary_factor']}, wanted 1.0")
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


def _check_shape(config: dict[str, Any], source: str) -> None:
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{source}: {key} is {value!r}, wanted a positive integer")
    heads, groups = config["num_attention_heads"], key_value_heads_of(config)
    if heads % groups:
        raise ValueError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


class PreRopeTap:
    """Hands out each layer's queries and keys as they enter RoPE, by hooks on the modules the architecture names.

    Inside `with PreRopeTap(model, architecture) as tap:` every forward pass stores, per layer index, `tap.q[layer]` [B, T, H, D] and
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
