"""A model's weights in the shapes that the forward pass wants: q, k, v side by side, gate and up side by side, experts stacked."""

# V vocabulary  C hidden  M (H + 2 K) D  H query heads  K kv heads  D head dim  F MLP width  G 2 F  E experts
# S positions  e half the head dim
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Positions whose rotary tables are computed at a time: the model's own module makes several fp32 tensors of that length.
ROPE_PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(silu(gate x) * (up x)); gate_up_GC has the gate's rows first."""

    gate_up_GC: torch.Tensor
    gate_up_bias_G: torch.Tensor | None
    down_CF: torch.Tensor
    down_bias_C: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: softmax router, the best `num_chosen` of E, their weights normalised to sum 1 if `normalize`."""

    router_EC: torch.Tensor
    gate_up_EGC: torch.Tensor
    down_ECF: torch.Tensor
    num_chosen: int
    normalize: bool


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer; heads in run-time order (runtime/layout.py). qkv_MC: rows of q, then k, then v."""

    input_norm_C: torch.Tensor
    qkv_MC: torch.Tensor
    qkv_bias_M: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    o_CM: torch.Tensor
    o_bias_C: torch.Tensor | None
    post_norm_C: torch.Tensor
    mlp: Mlp | Experts


class Model:
    """All weights on one device. `config` and `generation_config` are transformers' objects; head_VC is embed_VC when tied."""

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate, without values. Raises ValueError for an activation other than silu and when the memory is not there."""
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act!r}, wanted 'silu'")
        self.config, self.device, self.dtype = config, device, dtype
        with torch.device("meta"):
            # transformers' own idea of which tensors there are: biases, norms, dense and sparse layers.
            empty: Any = AutoModelForCausalLM.from_config(config)
        self.generation_config: Any = empty.generation_config
        self._rotary = type(empty.model.rotary_emb)(config=config).to(device)
        self._cos_Se = self._sin_Se = torch.empty(0, 0, device=device, dtype=dtype)
        self.head_dim: int = empty.model.layers[0].self_attn.head_dim
        self.scale: float = empty.model.layers[0].self_attn.scaling
        self.eps: float = config.rms_norm_eps
        self.num_groups: int = config.num_key_value_heads
        try:
            self.embed_VC = self._like(empty.model.embed_tokens.weight)
            self.head_VC = self.embed_VC if config.tie_word_embeddings else self._like(empty.lm_head.weight)
            self.norm_C = self._like(empty.model.norm.weight)
            self.layers = tuple(self._layer(layer) for layer in empty.model.layers)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"no memory on {device} for the weights of a {config.model_type} model in {dtype}") from error

    def rope(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [>= tokens, head_dim / 2] by position from the model's own rotary module (both of its halves are equal).

        Tensors returned earlier stay as they are when a longer table is made.
        """
        if self._cos_Se.shape[0] < tokens:
            half = self.head_dim // 2
            tables = [torch.empty(tokens, half, dtype=self.dtype, device=self.device) for _ in range(2)]
            for start in range(0, tokens, ROPE_PIECE):
                position_1S = torch.arange(start, min(start + ROPE_PIECE, tokens), device=self.device)[None]
                # fp32 angles, rounded to the model's dtype, as its attention gets them.
                for table_Se, made_1SD in zip(tables, self._rotary(self.embed_VC[:1], position_1S), strict=True):
                    table_Se[start : start + ROPE_PIECE] = made_1SD[0, :, :half]
            self._cos_Se, self._sin_Se = tables
        return self._cos_Se, self._sin_Se

    def tensors(self) -> list[torch.Tensor]:
        """Every weight once."""
        found = [self.embed_VC, self.norm_C] if self.head_VC is self.embed_VC else [self.embed_VC, self.norm_C, self.head_VC]
        for layer in self.layers:
            found += [x for part in (layer, layer.mlp) for x in vars(part).values() if isinstance(x, torch.Tensor)]
        return found

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(x.nbytes for x in self.tensors())

    def _layer(self, empty: Any) -> Layer:
        attention = empty.self_attn
        q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
        return Layer(
            input_norm_C=self._like(empty.input_layernorm.weight),
            qkv_MC=self._rows(q.weight, k.weight, v.weight),
            qkv_bias_M=None if q.bias is None else self._rows(q.bias, k.bias, v.bias),
            q_norm_D=self._like(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
            k_norm_D=self._like(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
            o_CM=self._like(o.weight),
            o_bias_C=None if o.bias is None else self._like(o.bias),
            post_norm_C=self._like(empty.post_attention_layernorm.weight),
            mlp=self._experts(empty.mlp) if hasattr(empty.mlp, "experts") else self._mlp(empty.mlp),
        )

    def _mlp(self, empty: Any) -> Mlp:
        gate, up, down = empty.gate_proj, empty.up_proj, empty.down_proj
        return Mlp(
            gate_up_GC=self._rows(gate.weight, up.weight),
            gate_up_bias_G=None if gate.bias is None else self._rows(gate.bias, up.bias),
            down_CF=self._like(down.weight),
            down_bias_C=None if down.bias is None else self._like(down.bias),
        )

    def _experts(self, empty: Any) -> Experts:
        return Experts(
            router_EC=self._like(empty.gate.weight),
            gate_up_EGC=self._like(empty.experts.gate_up_proj),
            down_ECF=self._like(empty.experts.down_proj),
            num_chosen=self.config.num_experts_per_tok,
            normalize=self.config.norm_topk_prob,
        )

    def _like(self, empty: torch.Tensor) -> torch.Tensor:
        return torch.empty(empty.shape, dtype=self.dtype, device=self.device)

    def _rows(self, *parts: torch.Tensor) -> torch.Tensor:
        """One tensor with room for the parts below each other."""
        rows = sum(part.shape[0] for part in parts)
        return torch.empty(rows, *parts[0].shape[1:], dtype=self.dtype, device=self.device)


@torch.no_grad()
def fill_random(model: Model, seed: int) -> None:
    """Values as transformers initialises a new model: matrices normal with std initializer_range, norms 1, biases 0; on the device."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for tensor in model.tensors():
        if tensor.ndim > 1:
            tensor.normal_(0.0, model.config.initializer_range, generator=generator)
    model.norm_C.fill_(1.0)
    for layer in model.layers:
        for norm in (layer.input_norm_C, layer.post_norm_C, layer.q_norm_D, layer.k_norm_D):
            if norm is not None:
                norm.fill_(1.0)
        biases = (layer.qkv_bias_M, layer.o_bias_C)
        for bias in biases if isinstance(layer.mlp, Experts) else (*biases, layer.mlp.gate_up_bias_G, layer.mlp.down_bias_C):
            if bias is not None:
                bias.zero_()
