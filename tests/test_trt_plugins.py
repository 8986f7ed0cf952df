"""Every custom node alone in a TensorRT engine: built here without a GPU, and on a GPU equal to its definition over dynamic shapes."""

# B batch  T chunk tokens  S cached tokens  H query heads  K kv heads  G query heads per kv head  D head dim
import json

import pytest
import torch

from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.experts.reference import mix_experts
from rtpurbo.kernels.prefill_selection import select_prefill
from rtpurbo.kernels.router.reference import route_tokens
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL

pytestmark = pytest.mark.trt
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'rtpurbo[trt-rtx]'")
pytest.importorskip("triton")

import trt_attention_case as attention_case  # noqa: E402
from trt_attention_case import AttentionCase  # noqa: E402
from trt_node_engines import NodeCase, NodeEngine, build  # noqa: E402

WINDOW, SINKS, SCALE = 96, 4, 0.125
MASK = {"window": WINDOW, "sinks": SINKS, "scale": SCALE}
SELECTION = {"narrow_keys": 1, "key_sets": [0, 1, 1], "block": 64, "sinks": SINKS, "top_p_ppb": 900_000_000, "scale": 0.25}
ATTENTION = [name for name in NODES if name.startswith("Attention")]
POSITIONS = 1536


def attention_node(name: str) -> NodeCase:
    case = AttentionCase(name, ((0,), (1,), 1), D=64, dtype=torch.bfloat16)
    sizes = {
        "O": (case.H + 2 * case.K) * case.D, "U": case.D // 2, "Q": POSITIONS, "Z": 2, "K": len(case.counts_K), "L": case.local,
        "D": case.D, "W": attention_case.WINDOW + attention_case.SINKS, "I": 3, "J": len(case.heads), "R": attention_case.R, "H": case.H,
    }  # fmt: skip
    return NodeCase(node=name, attributes=case.attributes, sizes=sizes)


CASES = {
    "AttendLocal": NodeCase(node="AttendLocal", attributes=MASK, sizes={"H": 6, "K": 2, "D": 64, "W": WINDOW + SINKS}),
    "Append": NodeCase(node="Append", attributes={}, sizes={"K": 2, "D": 64, "I": 3, "R": 16}),
    "AppendKV": NodeCase(node="AppendKV", attributes={}, sizes={"K": 2, "D": 64}),
    "SelectBlocks": NodeCase(node="SelectBlocks", attributes=SELECTION, sizes={"J": 3, "R": 16, "I": 2}),
    "AttendRetained": NodeCase(
        node="AttendRetained", attributes={**MASK, "retrieval_counts": [3, 1], "block": 64}, sizes={"H": 6, "K": 2, "D": 64, "J": 4}
    ),
    "AttendPooled": NodeCase(
        node="AttendPooled",
        attributes={
            **MASK,
            "retrieval_counts": [3, 1],
            "block": 64,
            "key_sets": [0, 1, 1, 2],
            "index_scale": 0.25,
            "prefill_ppb": 700_000_000,
            "prefill_block": 128,
        },
        sizes={"H": 6, "K": 2, "D": 64, "J": 4, "I": 3, "R": 16},
    ),
    "AttendCausal": NodeCase(node="AttendCausal", attributes={**MASK, "retrieval_counts": [2, 1]}, sizes={"H": 4, "K": 2, "D": 128}),
    "GatedSilu": NodeCase(node="GatedSilu", attributes={}, sizes={"G": 640, "F": 320}),
    "Route": NodeCase(node="Route", attributes={"num_chosen": 8, "normalize": 1}, sizes={"E": 128, "X": 8}),
    "Experts": NodeCase(node="Experts", attributes={}, sizes={"C": 256, "F": 128, "G": 256, "E": 16, "X": 4}),
    **{
        name: NodeCase(node=name, attributes={"eps": 1e-6} if "Norm" in name else {}, sizes={"C": 320, "O": 200})
        for name in NODES
        if "Linear" in name
    },
    **{name: attention_node(name) for name in ATTENTION},
}


