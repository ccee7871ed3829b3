"""Many prompts at once. Oracles: the run of each prompt alone; a plain trie; torch.compile that may not do so again."""

import gc
import itertools
import math
import random
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ALIBI, GQA, WINDOW, Letters, draws, random_model, random_tokens, request, slow
from torch import Tensor

from engine import prefixes, runner, scheduler
from engine.contexts import Contexts
from engine.engine import Engine
from engine.prefixes import Sharing
from engine.request import Request, Sampling
from engine.samples import Piece, Row, StopConditions
from engine.scheduler import BatchStats, Outcome, Prompt, Queue, Scheduler, seed_of
from engine.speculate import DraftController, LayersDraft, ModelDraft, PromptDraft, Speculation
from layers.moe import MoEConfig
from layers.rope import RopeScaling

TWO = replace(GQA, n_layer=2)
ENDS = frozenset(range(3, 97, 9))  # about one token in nine
KINDS = {
    "windows": replace(WINDOW, n_layer=2, windows=(5, None)),
    "ALiBi": replace(ALIBI, n_layer=2, windows=(None, 4)),
    "experts": replace(TWO, mixture=MoEConfig(5, 2, 24, True)),
    "dynamic": replace(TWO, rope_scaling=RopeScaling("dynamic", 2.0, original_context=16)),
    "longrope": replace(
        TWO, rope_scaling=RopeScaling("longrope", 4.0, 30, short=(1.0,) * 5, long=(1.0, 1.5, 2.0, 3.0, 4.0))
    ),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(TWO), compile=False)


def prompts_of(preamble: int, groups: int, common: int, count: int = 8, seed: int = 0) -> list[Prompt]:
    """Ragged ones behind a preamble, some of them behind what a group has in common; the last is that of another."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(GQA.vocab_size) for _ in range(length)]

    begin = tokens(preamble)
    shared = [tokens(common) for _ in range(groups)] + [[]]
    made = [Prompt(number, begin + rng.choice(shared) + tokens(rng.choice((1, 5, 30)))) for number in range(count)]
    return [*made, Prompt("again", made[count // 2].tokens)]


def alone(engine: Engine, prompt: Prompt, asked: Request) -> list[tuple]:
    return draws(engine.generate(prompt.tokens, replace(asked, seed=seed_of(asked.seed, prompt.id))))


def drawn(outcomes: Iterable[Outcome]) -> dict[str | int, list[tuple]]:
    found = list(outcomes)
    assert len({outcome.prompt.id for outcome in found}) == len(found) and not any(each.error for each in found)
    return {outcome.prompt.id: draws(outcome.samples) for outcome in found}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", [(0, 0, 0), (20, 0, 0), (20, 3, 70), (0, 4, 66)], ids=str)
def test_samples_are_those_of_each_prompt_alone(engine, n, shape):
    """More prompts than fit, ragged, with and without what all or some begin with; 5 rows at once and all; in another
    order too."""
    prompts, asked = prompts_of(*shape), request(n, 10, eos_ids=ENDS)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    if n == 3:  # the same prompt twice is not the same draw
        assert len({str(each) for each in expected.values()}) == len(prompts)
    for rows in (5, None):
        assert drawn(engine.generate_many(prompts, replace(asked, rows_at_once=rows))) == expected
        prompts = prompts[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_other_networks(kind):
    """Where distance matters, where rows meet experts, and where nothing may be shared, some of it read anew."""
    engine = Engine(random_model(KINDS[kind]), compile=False)
    prompts, asked, tally = prompts_of(20, 2, 70, 7), request(3, 12, eos_ids=ENDS, rows_at_once=5), BatchStats()
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    assert drawn(engine.generate_many(prompts, asked, stats=tally)) == expected
    assert (tally.read == tally.asked) == (kind in ("dynamic", "longrope"))


def test_in_fp32_with_text_and_stop_strings():
    engine = Engine(random_model(TWO, torch.float32), Letters(), compile=False)
    prompts, asked = prompts_of(20, 0, 0), request(3, 12, stop=("q", "AB"), rows_at_once=5)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    assert drawn(engine.generate_many(prompts, asked)) == expected
    assert {reason for each in expected.values() for _, reason, _ in each} == {"stop", "length"}


def test_a_host_that_looks_every_few_steps_draws_the_same(engine, monkeypatch):
    """As on a GPU: rows go on for a while after their sample's end."""
    prompts, asked = prompts_of(20, 2, 70, 7), request(3, 12, eos_ids=ENDS, rows_at_once=5)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", 5)
    assert drawn(engine.generate_many(prompts, asked)) == expected


