"""Speculative decoding. Oracles: plain decoding, token by token; stub logits whose proposals are known; exact
enumeration of what a small network draws."""

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
from conftest import GQA, PROMPT, STORIES, TINY, Letters, draws, full, needs_stories, random_model, request, slow
from test_sampling import chi_square
from torch import Tensor

import sampling
from engine import decoding, runner, scheduler
from engine.chat import Conversation
from engine.contexts import Place
from engine.decoding import ActivePrompt, Prompt, Seat
from engine.engine import Engine
from engine.request import Sampling
from engine.samples import Row, Sample, StopConditions
from engine.speculate import (
    Draft,
    DraftController,
    LayersDraft,
    MedusaDraft,
    ModelDraft,
    PromptDraft,
    Speculation,
    SpeculativeDecoder,
    choose_draft,
)
from layers.linear import dequantise
from layers.rope import RopeScaling
from loading.checkpoint import read_checkpoint
from loading.tokenizer import load_tokenizer
from model import ModelArgs, Transformer
from quantize import quantise_int4, quantise_int8
from sampling import candidates

TWO = replace(GQA, n_layer=2)
EOS = frozenset(range(3, 97, 9))
GREEDY, DRAWN = Sampling(0), Sampling(0.8, top_k=20)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TWO)


def near(model: Transformer, seed: int = 3, size: float = 0.2) -> Transformer:
    """A network that agrees with another now and then."""
    other = random_model(model.args, model.norm.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        noise = torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype)
        mine.copy_(theirs + size * theirs.std(unbiased=False) * noise)
    return other


