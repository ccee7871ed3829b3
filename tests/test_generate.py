"""From prompt to samples. Oracles: re-scoring by one pass, the other layouts, plain NumPy, the distribution."""

import math

import numpy
import pytest
import torch
from conftest import GQA, random_model, random_tokens

from generate import (
    Conversation,
    Request,
    Sample,
    Sampling,
    candidates,
    generate,
    make_steps,
    rescore,
    rows_to_keep,
    sample,
)
from model import LAYOUTS
from report import Monitor, rank

PROMPT = random_tokens(GQA, 13).tolist()


def request(n: int = 3, length: int = 20, sampling: Sampling | None = None, **fields) -> Request:
    return Request(n, length, sampling or Sampling(0.8, top_k=20), seed=5, **fields)


def draws(samples: list[Sample]) -> list[tuple]:
    return [(each.tokens, each.finish_reason, each.text) for each in samples]


class Letters:
    """A tokenizer of one character per token, for the tests of text."""

    bos_id, eos_ids, vocab_size = None, frozenset(), GQA.vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(id + 32) for id in ids)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_all_layouts_draw_the_same_tokens(n):
    model = random_model(GQA, torch.float32)
    by_layout = {name: generate(model, PROMPT, request(n, attention=name)) for name in LAYOUTS}
    assert draws(by_layout["bifurcated"]) == draws(by_layout["contiguous"]) == draws(by_layout["expanded"])
    assert len({tuple(each.tokens) for each in by_layout["bifurcated"]}) == n


@pytest.mark.parametrize("length", [1, 2, 40])
def test_logprobs_equal_those_of_one_forward_pass(length):
    model = random_model(GQA)
    for each in generate(model, PROMPT, request(5, length)):
        assert each.logprobs == pytest.approx(rescore(model, PROMPT, each.tokens), abs=1e-6)


def test_growing_the_cache_changes_nothing(monkeypatch):
    model = random_model(GQA)
    expected = generate(model, PROMPT, request(3, 40))
    monkeypatch.setattr("generate.DECODE_SLOTS", 7)
    assert draws(generate(model, PROMPT, request(3, 40))) == draws(expected)


def test_prefill_chunks_change_nothing():
    model = random_model(GQA)
    assert draws(generate(model, PROMPT, request(prefill_chunk=4))) == draws(generate(model, PROMPT, request()))


def test_waves_change_nothing():
    model = random_model(GQA)
    expected = generate(model, PROMPT, request(7))
    for rows in (1, 2, 3, 6):
        monitor = Monitor()
        assert draws(generate(model, PROMPT, request(7, rows_at_once=rows), monitor=monitor)) == draws(expected)
        assert monitor.waves == math.ceil(7 / rows)


def test_a_wave_holds_no_more_than_its_own_rows():
    """A million million samples: the first wave begins before the others are thought of."""

    class Begun(Exception):
        pass

    class Stop(Monitor):
        def wave(self) -> None:
            raise Begun

    request = Request(10**12, 30, Sampling(0.9), seed=1, rows_at_once=3)
    with pytest.raises(Begun):
        generate(random_model(GQA), [1, 2], request, monitor=Stop())


def test_more_samples_begin_with_the_same_ones():
    model = random_model(GQA)
    assert draws(generate(model, PROMPT, request(9)))[:4] == draws(generate(model, PROMPT, request(4)))


def test_greedy_is_the_most_likely_token_at_every_step():
    model = random_model(GQA)
    (greedy,) = generate(model, PROMPT, request(1, 12, Sampling(0)))
    tokens = list(PROMPT)
    for token in greedy.tokens:
        scores = [rescore(model, tokens, [other])[0] for other in range(GQA.vocab_size)]
        assert token == max(range(GQA.vocab_size), key=scores.__getitem__)
        tokens.append(token)


def test_rows_stop_at_eos_and_compaction_leaves_the_others_unchanged():
    """Oracle: the same draws without any EOS, cut at the first EOS token."""
    model, eos = random_model(GQA), frozenset(range(3, 97, 9))
    free = generate(model, PROMPT, request(17, 60))
    rows = []

    class Watch(Monitor):
        def done(self, sample, cache, row, begin):
            super().done(sample, cache, row, begin)
            rows.append(cache.rows)

    stopped = generate(model, PROMPT, request(17, 60, eos_ids=eos), monitor=Watch())
    for whole, cut in zip(free, stopped, strict=True):
        end = next((at for at, token in enumerate(whole.tokens) if token in eos), 59)
        assert cut.tokens == whole.tokens[: end + 1]
        assert cut.finish_reason == ("eos" if cut.tokens[-1] in eos else "length")
    assert rows[0] == 17 and set(rows) >= {17, 8, 4, 2}, "the batch was compacted on the way"