@pytest.mark.parametrize("name", CASES)
def test_a_node_becomes_an_engine_with_its_cubins_without_a_gpu(name, tmp_path):
    session = build(CASES[name], tmp_path, (80,))
    # What a plugin stores of itself is what the engine has at run time.
    rule = f"rtpurbo::{name}{json.dumps(CASES[name].attributes)}"
    assert rule.encode() in (tmp_path / "engine.plan").read_bytes()
    assert {entry[0] for entry in session.seen.values()} == {name}
    assert len(list((tmp_path / "cubins").glob("*_sm80_*.cubin"))) >= 1


def test_every_node_is_tested():
    assert CASES.keys() == NODES.keys()


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    made: dict[str, NodeEngine] = {}

    def get(name: str) -> NodeEngine:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            major, minor = torch.cuda.get_device_capability()
            build(CASES[name], folder, (10 * major + minor,))
            made[name] = NodeEngine(CASES[name], folder)
        return made[name]

    return get


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# (lengths before, valid tokens, rows of the chunk)
CHUNKS = [
    ((0,), (1,), 1),
    ((0, 50, 99, 350), (1, 1, 1, 1), 1),
    ((700, 3, 41), (1, 0, 1), 1),
    ((0, 130), (37, 20), 37),
    ((0, 5, 700, 96), (600, 0, 599, 1), 600),
]


class History:
    """Keys and values of whole sequences, and what a chunk of queries sees of them."""

    def __init__(self, lengths, counts, T, K, D, H, seed, device="cuda"):
        generator = torch.Generator(device).manual_seed(seed)
        self.lengths, self.counts, self.T = lengths, counts, T
        self.ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        B, S = len(lengths), max(64, *self.ends)

        def random(*shape):
            return torch.randn(shape, generator=generator, device=device).bfloat16()

        self.k, self.v, self.q = random(B, S, K, D), random(B, S, K, D), 4 * random(B, T, H, D)
        self.lengths_B, self.counts_B = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, counts))
        self.visible_B = (self.lengths_B + self.counts_B) * (self.counts_B > 0)

    def chunk(self, x):
        """The chunk's rows of the history; rows of padding are large, so that reading one is a large error."""
        out = torch.full((x.shape[0], self.T, *x.shape[2:]), 99.0, device=x.device, dtype=x.dtype)
        for b, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            out[b, :count] = x[b, length : length + count]
        return out

    def ring(self, x, ends):
        out = torch.full((x.shape[0], SINKS + WINDOW, *x.shape[2:]), 99.0, device=x.device, dtype=x.dtype)
        for b, end in enumerate(ends):
            for position in range(end):
                out[b, position if position < SINKS else SINKS + (position - SINKS) % WINDOW] = x[b, position]
        return out

    def cache(self, x):
        """The cache by position with the chunk written; large beyond it."""
        out = torch.full_like(x, 99.0)
        for b, end in enumerate(self.ends):
            out[b, :end] = x[b, :end]
        return out

    def error(self, out, b, head, group, seen):
        """Error of one head's valid rows over the allowed one: twice eager attention's in bf16, plus one rounding."""
        count, end = self.counts[b], self.ends[b]
        i = torch.arange(self.lengths[b], end, device="cuda")[:, None]
        j = torch.arange(end, device="cuda")[None, :]
        mask = (j <= i) & seen(i, j)
        q, k, v = (x[b] for x in (self.q[:, :count, head], self.k[:, :end, group], self.v[:, :end, group]))

        def attend(dtype):
            logits = ((q.to(dtype) @ k.to(dtype).T).double() * SCALE).masked_fill(~mask, float("-inf"))
            return (logits.softmax(-1).to(dtype) @ v.to(dtype)).double()

        exact = attend(torch.float64)
        allowed = 2 * (attend(torch.bfloat16) - exact).norm() + 2**-8 * exact.norm()
        return ((out[b, :count, head].double() - exact).norm() / allowed).item()


def local(i, j):
    return (i - j < WINDOW) | (j < SINKS)


