"""From logits to tokens, on the CPU, in fp32 and fp64. Oracles: plain NumPy for the filters, the distribution for the
draw, and in closed form how often two draws by the same numbers meet; for the random numbers the published vectors of
Philox and a Philox of Python's integers, whose other word size is NumPy's own generator."""

import math
from itertools import pairwise

import numpy
import pytest
import torch
from conftest import slow
from torch import Tensor

from engine.request import Sampling
from layers import kernels
from layers.kernels import token_uniforms
from sampling import (
    LOGITS_AT_ONCE,
    UniformBlocks,
    candidates,
    draw,
    draw_rows,
    exponential_race,
    philox,
    uniform,
)

# Philox4x32-10 and Philox4x64-10: multipliers and key increments of Salmon et al. 2011, and the bits of a word.
PHILOX = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}


def plain_philox(counter: list[int], key: list[int], bits: int = 32) -> list[int]:
    """Ten rounds in Python's integers, which have no word to overflow."""
    (first, second), increments = PHILOX[bits]
    mask = (1 << bits) - 1
    for _ in range(10):
        a, b = first * counter[0], second * counter[2]
        counter = [b >> bits ^ counter[1] ^ key[0], b & mask, a >> bits ^ counter[3] ^ key[1], a & mask]
        key = [(word + increment) & mask for word, increment in zip(key, increments, strict=True)]
    return counter


def plain_uniform(seed: int, sample: int, position: int) -> float:
    words = [each >> shift & 0xFFFFFFFF for each in (sample, position, seed) for shift in (0, 32)]
    high, low, *_ = plain_philox(words[:4], words[4:])
    return (high << 21 | low >> 11) / 2**53


def ours(counter: list[int], key: list[int]) -> list[int]:
    even, odd = philox(torch.tensor(counter[::2]), torch.tensor(counter[1::2]), torch.tensor(key))
    return [even[0].item(), odd[0].item(), even[1].item(), odd[1].item()]


