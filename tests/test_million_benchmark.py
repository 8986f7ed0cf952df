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


@pytest.mark.parametrize("kept", [0.03, 0.1])
def test_the_scale_keeps_the_wanted_share_of_normal_block_scores(million, kept):
    manifest = million.with_kept(million.manifest_of(million.Shape()), kept, "topp")
    scores = torch.randn(64, 1 << 16, generator=torch.Generator().manual_seed(0)) * 4 * manifest.indexer.scale
    mass = scores.softmax(1).sort(dim=1, descending=True).values
    found = ((mass.cumsum(1) - mass) < manifest.top_p).float().mean().item()
    assert found == pytest.approx(kept, rel=0.35)


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
