"""The logic of benchmarks/million.py on a CPU with a tiny model of the same family."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "million.py"


@pytest.fixture(scope="module")
def million():
    spec = importlib.util.spec_from_file_location("million", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["million"] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    yield module
    del sys.modules["million"]


def test_the_roles_are_29_groups_in_the_later_half(million):
    manifest = million.manifest_of(million.Shape())
    assert manifest.num_retained_groups == 29
    assert manifest.num_retrieval_heads == 232
    assert not any(layer.retained_groups for layer in manifest.layers[:24])
    assert max(len(layer.retained_groups) for layer in manifest.layers) == 2


def test_the_spread_is_that_of_the_index_logits(million):
    manifest = million.with_spread(million.manifest_of(million.Shape()), 3.0, "topp")
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(16, 128, generator=generator) * 128**-0.5 for _ in range(2))
    q, k = torch.randn(2, 4096, 128, generator=generator)
    logits = ((q @ w_q.T) * (k @ w_k.T)).sum(1) * manifest.indexer.scale
    assert logits.std().item() == pytest.approx(3.0, rel=0.1)


def test_every_section_writes_its_figures(million, tmp_path):
    shape = million.Shape(
        layers=4, hidden=32, heads=4, groups=2, head_dim=16, experts=8, vocabulary=64, retained=3, window=32, chunk=64, block=16,
        positions=1024, new_tokens=8,
    )  # fmt: skip
    out = tmp_path / "million.json"
    sections = ["growth", "short", "short_dense_heads", "short_dense_model", "long", "long_dense_heads"]
    million.run(torch.device("cpu"), shape, out, sections, short=256, growth=(64, 16))
    found = json.loads(out.read_text())
    assert found.keys() >= set(sections)
    assert found["long"]["tokens"] == 1016
    assert found["long"]["new_tokens"] == 8
    assert 0 < found["long"]["decode"]["kept_share"] < 1
    assert 0 < found["long"]["prefill_split_at_896"]["kept_share"] < 1
    assert found["long"]["token_ms"] > 0
    assert found["short_dense_model"]["cache_bytes"] > found["short"]["cache_bytes"]