@pytest.mark.parametrize(
    "counter,key,words",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["0", "ff", "pi"],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    """Oracle: the known-answer file of Random123, the library of Philox's authors."""
    expected = [int(word, 16) for word in words.split()]
    assert ours(counter, key) == expected and plain_philox(counter, key) == expected


def test_the_plain_philox_is_that_of_numpy():
    """In words of 64 bits, the size that NumPy has. It counts up before each block."""
    for counter, key in (([4, 0, 0, 0], [0, 0]), ([2**63, 7, 2**64 - 1, 11], [2**64 - 3, 12345])):
        before = [counter[0] - 1, *counter[1:]]
        bits = numpy.random.Philox(
            counter=numpy.array(before, dtype=numpy.uint64), key=numpy.array(key, dtype=numpy.uint64)
        )
        assert plain_philox(counter, key, 64) == bits.random_raw(4).tolist()


# Words that are 0, all ones, and whose products carry into every part; seeds, samples, positions beyond 2^32.
NUMBERS = [0, 1, 2, 31, 0xFFFF, 0x10000, 0xFFFFFFFF, 2**32, 2**32 + 5, 0x9E3779B97F4A7C15 >> 1, 2**63 - 1]


def test_philox_over_many_counters_is_the_plain_one():
    generator = numpy.random.default_rng(0)
    counters, keys = generator.integers(2**32, size=(4, 500)), generator.integers(2**32, size=(2, 500))
    even, odd = philox(*(torch.tensor(words) for words in (counters[::2], counters[1::2], keys)))
    for column in range(500):
        expected = plain_philox(counters[:, column].tolist(), keys[:, column].tolist())
        found = torch.stack([even[0], odd[0], even[1], odd[1]])[:, column]
        assert found.tolist() == expected


def numbers(function, seed: int) -> Tensor:
    samples = torch.tensor(NUMBERS)
    return function(torch.tensor(seed), samples[:, None], samples)  # [11,11]


@pytest.mark.parametrize("seed", NUMBERS)
def test_a_number_is_that_of_seed_sample_and_position(seed):
    expected = [[plain_uniform(seed, sample, position) for position in NUMBERS] for sample in NUMBERS]
    found = numbers(uniform, seed)
    assert found.dtype == torch.float64 and found.tolist() == expected
    assert found.min() >= 0 and found.max() < 1


def test_blocks_of_numbers_are_the_numbers():
    """A hundred positions one after another from beyond 2^32, then other rows from where they are."""
    seed, blocks, position = torch.tensor(2**40 + 3), UniformBlocks(), torch.full((3,), 2**33)
    samples = torch.tensor([5, 2**35, 0])
    for kept in ([0, 1, 2], [0, 2], [1]):
        samples, position = samples[kept], position[kept]
        for _ in range(100 if len(kept) == 3 else 5):
            assert torch.equal(blocks(seed, samples, position), uniform(seed, samples, position))
            position = position + 1


def test_numbers_are_made_a_block_at_a_time(monkeypatch):
    """One position more than three blocks hold is four blocks, and nothing is made in between."""
    made: list[Tensor] = []
    monkeypatch.setattr("sampling.uniform", lambda *words: made.append(uniform(*words)) or made[-1])
    blocks, samples = UniformBlocks(), torch.arange(3)
    for position in range(3 * UniformBlocks.BLOCK + 1):
        blocks(torch.tensor(1), samples, torch.full((3,), position))
    assert [each.shape for each in made] == 4 * [(3, UniformBlocks.BLOCK)]


def test_blocks_of_numbers_serve_rows_that_move_by_themselves():
    """Several positions at once, and rows that are further apart at every step."""
    seed, blocks, samples = torch.tensor(7), UniformBlocks(), torch.tensor([5, 2**35, 0])
    position = torch.full((3, 1), 2**33)
    for step in range(40):
        where = position + torch.arange(1 + step % 5)  # [N,S]
        assert torch.equal(blocks(seed, samples, where), uniform(seed, samples[:, None], where))
        position = position + torch.tensor([[1], [2], [5]])


def chi_square(counts: numpy.ndarray, expected: numpy.ndarray) -> tuple[float, float]:
    """Pearson's statistic, and the bound that a right one passes but once in a million times (Wilson-Hilferty)."""
    freedom = counts.size - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((counts - expected) ** 2 / expected).sum(), bound


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "sample", "position"])
def test_numbers_are_uniform_and_those_of_neighbours_independent(step):
    """Pearson's chi-square of pairs on a grid of 16 x 16: a number, and that of the next seed, sample or position, of
    256 samples at 256 positions. Each fails with odds of 1e-6 for a generator that is right; the seeds are fixed."""

    def grid(seed: int, sample: int, position: int) -> numpy.ndarray:
        rows, columns = sample + torch.arange(256)[:, None], position + torch.arange(256)
        return uniform(torch.tensor(seed), rows, columns).flatten().numpy()

    here, there = grid(11, 0, 0), grid(11 + step[0], step[1], step[2])
    counts, _, _ = numpy.histogram2d(here, there, bins=16, range=[[0, 1], [0, 1]])
    statistic, bound = chi_square(counts, numpy.full((16, 16), 256.0))
    assert statistic < bound
    low = numpy.bincount((here * 2**53).astype(numpy.int64) & 0xFF, minlength=256)  # the last bits are random too
    statistic, bound = chi_square(low, numpy.full(256, 256.0))
    assert statistic < bound


def test_no_number_comes_twice():
    """64 seeds, 40 samples, 40 positions: 100,000 numbers of 53 bits are all different but with odds of 1 to 1.7
    million, and would not be if two of the three were added up."""
    found = [uniform(torch.tensor(seed), torch.arange(40)[:, None], torch.arange(40)) for seed in range(64)]
    assert torch.stack(found).unique().numel() == 64 * 40 * 40


def plain_of_token(row: float, token: int) -> float:
    key = int(row * 2**53)
    high, low, *_ = plain_philox([token, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32])
    return (high << 21 | low >> 11) / 2**53


