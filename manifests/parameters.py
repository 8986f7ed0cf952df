"""Exact parameter counts and layer widths of the supported architectures, from a config.json alone."""

from dataclasses import dataclass
from typing import Any

from rtpurbo.manifests.architectures import ARCHITECTURES, architecture_of, head_dim_of, key_value_heads_of, num_experts_of


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The widths that sizes and times follow from. mlp_width: widest MLP that one token passes, summed over its experts.

    copies: times that a token's hidden state is copied for the MLP (one per expert, 1 without experts).
    """

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    mlp_width: int
    copies: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_groups


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts, in parameters (not bytes).

    embedding: the input table. lm_head: 0 when tied to it. attention: q, k, v, o of all layers with biases and q/k norms.
    router, experts: of all layers together; expert: a single one. largest_layer: the layer with the most parameters.
    total: everything, tied tensors once.
    """

    total: int
    embedding: int
    lm_head: int
    attention: int
    router: int
    experts: int
    expert: int
    experts_per_token: int
    num_moe_layers: int
    largest_layer: int

    @property
    def active_experts(self) -> int:
        """Parameters of the experts that one token passes, over all layers."""
        return self.num_moe_layers * self.experts_per_token * self.expert

    @property
    def active(self) -> int:
        """Parameters that serve one token: the total without the experts that the router leaves idle."""
        return self.total - self.experts + self.active_experts

    @property
    def active_backbone(self) -> int:
        """`active` without input table and output projection: what every context token is multiplied with."""
        return self.active - self.embedding - self.lm_head

    @property
    def head(self) -> int:
        """Parameters of the output projection, which is the input table when tied."""
        return self.lm_head or self.embedding

    def read_per_step(self, batch: int) -> int:
        """Parameters that one decode step reads; the few rows of the input table are neglected.

        An expert is read once however many sequences ask for it: with `batch` sequences that choose e of E experts
        independently, E * (1 - (1 - e / E)^batch) distinct ones are expected per layer.
        """
        if not self.experts:
            return self.active_backbone + self.head
        idle = (1 - self.experts_per_token * self.num_moe_layers * self.expert / self.experts) ** batch
        return self.active_backbone - self.active_experts + self.head + round(self.experts * (1 - idle))

    def lora(self, shape: Shape, rank: int) -> int:
        """Parameters of rank-`rank` adapters on q, k, v and o of every layer: rank * (inputs + outputs) for each."""
        queries, keys = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
        return shape.num_layers * rank * (2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys))


def shape_of(config: dict[str, Any]) -> Shape:
    """The widths of a supported config; ValueError for any other (see `architecture_of`)."""
    architecture_of(config)
    num_dense = sum(not moe for moe in _moe_layers(config))
    dense_width = config["intermediate_size"] if num_dense else 0
    experts = config["num_experts_per_tok"] if num_dense < config["num_hidden_layers"] else 0
    return Shape(
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_groups=key_value_heads_of(config),
        head_dim=head_dim_of(config),
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        mlp_width=max(dense_width, experts * config.get("moe_intermediate_size", 0)),
        copies=max(experts, 1),
    )


def count_parameters(config: dict[str, Any]) -> Parameters:
    """Parameters of a supported config as transformers builds it; ValueError for any other. Formulas: docs/plan.md."""
    shape, kind = shape_of(config), ARCHITECTURES[config["model_type"]]
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * head_dim, shape.num_groups * head_dim
    attention = 2 * hidden * queries + 2 * hidden * keys
    if kind.model_type == "qwen2":
        attention += queries + 2 * keys
    elif kind.model_type != "mistral" and config.get("attention_bias"):
        attention += queries + 2 * keys + hidden
    if kind.query_tap == "q_norm":
        attention += 2 * head_dim
    dense = 3 * hidden * config["intermediate_size"]
    if kind.model_type == "llama" and config.get("mlp_bias"):
        dense += 2 * config["intermediate_size"] + hidden
    moe_layers = _moe_layers(config)
    num_moe = sum(moe_layers)
    num_experts = num_experts_of(config) if num_moe else 0
    expert = 3 * hidden * config["moe_intermediate_size"] if num_moe else 0
    sparse = num_experts * (expert + hidden)
    embedding = config["vocab_size"] * hidden
    lm_head = 0 if config.get("tie_word_embeddings") else embedding
    layers = [attention + 2 * hidden + (sparse if moe else dense) for moe in moe_layers]
    return Parameters(
        total=sum(layers) + hidden + embedding + lm_head,
        embedding=embedding,
        lm_head=lm_head,
        attention=shape.num_layers * attention,
        router=num_moe * num_experts * hidden,
        experts=num_moe * num_experts * expert,
        expert=expert,
        experts_per_token=config["num_experts_per_tok"] if num_moe else 0,
        num_moe_layers=num_moe,
        largest_layer=max(layers),
    )


def _moe_layers(config: dict[str, Any]) -> list[bool]:
    """For each layer, whether its MLP is a mixture of experts (the rule of the transformers module)."""
    kind = ARCHITECTURES[config["model_type"]]
    if kind.num_experts_key is None:
        return [False] * config["num_hidden_layers"]
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return [i not in dense and (i + 1) % step == 0 for i in range(config["num_hidden_layers"])]
