"""Sampling against an fp64 reference of its own: distributions, ties, extremes, seeds, and the same tokens in every company."""

import math

import pytest
import torch

from rtpurbo.runtime.sampling import DeviceOptions, Sampler, SamplingOptions, kept_weights, kind_of, sample, sequence_seeds, uniform

CPU = torch.device("cpu")
GREEDY = SamplingOptions()
INFINITY = float("inf")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[gpu, needs_gpu])]


def reference(logits: list[float], options: SamplingOptions) -> list[float]:
    """Probabilities of one row, in plain Python: temperature, then top_k, then top_p; both reals as fp32 holds them."""
    temperature, top_p = torch.tensor([options.temperature, options.top_p]).tolist()
    largest = max(logits)
    mass = [math.exp((logit - largest) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    for i in order[options.top_k or len(order) :]:
        mass[i] = 0.0
    total, before, kept = math.fsum(mass), 0.0, [0.0] * len(mass)
    for i in order:
        if before < top_p * total:
            kept[i] = mass[i]
        before += mass[i]
    return [value / math.fsum(kept) for value in kept]


def draws(logits: torch.Tensor, options: SamplingOptions, count: int, *, device: str = "cpu") -> torch.Tensor:
    """Tokens of `count` steps of one sequence with constant logits, as one batch."""
    where = torch.device(device)
    seed = sequence_seeds(options.seed, [0], where).expand(count)
    rows = DeviceOptions.of([options] * count, where)
    return sample(logits.to(where).expand(count, -1), rows, seed, torch.arange(count, device=where)).cpu()


def chi_square(found: torch.Tensor, wanted: list[float]) -> tuple[float, int]:
    """Pearson's statistic over the tokens that are possible, and its degrees of freedom."""
    counts = torch.bincount(found, minlength=len(wanted)).tolist()
    impossible = [i for i, p in enumerate(wanted) if p == 0 and counts[i]]
    assert not impossible
    cells = [(count, p * len(found)) for count, p in zip(counts, wanted, strict=True) if p > 0]
    return sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0),
        SamplingOptions(temperature=0.6),
        SamplingOptions(temperature=2.5),
        SamplingOptions(temperature=1.0, top_k=7),
        SamplingOptions(temperature=1.0, top_p=0.8),
        SamplingOptions(temperature=1.3, top_k=30, top_p=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_distribution_of_their_options(device: str, options: SamplingOptions) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40)
    for seed in range(3):
        seeded = SamplingOptions(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=seed)
        statistic, freedom = chi_square(draws(logits, seeded, 20_000, device=device), reference(logits.tolist(), options))
        # Wilson and Hilferty's normal approximation of the 1 - 1e-4 quantile.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert statistic < limit


def test_uniform_numbers_are_those_of_splitmix64_and_fill_the_interval_evenly() -> None:
    # The first outputs of SplitMix64 from seed 1234567, as published with the algorithm's test vectors.
    vectors = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = uniform(torch.full((5,), 1234567), torch.arange(5))
    assert found.tolist() == [(vector >> 11) * 2.0**-53 for vector in vectors]
    many = uniform(torch.tensor([-5]), torch.arange(100_000))
    counts = torch.histc(many.float(), 100, 0, 1)
    assert 0 <= float(many.min()) < float(many.max()) < 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 160
    pairs = many.reshape(-1, 2)
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.02


def test_temperature_top_k_and_top_p_restrict_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.2]]).log()

    def shares(**options: float) -> list[float]:
        weights = kept_weights(logits, DeviceOptions.of([SamplingOptions(**options)], CPU)).double()  # pyright: ignore[reportArgumentType]
        return (weights / weights.sum())[0].tolist()

    assert shares(temperature=1.0) == pytest.approx([0.1, 0.5, 0.2, 0.2])
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0, 5 / 7, 2 / 7, 0])
    assert shares(temperature=1.0, top_k=400) == pytest.approx([0.1, 0.5, 0.2, 0.2])
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([0, 5 / 7, 2 / 7, 0])
    assert shares(temperature=1.0, top_k=3, top_p=0.8) == pytest.approx([0, 5 / 9, 2 / 9, 2 / 9])
    assert shares(temperature=1.0, top_p=0.01) == shares(temperature=1.0, top_p=1e-60) == [0, 1, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([1 / 34, 25 / 34, 4 / 34, 4 / 34])
    assert shares(temperature=1e-6) == shares(temperature=1e-30) == [0, 1, 0, 0]
    assert shares(temperature=1e300) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000])