@pytest.mark.parametrize("look", [1, 8])
def test_long_samples_are_those_of_each_prompt_alone(monkeypatch, look):
    """Past 64, 128 and 256 tokens, with rows that are taken again by prompts which come later, and rows that are done
    and go on meanwhile, beyond the slots in view."""

    def row(index: int, ending: StopConditions, *rest) -> Row:
        return Row(index, replace(ending, length=(5, 67, 131, 261)[(index + len(rest[1])) % 4]), *rest)

    monkeypatch.setattr(scheduler, "Row", row)
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    engine = Engine(random_model(replace(GQA, n_layer=1)), compile=False)
    prompts, asked = prompts_of(20, 1, 66, 4), request(2, 261, rows_at_once=3)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    assert {len(tokens) for each in expected.values() for tokens, _, _ in each} == {5, 67, 131, 261}
    assert drawn(engine.generate_many(prompts, asked)) == expected


def test_long_prompts_are_read_in_chunks(engine):
    prompts = [Prompt(each.id, prompts_of(9, 0, 0)[0].tokens[:9] * 40 + each.tokens) for each in prompts_of(9, 0, 0, 3)]
    prompts.append(Prompt("short", prompts[0].tokens[:10]))
    asked = request(2, 5, prefill_chunk=100)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    assert drawn(engine.generate_many(prompts, asked)) == expected


@pytest.mark.parametrize("length", [1, 2])
def test_samples_of_one_and_two_tokens(engine, length):
    prompts, asked = prompts_of(0, 0, 0), request(3, length, eos_ids=ENDS, rows_at_once=4)
    expected = {prompt.id: alone(engine, prompt, asked) for prompt in prompts}
    assert drawn(engine.generate_many(prompts, asked)) == expected


def test_a_replicas_indices_count_from_the_first(engine):
    prompts, asked = prompts_of(0, 0, 0, 3), request(4, 6)
    expected = drawn(engine.generate_many(prompts, asked))
    later = drawn(engine.generate_many(prompts, replace(asked, num_samples=2, first_index=2)))
    assert later == {id: each[2:] for id, each in expected.items()}


def test_what_cannot_be_run_is_said_and_the_others_go_on(engine):
    long = Prompt("long", [1] * GQA.context_limit)
    bad = [long, Prompt("empty", []), Prompt("foreign", [1, 97]), Prompt("negative", [-1, 1])]
    good = prompts_of(0, 0, 0, 2)
    found = list(engine.generate_many([good[0], *bad, *good[1:]], request(2, 5)))
    errors = {outcome.prompt.id: outcome.error for outcome in found if outcome.error is not None}
    assert errors.keys() == {"long", "empty", "foreign", "negative"} and "4096" in errors["long"]
    assert {outcome.prompt.id for outcome in found if len(outcome.samples) == 2} == {prompt.id for prompt in good}
    assert list(engine.generate_many([], request())) == []
    assert [outcome.error is None for outcome in engine.generate_many(bad[:1], request())] == [False]


@pytest.mark.parametrize("look", [1, 8])
def test_a_prompt_whose_logits_are_not_finite_is_said_and_the_others_go_on(monkeypatch, look):
    """A damaged row of the embedding, which some prompts hold, at their end or as a group, and some samples draw. Rows
    that read it are taken again. Oracle: the run of each prompt alone, which ends in an error or does not."""
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    model = random_model(replace(GQA, n_layer=1))
    model.tok_embeddings.weight[11] = torch.nan
    engine, asked = Engine(model, compile=False), request(2, 25, Sampling(1.0), rows_at_once=5)
    prompts = [Prompt(each.id, [token for token in each.tokens if token != 11]) for each in prompts_of(20, 2, 70, 12)]
    group = prompts[0].tokens[:20] + [11] + prompts[1].tokens[20:] * 9
    longest = Prompt("end", [*prompts[0].tokens[:20], *range(12, 52), 11])
    prompts[:0] = [longest, *(Prompt(f"group {at}", [*group, at]) for at in (1, 2))]
    expected = {}
    for prompt in prompts:
        with suppress(FloatingPointError):
            expected[prompt.id] = alone(engine, prompt, asked)
    found = {outcome.prompt.id: outcome for outcome in engine.generate_many(prompts, asked)}
    assert found.keys() == {prompt.id for prompt in prompts} and 3 < len(expected) < len(prompts) - 3
    assert {id: draws(outcome.samples) for id, outcome in found.items() if outcome.error is None} == expected
    errors = [outcome for outcome in found.values() if outcome.error is not None]
    assert all("logits are not finite" in each.error and not each.samples for each in errors)


