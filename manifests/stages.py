"""GPU memory, disk and time of each stage of a conversion, as formulas over a planned model. Formulas: docs/plan.md."""

from dataclasses import dataclass

from rtpurbo.manifests.assumptions import PlanOptions
from rtpurbo.manifests.parameters import Parameters, Shape

# Per trained parameter: fp32 master and gradient, two fp32 Adam moments. Autocast keeps a copy in the weights' dtype beside them.
MASTER_BYTES, GRADIENT_BYTES, ADAM_BYTES = 4, 4, 8


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Memory of one stage by part, and its time in seconds at the stated rates (None where the stage has no fixed work)."""

    name: str
    memory_bytes: dict[str, int]
    seconds: float | None
    disk_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.memory_bytes.values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the formulas need to know: model, planned roles, options."""

    shape: Shape
    parameters: Parameters
    options: PlanOptions
    num_retrieval_heads: int
    num_index_sets: int

    def seconds(self, flops: float, size_bytes: float) -> float:
        """The longer of arithmetic at gemm_flops * efficiency and memory traffic at `bandwidth`."""
        return max(flops / (self.options.gemm_flops * self.options.efficiency), size_bytes / self.options.bandwidth)

    def linear_flops(self, num_tokens: int, num_logits: int) -> float:
        """Two per multiplied parameter: the active backbone for every token, the output projection where logits are needed."""
        return 2.0 * self.parameters.active_backbone * num_tokens + 2.0 * self.parameters.head * num_logits

    def dense_attention_flops(self, num_tokens: int) -> float:
        """4 * head_dim per visible pair and query head: one product for the logit, one for the value."""
        heads = self.shape.num_layers * self.shape.num_heads
        return 4.0 * self.shape.head_dim * heads * dense_pairs(num_tokens)

    def sparse_attention_flops(self, num_tokens: int) -> float:
        """The prefill pattern: retrieval heads dense, local heads sinks and window."""
        local = self.shape.num_layers * self.shape.num_heads - self.num_retrieval_heads
        window = local_pairs(num_tokens, self.options.sliding_window, self.options.sinks)
        return 4.0 * self.shape.head_dim * (self.num_retrieval_heads * dense_pairs(num_tokens) + local * window)

    def layer_activation_bytes(self, num_tokens: int) -> int:
        """Tensors alive while `num_tokens` tokens pass one layer.

        Three hidden states, q, k, v before and after RoPE, the attention output and three MLP widths, plus one copy of the hidden
        state per expert.
        """
        shape = self.shape
        width = (2 + shape.copies) * shape.hidden_size + 3 * (shape.num_heads + shape.num_groups) * shape.head_dim
        return num_tokens * self.options.weight_bytes * (width + 3 * shape.mlp_width)

    @property
    def num_indexer_parameters(self) -> int:
        """W^Q for every retrieval head and W^K for every set of index keys."""
        return (self.num_retrieval_heads + self.num_index_sets) * self.options.index_dim * self.shape.head_dim


def dense_pairs(num_tokens: int) -> int:
    """Query-key pairs of causal attention: T (T + 1) / 2."""
    return num_tokens * (num_tokens + 1) // 2


def local_pairs(num_tokens: int, window: int, sinks: int) -> int:
    """Query-key pairs of causal attention where key j is visible to query i when i - j < window or j < sinks."""
    inside = min(num_tokens, window)
    in_window = dense_pairs(inside) + (num_tokens - inside) * window
    rows_beyond = max(num_tokens - window, 0)
    growing = min(rows_beyond, sinks)
    return in_window + dense_pairs(growing) + (rows_beyond - growing) * sinks


def calibration(work: Work) -> Stage:
    """Layer by layer: one layer, the document's hidden states before and after it, its keys and values, one chunk."""
    shape, options = work.shape, work.options
    num_tokens, width = options.calibration_tokens, options.weight_bytes
    flops = options.calibration_documents * (work.linear_flops(num_tokens, 0) + work.dense_attention_flops(num_tokens))
    return Stage(
        name="calibration",
        memory_bytes={
            "one layer": work.parameters.largest_layer * width,
            "hidden states": 2 * num_tokens * shape.hidden_size * width,
            "keys and values": 2 * num_tokens * shape.num_groups * shape.head_dim * width,
            "chunk": work.layer_activation_bytes(min(options.chunk, num_tokens)),
        },
        seconds=work.seconds(flops, work.parameters.total * width * options.calibration_documents),
    )