def test_rows_to_keep():
    assert rows_to_keep([True] * 5) == [0, 1, 2, 3, 4]
    assert rows_to_keep([False] * 5) == []
    assert rows_to_keep([True, False, True, True, True, False]) == [0, 1, 2, 3, 4, 5]
    assert rows_to_keep([False, True, False, False, True, False, True, False]) == [0, 1, 4, 6]
    assert rows_to_keep([False, False, False, True]) == [0, 3]
    assert rows_to_keep([False, True]) == [0, 1]
    assert rows_to_keep([True]) == [0]


def test_a_stop_string_ends_a_sample_before_it():
    """Oracle: the same draws without stop strings, searched with str.find. The strings span tokens and pieces."""
    model, tokenizer = random_model(GQA), Letters()
    free = generate(model, PROMPT, request(17, 60), tokenizer)
    stops = (free[2].text[20:23], free[5].text[7:9], "no such text")
    stopped = generate(model, PROMPT, request(17, 60, stop=stops), tokenizer)
    for whole, cut in zip(free, stopped, strict=True):
        found = [(whole.text.find(stop), len(stop)) for stop in stops if stop in whole.text]
        ends = [(at + length, at) for at, length in found]
        assert cut.text == (whole.text[: min(ends)[1]] if ends else whole.text)
        assert len(cut.tokens) == (min(ends)[0] if ends else 60)
        assert cut.finish_reason == ("stop" if ends else "length")
    assert {each.finish_reason for each in stopped} == {"stop", "length"}


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(random_model(GQA), PROMPT, request(stop=("x",)))


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


def test_a_filtered_token_is_never_drawn_at_the_ends_of_the_interval():
    """The smallest and the largest number that torch.rand gives."""
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample(logits, uniform, Sampling(1.0))
    assert tokens.tolist() == [3, 1]
    assert logprobs.isfinite().all()


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, top_k=9), Sampling(1.2, top_p=0.8, min_p=0.05)], ids=str
)
def test_sampled_frequencies_follow_the_distribution(sampling):
    """Pearson's chi-square over 200,000 draws against the reference probabilities. With the fixed seed the test is
    deterministic; for a new seed a correct sampler fails it with probability 1e-6 (the bound is the Wilson-Hilferty
    approximation of that quantile, z = 4.75)."""
    logits = 2 * torch.randn(1, 23, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logprobs = sample(logits.expand(len(uniform), -1), uniform, sampling)
    expected = reference(logits[0].numpy(), sampling)
    counts = numpy.bincount(tokens.numpy(), minlength=23)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts[kept] - len(uniform) * expected[kept]) ** 2 / (len(uniform) * expected[kept])).sum()
    freedom = kept.sum() - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile
    # The log-probability is that of the model, before temperature and filters.
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, tokens])


def test_the_first_tokens_are_independent_draws():
    model = random_model(GQA)
    first = [each.tokens[0] for each in generate(model, PROMPT, request(64, 1, Sampling(1.5)))]
    assert len(set(first)) > 5


def test_rank_puts_the_most_likely_first_and_merges_equal_texts():
    samples = [
        Sample(0, [1], [-2.0], "b", "eos"),
        Sample(1, [2, 3], [-1.0, -0.5], "a", "eos"),
        Sample(2, [4], [-1.0], "b", "eos"),
        Sample(3, [5], [-9.0], "", "eos"),
        Sample(4, [6], [-8.0], "", "eos"),
    ]
    ranked = rank(samples)
    assert [(each.rank, each.count, each.sample.index) for each in ranked] == [(1, 1, 1), (2, 2, 2), (3, 2, 4)]


