"""Slots: requests join and leave a running batch, a prefix is cloned, and the cache is as large as planned."""

import json
from pathlib import Path

import eager_model as eager
import pytest
import torch

from rtpurbo.kernels.decode_layer import cuda, fused
from rtpurbo.kernels.decode_layer import plan as decode_plan
from rtpurbo.manifests.assumptions import PlanOptions
from rtpurbo.manifests.plan import plan
from rtpurbo.runtime.batch import Batch, Request
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load, random_runtime
from rtpurbo.runtime.sampling import SamplingOptions

RETRIEVAL = [[0, 5], [], [4, 5, 6, 7]]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("artifact")
    eager.save_artifact(folder, eager.tiny_config("qwen3_moe"), RETRIEVAL, keys="group")
    return load(folder, device="cpu")


def prompt(tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(eager.VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(index: int, tokens: int, new: int, temperature: float = 0.0) -> Request:
    return Request(index=index, prompt=prompt(tokens, index), options=SamplingOptions(temperature=temperature), max_new_tokens=new)


def alone(runtime: Runtime, wanted: Request) -> tuple[int, ...]:
    batch = Batch(runtime, slots=1, capacity=400)
    running = batch.add([wanted])[0]
    while batch.running:
        batch.step()
    assert running.reason == "length"
    return tuple(running.tokens)


def test_requests_join_and_leave_a_running_batch_without_changing_each_other(runtime: Runtime) -> None:
    shapes = [(60, 30, 0.0), (90, 5, 1.0), (41, 12, 0.0), (150, 9, 1.0), (7, 3, 0.0), (70, 20, 0.0)]
    waiting = [request(i, *shape) for i, shape in enumerate(shapes)]
    batch, done, steps = Batch(runtime, slots=2, capacity=400), [], 0
    left = list(waiting)
    while left or batch.running:
        while left and batch.free:
            done += batch.add([left.pop(0)], prefill_chunk=37)
        assert len(batch.running) <= 2
        batch.step()
        steps += 1
    assert steps < sum(r.max_new_tokens for r in waiting) - 20
    for running in done:
        assert tuple(running.tokens) == alone(runtime, running.request)


def test_a_prefix_is_prefilled_once_and_continued_several_times(runtime: Runtime) -> None:
    base = request(0, 110, 12)
    sampled = SamplingOptions(temperature=1.0)
    options = [SamplingOptions(), sampled, sampled, SamplingOptions(temperature=2.0, top_k=5)]
    requests = [Request(index=i, prompt=base.prompt, options=o, max_new_tokens=12) for i, o in enumerate(options)]
    batch = Batch(runtime, slots=5, capacity=200)
    other = batch.add([request(9, 80, 20)])[0]
    running = batch.add(requests)
    assert batch.state.cache.lengths[1:] == batch.state.cache.lengths_B.tolist()[1:] == [110] * 4
    while batch.running:
        batch.step()
    tokens = [tuple(r.tokens) for r in running]
    assert tokens == [alone(runtime, r) for r in requests]
    assert len(set(tokens)) > 2
    assert tuple(other.tokens) == alone(runtime, other.request)


def test_a_clone_holds_the_same_tokens_and_goes_its_own_way(runtime: Runtime) -> None:
    ids = torch.tensor([prompt(90, 0)])
    state = runtime.start(3, 120)
    runtime.prefill(state, ids, slot=1)
    runtime.prefill(state, torch.tensor([prompt(100, 1)]), slot=0)
    state.cache.clone(1, [0, 2])
    assert state.cache.lengths == state.cache.lengths_B.tolist() == [90, 90, 90]
    logits = runtime.decode(state, torch.tensor([5, 6, 5]))
    assert (logits[0] - logits[2]).abs().max() < 1e-5
    single = runtime.start(1, 120)
    runtime.prefill(single, ids)
    assert (runtime.decode(single, torch.tensor([6]))[0] - logits[1]).abs().max() < 1e-4


def test_what_a_batch_cannot_take_is_refused_before_anything_is_written(runtime: Runtime) -> None:
    batch = Batch(runtime, slots=2, capacity=50)
    batch.add([request(0, 20, 10)])
    stored = [t.clone() for layer in batch.state.cache.layers for t in layer.tensors()]
    for requests, message in (
        ([request(1, 40, 11)], "a prompt of 40 and 11 new tokens, but a slot's capacity is 50"),
        ([request(1, 10, 5), request(2, 10, 5)], "must have the same prompt"),
        ([request(1, 10, 5)] * 2, "2 requests, but 1 slots of 2 are free"),
        ([request(1, 0, 5)], "the prompt is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.add(requests)
    now = [t for layer in batch.state.cache.layers for t in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(stored, now, strict=True))
    assert batch.free == 1


def test_a_step_refuses_to_grow_past_the_capacity_before_anything_is_written(runtime: Runtime) -> None:
    state = runtime.start(2, 10)
    runtime.prefill(state, torch.ones(2, 10, dtype=torch.int64), torch.tensor([[1] * 10, [0] * 5 + [1] * 5]))
    stored = [t.clone() for layer in state.cache.layers for t in layer.tensors()]
    with pytest.raises(ValueError, match="sequence 0 has 10 tokens in the cache and gets 1 more, but the capacity is 10"):
        runtime.decode(state, torch.tensor([1, 2]))
    assert all(torch.equal(a, b) for a, b in zip(stored, [t for x in state.cache.layers for t in x.tensors()], strict=True))
    runtime.decode(state, torch.tensor([1, 2]), [False, True])
    assert state.cache.lengths == state.cache.lengths_B.tolist() == [10, 6]


@pytest.mark.parametrize("keys", ["head", "group"])
@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_the_cache_is_as_large_as_planned(tmp_path: Path, keys: str, key_dtype: str) -> None:
    manifest = eager.save_artifact(tmp_path, eager.tiny_config("llama"), RETRIEVAL, keys=keys, key_dtype=key_dtype)
    runtime = load(tmp_path, device="cpu")
    options = PlanOptions(roles=manifest, kv_bytes=4)
    planned = plan(json.loads((tmp_path / "config.json").read_text()), context=1000, batch=3, options=options)
    for dense, wanted in ((False, planned.cache_bytes(1000, 3)), (True, planned.dense_cache_bytes(1000, 3))):
        found = runtime.start(3, 1000, dense).cache.nbytes()
        assert abs(found - wanted) <= 0.02 * wanted


def test_index_keys_lie_set_by_set_in_memory(runtime: Runtime) -> None:
    index_k_BSIR = runtime.start(2, 64).cache.layers[2].index_k_BSIR
    assert index_k_BSIR is not None
    assert index_k_BSIR.transpose(1, 2).is_contiguous()


def test_weights_made_at_random_run_and_have_transformers_scale(tmp_path: Path) -> None:
    config = eager.tiny_config("qwen3_moe", max_position_embeddings=4096)
    manifest = eager.save_artifact(tmp_path, config, RETRIEVAL)
    made = [random_runtime(config, manifest, torch.device("cpu"), torch.float32, seed) for seed in (0, 0, 1)]
    first, same, other = (runtime.model.layers[0] for runtime in made)
    assert torch.equal(first.qkv_MC, same.qkv_MC)
    assert not torch.equal(first.qkv_MC, other.qkv_MC)
    assert float(first.mlp.gate_up_EGC.std()) == pytest.approx(config.initializer_range, rel=0.05)
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in (first.input_norm_C, first.q_norm_D, made[0].model.norm_C))
    assert len(made[0].generate([[1, 2, 3] * 50], max_new_tokens=5)[0].token_ids) == 5
    with pytest.raises(ValueError, match=r"config: num_hidden_layers is 2, but rtpurbo\.json says 3"):
        random_runtime(eager.tiny_config("qwen3_moe", layers=2), manifest, torch.device("cpu"), torch.float32, 0)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def gpu_artifact(folder: Path, family: str, dtype: str, key_dtype: str = "bfloat16") -> Runtime:
    changes = {"decode_block": 64, "sliding_window": 100, "index_dim": 16, "key_dtype": key_dtype} if dtype == "bfloat16" else {}
    eager.save_artifact(folder, eager.tiny_config(family, head_dim=64, max_position_embeddings=1 << 14), RETRIEVAL, **changes)
    return load(folder, device="cuda", dtype=dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", eager.FAMILIES)
def test_captured_and_uncaptured_steps_give_the_same_logits(tmp_path: Path, family: str, dtype: str) -> None:
    runtime = gpu_artifact(tmp_path, family, dtype)
    if (family, dtype) == ("qwen3_moe", "float32"):
        with pytest.raises(ValueError, match="experts in float32 run eagerly"):
            runtime.start(3, 400, graph=True)
        assert not runtime.start(3, 400).graph
        return
    for dense in (False, True):
        states = [runtime.start(3, 400, dense, graph=graph) for graph in (True, False)]
        ids = torch.tensor([prompt(300, 0), prompt(300, 1), prompt(300, 2)])
        mask = torch.arange(300) < torch.tensor([[300], [7], [290]])
        # Otherwise the steps below would not begin alike.
        first, second = (runtime.prefill(state, ids, mask, chunk=61) for state in states)
        assert torch.equal(first, second)
        for step in range(12):
            active = [True, step % 3 > 0, step < 6]
            tokens = torch.tensor([step, 2 * step, 3 * step])
            captured, plain = (runtime.decode(state, tokens, active) for state in states)
            error = (captured - plain)[torch.tensor(active)].abs().max() / plain[torch.tensor(active)].abs().max()
            assert error <= 1e-5, (dense, step, float(error))
        assert states[0].cache.lengths_B.tolist() == states[0].cache.lengths == states[1].cache.lengths_B.tolist() == [312, 15, 296]
        assert list(states[0].graphs) == ["greedy"]
        for a, b in zip(states[0].cache.layers, states[1].cache.layers, strict=True):
            assert all(torch.equal(x.float(), y.float()) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_batch_on_captured_steps_generates_what_each_request_generates_alone(tmp_path: Path) -> None:
    runtime = gpu_artifact(tmp_path, "qwen3", "float32")
    shapes = [(60, 30, 0.0), (90, 5, 1.0), (41, 12, 0.0), (150, 9, 1.0), (7, 3, 0.0), (70, 20, 0.0)]
    left = [request(i, *shape) for i, shape in enumerate(shapes)]
    batch, done = Batch(runtime, slots=3, capacity=400), []
    done += batch.add([left[1], Request(index=7, prompt=left[1].prompt, options=SamplingOptions(), max_new_tokens=11)])
    while left or batch.running:
        while left and batch.free:
            done += batch.add([left.pop(0)], prefill_chunk=37)
        batch.step()
    for running in done:
        plain = Batch(runtime, slots=1, capacity=400, graph=False)
        wanted = plain.add([running.request])[0]
        while plain.running:
            plain.step()
        assert running.tokens == wanted.tokens


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("key_dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_few_sequences_decode_alike_in_cuda_cpp_and_in_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key_dtype: str) -> None:
    """In captured steps, and with sequences that come to rest."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("elsewhere Triton's launch is taken")
    runtime = gpu_artifact(tmp_path, "qwen3", "bfloat16", key_dtype)
    states = [runtime.start(3, 1 << 13)]
    monkeypatch.setattr(decode_plan, "is_faster", lambda *_: False)
    states.append(runtime.start(3, 1 << 13))
    assert [sum(plan.cuda is not None for plan in state.decode_plans) for state in states] == [2, 0]
    ids = torch.tensor([prompt(1200, seed) for seed in range(3)])
    mask = torch.arange(1200) < torch.tensor([[1200], [7], [290]])
    calls: list[object] = []
    for module in (cuda, fused):
        launch = module.launch
        monkeypatch.setattr(module, "launch", lambda *given, launch=launch, module=module: calls.append(module) or launch(*given))
    for state, wanted in zip(states, (cuda, fused), strict=True):
        runtime.prefill(state, ids, mask)
        calls.clear()
        runtime.decode(state, torch.tensor([7, 8, 9]), [True, True, True])
        assert set(calls) == {wanted}
    for step in range(12):
        active = [True, step % 3 > 0, step < 6]
        tokens = torch.tensor([step, 2 * step, 3 * step])
        ours, other = (runtime.decode(state, tokens, active)[torch.tensor(active)] for state in states)
        assert (ours - other).norm() <= 0.02 * other.norm()
    assert states[0].cache.lengths_B.tolist() == [1213, 16, 297]


@pytest.mark.gpu
@needs_gpu
def test_generated_tokens_take_no_memory_beyond_the_cache(tmp_path: Path) -> None:
    runtime = gpu_artifact(tmp_path, "qwen3", "bfloat16")
    state = runtime.start(2, 900)
    runtime.prefill(state, torch.tensor([prompt(300, 0), prompt(300, 1)]))
    runtime.advance(state, [True, True])
    before = torch.cuda.memory_allocated()
    for _ in range(500):
        runtime.advance(state, [True, True])
    assert torch.cuda.memory_allocated() == before


def test_a_graph_on_a_cpu_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="cannot run as a CUDA graph: the model is on cpu"):
        runtime.start(1, 10, graph=True)