def everything(i, j):
    return j >= 0


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=on_gpu)], ids=[""])
def test_attend_local_in_an_engine_equals_the_mask_and_updates_the_ring(engine_of, chunk, graph, mark):
    h = History(*chunk, K=2, D=64, H=6, seed=1)
    rings = [h.ring(x, h.lengths) for x in (h.k, h.v)]
    out, *written = engine_of("AttendLocal").run(h.q, h.chunk(h.k), h.chunk(h.v), *rings, h.lengths_B, h.counts_B, graph=graph)
    errors = [h.error(out, b, head, head // 3, local) for b, count in enumerate(h.counts) if count for head in range(6)]
    assert max(errors) < 1
    assert all(torch.equal(found, h.ring(x, h.ends)) for found, x in zip(written, (h.k, h.v), strict=True))


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in ("Append", "AppendKV")])
def test_append_in_an_engine_writes_the_chunk_and_nothing_else(engine_of, chunk, name):
    h = History(*chunk, K=2, D=64, H=2, seed=2)
    index = torch.randn(*h.k.shape[:2], 3, 16, device="cuda").bfloat16()
    histories = [h.k, h.v, index][: len(NODES[name].outputs)]
    caches = [torch.full_like(x, 7.0) for x in histories]
    written = engine_of(name).run(*caches, *(h.chunk(x) for x in histories), h.lengths_B, h.counts_B)
    for cache, x in zip(written, histories, strict=True):
        wanted = torch.full_like(x, 7.0)
        for b, (length, end) in enumerate(zip(h.lengths, h.ends, strict=True)):
            wanted[b, length:end] = x[b, length:end]
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
@pytest.mark.parametrize("visible", [pytest.param(v, marks=on_gpu) for v in ((1,), (8192, 2000), (4097, 63, 0, 6000))], ids=str)
def test_select_blocks_in_an_engine_selects_the_reference_set(engine_of, visible, graph):
    generator = torch.Generator("cuda").manual_seed(3)
    B, S = len(visible), 8192
    index_k = torch.randn(B, S, 2, 16, generator=generator, device="cuda").bfloat16()
    index_q = 6 * torch.randn(B, 1, 3, 16, generator=generator, device="cuda")
    lengths = torch.tensor(visible, dtype=torch.int32, device="cuda")
    phase = torch.zeros(DECODE, dtype=torch.int32, device="cuda")
    # An idle row selects nothing that anybody reads: the engine gets it as it is, the reference with one token.
    ids, count = engine_of("SelectBlocks").run(index_q, index_k, lengths, phase, graph=graph)
    plan = plan_selection(SELECTION["key_sets"], num_sets=2, batch=B, capacity=S, device="cuda", block_size=64)
    wanted_ids, wanted = score_and_select(
        index_q[:, 0], index_k, plan=plan, lengths_B=lengths.clamp(min=1), scale=SELECTION["scale"], top_p=0.9, sinks=SINKS,
        impl="reference",
    )  # fmt: skip
    kept = []
    for b in (b for b, tokens in enumerate(visible) if tokens):
        for head in range(3):
            n = wanted[b, head].item()
            assert count[b, head].item() == n
            assert torch.equal(ids[b, head, :n], wanted_ids[b, head, :n])
            kept.append(n / -(-visible[b] // 64))
    if max(visible) >= 2000:
        assert 0.05 < sum(kept) / len(kept) < 0.8, kept


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in ("AttendRetained", "AttendCausal")])
def test_retained_groups_in_prefill_attend_as_their_roles_say(engine_of, chunk, name):
    case = CASES[name]
    H, D = case.sizes["H"], case.sizes["D"]
    h = History(*chunk, K=2, D=D, H=H, seed=4)
    inputs = [h.q, h.cache(h.k), h.cache(h.v), h.lengths_B, h.counts_B, h.visible_B]
    if name == "AttendRetained":
        B, N = len(h.lengths), -(-h.k.shape[1] // 64)
        inputs += [torch.full((B, 4, N), -1, dtype=torch.int32, device="cuda"), torch.zeros(B, 4, dtype=torch.int32, device="cuda")]
        inputs += [torch.zeros(PREFILL, dtype=torch.int32, device="cuda")]
    (out,) = engine_of(name).run(*inputs)
    G = H // 2
    for b, count in enumerate(h.counts):
        for head in range(H if count else 0):
            retrieves = head % G < case.attributes["retrieval_counts"][head // G]
            assert h.error(out, b, head, head // G, everything if retrieves else local) < 1


@pytest.mark.parametrize("chunk", [c for c in CHUNKS if c[2] > 1], ids=str)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=on_gpu)], ids=[""])
def test_attend_pooled_in_prefill_reads_the_blocks_that_the_reference_selects(engine_of, chunk, mark):
    case = CASES["AttendPooled"]
    h = History(*chunk, K=2, D=64, H=6, seed=7)
    B, N = len(h.lengths), -(-h.k.shape[1] // 64)
    generator = torch.Generator("cuda").manual_seed(8)
    index_k = torch.randn(*h.k.shape[:2], 3, 16, generator=generator, device="cuda").bfloat16()
    index_q = 3 * torch.randn(B, h.q.shape[1], 4, 16, generator=generator, device="cuda")
    inputs = [h.q, h.cache(h.k), h.cache(h.v), h.lengths_B, h.counts_B, h.visible_B]
    inputs += [torch.full((B, 4, N), -1, dtype=torch.int32, device="cuda"), torch.zeros(B, 4, dtype=torch.int32, device="cuda")]
    inputs += [torch.zeros(PREFILL, dtype=torch.int32, device="cuda"), index_q, h.cache(index_k)]
    (out,) = engine_of("AttendPooled").run(*inputs)
    key_sets = torch.tensor(case.attributes["key_sets"])
    options = {"scale": 0.25, "top_p": 0.7, "sinks": SINKS, "block": 128, "impl": "reference"}
    ids, count = select_prefill(
        index_q.cpu(), h.cache(index_k).cpu(), key_set_H=key_sets, lengths_B=h.lengths_B.cpu(), counts_B=h.counts_B.cpu(), **options
    )
    rows = {0: 0, 1: 1, 2: 2, 3: 3}
    for b, n in enumerate(h.counts):
        for head in range(6 if n else 0):
            if head not in rows:
                assert h.error(out, b, head, head // 3, local) < 1
                continue
            lists = torch.zeros(ids.shape[2], ids.shape[3], dtype=torch.bool)
            for block in range(ids.shape[2]):
                lists[block, ids[b, rows[head], block, : count[b, rows[head], block]].long()] = True
            lists, first = lists.cuda(), h.lengths[b]
            assert h.error(out, b, head, head // 3, lambda i, j, lists=lists, first=first: lists[(i - first) // 128, j // 128]) < 1


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
@pytest.mark.parametrize("mark", [pytest.param(None, marks=on_gpu)], ids=[""])
def test_attend_retained_in_decode_reads_the_selected_blocks_only(engine_of, graph, mark):
    lengths = (4000, 100, 7000)
    h = History(lengths, (1, 1, 1), 1, K=2, D=64, H=6, seed=5)
    N = -(-h.k.shape[1] // 64)
    generator = torch.Generator().manual_seed(6)
    ids, count = torch.full((3, 4, N), 1 << 20, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32)
    chosen = {}
    for b, end in enumerate(h.ends):
        blocks = -(-end // 64)
        for row in range(4):
            kept = (torch.rand(blocks, generator=generator) < 0.3) | (torch.arange(blocks) >= blocks - 2)
            chosen[b, row] = kept.cuda()
            count[b, row] = int(kept.sum())
            ids[b, row, : int(kept.sum())] = kept.nonzero()[:, 0].int()
    phase = torch.zeros(DECODE, dtype=torch.int32, device="cuda")
    inputs = [h.q, h.cache(h.k), h.cache(h.v), h.lengths_B, h.counts_B, h.visible_B, ids.cuda(), count.cuda(), phase]
    (out,) = engine_of("AttendRetained").run(*inputs, graph=graph)
    rows = {0: 0, 1: 1, 2: 2, 3: 3}
    for b in range(3):
        for head in range(6):
            seen = local if head not in rows else (lambda i, j, b=b, head=head: chosen[b, rows[head]][j // 64])
            assert h.error(out, b, head, head // 3, seen) < 1


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=on_gpu) for rows in (1, 3, 2048)])
def test_gated_silu_in_an_engine_multiplies_up_with_silu_of_gate(engine_of, rows):
    x = 4 * torch.randn(rows, 640, generator=torch.Generator("cuda").manual_seed(rows), device="cuda").bfloat16()
    (y,) = engine_of("GatedSilu").run(x)
    gate, up = x.double().chunk(2, dim=1)
    torch.testing.assert_close(y.double(), gate / (1 + (-gate).exp()) * up, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_gpu) for tokens in (1, 3, 64, 65, 2048)])
def test_route_in_an_engine_takes_the_lowest_id_among_equal_logits(engine_of, tokens):
    logits = torch.randint(-8, 8, (tokens, 128), generator=torch.Generator("cuda").manual_seed(tokens), device="cuda").bfloat16()
    ids, weights = engine_of("Route").run(logits)
    wanted_ids, wanted = route_tokens(logits, 8, True)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted, atol=0, rtol=2**-7)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
@pytest.mark.parametrize("chunk", [*CHUNKS, ((1300,), (1,), 1)], ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in ATTENTION])
def test_attention_in_an_engine_appends_and_attends_by_role(engine_of, name, chunk, graph):
    # The order of the heads is an attribute: every case of a name has the same.
    case = AttentionCase(name, chunk, D=64, S=POSITIONS, dtype=torch.bfloat16, device="cuda")
    assert case.attributes == CASES[name].attributes
    out, *caches = engine_of(name).run(*case.inputs(), graph=graph)
    wanted = {port.name: cache for port, cache in zip(case.node.outputs[1:], caches, strict=True)}
    case.check(out, [wanted[name] for name in ("new_k", "new_v", "new_index", "new_ring_k", "new_ring_v") if name in wanted], 2e-2)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
@pytest.mark.parametrize("rows", [1, 2, 64, 2048])
@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in NODES if "Linear" in name])
def test_products_in_an_engine_are_as_exact_as_their_parts(engine_of, name, rows, graph):
    generator = torch.Generator("cuda").manual_seed(rows)
    shapes = {"x": (rows, 320), "residual": (rows, 320), "norm": (320,), "weight": (200, 320), "bias": (200,)}
    named = {key: torch.randn(shape, generator=generator, device="cuda").bfloat16() for key, shape in shapes.items()}
    outputs = engine_of(name).run(*(named[port.name] for port in NODES[name].inputs), graph=graph)
    made = dict(zip((port.name for port in NODES[name].outputs), outputs, strict=True))
    y, left, total = made["y"], made.get("normed", named["x"]), named["x"]
    if "sum" in made:
        total = named["x"] + named["residual"]
        assert torch.equal(made["sum"], total)
    if "normed" in made:
        want = total.double() / (total.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * named["norm"].double()
        assert (left.double() - want).norm() < 2**-8 * want.norm()
    exact = left.double() @ named["weight"].double().T + (named["bias"].double() if "Bias" in name else 0)
    assert (y.double() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=on_gpu) for rows in (1, 2, 64, 2048)])