def test_rank_without_a_tokenizer_goes_by_tokens():
    samples = [Sample(0, [1], [-2.0]), Sample(1, [2], [-1.0]), Sample(2, [1], [-2.0])]
    assert [(each.count, each.sample.index) for each in rank(samples)] == [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"num_samples": 0}, "num_samples 0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"prefill_chunk": -1}, "prefill_chunk -1"),
        ({"stop": ("",)}, "stop string is empty"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    given = {"num_samples": 1, "max_new_tokens": 1, "sampling": Sampling(1.0), "seed": 0} | fields
    with pytest.raises(ValueError, match=message):
        Request(**given)


@pytest.mark.parametrize(
    "values,message",
    [
        ((-0.1,), "temperature -0.1"),
        ((float("nan"),), "temperature nan"),
        ((1e-39,), "temperature 1e-39"),
        ((1.0, 0), "top_k 0"),
        ((1.0, None, 0.0), "top_p 0.0"),
        ((1.0, None, 1.1), "top_p 1.1"),
        ((1.0, None, None, 1.5), "min_p 1.5"),
    ],
)
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*values)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers():
    model = random_model(GQA)
    with pytest.raises(ValueError, match="prompt of 4090 tokens \\+ max_new_tokens 20 = 4110 is over .* 4096"):
        generate(model, [0] * 4090, request())
    with pytest.raises(ValueError, match="empty"):
        generate(model, [], request())


class Keeper(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.caches = {}

    def done(self, sample, cache, row, begin):
        self.caches[sample.index] = cache.row(row, begin)


@pytest.mark.parametrize("n,eos", [(1, frozenset()), (5, frozenset()), (9, frozenset({3, 11, 40, 41, 52}))])
@pytest.mark.parametrize("attention", LAYOUTS)
def test_a_conversation_equals_one_long_prompt(n, eos, attention):
    """Three turns against generate() on the whole history: same draws, and no token of the context is run twice."""
    model, ran = random_model(GQA), 0
    steps = make_steps(model)

    def counted(tokens, input_pos, cache):
        nonlocal ran
        ran += tokens.shape[1]
        return steps.prefill(tokens, input_pos, cache)

    asked = request(n, 12, eos_ids=eos, attention=attention)
    counting = type(steps)(counted, steps.decode)
    conversation = Conversation(asked, Letters(), model, counting)
    history: list[int] = []
    for turn in range(3):
        said = random_tokens(GQA, 4 + turn, seed=turn).tolist()
        keeper = Keeper()
        before, pending = ran, len(conversation.pending)
        samples = conversation.turn(said, keeper)
        assert ran - before == len(said) + pending
        history += said
        seeded = type(asked)(**vars(asked) | {"seed": asked.seed + len(history)})
        assert draws(samples) == draws(generate(model, history, seeded, Letters()))
        reply = samples[-1]
        conversation.keep(reply, keeper.caches[reply.index])
        history += reply.tokens[:-1] if reply.finish_reason == "eos" else reply.tokens
        assert conversation.history == history


def test_a_kept_reply_ends_before_its_stop_string():
    """The context goes on from what was shown: all three layouts of text, tokens and keys agree on where that ends."""
    model, tokenizer = random_model(GQA), Letters()
    free = generate(model, PROMPT, request(1, 30), tokenizer)[0]
    asked = request(1, 30, stop=(free.text[10:13],))
    conversation, keeper = Conversation(asked, Letters(), model, make_steps(model)), Keeper()
    conversation.request = type(asked)(**vars(asked) | {"seed": asked.seed - len(PROMPT)})  # a turn adds its length
    (reply,) = conversation.turn(PROMPT, keeper)
    assert reply.finish_reason == "stop" and len(reply.text) < len(reply.tokens)
    conversation.keep(reply, keeper.caches[0])
    assert tokenizer.decode(conversation.history[len(PROMPT) :]) == reply.text
    assert conversation.context.slots == len(conversation.history) - len(conversation.pending)


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was():
    model = random_model(GQA)
    conversation = Conversation(request(2, 12), Letters(), model, make_steps(model))
    with pytest.raises(ValueError, match="context limit"):
        conversation.turn([0] * 5000, Keeper())
    assert conversation.history == [] and conversation.context.slots == 0


def test_decoder_streams_whole_text_in_pieces():
    model, pieces = random_model(GQA), []

    class Live(Monitor):
        streams = True

        def text(self, sample):
            pieces.append(sample.text)

    (each,) = generate(model, PROMPT, request(1, 15), Letters(), monitor=Live())
    assert len(pieces) == 15 and pieces[-1] == each.text == Letters().decode(each.tokens)
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))
