"""The road from a prompt to samples. Oracles: re-scoring by one pass, the other layouts, the same draws cut by hand,
and for the loop, plain decoding."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GQA, PROMPT, TINY, Letters, draws, full, random_model, random_tokens, request

from cache import KVCache
from cli.console import Stopwatch
from engine import contexts, scheduler
from engine.chat import ChatEncoder, Conversation
from engine.decoding import PlainDecoder, Prompt, StepOutput
from engine.engine import Engine
from engine.graphs import StepInput
from engine.layouts import LAYOUTS
from engine.request import Request, Sampling
from engine.runner import Monitor, bucket, decode, rows_to_keep
from engine.samples import Piece, Sample, rank
from layers.rope import RopeScaling
from sampling import draw, uniform

TWO = replace(GQA, n_layer=2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(TWO))


@pytest.fixture(scope="module")
def speaking() -> Engine:
    """The same, with a tokenizer."""
    return Engine(random_model(TWO), Letters())


@pytest.mark.parametrize("n", [1, 3, 17])
def test_all_layouts_draw_the_same_tokens(n):
    engine = Engine(random_model(GQA, torch.float32))
    by_layout = {name: engine.generate(PROMPT, request(n, attention=name)) for name in LAYOUTS}
    assert draws(by_layout["bifurcated"]) == draws(by_layout["contiguous"]) == draws(by_layout["expanded"])
    assert len({tuple(each.tokens) for each in by_layout["bifurcated"]}) == n


@pytest.mark.parametrize("look,length", [(1, 1), (1, 2), (1, 40), (1, 261), (8, 261)])
def test_logprobs_equal_those_of_one_forward_pass(engine, monkeypatch, look, length):
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    for each in engine.generate(PROMPT, request(5, length)):
        assert each.logprobs == pytest.approx(engine.score(PROMPT, [each.tokens])[0].logprobs, abs=1e-6)


LONGROPE = RopeScaling("longrope", 4.0, 70, 1.0, 1.0, 1.1, short=(1.0,) * 5, long=(1.0, 1.5, 2.0, 3.0, 4.0))


@pytest.fixture(scope="module")
def growing() -> Engine:
    """All keys are turned otherwise from a length of 71 on."""
    return Engine(random_model(replace(TWO, rope_scaling=LONGROPE)), Letters(), compile=False)


def recompute_cache(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The log-probability of each token, by a pass over all before it, at the length of that."""
    found = []
    for end in range(len(prompt), len(prompt) + len(tokens)):
        logits = full(engine.model, torch.tensor([[*prompt, *tokens][:end]]))[0, -1]
        found.append(logits.log_softmax(-1)[tokens[end - len(prompt)]].item())
    return found


@pytest.mark.parametrize("length,n,attention,look", [
    (13, 1, "bifurcated", 1), (13, 5, "bifurcated", 8), (66, 3, "contiguous", 1), (69, 3, "expanded", 8),
    (70, 3, "bifurcated", 1), (71, 3, "bifurcated", 1), (60, 7, "bifurcated", 3), (8, 2, "bifurcated", 1),
    (8, 2, "contiguous", 1),
])  # fmt: skip
def test_what_outgrows_the_original_context_of_longrope_is_read_anew(growing, monkeypatch, length, n, attention, look):
    """Also where rows have ended before, and with fewer rows than samples."""
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    prompt = random_tokens(TWO, length).tolist()
    ends = frozenset(range(3, 97, 40) if length > 13 else ())
    asked = request(n, 66, attention=attention, rows_at_once=4, eos_ids=ends)
    samples = growing.generate(prompt, asked)
    assert any(len(sample.tokens) + length > 72 for sample in samples)
    for sample in samples:
        assert sample.logprobs == pytest.approx(recompute_cache(growing, prompt, sample.tokens), abs=1e-6)


def test_a_context_in_int8_is_read_anew_too(growing):
    """Rounding moves a log-probability by less than a tenth; keys turned by the short factors, by more."""
    prompt = random_tokens(TWO, 66).tolist()
    for sample in growing.generate(prompt, request(3, 20, kv_dtype="int8", eos_ids=frozenset())):
        assert sample.logprobs == pytest.approx(recompute_cache(growing, prompt, sample.tokens), abs=0.1)