def test_float32_products_in_an_engine_are_not_rounded_to_tf32(rows, tmp_path):
    case = NodeCase(node="Linear", attributes={}, sizes={"C": 320, "O": 200}, model=torch.float32)
    major, minor = torch.cuda.get_device_capability()
    build(case, tmp_path, (10 * major + minor,))
    x, weight = torch.randn(rows, 320, device="cuda"), torch.randn(200, 320, device="cuda")
    (y,) = NodeEngine(case, tmp_path).run(x, weight)
    exact = x.double() @ weight.double().T
    # TF32 gives 3e-4.
    assert (y.double() - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_gpu) for tokens in (1, 3, 5, 33, 300, 2048)])
def test_experts_in_an_engine_equal_their_definition(engine_of, tokens):
    sizes = CASES["Experts"].sizes
    generator = torch.Generator("cuda").manual_seed(tokens)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    x, gate_up = random(tokens, sizes["C"]).bfloat16(), (random(16, 256, 256) / 16).bfloat16()
    down, weights = (random(16, 256, 128) / 11).bfloat16(), random(tokens, 4).softmax(-1).bfloat16()
    ids = random(tokens, 16).topk(4).indices.int()
    (y,) = engine_of("Experts").run(x, ids, weights, gate_up, down)
    exact = mix_experts(*(t.double() if t.is_floating_point() else t for t in (x, ids, weights, gate_up, down)))
    eager = mix_experts(x, ids, weights, gate_up, down)
    allowed = 2 * (eager.double() - exact).norm() + 2**-8 * exact.norm()
    assert (y.double() - exact).norm() < allowed