@pytest.fixture(params=["kernel", "torch"])
def maker(request, monkeypatch) -> str:
    """What makes the numbers of tokens."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: kernels.Library(None, "no C++ compiler"))
    elif kernels.library().functions is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize("K", [1, 15, 16, 17, 66, 130, 257])
def test_numbers_of_tokens_are_those_of_row_and_token(maker, monkeypatch, K):
    """Of ids up to 32 bits, side by side or not, and of a vocabulary that rows share; in parts too."""
    monkeypatch.setattr("sampling.NUMBERS_AT_ONCE", 100)
    rows = torch.tensor([0.0, 1 - 2**-53, uniform(*map(torch.tensor, (3, 2**40, 5)))], dtype=torch.float64)
    ids = torch.randint(2**32, (3, K), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = torch.tensor([0, 2**32 - 1, 2**31])
    shared = torch.arange(31_999, 31_999 + K).expand(3, -1)
    for tokens in (ids, ids.repeat(1, 2)[:, ::2], ids.T.contiguous().T, shared):
        found = token_uniforms(rows, tokens)
        pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
        expected = [[plain_of_token(row, id) for id in each] for row, each in pairs]
        assert found.dtype == torch.float64 and found.tolist() == expected


def test_many_numbers_are_divided_among_threads(maker, monkeypatch):
    """Oracle: each row by itself, on one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(kernels, "NUMBERS_PER_THREAD", 0)
    rows = uniform(torch.tensor(5), torch.arange(7), torch.tensor(0))
    tokens = torch.arange(1003).expand(7, -1)
    found = token_uniforms(rows, tokens)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(found, torch.cat([token_uniforms(row[None], tokens[:1]) for row in rows]))


@pytest.mark.parametrize("step", [(1, 0), (0, 1)], ids=["row", "token"])
def test_numbers_of_tokens_are_uniform_and_those_of_neighbours_independent(step):
    """As those of rows: pairs on a grid of 16 x 16, of 256 rows by 256 tokens. Fails with odds of 1e-6 for a generator
    that is right; the seed is fixed."""
    rows = uniform(torch.tensor(11), torch.arange(257), torch.tensor(7))
    numbers = token_uniforms(rows, torch.arange(257).expand(257, -1)).numpy()
    here, there = numbers[:256, :256].flatten(), numbers[step[0] :, step[1] :][:256, :256].flatten()
    counts, _, _ = numpy.histogram2d(here, there, bins=16, range=[[0, 1], [0, 1]])
    statistic, bound = chi_square(counts, numpy.full((16, 16), 256.0))
    assert statistic < bound


# The reference filters, in the order top_k, top_p, min_p, on one row.
def reference(logits: numpy.ndarray, sampling: Sampling) -> numpy.ndarray:
    scaled = logits.astype(numpy.float64) / sampling.temperature
    probs = numpy.exp(scaled - scaled.max())
    order = numpy.argsort(-probs, kind="stable")
    if sampling.top_k is not None:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    if sampling.top_p is not None:
        mass = 0.0
        for id in order:
            if mass >= sampling.top_p:
                probs[id] = 0
            mass += probs[id]
    if sampling.min_p is not None:
        probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.3),
        Sampling(2.0, top_k=1),
        Sampling(0.8, top_k=7),
        Sampling(0.8, top_k=1000),
        Sampling(0.9, top_p=0.01),
        Sampling(0.9, top_p=0.6),
        Sampling(0.9, top_p=1.0),
        Sampling(1.1, min_p=0.2),
        Sampling(1.1, min_p=1.0),
        Sampling(0.7, top_k=30, top_p=0.8),
        Sampling(1.3, top_k=40, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_filters_equal_the_reference(sampling):
    logits = 3 * torch.randn(5, 101, generator=torch.Generator().manual_seed(0))
    probs, ids = candidates(logits, sampling)
    actual = torch.zeros(5, 101)
    actual.scatter_(1, torch.arange(101).expand(5, -1) if ids is None else ids, probs / probs.sum(-1, keepdim=True))
    for row in range(5):
        expected = reference(logits[row].numpy(), sampling)
        assert ((actual[row].numpy() > 0) == (expected > 0)).all()
        numpy.testing.assert_allclose(actual[row].numpy(), expected, atol=1e-6)


def test_top_k_keeps_exactly_k_of_equal_logits():
    probs, ids = candidates(torch.zeros(2, 50), Sampling(1.0, top_k=3))
    assert probs.shape == ids.shape == (2, 3) and (probs > 0).all()


def test_top_p_at_an_exact_tie_keeps_one():
    """The first of two that are equally likely holds the mass by itself."""
    probs, ids = candidates(torch.tensor([[0.0, 0.0, -50.0, -50.0]]), Sampling(1.0, top_p=0.5))
    assert int((probs > 0).sum()) == 1 and ids[0, probs[0] > 0].item() in (0, 1)


def test_a_filtered_token_is_never_drawn_at_the_ends_of_the_interval():
    """The smallest and the largest number that `uniform` gives, to what has no probability and to all others."""
    probs, ends = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for filtered in ends:
        for kept in ends:
            numbers = torch.where(probs > 0, kept, filtered)
            assert exponential_race(probs, numbers).item() == 3, "the likelier of two with the same number"
    assert exponential_race(torch.full((1, 5), 0.2), torch.full((1, 5), 0.5, dtype=torch.float64)).item() == 0, "a tie"


@pytest.mark.parametrize("p", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("other", [0.01, 0.5, 1 - 2**-20])
def test_a_rare_token_arrives_first_as_often_as_it_should(p, other):
    """Against one that is nearly certain, whose number is given. Oracle: the largest number by which the rare one is
    first, 1 - (1 - other) ^ (p / (1 - p)), found by bisection among all the multiples of 2^-53."""
    probs, rest = torch.tensor([[1 - p, p]]), float(torch.tensor(1 - p))
    rare = float(torch.tensor(p))  # in fp32

    def is_first(multiple: int) -> bool:
        numbers = torch.tensor([[other, multiple * 2.0**-53]], dtype=torch.float64)
        return exponential_race(probs, numbers).item() == 1

    low, high = 0, 2**53 - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_first(middle) else (low, middle)
    expected = -math.expm1(rare / rest * math.log1p(-other))
    assert high * 2.0**-53 == pytest.approx(expected, rel=1e-12, abs=2.0**-53)


def noisy(rows: int, vocabulary: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits about as flat as a story model's, the same with noise of +-size, and the numbers of as many rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    noise = (2 * torch.rand(logits.shape, generator=generator) - 1) * size
    return logits, logits + noise, uniform(torch.tensor(seed), torch.arange(rows), torch.tensor(0))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, top_k=200),
        *(pytest.param(each, marks=slow) for each in (Sampling(1.0), Sampling(1.5, min_p=1e-4))),
    ],
    ids=str,
)
def test_rounding_changes_hardly_a_draw(sampling):
    """Logits moved by 1e-5, as another batch size moves them: no token of 2,000 changes. Two candidates are as near to
    each other with odds of some 1e-5; a cumulative sum, all of whose borders move, changed 1 in 300."""
    for seed in range(5):
        logits, moved, numbers = noisy(400, 4000, 1e-5, seed)
        assert torch.equal(draw(logits, numbers, sampling)[0], draw(moved, numbers, sampling)[0])