def medusa(tmp_path, args: ModelArgs, heads: int = 3, ids: Tensor | None = None, seed: int = 0):
    """A file of random heads, in the public layout."""
    generator = torch.Generator().manual_seed(seed)
    state = {} if ids is None else {"tokens": ids}
    for head in range(heads):
        shapes = {"0.linear.weight": (args.dim, args.dim), "0.linear.bias": (args.dim,)}
        shapes["1.weight"] = (args.vocab_size if ids is None else len(ids), args.dim)
        state |= {f"{head}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "medusa_lm_head.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def draft(request, model, tmp_path) -> Draft:
    kind = request.param
    if kind == "model":
        return ModelDraft(TWO, lambda *_: near(model))
    if kind == "other model":
        args = replace(TWO, dim=22, n_layer=1, n_head=4, n_kv_head=1, head_dim=6)
        return ModelDraft(args, lambda *_: random_model(args))
    if kind == "medusa":
        return MedusaDraft(medusa(tmp_path, TWO, ids=torch.arange(0, 97, 2)), TWO)
    return {"prompt": PromptDraft(), "layers": LayersDraft(1)}[kind]


KINDS = ("model", "prompt", "layers", "medusa")
every_draft = pytest.mark.parametrize("draft", KINDS, indirect=True)


@pytest.fixture
def always(monkeypatch) -> None:
    """Drafts from the first step on, and does not give up."""
    restart = DraftController.restart
    monkeypatch.setattr(DraftController, "restart", lambda self: (restart(self), self.seconds[None].append(1.0)))
    monkeypatch.setattr(DraftController, "SETTLE", 0)
    monkeypatch.setattr(DraftController, "PATIENCE", math.inf)


def speculating(model: Transformer, draft: Draft, k: int | None = 3, tokenizer=None) -> Engine:
    engine = Engine(model, tokenizer)
    engine.use(Speculation(draft, k), 3)
    return engine


CASES = {
    "length": (5, GREEDY, {}),
    "eos": (17, DRAWN, {"eos_ids": EOS}),
    "one row": (1, DRAWN, {}),
    "stop strings": (3, GREEDY, {"stop": ("a", "Q", "zz")}),
    "fewer rows": (5, DRAWN, {"eos_ids": EOS, "rows_at_once": 2}),
    "rows one by one": (2, DRAWN, {"rows_at_once": 1}),
    "contiguous": (3, DRAWN, {"attention": "contiguous"}),
    "expanded": (3, GREEDY, {"attention": "expanded"}),
}


@pytest.fixture(scope="module")
def expected(model) -> dict[str, list[Sample]]:
    plain = Engine(model, Letters())
    return {name: plain.generate(PROMPT, request(n, 67, how, **each)) for name, (n, how, each) in CASES.items()}


@every_draft
def test_samples_are_those_of_plain_decoding(always, model, draft, expected):
    """Token by token, to the last slot, through compaction, over the border of a bucket, with fewer rows
    than samples, and in all layouts."""
    engine = speculating(model, draft, tokenizer=Letters())
    some = CASES if draft.name == "model" else ("eos", "one row", "stop strings", "fewer rows")
    for name in some:
        n, how, fields = CASES[name]
        found = engine.generate(PROMPT, request(n, 67, how, **fields))
        assert draws(found) == draws(expected[name]), name
        for one, other in zip(found, expected[name], strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    accepted = engine.decoder.report()["accept_histogram"]
    assert min(accepted[:2]) > 0, "some were right and some were not"


@pytest.mark.parametrize("draft,look", [("model", 1), ("layers", 8)], indirect=["draft"])
def test_long_samples_are_those_of_plain_decoding(always, model, draft, monkeypatch, look):
    """Past 64, 128 and 256 tokens, with rows that end early and stay."""
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    row, asked = scheduler.Row, request(3, 261, DRAWN)
    lengths = 30, 131, 261
    monkeypatch.setattr(scheduler, "Row", lambda at, end, *rest: row(at, replace(end, length=lengths[at]), *rest))
    expected = Engine(model).generate(PROMPT, asked)
    assert [len(each.tokens) for each in expected] == [30, 131, 261]
    assert draws(speculating(model, draft).generate(PROMPT, asked)) == draws(expected)


@pytest.mark.parametrize("draft", ["prompt", "layers"], indirect=True)
def test_logits_that_are_not_finite_are_noticed_while_drafting(always, draft):
    """From a token on that comes late: a damaged row of the embedding."""
    model = random_model(TWO)
    (plain,) = Engine(model).generate(PROMPT, request(1, 40))
    late = next(token for token in plain.tokens[20:] if token not in {*PROMPT, *plain.tokens[:20]})
    model.tok_embeddings.weight[late] = math.nan
    with pytest.raises((FloatingPointError, ValueError), match="logits are not finite"):
        speculating(model, draft).generate(PROMPT, request(1, 40))


@pytest.mark.parametrize("draft", ["model", "other model", "prompt"], indirect=True)
def test_greedy_samples_in_fp32_are_those_of_plain_decoding(always, draft):
    model = random_model(TWO, torch.float32)
    if draft.name == "model":
        load = draft.load
        draft.load = lambda *given: load(*given).float()
    engine, plain = speculating(model, draft), Engine(model)
    for n in (1, 3):
        asked = request(n, 67, GREEDY)
        assert draws(engine.generate(PROMPT, asked)) == draws(plain.generate(PROMPT, asked))


def padded(model: Transformer, vocabulary: int) -> Transformer:
    """The same network with the first rows of its vocabulary, or with more, of large numbers."""
    other = random_model(replace(model.args, vocab_size=vocabulary), model.norm.weight.dtype)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        if mine.shape != theirs.shape:
            mine.fill_(30.0)
        rows = min(len(mine), len(theirs))
        mine[:rows] = theirs[:rows]
    return other


@pytest.mark.parametrize(
    "rows,tied,sampling",
    [(70, False, DRAWN), (96, True, GREEDY), (130, True, DRAWN)],
)
def test_a_draft_may_have_fewer_or_more_rows_than_the_target(always, monkeypatch, rows, tied, sampling):
    """fp64. As where vocabularies are padded to other sizes, over prompts and samples that hold tokens which the draft
    lacks, at N = 1 and 3: what one of the two has no row for is never proposed. Oracle: plain decoding; and the draft,
    which is the target but for such rows, is right wherever it has read none."""
    model = random_model(replace(TWO, tied_output=tied))
    proposed, check = [], SpeculativeDecoder.check
    monkeypatch.setattr(
        SpeculativeDecoder, "check", lambda each, tokens: proposed.append(tokens.flatten()) or check(each, tokens)
    )
    engine = speculating(model, ModelDraft(replace(model.args, vocab_size=rows), lambda *_: padded(model, rows)))
    for n, prompt in ((1, PROMPT), (3, [96, *PROMPT, 96, 69, 70, 95])):
        asked = request(n, 67, sampling)
        expected = Engine(model).generate(prompt, asked)
        assert draws(engine.generate(prompt, asked)) == draws(expected)
        if rows == 70 and sampling is DRAWN:
            assert any(token >= rows for sample in expected for token in sample.tokens), "the draft reads such tokens"
    assert torch.cat(proposed).max() < min(rows, 97)
    accepted = engine.decoder.report()["accept_histogram"]
    assert accepted[3] > 0 and (rows < 97 or sum(accepted[:3]) <= 4), "only the last step of a row may be cut"


class Known(Draft):
    """Proposes what plain decoding draws, but for the token after the first `right` ones of each row and step."""

    name = "known"

    def __init__(self, samples: list[Sample], right: Callable[[int, int], int]) -> None:
        self.samples, self.right = samples, right
        self.seen: list[list[tuple[int, int]]] = []  # of each step and row, its sample's tokens so far and `right`

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor:
        step, proposals = [], []
        for sample, at in zip(rows.samples.tolist(), (rows.input_pos[:, 0] + 1 - len(PROMPT)).tolist(), strict=True):
            right = self.right(sample, at)
            tokens = [*self.samples[sample].tokens[at : at + k], *[0] * k][:k]
            proposals.append([token if i < right else (token + 1) % 97 for i, token in enumerate(tokens)])
            step.append((at, right))
        self.seen.append(step)
        return torch.tensor(proposals)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "right", [lambda *_: 0, lambda *_: 3, lambda sample, at: (sample + at) % 4], ids=["never", "always", "sometimes"]
)
def test_each_row_takes_the_proposals_that_are_right(always, model, sampling, right):
    """Oracle: the draft itself, which knows how many of its proposals are."""
    plain = Engine(model).generate(PROMPT, request(3, 41, sampling))
    known = Known(plain, right)
    assert draws(speculating(model, known).generate(PROMPT, request(3, 41, sampling))) == draws(plain)
    for row in range(3):
        last = next(at for at, step in enumerate(known.seen) if sum(step[row]) + 1 >= 41)
        steps = [step[row] for step in known.seen[: last + 1]]
        assert len(steps) > 9 and steps[0][0] == 1, "one from the prompt"
        for (at, each), (then, _) in itertools.pairwise(steps):
            assert then == at + each + 1


@pytest.mark.parametrize("kind", ["model", *(pytest.param(kind, marks=slow) for kind in ("layers", "greedy model"))])
def test_the_distribution_is_that_of_the_target(always, kind):
    """Pearson's chi-square of three tokens out of five, 8,000 samples, against exact enumeration by one forward pass
    each. Fails with odds of 1e-6 where all is right; the seed is fixed. The draft's distribution is another."""
    args = replace(TWO, vocab_size=5)
    model, sampling, n = random_model(args), Sampling(0.9, top_p=0.98), 8_000
    made = {
        "model": lambda: ModelDraft(args, lambda *_: near(model, size=0.8)),
        "layers": lambda: LayersDraft(1),
        "greedy model": lambda: Certain(args, lambda *_: near(model, size=0.8)),
    }
    engine = speculating(model, made[kind](), 2)
    samples = engine.generate([1, 4, 2], request(n, 4, sampling, eos_ids=frozenset()))
    report = engine.decoder.report()
    assert sum(report["accept_histogram"]) >= n and min(report["accept_histogram"]) > n // 50
    every = list(itertools.product(range(5), repeat=3))
    inputs = torch.tensor([[1, 4, 2, *tokens] for tokens in every])
    logits = full(model, inputs).float()[:, 2:5]  # [125,3,V]
    probs, ids = candidates(logits.flatten(0, 1), sampling)
    probs = torch.zeros(375, 5).scatter(1, ids, probs).view(125, 3, 5)
    expected = n * probs.gather(2, torch.tensor(every)[:, :, None])[..., 0].prod(1).double().numpy()
    counts = Counter(tuple(sample.tokens[:3]) for sample in samples)
    found = numpy.array([counts[tokens] for tokens in every])
    likely = expected > 5
    assert found[expected == 0].sum() == 0 and likely.sum() > 30
    rare = found[~likely].sum(), expected[~likely].sum().clip(1e-9)
    statistic, bound = chi_square(numpy.append(found[likely], rare[0]), numpy.append(expected[likely], rare[1]))
    assert statistic < bound


class Certain(ModelDraft):
    """Proposes a model's most likely tokens, whatever the target draws by."""

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        with mock.patch.object(rows, "only", GREEDY):
            return super().propose(rows, k)


def looked_up(history: list[int], n: int) -> int | None:
    """Where what followed the last n tokens begins, the latest time that they stood before. By plain search."""
    places = [at for at in range(n, len(history)) if history[at - n : at] == history[-n:]]
    return places[-1] if places else None


def test_prompt_look_up_proposes_what_followed():
    """Over random texts of few tokens, so that runs repeat in the context, in the row's own text and across the border.
    Oracle: plain search."""
    generator, found = torch.Generator().manual_seed(3), 0
    for trial in range(60):
        T, own = 1 + trial % 23, 1 + trial % 7
        tokens = torch.randint(4, (3, T + own), generator=generator)
        tokens[:, :T] = tokens[:1, :T]
        ended = StopConditions(frozenset(), (), own + 1)
        held = ActivePrompt(0, Prompt(0, tokens[0, :T].tolist()), request(), 0, ended, Place(0))
        seats = [Seat(held, Row(index, ended, None, (), False), held.place) for index in range(3)]
        for seat, text in zip(seats, tokens[:, T:].tolist(), strict=True):
            for token in text:
                seat.row.record(token, 0.0)
        rows = SimpleNamespace(seats=seats, token=tokens[:, -1:])
        proposed = PromptDraft().begin(rows).propose(rows, 4)
        for row, history in enumerate(tokens.tolist()):
            place = next((at for n in (3, 2) if (at := looked_up(history, n)) is not None), None)
            if place is not None:
                found += 1
                after = history[place:]
                assert proposed[row].tolist() == [after[i % len(after)] for i in range(4)], (trial, row)
        if all(looked_up(history, 2) is None for history in tokens.tolist()):
            assert proposed is None
    assert found > 80


def steps(pace: DraftController, count: int, mean: float, seconds: dict[int | None, float]) -> list[int | None]:
    """What the pace chooses, where steps with so many proposals (None: plain ones) take so long, and give `mean`."""
    chosen: list[int | None] = []
    for _ in range(count):
        proposed = None if pace.plain_left else pace.k
        pace.stepped(proposed, [1] if proposed is None else [round(mean)], seconds[proposed], 0.0)
        chosen.append(proposed)
    return chosen


def test_a_draft_that_loses_rests_and_is_tried_again():
    """A drafted step that takes twice as long as a plain one and gives one token loses a plain step each time."""
    pace = DraftController(4, 4)
    chosen = steps(pace, 5000, 1, {None: 1.0, 4: 2.0})
    lost = chosen.count(4)
    assert pace.switched_off >= 4 and lost <= 4 * (pace.switched_off + 1), "four steps a try, the one under way too"
    assert 5000 / (5000 + lost) > 0.98, "never slower for long"
    begins = [at for at, each in enumerate(chosen) if each == 4 and chosen[at - 1] is None]
    rests = [b - a for a, b in itertools.pairwise(begins)]
    assert rests == sorted(rests) and rests[0] < 140 and rests[-1] > 900
    assert pace.expected_s / pace.taken_s == pytest.approx(5000 / (5000 + lost))


def test_a_draft_that_wins_goes_on():
    pace = DraftController(4, 4)
    assert steps(pace, 500, 3, {None: 1.0, 4: 2.0}) == [None] * 4 + [4] * 496
    assert pace.switched_off == 0 and pace.expected_s / pace.taken_s == pytest.approx(1.5, rel=0.02)


def test_k_adapts():
    """Up where all are right, but not where a longer step takes more than it gives; down where few are."""
    takes = {None: 1.0} | {k: 1 + 0.1 * k for k in (1, 2, 4, 8, 16)}

    def settled(given: Callable[[int], int], seconds: dict) -> int:
        pace = DraftController(None, 16)
        for _ in range(400):
            proposed = None if pace.plain_left else pace.k
            pace.stepped(proposed, [1 if proposed is None else 1 + given(proposed)], seconds[proposed], 0.0)
        return pace.k

    assert settled(lambda k: k, takes) == 16
    assert settled(lambda k: min(k, 1), takes) == 2
    assert settled(lambda k: k, takes | {8: 9.0, 16: 99.0}) == 4


def test_rows_of_k_that_adapts_draw_the_same(always, model, monkeypatch):
    monkeypatch.setattr(DraftController, "WINDOW", 2)
    sizes, check = set(), SpeculativeDecoder.check
    monkeypatch.setattr(
        SpeculativeDecoder, "check", lambda rows, given: sizes.add(given.shape[1]) or check(rows, given)
    )
    engine = speculating(model, ModelDraft(TWO, lambda *_: near(model, size=0.02)), None)
    asked = request(3, 120)
    assert draws(engine.generate(PROMPT, asked)) == draws(Engine(model).generate(PROMPT, asked))
    assert len(sizes) > 1 and engine.decoder.width == 17


@pytest.mark.parametrize("draft", ["model", "prompt"], indirect=True)
def test_what_is_off_for_a_while_catches_up(model, draft, monkeypatch):
    """Plain steps in between, which the draft does not see: it proposes afterwards as well as before."""
    monkeypatch.setattr(ModelDraft, "PART", 5)
    engine, asked = speculating(model, draft), request(3, 120)
    choices = itertools.cycle([0] * 3 + [1] * 13)
    monkeypatch.setattr(
        DraftController, "plain_left", property(lambda _: next(choices), lambda *_: None), raising=False
    )
    monkeypatch.setattr(DraftController, "RECENT", 0)
    monkeypatch.setattr("statistics.median", lambda _: 1.0)
    assert draws(engine.generate(PROMPT, asked)) == draws(Engine(model).generate(PROMPT, asked))
    if draft.name == "model":
        always_on = speculating(model, ModelDraft(TWO, lambda *_: model))
        always_on.generate(PROMPT, asked)
        report = always_on.decoder.report()
        assert report["mean_accepted"] == 3, "the target as its own draft is always right"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("draft", ["model", "prompt"], indirect=True)
def test_a_conversation_is_that_of_plain_decoding(always, model, draft, n):
    engines = Engine(model, Letters()), speculating(model, draft, tokenizer=Letters())
    turns = []
    for engine in engines:
        conversation = Conversation(engine, request(n, 30, eos_ids=EOS))
        turns.append([])
        for said in ([5, 6, 7], [8], [9, 10]):
            samples = conversation.turn(said)
            conversation.keep(samples[-1])
            turns[-1].append(draws(samples))
    assert turns[0] == turns[1]


@slow
def test_steps_compile_once(monkeypatch):
    """The draft's, the verifying and the plain one; for other rows, contexts and lengths. Traced and guarded as ever,
    without the C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for module in (runner, decoding, sampling):  # Philox takes most of the time
        monkeypatch.setattr(module, "uniform", lambda seed, *at: (seed + at[0] * 7919 + at[1] * 104729) % 997 / 997.0)
    model = random_model(replace(TWO, n_layer=1))
    plain, engine = Engine(model), Engine(model, compile=True)
    engine.use(Speculation(ModelDraft(model.args, lambda *_: near(model)), 3), 3)
    monkeypatch.setattr(DraftController, "SETTLE", 2)
    monkeypatch.setattr(DraftController, "TIMED", -1)
    monkeypatch.setattr(DraftController, "PATIENCE", math.inf)
    engine.generate(PROMPT, request(3, 9))
    assert len(engine.decoder.steps) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, length in ((2, 5), (17, 70)):
            asked = request(n, length, eos_ids=EOS)
            assert draws(engine.generate(PROMPT * 2, asked)) == draws(plain.generate(PROMPT * 2, asked))


def test_the_plan_counts_the_draft(model):
    """Its weights, its keys and values, and the slots of what is proposed."""
    plain, engine = Engine(model), speculating(model, ModelDraft(TWO, lambda *_: near(model)), 5)
    before, after = (each.plan(100, request(7, 50)) for each in (plain, engine))
    token = TWO.kv_values_per_token * 8
    assert after.weights.total == 2 * before.weights.total
    assert (before.context, after.context) == (100 * token, 200 * token)
    assert (before.decoded_per_sample, after.decoded_per_sample) == (50 * token, 55 * 2 * token)
    assert after.workspace > 2 * before.workspace


def test_what_turns_by_the_length_so_far_is_refused(model):
    args = replace(TWO, rope_scaling=RopeScaling("dynamic", 2.0, original_context=64))
    engine = speculating(random_model(args), PromptDraft())
    with pytest.raises(ValueError, match="dynamic rope scaling"):
        engine.generate(PROMPT, request())


@slow
@needs_stories
@pytest.mark.parametrize("mode,least", [("int8", 0.85), ("int4", 0.6)])
def test_a_quantised_copy_is_a_good_draft(always, mode, least):
    """stories15M, drawn at temperature 0.8: its int8 weights propose what it draws at least 85 times in 100."""
    engine = Engine.open(STORIES, "cpu", "float32", compile=False)
    copy = Engine.open(STORIES, "cpu", "float32").model
    for block in copy.layers:
        for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
            weight = quantise_int8(linear.weight) if mode == "int8" else quantise_int4(linear.weight, 32)
            linear.weight = torch.nn.Parameter(dequantise(weight, torch.float32), requires_grad=False)
    engine.use(Speculation(ModelDraft(engine.args, lambda *_: copy), 3), 2)
    engine.generate(engine.encode("Once upon a time"), request(2, 60, Sampling(0.8, top_k=200)))
    accepted = engine.decoder.report()["accept_histogram"]
    right, tried = sum(i * times for i, times in enumerate(accepted)), sum(accepted)
    wrong = tried - accepted[-1]  # each row and step ends at the first that is wrong
    assert right / (right + wrong) >= least, accepted


TARGET = read_checkpoint(TINY)
PLACE = (torch.device("cpu"), torch.float32, 1)


@pytest.mark.parametrize(
    "names,path,k,message",
    [
        (["prompt"], None, "0", "speculate_k 0 must be at least 1, or auto"),
        (["prompt"], None, "-3", "speculate_k -3 must"),
        (["prompt"], None, "x", "speculate_k 'x' is not a number"),
        (["prompt"], "somewhere", None, "--draft and --draft_checkpoint_path are both given"),
        ([], None, "4", "--speculate_k needs --draft"),
        ([], "scripts/nothing/here", None, "checkpoint scripts/nothing/here not found"),
        (["layers:0"], None, None, "--draft layers:0: pass prompt, layers:K with K from 1 to 4"),
        (["layers:5"], None, None, "K from 1 to 4"),
        (["layers"], None, None, "--draft layers: pass"),
        (["medusa"], None, None, "--draft medusa: pass"),
        (["medusa", "nothing.pt"], None, None, "no file at nothing.pt"),
        (["prompt", "more"], None, None, "--draft prompt more: pass"),
        (["sideways"], None, None, "--draft sideways: pass"),
    ],
)
def test_bad_flags_are_refused(names, path, k, message):
    with pytest.raises((ValueError, OSError), match=message):
        choose_draft(names, path, k, TARGET, PLACE)


def test_no_draft_is_plain_decoding():
    assert choose_draft([], None, None, TARGET, PLACE) is None


def test_another_vocabulary_is_refused_by_its_first_token(tmp_path):
    """A folder with a tokenizer of the same size, of which one piece is another."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    path, piece = tmp_path / "tokenizer.model", load_tokenizer(TINY).processor.id_to_piece(259).encode()
    size = bytes([len(piece)])  # which precedes it in the file
    path.write_bytes(path.read_bytes().replace(size + piece, size + piece[:-1] + b"~", 1))
    with pytest.raises(ValueError, match="vocabulary is not the target's: token 259 differs"):
        choose_draft([], str(tmp_path), None, TARGET, PLACE)


def test_files_that_are_no_heads_are_refused(tmp_path):
    for state in ([1], {}, {"0.1.weight": 3}, None):
        path = tmp_path / "heads.pt"
        torch.save(state, path)
        with pytest.raises(ValueError, match="does not hold Medusa heads of dim 30 for 97 tokens"):
            MedusaDraft(path, TWO)
    with pytest.raises(ValueError, match="heads of dim 28"):
        MedusaDraft(medusa(tmp_path, TWO), replace(TWO, dim=28))
    with pytest.raises(ValueError, match="for 96 tokens"):
        MedusaDraft(medusa(tmp_path, TWO), replace(TWO, vocab_size=96))
    with pytest.raises(ValueError, match="heads of dim"):
        MedusaDraft(medusa(tmp_path, TWO, ids=torch.tensor([3, 97])), TWO)
    with pytest.raises(ValueError, match="speculate_k 4 must be at least 1 and at most 3"):
        Speculation(MedusaDraft(medusa(tmp_path, TWO), TWO), 4)
