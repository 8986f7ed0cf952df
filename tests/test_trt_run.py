"""The engine behind the runtime's interface, on a CPU: ONNX Runtime executes the exported graph in place of TensorRT."""

# B batch  V vocabulary
import dataclasses
from pathlib import Path

import eager_model as eager
import numpy as np
import pytest
import torch
from test_runtime_equality import random_ids

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest  # noqa: E402
from rtpurbo.plugins.trt.build import caches_of  # noqa: E402
from rtpurbo.plugins.trt.export import ExportOptions, export  # noqa: E402
from rtpurbo.plugins.trt.folder import EngineInfo  # noqa: E402
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL  # noqa: E402
from rtpurbo.plugins.trt.run import EngineRuntime  # noqa: E402
from rtpurbo.plugins.trt.verify import argmax_report, teacher_forced_logits  # noqa: E402
from rtpurbo.runtime.loader import load  # noqa: E402


class OnnxExecution:
    """Executes by the nodes' function bodies; checks that it is given what the engine's profiles hold."""

    def __init__(self, session, info: EngineInfo, phase: int) -> None:
        self._session, self._info, self._phase = session, info, phase

    def run(self, inputs, caches, logits_BV) -> None:
        B, T = inputs["input_ids"].shape
        assert (B == 1 and self._info.prefill_chunk >= T) if self._phase == PREFILL else (T == 1 and self._info.batch >= B)
        feeds = {name: tensor.numpy() for name, tensor in {**inputs, **caches}.items()}
        assert all(feeds[name].dtype == np.int32 for name in inputs)
        if self._info.phased:
            feeds["phase"] = np.zeros(self._phase, np.int32)
        outputs = {name: cache.output for name, cache in self._info.caches.items()}
        logits, *new = self._session.run(["logits", *outputs.values()], feeds)
        logits_BV.copy_(torch.from_numpy(logits))
        for name, value in zip(outputs, new, strict=True):
            caches[name].copy_(torch.from_numpy(value))


def engine_of(folder: Path, *, dense: bool = False) -> EngineRuntime:
    exported = export(folder, ExportOptions(dtype="float32", dense=dense))
    model, manifest = exported.model, Manifest.load(folder / MANIFEST_NAME)
    info = EngineInfo(
        library="tensorrt", library_version="0", rtpurbo="0", capabilities=(80,), dtype="float32", batch=3, capacity=768, prefill_chunk=128,
        dense=dense, phased=any(port.name == "phase" for port in model.graph.input), vocab_size=eager.VOCABULARY,
        caches=caches_of(model, exported.caches), manifest_digest="", kernels_sha256="", onnx_sha256="", plan_sha256="", plan_bytes=0,
        build={},
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    executions = {phase: OnnxExecution(session, info, phase) for phase in (PREFILL, DECODE)}
    return EngineRuntime(folder, info, manifest, executions, torch.device("cpu"))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "artifact"
    # 31 slots of 2 x 16 floats: the part of the second sequence begins where TensorRT would not take it.
    config = eager.tiny_config("llama", layers=2)
    eager.save_artifact(folder, config, [[0, 5], [1]], sliding_window=27, key_dtype="float32")
    return engine_of(folder), load(folder, device="cpu"), folder


def test_sequences_of_different_lengths_get_the_runtimes_logits(forms):
    engine, runtime, _ = forms
    sequences = [random_ids(300, 0), random_ids(21, 1), random_ids(170, 2)]
    got, want = (teacher_forced_logits(form, sequences, dense=False, steps=20, chunk=100) for form in (engine, runtime))
    assert (got - want).abs().max() < 1e-3
    assert argmax_report(got, want)["argmax_agreement"] > 0.95


def test_generation_is_the_runtimes_in_a_batch_and_with_sampling(forms):
    engine, runtime, _ = forms
    prompts = [random_ids(n, n) for n in (140, 33)]
    for options in ({}, {"temperature": 0.8, "top_k": 20, "seed": 5}):
        answers = [form.generate(prompts, max_new_tokens=12, prefill_chunk=64, **options) for form in (engine, runtime)]
        assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
        assert [a.cache_bytes > 0 for a in answers[0]] == [True, True]


def test_one_slot_is_filled_while_the_others_stay(forms):
    engine, runtime, _ = forms
    rows = [random_ids(90, 7), random_ids(60, 8)]
    logits = []
    for form in (engine, runtime):
        state = form.start(2, 128)
        form.prefill(state, torch.tensor([rows[0]]), chunk=50, slot=0)
        form.decode(state, torch.tensor([3, 0]), [True, False])
        state.cache.clear(1)
        form.prefill(state, torch.tensor([rows[1]]), chunk=50, slot=1)
        state.cache.clone(1, [0])
        assert state.cache.lengths == [60, 60]
        logits.append(form.decode(state, torch.tensor([5, 5])))
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    assert torch.equal(logits[0][0], logits[0][1])


def test_a_dense_engine_equals_the_dense_mode(forms):
    _, runtime, folder = forms
    engine, sequences = engine_of(folder, dense=True), [random_ids(150, 3)]
    got, want = (teacher_forced_logits(form, sequences, dense=True, steps=5, chunk=64) for form in (engine, runtime))
    assert (got - want).abs().max() < 1e-3
    with pytest.raises(ValueError, match="built for dense attention, but sparse attention is wanted"):
        engine.start(1, 64)


def test_what_exceeds_an_engine_is_refused_before_anything_is_written(forms):
    engine, _, _ = forms
    with pytest.raises(ValueError, match="the engine's profiles hold at most 3 of 768"):
        engine.start(4, 64)
    with pytest.raises(ValueError, match="the engine's profiles hold at most 3 of 768"):
        engine.start(1, 769)
    state = engine.start(2, 200)
    for ids, mask, message in (
        (torch.zeros(3, 4, dtype=torch.int64), None, "do not fit a batch of 2"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "sequence 1 has no token"),
        (torch.zeros(2, 300, dtype=torch.int64), None, "but the capacity is 256"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.prefill(state, ids, mask)
    with pytest.raises(ValueError, match="the last token alone"):
        engine.prefill(state, torch.zeros(2, 4, dtype=torch.int64), all_logits=True)
    assert state.cache.lengths == [0, 0]


def test_prompts_below_dense_below_ask_for_an_engine_of_their_own(forms):
    engine, _, _ = forms
    other = EngineRuntime(forms[2], engine.info, dataclasses.replace(engine.manifest, dense_below=50), {}, torch.device("cpu"))
    with pytest.raises(ValueError, match="it takes an engine of its own"):
        other.generate([random_ids(10, 0)], max_new_tokens=2)