def test_kept_weights_equal_the_reference_at_every_size(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    # Rounded, so that many tokens tie.
    logits = (torch.randn(1, vocabulary, generator=generator) * 3).round(decimals=1)
    for options in (
        SamplingOptions(temperature=0.7),
        SamplingOptions(temperature=0.7, top_k=50),
        SamplingOptions(temperature=1.1, top_p=0.95),
        SamplingOptions(temperature=1.1, top_k=100, top_p=0.5),
    ):
        weights = kept_weights(logits, DeviceOptions.of([options], CPU)).double()
        wanted = reference(logits[0].tolist(), options)
        assert (weights / weights.sum())[0].tolist() == pytest.approx(wanted, abs=1e-9)
        assert [w > 0 for w in weights[0].tolist()] == [p > 0 for p in wanted]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_draws_the_same_token_alone_and_beside_rows_with_other_options(device: str) -> None:
    where = torch.device(device)
    mixed = [
        GREEDY,
        SamplingOptions(temperature=0.8),
        SamplingOptions(temperature=1.0, top_k=5),
        SamplingOptions(temperature=3.0, top_p=0.9),
        SamplingOptions(temperature=1.0, top_k=300, top_p=0.7),
    ]
    torch.manual_seed(1)
    logits = (torch.randn(len(mixed), 5000, device=where) * 2).bfloat16()
    seeds = sequence_seeds(3, range(len(mixed)), where)
    for step in range(20):
        steps = torch.full_like(seeds, step)
        together = sample(logits, DeviceOptions.of(mixed, where), seeds, steps)
        for i, options in enumerate(mixed):
            alone = DeviceOptions.of([options], where)
            assert int(sample(logits[i : i + 1], alone, seeds[i : i + 1], steps[:1])) == int(together[i])
        assert int(together[0]) == int(logits[0].argmax())


def test_only_rows_that_draw_and_restrict_cost_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of([GREEDY, SamplingOptions(top_k=5, top_p=0.5)]) == "greedy"
    assert kind_of([GREEDY, SamplingOptions(temperature=1.0)]) == "free"
    assert kind_of([GREEDY, SamplingOptions(temperature=1.0, top_k=5)]) == "restricted"
    assert kind_of([SamplingOptions(temperature=1.0, top_p=0.5), GREEDY]) == "restricted"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch, "sort", refuse)
    logits = torch.randn(2, 300)
    for options in (GREEDY, SamplingOptions(temperature=1.0)):
        Sampler(options, [0, 1], CPU).pick(logits)
    with pytest.raises(AssertionError, match="sorted"):
        Sampler(SamplingOptions(temperature=1.0, top_k=2), [0, 1], CPU).pick(logits)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_id(device: str) -> None:
    logits = torch.zeros(2, 1000)
    logits[:, [3, 400, 999]] = 5.0
    where = torch.device(device)
    assert Sampler(GREEDY, [0, 1], where).pick(logits.to(where)).tolist() == [3, 3]
    assert set(draws(logits[0], SamplingOptions(temperature=1.0, top_k=2), 200, device=device).tolist()) == {3, 400}
    assert set(draws(logits[0], SamplingOptions(temperature=1e-6), 200, device=device).tolist()) == {3, 400, 999}
    assert set(draws(logits[0], SamplingOptions(temperature=1.0, top_p=1e-7), 200, device=device).tolist()) == {3}
    signed = torch.tensor([-0.0, 0.0, -0.0, -1.0])
    assert set(draws(signed, SamplingOptions(temperature=1.0, top_k=2), 200, device=device).tolist()) == {0, 1}


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits_and_options_give_only_possible_tokens(device: str) -> None:
    logits = torch.full((1500,), -INFINITY)
    logits[[7, 1499]] = torch.tensor([1.0, 1.5])
    assert set(draws(logits, SamplingOptions(temperature=1.0), 300, device=device).tolist()) == {7, 1499}
    assert set(draws(logits, SamplingOptions(temperature=1.0, top_k=900, top_p=0.999), 300, device=device).tolist()) == {7, 1499}
    assert set(draws(logits, SamplingOptions(temperature=1e-6), 50, device=device).tolist()) == {1499}
    assert set(draws(logits, SamplingOptions(temperature=1.0, top_p=1e-30), 50, device=device).tolist()) == {1499}
    huge = torch.tensor([3e38, -3e38, 2.9e38])
    assert set(draws(huge, SamplingOptions(temperature=1e-6), 50, device=device).tolist()) == {0}
    for broken in (float("nan"), INFINITY, -INFINITY):
        for options in (GREEDY, SamplingOptions(temperature=1.0), SamplingOptions(temperature=1.0, top_k=3, top_p=0.5)):
            found = draws(torch.full((300,), broken), options, 20, device=device)
            assert 0 <= int(found.min()) <= int(found.max()) < 300