def test_a_batch_that_cannot_run_is_refused(engine):
    two = prompts_of(0, 0, 0, 2)
    for asked, given, words in (
        (request(), [two[0], two[0]], "2 prompts have the id 0"),
        (request(stop=("a",)), two, "need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.generate_many(given, asked)


def cross() -> list[tuple]:
    """Every pair of settings occurs; a draft model and the layers share no prompt with the look-up, so odd ones do."""
    layouts = ({}, {"attention": "contiguous"}, {"attention": "expanded"}, {"kv_dtype": "int8"})
    drafts, penalties = (None, "prompt", "layers", "model"), (1.0, 1.3)
    every = list(itertools.product((1, 3), (1, 5), layouts, drafts, penalties, (False, True)))
    return every[::7]  # 7 has no factor with the numbers of settings


@pytest.mark.parametrize("prompts,n,layout,draft,penalty,live", cross())
def test_every_feature_runs_with_every_other(monkeypatch, prompts, n, layout, draft, penalty, live):
    """fp64, past 66 tokens, rows fewer than samples. Oracle: each prompt alone, plain decoding."""
    monkeypatch.setattr(DraftController, "SETTLE", 0)
    monkeypatch.setattr(DraftController, "PATIENCE", math.inf)
    restart = DraftController.restart
    monkeypatch.setattr(DraftController, "restart", lambda self: (restart(self), self.seconds[None].append(1.0)))
    model = random_model(TWO)
    plain, engine = Engine(model, compile=False), Engine(model, compile=False)
    drafts = {"prompt": PromptDraft(), "layers": LayersDraft(1), "model": ModelDraft(TWO, lambda *_: random_model(TWO))}
    if draft is not None:
        engine.use(Speculation(drafts[draft], 3), 4)
    asked = request(n, 70, Sampling(0.8, top_k=20, repetition_penalty=penalty), eos_ids=frozenset(range(3, 97, 40)))
    asked, given = replace(asked, **layout), prompts_of(20, 2, 70, prompts)[:prompts]
    expected = {prompt.id: alone(plain, prompt, asked) for prompt in given}
    events = list(engine.stream_many(given, replace(asked, rows_at_once=4), live=live))
    assert drawn(each for each in events if isinstance(each, Outcome)) == expected
    tokens: dict[tuple, list[int]] = {}
    for each in events:
        if isinstance(each, Piece):
            tokens.setdefault((each.prompt, each.sample), []).extend(each.tokens)
    whole = {(id, at): sample[0] for id, samples in expected.items() for at, sample in enumerate(samples)}
    assert tokens == (whole if live else {})
    if draft in ("layers", "model"):
        assert sum(engine.decoder.report()["accept_histogram"]) > 0


def test_the_cross_product_holds_every_pair():
    for one, other in itertools.combinations(range(6), 2):
        found = {(str(each[one]), str(each[other])) for each in cross()}
        sizes = [len({str(each[at]) for each in cross()}) for at in (one, other)]
        assert len(found) == sizes[0] * sizes[1] and min(sizes) > 1, (one, other)


def test_rows_of_different_settings_draw_as_alone(engine):
    """Temperature, filters, penalty, length, number and ends by prompt, of which some share rows. Oracle: each alone
    with its own request."""
    settings = [
        (1, 70, Sampling(0)), (7, 20, Sampling(1.2, top_p=0.9)), (3, 130, Sampling(0.7, top_k=5)),
        (5, 66, Sampling(1.0, min_p=0.1)), (2, 9, Sampling(0.9, top_k=30, repetition_penalty=1.4)),
        (4, 67, Sampling(2.0, top_k=50, top_p=0.8, min_p=0.02)), (3, 40, Sampling(1.5)),
    ]  # fmt: skip
    given = [
        replace(prompt, request=request(n, length, sampling, seed=None, eos_ids=frozenset({at, 50 + at})))
        for at, (prompt, (n, length, sampling)) in enumerate(zip(prompts_of(20, 2, 70, 7), settings, strict=False))
    ]
    for some in (given, given[:3], given[2:5]):
        found = drawn(engine.generate_many(some, request(1, 5, rows_at_once=6)))
        for prompt in some:
            assert found[prompt.id] == alone(engine, prompt, replace(prompt.request, seed=request().seed)), prompt.id


def test_a_prompt_of_many_samples_leaves_rows_to_the_others(engine):
    """100 prompts of one sample, and one of 64. Oracle: the steps that they need at least."""
    given, stats = [Prompt(at, [at % 90 + 1] * 5) for at in range(100)], BatchStats()
    given[50] = replace(given[50], request=request(64, 8))
    list(engine.generate_many(given, request(1, 8, rows_at_once=64), stats=stats))
    assert stats.drawn == 163 * 8 and stats.steps <= 4 * 7, stats


def test_ids_have_seeds_of_their_own():
    seeds = {seed_of(seed, id) for seed in (0, 1, 2**62) for id in (0, 1, "1", "0", "a", "é")}
    assert len(seeds) == 18 and all(0 <= seed < 2**53 for seed in seeds)


def plain_trie(prompts: Sequence[Sequence[int]]) -> dict:
    """Each node: its children by token, and under None the prompts, less their last token, at or below it."""
    root: dict = {None: set(range(len(prompts)))}
    for number, tokens in enumerate(prompts):
        node = root
        for token in tokens[:-1]:
            node = node.setdefault(token, {None: set()})
            node[None].add(number)
    return root


def most_saved(node: dict, depth: int, least: int) -> int:
    """Tokens that disjoint groups can save at best, each at least `least` tokens longer than one that it is within."""
    layer = [node]
    for _ in range(least):
        layer = [child for each in layer for token, child in each.items() if token is not None]
    total = 0
    for each in layer:
        length, members = depth + least, each[None]
        while together := [child for token, child in each.items() if token is not None and child[None] == members]:
            each, length = together[0], length + 1
        if len(members) > 1:
            total += max((len(members) - 1) * length, most_saved(each, length, least))
    return total


@pytest.mark.parametrize("seed", range(6))
def test_sharing_is_that_of_a_plain_trie(seed, monkeypatch):
    monkeypatch.setattr(prefixes, "GROUP", 5)
    rng = random.Random(seed)
    parts = [[rng.randrange(3) for _ in range(rng.choice((3, 6, 11)))] for _ in range(5)]
    begin = [7] * rng.choice((0, 4, 13))
    prompts = [begin + sum(rng.choices(parts, k=rng.randrange(1, 4)), []) for _ in range(40)]
    found, trie = Sharing.among(prompts), plain_trie(prompts)
    root, node = 0, trie
    while len(node) == 2 and all(len(prompt) > root + 1 for prompt in prompts):
        root, node = root + 1, next(child for token, child in node.items() if token is not None)
    if root < prefixes.ROOT:
        root, node = 0, trie
    assert found.root == root
    assert sum(group.saved for group in found.groups) == most_saved(node, root, prefixes.GROUP) > 0
    seen = [member for group in found.groups for member in group.members]
    assert len(seen) == len(set(seen)) and sorted(found.order()) == list(range(40))
    for group in found.groups:
        assert len({tuple(prompts[member][: group.length]) for member in group.members}) == 1
        assert all(len(prompts[member]) > group.length for member in group.members)


def test_prompts_that_each_extend_the_last_are_shared(monkeypatch):
    """1,500 of them, 9 tokens more each: a tree as deep. Oracle: the most that one group of them saves; each shares all
    but the last token of its shortest member."""
    monkeypatch.setattr(prefixes, "GROUP", 5)
    tokens = random_tokens(GQA, 9 * 1500).tolist()
    sharing = Sharing.among([tokens[: 9 * (1 + number)] for number in range(1500)])
    assert sharing.root == 8
    assert sum(group.saved for group in sharing.groups) == max((9 * n - 1) * (1500 - n) for n in range(1, 1501))


def test_what_is_shared_is_read_once(engine):
    prompts, tally = prompts_of(20, 3, 70), BatchStats()
    sharing = Sharing.among([prompt.tokens for prompt in prompts])
    list(engine.generate_many(prompts, request(2, 5, rows_at_once=4), stats=tally))
    saved = 20 * (len(prompts) - 1) + sum((len(group.members) - 1) * (group.length - 20) for group in sharing.groups)
    assert len(sharing.groups) >= 2 and sharing.root == 20
    assert tally.asked - tally.read == saved and tally.asked == sum(sharing.lengths)
    assert tally.prompts == len(prompts) and tally.kv_bytes_saved > 0


def held_bytes(contexts: Contexts) -> int:
    """What its caches take, less the slot of each that is never in view."""
    caches = (contexts.root, contexts.groups.cache, contexts.prompts.cache, contexts.cache)
    buffers = [buffer for cache in caches for side in cache.buffers for buffer in side]
    return sum(buffer[:, :, 1:].numel() * buffer.element_size() for buffer in buffers)


def test_memory_stays_within_what_there_is():
    """What the caches hold within the plan's bytes, and those within what is available; with less memory fewer rows,
    and the same samples."""
    engine = Engine(random_model(TWO, torch.float32), compile=False)
    prompts, asked = prompts_of(20, 3, 70), request(3, 12)
    expected, rows = drawn(engine.generate_many(prompts, asked)), []
    for spare in (1 << 19, 1 << 18, 0):
        one = Scheduler(engine, prompts, replace(asked, rows_at_once=1))
        engine.available = one.sizes.needed(one.plan) + spare
        made = Scheduler(engine, prompts, asked)
        assert drawn(made.run()) == expected and made.contexts.tokens == made.sizes.root
        assert held_bytes(made.contexts) + engine.weights.total <= made.sizes.needed(made.plan) <= engine.available
        rows.append(made.sizes.rows)
    assert rows == sorted(rows, reverse=True) and len(set(rows)) == 3 and rows[-1] == 1, rows
    engine.available = engine.weights.total
    with pytest.raises(ValueError, match="one sample needs"):
        engine.generate_many(prompts, asked)


def test_rows_are_kept_busy(monkeypatch):
    """32 prompts, 8 samples of 8 to 128 tokens each, 64 rows: at least 85 % of them draw for a sample that is not done,
    the end included, where nothing waits."""

    def row(index: int, ending: StopConditions, *rest) -> Row:
        return Row(index, replace(ending, length=8 + (index * 7919 + sum(rest[1]) * 31) % 121), *rest)

    monkeypatch.setattr(scheduler, "Row", row)
    engine, tally = Engine(random_model(replace(GQA, n_layer=1), torch.float32), compile=False), BatchStats()
    prompts = prompts_of(0, 0, 0, 31)
    found = list(engine.generate_many(prompts, request(8, 128), stats=tally))
    lengths = [len(sample.tokens) for outcome in found for sample in outcome.samples]
    assert len(lengths) == 256 and min(lengths) < 12 and max(lengths) > 124
    assert tally.busy == sum(lengths) - 256 and tally.busy >= 0.85 * tally.capacity, tally


@slow
def test_one_compiled_step_serves_prompts_that_come_and_go(monkeypatch):
    """Traced and guarded as ever, without the C++ compiler: groups, rows that leave at the end, another batch of other
    sizes. Oracle: the eager step's tokens, in fp64. The random numbers, which take most of the time to trace, are not
    what is asked."""

    def numbers(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        return (seed % 1013 + sample * 7919 + position * 31) % 1009 / 1009

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(runner, "uniform", numbers)
    monkeypatch.setattr(runner, "UniformBlocks", lambda: numbers)
    torch.compiler.reset()
    model = random_model(replace(GQA, n_layer=1))
    eager, compiled = (Engine(model, compile=each) for each in (False, True))
    first = prompts_of(20, 3, 70)
    asked = request(3, 83, eos_ids=ENDS, rows_at_once=5)
    steps = compiled.generate_many(first, asked)
    found = [next(steps)]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert drawn([*found, *steps]) == drawn(eager.generate_many(first, asked))
        second, other = prompts_of(33, 4, 66, seed=1), replace(asked, num_samples=2, rows_at_once=9)
        assert drawn(compiled.generate_many(second, other)) == drawn(eager.generate_many(second, other))


@pytest.mark.parametrize("draft", [None, "prompt"])
def test_the_caches_of_a_finished_batch_are_freed_at_once(draft, monkeypatch):
    """Without the garbage collector, which seldom runs: the next batch is planned for all of the memory."""
    made = []
    init = Contexts.__init__

    def noted(self, *given, **named):
        init(self, *given, **named)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Contexts, "__init__", noted)
    engine = Engine(random_model(TWO), compile=False)
    if draft:
        engine.use(Speculation(PromptDraft(), 3), 4)
    prompts = [Prompt(at, random_tokens(GQA, 9 + at, seed=at).tolist()) for at in range(3)]
    gc.disable()
    try:
        for _ in range(2):
            assert len(list(engine.generate_many(prompts, Request(2, 5, seed=1)))) == 3
        assert len(made) == 2 and not any(each() for each in made)
    finally:
        gc.enable()


def test_replicas_leave_prompts_to_others_only_in_the_last_queue():
    engine = Engine(random_model(TWO), compile=False)
    prompts = [Prompt(at, random_tokens(GQA, 9, seed=at).tolist()) for at in range(7)]
    for more, share in ((False, 4), (True, 7)):
        queue = Queue(itertools.count().__next__, 2, True, more)
        assert Scheduler(engine, prompts, Request(1, 5, seed=1), queue=queue).share == share