def indexer(work: Work) -> Stage:
    """Stage 1: frozen weights, one layer's q, k, v before and after RoPE, two softmaxes, indexer with gradient and Adam."""
    shape, options = work.shape, work.options
    longest, mean = options.indexer_max_tokens, (options.indexer_min_tokens + options.indexer_max_tokens) // 2
    pair_flops = 4 * shape.head_dim + 8 * options.index_dim
    flops = options.indexer_steps * (
        work.linear_flops(mean, 0) + work.dense_attention_flops(mean) + float(work.num_retrieval_heads) * dense_pairs(mean) * pair_flops
    )
    heads = shape.num_heads + shape.num_groups
    return Stage(
        name="stage 1: indexer",
        memory_bytes={
            "weights": work.parameters.total * options.weight_bytes,
            "hidden states": 2 * longest * shape.hidden_size * options.weight_bytes,
            "one layer's q, k, v": longest * (2 * heads + shape.num_groups) * shape.head_dim * options.weight_bytes,
            "index q, k and gradients": 2 * longest * 2 * shape.num_heads * options.index_dim * 4,
            "softmax sums": 2 * longest * shape.num_heads * 4,
            "chunk": work.layer_activation_bytes(min(options.chunk, longest)),
            "indexer, gradient, Adam": work.num_indexer_parameters * (MASTER_BYTES + GRADIENT_BYTES + ADAM_BYTES),
        },
        seconds=work.seconds(flops, options.indexer_steps * work.parameters.total * options.weight_bytes),
    )


def distillation(work: Work) -> Stage:
    """Stage 2: weights, what the trained part adds, layer inputs kept for recomputation, one layer's activations, logits."""
    shape, options = work.shape, work.options
    longest, mean = options.distill_max_tokens, (options.distill_min_tokens + options.distill_max_tokens) // 2
    trained, trained_share = _trained(work)
    documents = options.distill_steps * options.distill_batch
    forward = work.linear_flops(mean, options.answer_tokens)
    flops = documents * (
        forward
        + work.dense_attention_flops(mean)
        + (3 + trained_share) * forward
        # Recomputed once; the backward pass does 5 products per pair where the forward pass does 2.
        + (2 + 2.5) * work.sparse_attention_flops(mean)
    )
    logit_bytes = options.teacher_top_k * (4 + 4)
    return Stage(
        name=f"stage 2: distillation ({options.train})",
        memory_bytes={
            "weights": work.parameters.total * options.weight_bytes,
            "fp32 masters": trained * MASTER_BYTES,
            "gradients": trained * GRADIENT_BYTES,
            "Adam": trained * ADAM_BYTES,
            "layer inputs": shape.num_layers * longest * shape.hidden_size * options.weight_bytes,
            "one layer, recomputed, and gradients": 2 * work.layer_activation_bytes(longest),
            "answer logits": options.answer_tokens * shape.vocab_size * (options.weight_bytes + 2 * 4),
            "teacher logits": options.answer_tokens * logit_bytes,
        },
        seconds=work.seconds(flops, 4.0 * documents * work.parameters.active * options.weight_bytes),
        disk_bytes=documents * options.answer_tokens * logit_bytes,
    )


def _trained(work: Work) -> tuple[int, float]:
    """Trained parameters, and the share of the multiplied ones whose weight gradient is computed."""
    p, options = work.parameters, work.options
    if options.train == "lora":
        adapters = p.lora(work.shape, options.lora_rank)
        return adapters, adapters / p.active_backbone
    if options.train == "attention":
        return p.attention, p.attention / p.active_backbone
    frozen = p.active_experts + p.router
    return p.total - p.experts - p.router, 1 - frozen / p.active_backbone


def serving(work: Work, cache_bytes: int, context: int, batch: int) -> Stage:
    """Weights, cache, one prefill chunk and the logits of the batch; seconds: prefill of one batch with the sparse pattern."""
    options = work.options
    flops = batch * (work.linear_flops(context, 1) + work.sparse_attention_flops(context))
    return Stage(
        name="serving, converted",
        memory_bytes={
            "weights": work.parameters.total * options.weight_bytes,
            "indexer": work.num_indexer_parameters * options.weight_bytes,
            "cache": cache_bytes,
            "chunk": work.layer_activation_bytes(min(options.chunk, context)),
            "logits": batch * work.shape.vocab_size * 4,
        },
        seconds=work.seconds(flops, work.parameters.total * options.weight_bytes),
    )


def serving_dense(work: Work, cache_bytes: int, context: int, batch: int) -> Stage:
    """The same for the unconverted model."""
    options = work.options
    flops = batch * (work.linear_flops(context, 1) + work.dense_attention_flops(context))
    return Stage(
        name="serving, dense",
        memory_bytes={
            "weights": work.parameters.total * options.weight_bytes,
            "cache": cache_bytes,
            "chunk": work.layer_activation_bytes(min(options.chunk, context)),
            "logits": batch * work.shape.vocab_size * 4,
        },
        seconds=work.seconds(flops, work.parameters.total * options.weight_bytes),
    )