@pytest.mark.parametrize("n", [1, 3])
def test_a_conversation_that_outgrows_the_original_context_is_read_anew(growing, n):
    """In its second reply; what it was before that can be gone back to."""
    asked = request(n, 30, eos_ids=frozenset())
    conversation, history = Conversation(growing, asked), PROMPT
    for turn in range(3):
        mark, new = conversation.mark(), history[len(conversation.history) :]
        for _ in range(2):
            conversation.back_to(mark)
            samples = conversation.turn(new)
            for sample in samples:
                assert sample.logprobs == pytest.approx(recompute_cache(growing, history, sample.tokens), abs=1e-6)
        conversation.keep(samples[-1])
        history = [*history, *samples[-1].tokens, turn + 5]


def test_how_many_slots_a_step_reads_changes_nothing(engine, monkeypatch):
    expected = engine.generate(PROMPT, request(3, 90))
    for size in (1, 7, 1000):
        monkeypatch.setattr(contexts, "bucket", lambda slots, size=size: -(-slots // size) * size)
        assert draws(engine.generate(PROMPT, request(3, 90))) == draws(expected)


def test_buckets_are_few_and_hold_what_is_needed():
    sizes = [bucket(slots) for slots in range(1, 10_001)]
    assert all(slots <= size <= 1.25 * slots + 63 for slots, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 40


class Watched(PlainDecoder):
    """Notes of every step the cache that it sees: its slots, and where its buffers lie."""

    seen: list[tuple[KVCache, int, list[int]]] = []

    def next(self) -> StepOutput:
        cache = self.contexts.cache
        buffers = [buffer.data_ptr() for side in cache.buffers for buffer in side]
        Watched.seen.append((cache, cache.slots, buffers))
        return super().next()


@pytest.fixture
def watched(monkeypatch) -> list[tuple[KVCache, int, list[int]]]:
    monkeypatch.setattr(scheduler, "PlainDecoder", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    return Watched.seen


@pytest.mark.parametrize("n,attention", [(1, "bifurcated"), (3, "bifurcated"), (3, "expanded"), (3, "contiguous")])
def test_cost_follows_what_is_written_and_nothing_is_allocated_anew(engine, watched, n, attention):
    """With room for 2,000 tokens, of which 150 are drawn: a step has the bucket of what is written in view, counted
    behind the context where the cache holds that too. Oracle: the slots counted at each step; where the buffers lie."""

    class Enough(Exception):
        pass

    class Stop(Monitor):
        def stepped(self, steps: int, tokens: int) -> None:
            if len(watched) == 150:
                raise Enough

    with pytest.raises(Enough):
        engine.generate(PROMPT, request(n, 2000, attention=attention), Stop())
    before = len(PROMPT) if attention == "contiguous" else 0
    assert [slots for _, slots, _ in watched] == [before + bucket(step) for step in range(1, 151)]
    assert len({id(cache) for cache, _, _ in watched}) == 1 and len({tuple(at) for _, _, at in watched}) == 1
    assert all(buffer.shape[2] == before + 2001 for side in watched[0][0].buffers for buffer in side)


def test_prefill_chunks_change_nothing(engine):
    expected = draws(engine.generate(PROMPT, request()))
    for chunk in (1, 4, 12, 13):
        assert draws(engine.generate(PROMPT, request(prefill_chunk=chunk))) == expected


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_monitor_hears_of_all_that_is_read_and_drawn(engine, watched, length):
    """Oracle: the prompt's length, the samples, and the steps that the network ran."""
    read, stepped = [], []

    class Heard(Monitor):
        def prefilling(self, tokens: int, total: int) -> None:
            read.append((tokens, total))

        def stepped(self, steps: int, tokens: int) -> None:
            stepped.append((steps, tokens))

    engine.generate(PROMPT, request(3, length, prefill_chunk=5), Heard())
    assert read == [(5, 13), (10, 13), (13, 13)]
    assert [sum(each) for each in zip(*stepped, strict=True)] == [len(watched), 3 * length]
    assert stepped[0] == (0, 3) and len(watched) == length - 1


def test_fewer_rows_than_samples_change_nothing(engine, watched):
    """Rows are taken again as soon as their samples end: with equal lengths, in as many rounds as are needed."""
    expected = engine.generate(PROMPT, request(7, 12))
    for rows in (1, 2, 3, 6):
        del watched[:]
        assert draws(engine.generate(PROMPT, request(7, 12, rows_at_once=rows))) == draws(expected)
        assert len(watched) == 11 * math.ceil(7 / rows)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_a_longer_request_continues_the_shorter_one(engine, n):
    """--max_new_tokens 20 and 200 with one seed: the same first 20 tokens of every sample."""
    short, long = (engine.generate(PROMPT, request(n, length)) for length in (20, 200))
    assert [each.tokens for each in short] == [each.tokens[:20] for each in long]
    assert all(len(each.tokens) == 200 for each in long)


def test_neighbouring_seeds_share_no_sample(engine):
    """Also not from the second token on, as a seed that is added to a position would have it."""
    by_seed = [[tuple(each.tokens) for each in engine.generate(PROMPT, request(9, 12, seed=seed))] for seed in range(4)]
    drawn = [tokens for samples in by_seed for tokens in samples]
    assert len(set(drawn)) == 4 * 9 and len({tokens[1:] for tokens in drawn}) == 4 * 9
    grid = torch.stack([uniform(torch.tensor(seed), torch.arange(9)[:, None], torch.arange(12)) for seed in range(4)])
    assert grid.unique().numel() == 4 * 9 * 12


def test_a_sample_is_the_same_whatever_is_drawn_beside_it(speaking):
    """Every N, wave size and layout, streamed or not: sample i of seed 5 is one sample."""
    asked = request(17, 25, eos_ids=frozenset(range(3, 97, 19)))
    expected = draws(speaking.generate(PROMPT, asked))
    for change in (
        {"num_samples": 1}, {"num_samples": 2}, {"num_samples": 9}, {"rows_at_once": 1}, {"rows_at_once": 5},
        {"attention": "contiguous"}, {"attention": "expanded", "rows_at_once": 4}, {"prefill_chunk": 3},
    ):  # fmt: skip
        other = replace(asked, **change)
        assert draws(speaking.generate(PROMPT, other)) == expected[: other.num_samples], change
        watch = Stopwatch()
        list(speaking.stream(PROMPT, other, watch))
        streamed = sorted(watch.finished, key=lambda sample: sample.index)
        assert draws(streamed) == expected[: other.num_samples], change


def test_samples_are_made_as_rows_come_free(engine):
    """A million million samples: the first decode before the others are thought of."""

    class Begun(Exception):
        pass

    class Stop(Monitor):
        def stepped(self, steps: int, tokens: int) -> None:
            if steps:
                raise Begun

    with pytest.raises(Begun):
        Engine(engine.model, compile=False).generate([1, 2], request(10**12, 30, rows_at_once=3), Stop())


def test_greedy_is_the_most_likely_token_at_every_step(engine):
    (greedy,) = engine.generate(PROMPT, request(1, 12, Sampling(0)))
    tokens = list(PROMPT)
    for token in greedy.tokens:
        scores = [each.logprobs[0] for each in engine.score(tokens, [[id] for id in range(GQA.vocab_size)])]
        assert token == max(range(GQA.vocab_size), key=scores.__getitem__)
        tokens.append(token)


def test_rows_stop_at_eos_and_compaction_leaves_the_others_unchanged(engine, watched):
    """Oracle: the same draws without any EOS, cut at the first EOS token."""
    eos = frozenset(range(3, 97, 9))
    free = engine.generate(PROMPT, request(17, 60))
    rows, note = [], Watched.next

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "next", lambda self, *at: rows.append(self.contexts.cache.rows) or note(self, *at))
        stopped = engine.generate(PROMPT, request(17, 60, eos_ids=eos))
    for whole, cut in zip(free, stopped, strict=True):
        end = next((at for at, token in enumerate(whole.tokens) if token in eos), 59)
        assert cut.tokens == whole.tokens[: end + 1]
        assert cut.finish_reason == ("eos" if cut.tokens[-1] in eos else "length")
    assert rows[0] == 17 and set(rows) >= {17, 8, 4, 2}, "the batch was compacted on the way"


def test_end_tokens_are_the_engines_own_unless_the_request_has_some():
    engine = Engine(random_model(GQA))
    engine.eos_ids = frozenset(range(3, 97, 9))
    expected = engine.generate(PROMPT, request(9, 40, eos_ids=engine.eos_ids))
    assert any(each.finish_reason == "eos" for each in expected)
    assert draws(engine.generate(PROMPT, request(9, 40))) == draws(expected)
    assert all(len(each.tokens) == 40 for each in engine.generate(PROMPT, request(9, 40, eos_ids=frozenset())))


def test_bos_ends_a_text():
    """A text after which the next one would begin. Oracle: the samples without an end, cut there by hand."""

    class ResumeState(Letters):
        bos_id = 7

    engine = Engine(random_model(GQA), ResumeState())
    assert engine.eos_ids == {7}
    whole = engine.generate(PROMPT, request(9, 60, eos_ids=frozenset()))
    ends = [each.tokens.index(7) + 1 if 7 in each.tokens else 60 for each in whole]
    assert min(ends) < 60
    for each, sample, end in zip(engine.generate(PROMPT, request(9, 60)), whole, ends, strict=True):
        assert each.tokens == sample.tokens[:end] and each.finish_reason == ("eos" if 7 in each.tokens else "length")
    assert 7 in ChatEncoder(ResumeState(), 97, None, None).eos_ids


def test_rows_to_keep():
    assert rows_to_keep([True] * 5) == [0, 1, 2, 3, 4]
    assert rows_to_keep([False] * 5) == []
    assert rows_to_keep([True, False, True, True, True, False]) == [0, 1, 2, 3, 4, 5]
    assert rows_to_keep([False, True, False, False, True, False, True, False]) == [0, 1, 4, 6]
    assert rows_to_keep([False, False, False, True]) == [0, 3]
    assert rows_to_keep([False, True]) == [0, 1]
    assert rows_to_keep([True]) == [0]


def test_a_stop_string_ends_a_sample_before_it(speaking):
    """Oracle: the same draws without stop strings, searched with str.find. The strings span tokens and pieces."""
    free = speaking.generate(PROMPT, request(17, 60))
    stops = (free[2].text[20:23], free[5].text[7:9], "no such text")
    stopped = speaking.generate(PROMPT, request(17, 60, stop=stops))
    for whole, cut in zip(free, stopped, strict=True):
        found = [(whole.text.find(stop), len(stop)) for stop in stops if stop in whole.text]
        ends = [(at + length, at) for at, length in found]
        assert cut.text == (whole.text[: min(ends)[1]] if ends else whole.text)
        assert len(cut.tokens) == (min(ends)[0] if ends else 60)
        assert cut.finish_reason == ("stop" if ends else "length")
    assert {each.finish_reason for each in stopped} == {"stop", "length"}


def test_stop_strings_without_a_tokenizer_are_refused(engine):
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.generate(PROMPT, request(stop=("x",)))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("eos", [frozenset(), frozenset(range(3, 97, 9))])
def test_pieces_add_up_to_the_samples(speaking, n, eos):
    """Oracle: generate(). Stop strings span pieces: what may begin one is held back, and never shown."""
    free = speaking.generate(PROMPT, request(n, 60))
    asked = request(n, 60, stop=(free[0].text[30:34], free[-1].text[20:23]), eos_ids=eos)
    expected = speaking.generate(PROMPT, asked)
    pieces = list(speaking.stream(PROMPT, asked))
    for sample in expected:
        mine = [piece for piece in pieces if piece.sample == sample.index]
        assert "".join(piece.text for piece in mine) == sample.text
        assert [token for piece in mine for token in piece.tokens] == sample.tokens
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [sample.finish_reason]
        shown = ""
        for piece in mine:
            shown += piece.text
            assert sample.text.startswith(shown)
        assert sum(bool(piece.text) for piece in mine) > min(3, len(sample.text) - 3)


def test_text_comes_while_the_others_wait(speaking):
    """A piece is there before the next step runs, and rows take turns."""
    pieces = speaking.stream(PROMPT, request(3, 15))
    begun = [next(pieces) for _ in range(6)]
    assert [piece.sample for piece in begun] == [0, 1, 2] * 2
    assert all(isinstance(piece, Piece) and len(piece.text) == len(piece.tokens) == 1 for piece in begun)
    rest = [*begun, *pieces]
    assert len(rest) == 45 and {piece.finish_reason for piece in rest[-3:]} == {"length"}


def test_pieces_without_a_tokenizer_have_tokens_alone(engine):
    (sample,) = engine.generate(PROMPT, request(1, 9))
    pieces = list(engine.stream(PROMPT, request(1, 9)))
    assert [piece.text for piece in pieces] == [""] * 9
    assert [token for piece in pieces for token in piece.tokens] == sample.tokens


class Drafted(PlainDecoder):
    """Rows that move by themselves: a step gives each of them one to three of the tokens that plain decoding draws.

    Three plain steps run ahead, on the cache itself, as a draft that guesses right would have it; one step of three
    positions then writes them again and gives the logits. How many count differs by row and step, so most of what was
    written is written again.
    """

    width = 3
    counts: list[list[int]] = []

    def next(self) -> StepOutput:
        self.input_pos = self.input_pos.minimum(self.last)
        run, model, cache = [self.token], self.runner.model, self.contexts.cache
        for ahead in range(2):
            inputs = StepInput(run[-1], self.input_pos + ahead, self.samples, self.seeds)
            logits, numbers = decode(model, uniform, inputs, cache)
            run.append(draw(logits, numbers, self.only)[0][:, None])
        where = self.input_pos + torch.arange(3)  # [N,3]
        logits = model(torch.cat(run, 1), where, cache)  # [N,3,V]
        drawn = [
            draw(logits[:, ahead], uniform(self.seeds, self.samples, where[:, ahead] + 1), self.only)
            for ahead in range(3)
        ]
        tokens, logprobs = (torch.stack(parts, 1) for parts in zip(*drawn, strict=True))  # [N,3] each
        count = 1 + (self.samples + where[:, 0]) % 3
        Drafted.counts.append(count.tolist())
        self.token, self.input_pos = tokens.gather(1, count[:, None] - 1), self.input_pos + count[:, None]
        return torch.where(torch.arange(3) < count[:, None], tokens, -1), logprobs, count


@pytest.fixture(params=[1, 8], ids=["looked at every step", "looked at every eight"])
def stride(request, monkeypatch) -> int:
    """How often tokens are brought to the host, which on an accelerator is not every step."""
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", request.param)
    return request.param


ENDS = {
    "length": {},
    "eos": {"eos_ids": frozenset(range(3, 97, 9))},
    "stop strings": {"stop": ("a", "Q", "zz")},
    "fewer rows": {"eos_ids": frozenset(range(3, 97, 9)), "rows_at_once": 4},
}


@pytest.mark.parametrize(
    "n,length,ends",
    [(1, 67, "length"), (3, 66, "length"), (5, 66, "fewer rows"), (17, 67, "eos"), (3, 67, "stop strings")],
)
def test_rows_that_move_by_themselves_draw_what_plain_decoding_draws(speaking, monkeypatch, stride, n, length, ends):
    """Also through compaction, over the border of a bucket, to the last slot. Oracle: plain decoding."""
    asked = request(n, length, **ENDS[ends])
    expected = speaking.generate(PROMPT, asked)
    monkeypatch.setattr(scheduler, "PlainDecoder", Drafted)
    monkeypatch.setattr(Drafted, "counts", [])
    found = speaking.generate(PROMPT, asked)
    assert draws(found) == draws(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    if ends == "length":
        assert {count for counts in Drafted.counts for count in counts} >= ({1, 2} if n == 1 else {1, 2, 3})


@pytest.mark.parametrize("n", [1, 3, 17])
def test_looking_at_tokens_every_few_steps_changes_nothing(speaking, stride, n):
    """Oracle: the same draws without an end, cut by hand."""
    eos = frozenset(range(3, 97, 9))
    free = speaking.generate(PROMPT, request(n, 70))
    for whole, cut in zip(free, speaking.generate(PROMPT, request(n, 70, eos_ids=eos)), strict=True):
        end = next((at for at, token in enumerate(whole.tokens) if token in eos), 69)
        assert cut.tokens == whole.tokens[: end + 1]


def test_the_first_tokens_are_independent_draws(engine):
    first = [each.tokens[0] for each in engine.generate(PROMPT, request(64, 1, Sampling(1.5)))]
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
        ({"num_samples": 2.5}, "num_samples 2.5 is not a whole number"),
        ({"max_new_tokens": "3"}, "max_new_tokens '3' is not a whole number"),
        ({"seed": 1.0}, "seed 1.0 is not a whole number"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"stop": "x"}, "stop 'x' is not a tuple of texts"),
        ({"stop": (1,)}, "stop \\(1,\\) is not a tuple of texts"),
        ({"seed": -1}, "seed -1 must be at least 0 and below 2"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"kv_dtype": "int8", "attention": "contiguous"}, "kv_dtype 'int8' with contiguous: use auto, or int8 with"),
        ({"kv_dtype": "int4"}, "kv_dtype 'int4' with bifurcated"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_without_a_seed_every_call_draws_anew_and_says_by_which(speaking):
    """By all ways to draw. Oracle: the seed that a sample names, which draws it again."""
    asked = request(5, 20, Sampling(1.5), seed=None)
    assert Request().seed is None
    many = [Prompt("a", PROMPT), Prompt("b", PROMPT)]
    ways = (
        partial(speaking.generate, PROMPT),
        lambda each: [*Conversation(speaking, each).turn(PROMPT)],
        lambda each: next(iter(speaking.generate_many(many[:1], each))).samples,
    )
    for draw_all in ways:
        first, second = draw_all(asked), draw_all(asked)
        assert len({each.seed for each in first}) == 1 and first[0].seed != second[0].seed
        assert [each.tokens for each in first] != [each.tokens for each in second]
        again = speaking.generate(PROMPT, replace(asked, seed=first[0].seed))
        assert again == first
    seeds = [outcome.samples[0].seed for outcome in speaking.generate_many(many, request(2, 3, seed=None))]
    assert len(set(seeds)) == 2, "each prompt has its own"
    assert {each.seed for each in speaking.generate(PROMPT, replace(asked, seed=7))} == {7}


def test_a_text_is_a_prompt_and_what_is_neither_is_refused(speaking):
    """Oracle: its tokens, also where they are another library's whole numbers."""
    text, asked = "Once upon", request()
    tokens = speaking.encode(text)
    drawn = draws(speaking.generate(tokens, asked))
    assert draws(speaking.generate(text, asked)) == draws(speaking.generate(torch.tensor(tokens), asked)) == drawn
    assert list(speaking.stream(text, asked)) == list(speaking.stream(tokens, asked))
    assert speaking.score(text, [[4, 5]]) == speaking.score(tokens, [[4, 5]])
    for wrong in ([tokens], [1.5], [text], None, 5):
        with pytest.raises(ValueError, match="is not a list of tokens: pass those of tokenizer.encode"):
            speaking.generate(wrong, asked)
    calls = (lambda: speaking.score(tokens, [text]), lambda: speaking.generate_many([Prompt("a", text)], asked))
    for call in calls:
        with pytest.raises(ValueError, match="'Once upon' is not a list of tokens"):
            call()


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(engine):
    with pytest.raises(ValueError, match="prompt of 4090 tokens \\+ max_new_tokens 20 = 4110 exceeds .* 4096"):
        engine.generate([0] * 4090, request())
    with pytest.raises(ValueError, match="empty"):
        engine.generate([], request())


def test_a_checkpoint_is_opened_as_the_command_line_opens_it():
    """Device, dtype and end tokens. Oracle: what is known of the shipped model."""
    engine = Engine.open(TINY, "cpu", "float32")
    assert (engine.device.type, engine.dtype) == ("cpu", torch.float32)
    assert engine.eos_ids == {1, 2} and engine.tokenizer.eos_ids <= engine.eos_ids
    prompt = engine.encode("Once upon a time")
    assert prompt == [1, *engine.tokenizer.encode("Once upon a time")]
    samples = engine.generate(prompt, Request(3, 9, seed=1))
    assert [each.text for each in samples] == ["".join(p.text for p in engine.stream(prompt, Request(3, 9, seed=1))
        if p.sample == each.index) for each in samples]  # fmt: skip


@pytest.mark.parametrize("n,eos", [(1, frozenset()), (5, frozenset({3, 11, 40, 41, 52}))])
@pytest.mark.parametrize("attention", LAYOUTS)
@pytest.mark.parametrize("live", [False, True], ids=["whole", "streamed"])
def test_a_conversation_equals_one_long_prompt(n, eos, attention, live):
    """Four turns against generate() on the whole history with the same request: same draws, and no token of the context
    is run twice."""
    engine, ran = Engine(random_model(TWO), Letters()), 0
    hidden = engine.hidden

    def counted(tokens, input_pos, cache):
        nonlocal ran
        ran += tokens.shape[1]
        return hidden(tokens, input_pos, cache)

    asked = request(n, 70 if n == 1 else 12, eos_ids=eos, attention=attention)
    conversation = Conversation(engine, asked)
    history: list[int] = []
    for turn in range(4):
        said = random_tokens(GQA, 4 + turn, seed=turn).tolist()
        before, pending, watch = ran, len(conversation.pending), Stopwatch()
        engine.hidden = counted
        if live:
            list(conversation.stream(said, watch))
            samples = sorted(watch.finished, key=lambda sample: sample.index)
        else:
            samples = conversation.turn(said, watch)
        engine.hidden = hidden
        assert ran - before == len(said) + pending
        history += said
        assert draws(samples) == draws(engine.generate(history, asked))
        reply = samples[-1]
        conversation.keep(reply)
        history += reply.text_tokens
        assert conversation.history == history
        assert conversation.context.slots == len(history) - len(conversation.pending)


def test_a_kept_reply_ends_before_its_stop_string(speaking):
    """The context goes on from what was shown: text, tokens and keys agree on where that ends."""
    free = speaking.generate(PROMPT, request(1, 30))[0]
    for n in (1, 3):
        conversation = Conversation(speaking, request(n, 30, stop=(free.text[10:13],)))
        reply = conversation.turn(PROMPT)[0]
        assert reply.finish_reason == "stop" and len(reply.text) < len(reply.tokens)
        conversation.keep(reply)
        assert speaking.tokenizer.decode(conversation.history[len(PROMPT) :]) == reply.text
        assert conversation.context.slots == len(conversation.history) - len(conversation.pending)


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(speaking):
    conversation = Conversation(speaking, request(2, 12))
    with pytest.raises(ValueError, match="context limit"):
        conversation.turn([0] * 5000)
    assert conversation.history == [] and conversation.context.slots == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_turn_whose_reply_is_not_kept_is_a_part_of_the_context(speaking, n):
    """After a turn whose reply was; nor must it be read to its end. Oracle: generate() on all that was said."""
    for drawn in (3, 1000):
        conversation = Conversation(speaking, request(n, 40))
        conversation.keep(conversation.turn(PROMPT)[0])
        pieces = conversation.stream([9, 8, 7])
        for _, _ in zip(range(drawn), pieces, strict=False):
            pass
        pieces.close()
        before = list(conversation.history)
        samples = conversation.turn([5, 6])
        assert before[-3:] == [9, 8, 7] and len(before) == len(PROMPT) + 40 + 3
        assert draws(samples) == draws(speaking.generate([*before, 5, 6], request(n, 40)))


def test_a_stream_that_is_closed_after_a_step_back_adds_nothing(speaking):
    """Oracle: the context's slots before it, and generate() of the next turn's text."""
    conversation = Conversation(speaking, request(2, 9))
    mark, stream = conversation.mark(), conversation.stream([5, 6, 7, 8])
    next(stream)
    conversation.back_to(mark)
    stream.close()
    assert conversation.context.slots == 0
    assert draws(conversation.turn(PROMPT)) == draws(speaking.generate(PROMPT, request(2, 9)))


@pytest.mark.parametrize("n", [1, 3])
def test_a_later_turn_allocates_nothing_while_it_decodes(speaking, watched, n):
    conversation = Conversation(speaking, request(n, 150))
    for turn in range(3):
        del watched[:]
        reply = conversation.turn([7 + turn] * 5)[0]
        assert len({tuple(at) for _, _, at in watched}) == 1, f"turn {turn}"
        conversation.keep(replace(reply, tokens=reply.tokens[:9]))


def test_a_request_takes_stop_strings_and_end_tokens_in_any_collection(engine):
    asked = Request(2, 9, seed=1, stop=["zz"], eos_ids={5})
    assert asked == Request(2, 9, seed=1, stop=("zz",), eos_ids=frozenset([5])) and len({asked}) == 1
