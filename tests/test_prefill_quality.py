"""What the quality measurement of a sparse prefill reports, against a full matrix."""

import pytest
import torch

from rtpurbo.benchmarks.prefill_quality import measure

T, H, D, R, BLOCK = 24 * 16, 3, 16, 16, 16


def captured(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, heads, D, generator=generator) for heads in (H, 2, 2))
    # Index and attention agree: both see a few blocks with one strong direction a block of queries.
    topic_q, topic_k = (1.6 * torch.randn(T // BLOCK, heads, R, generator=generator).repeat_interleave(BLOCK, 0) for heads in (H, 2))
    return q + topic_q, k + topic_k, v, topic_q, topic_k


ARGUMENTS = {"kv_heads": (0, 0, 1), "key_sets": (0, 0, 1), "scale": 0.25, "index_scale": 0.25, "sinks": 4, "block": BLOCK}


def test_masses_and_error_are_those_of_the_full_matrix():
    q, k, v, index_q, index_k = captured()
    result = measure(q, k, v, index_q, index_k, top_p=0.8, **ARGUMENTS)
    assert result.keys() == {"mean", "max"}
    mean = result["mean"]
    assert 0.05 < mean["density"] < 0.6
    assert 0 < mean["oracle_density"] < mean["density"] + 0.2
    # Index logits are equal within a block: the pooled guarantee is the token-level one, but for the diagonal block's causal mask.
    assert mean["index_mass"] > 0.79
    assert mean["worst_true_mass"] <= mean["true_mass"] <= 1
    assert 0 < mean["output_error"] <= mean["worst_output_error"]


def test_everything_kept_is_no_error():
    q, k, v, index_q, index_k = captured()
    result = measure(q, k, v, index_q, index_k, top_p=1.0, **ARGUMENTS)["mean"]
    assert result["density"] == 1
    assert result["true_mass"] == pytest.approx(1, abs=1e-6)
    assert result["output_error"] < 1e-6


def test_a_short_prompt_is_refused():
    q, k, v, index_q, index_k = (x[: 15 * BLOCK] for x in captured())
    with pytest.raises(ValueError, match="fewer than 16 blocks"):
        measure(q, k, v, index_q, index_k, top_p=0.8, **ARGUMENTS)