def meeting(p: Tensor, q: Tensor) -> Tensor:
    """The probability [N] that draws from p and q [N,V], both above 0, by the same numbers give the same token: it is i
    where no other arrives before it in either race, 1 / sum over j of max(p_j / p_i, q_j / q_i)."""
    return (1 / torch.maximum(p[:, None] / p[:, :, None], q[:, None] / q[:, :, None]).sum(2)).sum(1)


@pytest.mark.parametrize("size", [0.03, 0.5, 3.0])
def test_draws_from_two_distributions_meet_as_often_as_they_should(size):
    """Oracle: the closed form. 20,000 draws are within five standard deviations of it with odds of 6e-7."""
    logits, moved, _ = noisy(20, 30, size)
    numbers = uniform(torch.tensor(9), torch.arange(20)[:, None], torch.arange(1000)).flatten()
    drawn = [draw(each.repeat_interleave(1000, 0), numbers, Sampling(1.0))[0] for each in (logits, moved)]
    expected = meeting(*(each.double().softmax(-1) for each in (logits, moved)))
    deviation = (1000 * (expected * (1 - expected)).sum()).sqrt()
    assert abs(int((drawn[0] == drawn[1]).sum()) - 1000 * float(expected.sum())) < 5 * float(deviation)


def test_a_filter_changes_a_draw_only_where_it_removes_the_token():
    """A token's number is its own, whatever its rank and whichever others are candidates."""
    logits, _, numbers = noisy(500, 257, 0.0)
    filters = [
        Sampling(1.0),
        Sampling(1.0, top_k=130),
        Sampling(1.0, top_k=66),
        Sampling(1.0, 66, 0.8),
        Sampling(1.0, 1),
    ]
    for wider, narrower in pairwise(filters):
        before, after = draw(logits, numbers, wider)[0], draw(logits, numbers, narrower)[0]
        kept, ids = candidates(logits, narrower)
        is_kept = torch.zeros(logits.shape).scatter(1, ids, kept).gather(1, before[:, None])[:, 0] > 0
        assert torch.equal(before[is_kept], after[is_kept]) and 0 < is_kept.sum() < 500


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.9), Sampling(0.9, top_k=7)], ids=str)
def test_logits_of_some_tokens_are_drawn_by_their_names(sampling):
    """Oracle: all logits, those of the others -inf."""
    few, _, numbers = noisy(50, 17, 0.0)
    names = torch.randperm(130, generator=torch.Generator().manual_seed(1))[:17]
    every = torch.full((50, 130), -math.inf).index_copy(1, names, few)
    found, expected = draw(few, numbers, sampling, names=names), draw(every, numbers, sampling)
    assert torch.equal(found[0], expected[0]) and set(found[0].tolist()) <= set(names.tolist())
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, top_k=9), Sampling(1.2, top_p=0.8, min_p=0.05)], ids=str
)
def test_sampled_frequencies_follow_the_distribution(sampling):
    """Pearson's chi-square over 200,000 draws against the reference probabilities. With the fixed seed the test is
    deterministic; for a new seed a correct sampler fails it with probability 1e-6 (the bound is the Wilson-Hilferty
    approximation of that quantile, z = 4.75)."""
    logits = 2 * torch.randn(1, 23, generator=torch.Generator().manual_seed(3))
    drawn = torch.rand(200_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(len(drawn), -1), drawn, sampling)
    expected = reference(logits[0].numpy(), sampling)
    counts = numpy.bincount(tokens.numpy(), minlength=23)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic, bound = chi_square(counts[kept], len(drawn) * expected[kept])
    assert statistic < bound
    # The log-probability is that of the model, before temperature and filters.
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.9, top_k=7)], ids=str)
def test_rows_drawn_some_at_a_time_are_the_same(monkeypatch, sampling):
    """As many rows at a time as there is room for, at least one."""
    rows: list[int] = []
    monkeypatch.setattr(
        "sampling.draw_rows", lambda logits, *rest: rows.append(len(logits)) or draw_rows(logits, *rest)
    )
    logits = torch.randn(17, 50, generator=torch.Generator().manual_seed(0))
    drawn = uniform(torch.tensor(1), torch.arange(17), torch.tensor(0))
    expected = draw(logits, drawn, sampling)
    for at_once, most in ((1, 1), (50, 1), (149, 2), (150, 3)):
        monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
        rows.clear()
        assert all(map(torch.equal, draw(logits, drawn, sampling), expected))
        assert rows == [most] * (17 // most) + [17 % most] * (17 % most > 0)


@pytest.mark.parametrize(
    "values,message",
    [
        ((-0.1,), "temperature -0.1"),
        ((float("nan"),), "temperature nan"),
        ((1e-39,), "temperature 1e-39"),
        ((math.inf,), "temperature inf"),
        ((1.0, 0), "top_k 0"),
        ((1.0, None, 0.0), "top_p 0.0"),
        ((1.0, None, 1.1), "top_p 1.1"),
        ((1.0, None, None, 1.5), "min_p 1.5"),
        ((1.0, None, None, -0.1), "min_p -0.1"),
        ((1.0, None, None, None, 0.0), "repetition_penalty 0.0"),
        ((1.0, None, None, None, 1e-40), "repetition_penalty 1e-40 must be from 1e-6 to 1e6"),
        ((1.0, None, None, None, 1e39), "repetition_penalty 1e\\+39"),
        ((1.0, None, None, None, math.nan), "repetition_penalty nan"),
        ((1.0, None, None, None, math.inf), "repetition_penalty inf"),
    ],
)
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*values)


def test_the_ends_of_what_is_possible_are_taken():
    for sampling in (Sampling(1e-6, 1, 1.0, 0.0, 1e-6), Sampling(min_p=1.0)):
        token, _ = draw(torch.tensor([[0.0, 1.0]]), torch.tensor([0.5], dtype=torch.float64), sampling)
        assert token.tolist() == [1]


def test_rows_may_have_seeds_of_their_own():
    """Oracle: each row by itself, also where the numbers are made in blocks."""
    seeds, samples, positions = torch.tensor([3, 2**40 + 1, 0]), torch.tensor([0, 5, 2]), torch.tensor([7, 90, 3])
    rows = zip(seeds, samples, positions, strict=True)
    expected = torch.stack([uniform(seed, sample, position) for seed, sample, position in rows])
    assert torch.equal(uniform(seeds, samples, positions), expected)
    assert torch.equal(UniformBlocks()(seeds, samples, positions), expected)
