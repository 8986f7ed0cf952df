"""What each custom node launches, run by Triton's interpreter in float32: the plugins' logic without TensorRT and without a GPU."""

import pytest
import torch
from interpreter_process import interpreting, serve
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.experts.reference import mix_experts
from rtpurbo.kernels.router.reference import route_tokens

pytest.importorskip("triton")

from trt_attention_case import AttentionCase

from rtpurbo.plugins.trt.nodes import NODES

WINDOW, SINKS, SCALE, D = 24, 3, 0.4, 16
MASK = {"window": WINDOW, "sinks": SINKS, "scale": SCALE}
# (lengths before, valid tokens, rows of the chunk): decode with an idle row, a chunk of one token, chunks over ring borders.
CHUNKS = [((0, 25, 90), (1, 1, 1), 1), ((60, 3, 41), (1, 0, 1), 1), ((0, 50), (37, 20), 37)]


def history(chunk, K, H, seed=0):
    lengths, counts, T = chunk
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), 128
    k, v, q = (torch.randn(B, n, heads, D, generator=generator) for n, heads in ((S, K), (S, K), (T, H)))
    return 2 * q, k, v, *(torch.tensor(x, dtype=torch.int32) for x in (lengths, counts))


def visible_of(lengths, counts):
    return (lengths + counts) * (counts > 0)


def rows_of(x, lengths, counts, T):
    out = torch.full((x.shape[0], T, *x.shape[2:]), 99.0)
    for b in range(x.shape[0]):
        out[b, : counts[b]] = x[b, lengths[b] : lengths[b] + counts[b]]
    return out


def ring_of(x, ends):
    out = torch.full((x.shape[0], SINKS + WINDOW, *x.shape[2:]), 99.0)
    for b, end in enumerate(ends.tolist()):
        for position in range(end):
            out[b, position if position < SINKS else SINKS + (position - SINKS) % WINDOW] = x[b, position]
    return out