def test_the_sampler_counts_steps_and_separates_sequences() -> None:
    logits, options = torch.zeros(3, 1 << 14), SamplingOptions(temperature=1.0, seed=11)

    def run(indices: list[int]) -> list[list[int]]:
        sampler = Sampler(options, indices, CPU)
        return [sampler.pick(logits[: len(indices)]).tolist() for _ in range(8)]

    first = run([0, 1, 2])
    assert run([0, 1, 2]) == first
    assert [row[0] for row in run([2, 0])] == [row[2] for row in first]
    assert len({token for row in first for token in row}) > 20
    other = Sampler(SamplingOptions(temperature=1.0, seed=12), [0, 1, 2], CPU)
    assert other.pick(logits).tolist() != first[0]


@gpu
@needs_gpu
def test_the_gpu_draws_the_tokens_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [
        GREEDY,
        *(SamplingOptions(temperature=t, top_k=k, top_p=p) for t in (1e-6, 0.3, 1.0, 2.0) for k in (0, 1, 50) for p in (0.1, 0.9, 1.0)),
    ]
    for vocabulary in (300, 49152, 151_936):
        logits = (torch.randn(len(rows), vocabulary, generator=generator) * 3).bfloat16()
        seeds, steps = sequence_seeds(1, range(len(rows)), CPU), torch.arange(len(rows))
        wanted = sample(logits, DeviceOptions.of(rows, CPU), seeds, steps)
        cuda = torch.device("cuda")
        found = sample(logits.to(cuda), DeviceOptions.of(rows, cuda), seeds.to(cuda), steps.to(cuda))
        assert found.tolist() == wanted.tolist()


@gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 4])
def test_sampling_is_captured_in_a_cuda_graph_and_takes_new_options_on_replay(batch: int) -> None:
    cuda = torch.device("cuda")
    logits = torch.randn(batch, 151_936, device=cuda).bfloat16()
    captured = Sampler(SamplingOptions(temperature=1.0, top_k=40, top_p=0.9, seed=1), list(range(batch)), cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.pick(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.pick(logits)
    for options in (SamplingOptions(temperature=1.0, top_k=40, top_p=0.9, seed=1), SamplingOptions(temperature=0.5, seed=2), GREEDY):
        eager = Sampler(options, list(range(batch)), cuda)
        captured.options.copy_(eager.options)
        captured.seed_B.copy_(eager.seed_B)
        captured.step_B.zero_()
        for _ in range(5):
            graph.replay()
            assert out.tolist() == eager.pick(logits).tolist()