def largest_error(out, q, k, v, lengths, counts, seen):
    """Against attention over explicit masks in fp64; seen(b, head, i, j) is the head's mask within the causal one."""
    worst, group = 0.0, q.shape[2] // k.shape[2]
    for b, count in enumerate(counts.tolist()):
        end = int(lengths[b]) + count
        i, j = torch.arange(int(lengths[b]), end)[:, None], torch.arange(end)[None, :]
        for head in range(q.shape[2] if count else 0):
            logits = (q[b, :count, head].double() @ k[b, :end, head // group].double().T * SCALE).masked_fill(
                ~((j <= i) & seen(b, head, i, j)), float("-inf")
            )
            exact = logits.softmax(-1) @ v[b, :end, head // group].double()
            worst = max(worst, (out[b, :count, head].double() - exact).abs().max().item())
    return worst


def local(b, head, i, j):
    return (i - j < WINDOW) | (j < SINKS)


@pytest.fixture(scope="module")
def interpreted():
    with interpreting(__file__) as call:

        def run(name, attributes, inputs, outputs, capability=80):
            return call("run", {"case": (name, attributes), "inputs": inputs, "outputs": outputs, "capability": capability})

        yield run


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_the_launches_of_attend_local_attend_and_then_write_the_ring(interpreted, chunk):
    q, k, v, lengths, counts = history(chunk, K=2, H=6)
    rings = [ring_of(x, lengths) for x in (k, v)]
    inputs = [q, *(rows_of(x, lengths, counts, chunk[2]) for x in (k, v)), *rings, lengths, counts]
    (ring_k, ring_v), (out,) = interpreted("AttendLocal", MASK, inputs, [torch.full_like(q, float("nan"))])
    assert out.isfinite().all()
    assert largest_error(out, q, k, v, lengths, counts, local) < 1e-5
    assert all(torch.equal(found, ring_of(x, lengths + counts)) for found, x in ((ring_k, k), (ring_v, v)))


@pytest.mark.parametrize("counts_of_groups", [[3, 1], [2, 2]])
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("name", ["AttendCausal", "AttendRetained"])
def test_the_launches_of_retained_groups_follow_the_roles(interpreted, name, chunk, counts_of_groups):
    q, k, v, lengths, counts = history(chunk, K=2, H=6)
    attributes = {**MASK, "retrieval_counts": counts_of_groups}
    inputs = [q, k, v, lengths, counts, visible_of(lengths, counts)]
    if name == "AttendRetained":
        B, heads = q.shape[0], sum(counts_of_groups)
        attributes["block"] = 16
        inputs += [torch.zeros(B, heads, 8, dtype=torch.int32), torch.zeros(B, heads, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)]
    _, (out,) = interpreted(name, attributes, inputs, [torch.full_like(q, float("nan"))])
    assert out.isfinite().all()

    def seen(b, head, i, j):
        return (j >= 0) if head % 3 < counts_of_groups[head // 3] else local(b, head, i, j)

    assert largest_error(out, q, k, v, lengths, counts, seen) < 1e-5


def test_the_launches_of_a_decode_step_select_and_attend_to_the_selection(interpreted):
    chunk = ((100, 17, 126), (1, 1, 1), 1)
    q, k, v, lengths, counts = history(chunk, K=2, H=6)
    generator = torch.Generator().manual_seed(1)
    index_k, index_q = torch.randn(3, 128, 2, 16, generator=generator), 3 * torch.randn(3, 1, 3, 16, generator=generator)
    selection = {"narrow_keys": 0, "key_sets": [0, 1, 1], "block": 16, "sinks": SINKS, "top_p_ppb": 800_000_000, "scale": 0.5}
    decode, visible = torch.zeros(2, dtype=torch.int32), lengths + counts
    poison = [torch.full((3, 3, 8), -1, dtype=torch.int32), torch.full((3, 3), -1, dtype=torch.int32)]
    _, (ids, count) = interpreted("SelectBlocks", selection, [index_q, index_k, visible, decode], poison)
    plan = plan_selection([0, 1, 1], num_sets=2, batch=3, capacity=128, device="cpu", block_size=16)
    wanted_ids, wanted = score_and_select(
        index_q[:, 0], index_k, plan=plan, lengths_B=visible, scale=0.5, top_p=0.8, sinks=SINKS, impl="reference"
    )
    assert torch.equal(count, wanted)
    chosen = torch.zeros(3, 3, 8, dtype=torch.bool)
    for b in range(3):
        for row in range(3):
            assert torch.equal(ids[b, row, : count[b, row]], wanted_ids[b, row, : count[b, row]])
            chosen[b, row, ids[b, row, : count[b, row]].long()] = True
    assert 0.2 < count.sum() / (-(-visible // 16)).sum() / 3 < 0.9
    attributes = {**MASK, "retrieval_counts": [2, 1], "block": 16}
    inputs = [q, k, v, lengths, counts, visible, ids, count, decode]
    _, (out,) = interpreted("AttendRetained", attributes, inputs, [torch.full_like(q, float("nan"))])
    rows = {0: 0, 1: 1, 3: 2}

    def seen(b, head, i, j):
        return chosen[b, rows[head]][j // 16] if head in rows else local(b, head, i, j)

    assert largest_error(out, q, k, v, lengths, counts, seen) < 1e-5


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_the_launches_of_append_write_the_chunk(interpreted, chunk):
    _, k, v, lengths, counts = history(chunk, K=2, H=2)
    index = torch.randn(k.shape[0], 128, 3, 4)
    rows = [rows_of(x, lengths, counts, chunk[2]) for x in (k, v, index)]
    empty = [torch.full_like(x, 7.0) for x in (k, v, index)]
    written, _ = interpreted("Append", {}, [*empty, *rows, lengths, counts], [])
    for found, x in zip(written, (k, v, index), strict=True):
        wanted = torch.full_like(x, 7.0)
        for b in range(x.shape[0]):
            wanted[b, lengths[b] : lengths[b] + counts[b]] = x[b, lengths[b] : lengths[b] + counts[b]]
        assert torch.equal(found, wanted)


def test_the_launch_of_a_gated_silu_multiplies_up_with_silu_of_gate(interpreted):
    x = 4 * torch.randn(5, 2 * 1100, generator=torch.Generator().manual_seed(4))
    _, (y,) = interpreted("GatedSilu", {}, [x], [torch.full((5, 1100), float("nan"))])
    gate, up = x.double().chunk(2, dim=1)
    assert torch.allclose(y.double(), gate / (1 + (-gate).exp()) * up, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 9])
def test_the_launches_of_a_mixture_route_and_mix(interpreted, tokens):
    generator = torch.Generator().manual_seed(2)
    x, logits = torch.randn(tokens, 32, generator=generator), torch.randn(tokens, 8, generator=generator)
    gate_up, down = torch.randn(8, 64, 32, generator=generator) / 5, torch.randn(8, 32, 32, generator=generator) / 5
    chosen = [torch.zeros(tokens, 2, dtype=torch.int32), torch.zeros(tokens, 2)]
    _, (ids, weights) = interpreted("Route", {"num_chosen": 2, "normalize": 1}, [logits], chosen)
    wanted_ids, wanted = route_tokens(logits, 2, normalize=True)
    assert torch.equal(ids, wanted_ids.int())
    assert torch.allclose(weights, wanted)
    _, (y,) = interpreted("Experts", {}, [x, ids, weights, gate_up, down], [torch.full_like(x, float("nan"))])
    assert torch.allclose(y, mix_experts(x, ids, weights, gate_up, down), atol=1e-5)


ATTENTION = [name for name in NODES if name.startswith("Attention")]


@pytest.mark.parametrize("chunk", [((0, 100, 90), (1, 1, 1), 1), ((60, 3, 41), (1, 0, 1), 1), ((0, 50), (37, 20), 37)], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_the_launches_of_an_attention_node_append_and_attend_by_role(interpreted, name, chunk):
    case = AttentionCase(name, chunk)
    poison = torch.full((len(chunk[0]) * chunk[2], case.H * case.D), float("nan"))
    caches, (out,) = interpreted(name, case.attributes, case.inputs(), [poison])
    kept = case.check(out, caches, 1e-4)
    if ("Selected" in name and chunk[0][1] == 100) or ("Pooled" in name and chunk[0][0] == 0):
        assert 0.2 < kept < 0.9


@pytest.mark.parametrize(
    ("name", "chunk"), [("AttentionNormPooledLocal", ((0, 20), (100, 90), 100)), ("AttentionCausalLocal", ((0, 100, 126), (1, 0, 1), 1))]
)
def test_the_smaller_tiles_of_wide_float32_heads_attend_by_role(interpreted, name, chunk):
    case = AttentionCase(name, chunk, D=128)
    poison = torch.full((len(chunk[0]) * chunk[2], case.H * 128), float("nan"))
    caches, (out,) = interpreted(name, case.attributes, case.inputs(), [poison], capability=86)
    case.check(out, caches, 1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 48, 33), (5, 100, 7)])
def test_the_launches_of_products_norm_the_sum_and_multiply(interpreted, rows, width, columns, bias):
    generator = torch.Generator().manual_seed(3)
    x, residual, norm, weight, b = (
        torch.randn(s, generator=generator) for s in ((rows, width), (rows, width), (width,), (columns, width), (columns,))
    )
    suffix, more = ("Bias", [b]) if bias else ("", [])
    poison = [torch.full(s, float("nan")) for s in ((rows, columns), (rows, width), (rows, width))]
    _, (y,) = interpreted(f"Linear{suffix}", {}, [x, weight, *more], poison[:1])
    assert torch.allclose(y.double(), x.double() @ weight.double().T + (b if bias else 0), atol=1e-4)
    before = residual.clone()
    _, (y, total, normed) = interpreted(f"NormLinear{suffix}", {"eps": 1e-6}, [x, residual, norm, weight, *more], poison)
    assert torch.equal(residual, before)
    assert torch.equal(total, x + residual)
    want = total.double() / (total.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * norm
    assert torch.allclose(normed.double(), want, atol=1e-5)
    assert torch.allclose(y.double(), want @ weight.double().T + (b if bias else 0), atol=1e-4)
    _, (y, normed) = interpreted(f"FirstNormLinear{suffix}", {"eps": 1e-6}, [total, norm, weight, *more], [poison[0], poison[2]])
    assert torch.allclose(normed.double(), want, atol=1e-5)
    assert torch.allclose(y.double(), want @ weight.double().T + (b if bias else 0), atol=1e-4)


def run_operator(request):
    """(aliased inputs, outputs) after the launches of one execution, over poisoned scratch; outputs are those that alias no input."""
    from rtpurbo.plugins.trt.nodes import NODES
    from rtpurbo.plugins.trt.operators import OPERATORS
    from rtpurbo.plugins.trt.site import Site

    class Poisoned(TorchDispatchMode):
        """While entered, fresh memory holds NaN or, of integers, a number that is no count, block or position."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            if function in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default):
                made.fill_(float("nan") if made.is_floating_point() else 1 << 30)
            return made

    (name, attributes), inputs, outputs = request["case"], request["inputs"], request["outputs"]
    node, operator = NODES[name], OPERATORS[name]
    works = []
    site = Site(device=torch.device("cpu"), capability=request["capability"], run=works.append)
    plan = operator.plan(attributes, [tuple(x.shape) for x in inputs], site)
    sources = [node.aliased_input(i) for i in range(len(node.outputs))]
    own = iter(outputs)
    everything = [next(own) if source < 0 else inputs[source] for source in sources]
    with Poisoned():
        operator.launch(attributes, plan, inputs, everything, site)
    for work in works:
        work.run()
    return [inputs[source] for source in sources if source >= 0], outputs


if __name__ == "__main__":
    serve({"run": run_operator})
