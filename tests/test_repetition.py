"""The repetition penalty. Oracles: transformers' processor; a plain loop over full passes, without a cache."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GQA, PROMPT, full, random_model, request, slow
from transformers import RepetitionPenaltyLogitsProcessor

from engine.engine import Engine
from engine.layouts import LAYOUTS
from engine.request import Sampling
from engine.speculate import LayersDraft, ModelDraft, Speculation
from model import Transformer
from sampling import draw, penalised, seen_in, seen_prefixes, uniform

PENALTY, EOS, LENGTH = 1.7, frozenset(range(3, 97, 19)), 24
SAMPLINGS = {"greedy": Sampling(0, repetition_penalty=PENALTY), "drawn": Sampling(0.9, 20, 0.95, None, PENALTY)}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(GQA)


def by_hand(model: Transformer, sampling: Sampling, index: int) -> tuple[list[int], list[float]]:
    """A sample: the whole text in one pass for every token, and the processor's logits."""
    processor, text, logprobs = RepetitionPenaltyLogitsProcessor(PENALTY), list(PROMPT), []
    plain = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
    while len(logprobs) < LENGTH and not EOS & set(text[len(PROMPT) :]):
        logits = full(model, torch.tensor([text]))[:, -1].float()
        number = uniform(torch.tensor(5), torch.tensor([index]), torch.tensor([len(text)]))
        token, _ = draw(processor(torch.tensor([text]), logits.clone()), number, plain)
        text.append(int(token))
        logprobs.append(logits.log_softmax(-1)[0, token].item())
    return text[len(PROMPT) :], logprobs


@pytest.fixture(scope="module", params=SAMPLINGS)
def expected(request, model):
    """(sampling, [(tokens, log-probabilities) of three samples])."""
    sampling = SAMPLINGS[request.param]
    return sampling, [by_hand(model, sampling, index) for index in range(3)]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_logits_are_those_of_transformers(penalty):
    logits = 3 * torch.randn(3, 97, generator=torch.Generator().manual_seed(0))
    texts = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(texts, logits.clone())
    seen = torch.zeros(3, 97, dtype=torch.bool).scatter_(1, texts, True)
    assert torch.equal(penalised(logits, seen, penalty), theirs)


def test_what_is_seen_at_each_of_several_positions():
    seen, tokens = seen_in([[4, 2, 4]] * 2, 9, torch.device("cpu")), torch.tensor([[1, 2, 7], [8, 8, 0]])
    each = seen_prefixes(seen, tokens)
    ids = [[place.nonzero().flatten().tolist() for place in row] for row in each]
    assert ids == [[[1, 2, 4], [1, 2, 4], [1, 2, 4, 7]], [[2, 4, 8], [2, 4, 8], [0, 2, 4, 8]]]
    assert seen_in([[4, 2]] * 2, 0, torch.device("cpu")).shape == (2, 0)


def found(engine: Engine, sampling: Sampling, n: int = 3, **fields) -> list[tuple[list[int], list[float]]]:
    samples = engine.generate(PROMPT, request(n, LENGTH, sampling, eos_ids=EOS, **fields))
    return [(each.tokens, each.logprobs) for each in samples]


def same(ours: list, theirs: list) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert [each for _, logprobs in ours for each in logprobs] == pytest.approx(
        [each for _, logprobs in theirs for each in logprobs], abs=1e-4
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_the_plain_loop(model, expected, layout):
    """With fewer rows and at N = 1 too. Log-probabilities are the model's own, without the penalty."""
    sampling, samples = expected
    engine = Engine(model, compile=False)
    for fields in ({}, {"rows_at_once": 1}, {"rows_at_once": 2}):
        same(found(engine, sampling, attention=layout, **fields), samples)
    same(found(engine, sampling, 1, attention=layout), samples[:1])
    assert [tokens for tokens, _ in samples] != [tokens for tokens, _ in found(engine, Sampling(0.9, 20, 0.95))]


@pytest.mark.parametrize("kind", ["layers", "model"])
def test_a_draft_changes_no_sample(model, expected, kind):
    """It proposes without the penalty. The model as its own draft is right but for that."""
    sampling, samples = expected
    engine = Engine(model, compile=False)
    speculation = Speculation(LayersDraft(2) if kind == "layers" else ModelDraft(GQA, lambda *_: model), 3)
    engine.use(speculation, 3)
    speculation.pace.SETTLE, speculation.pace.PATIENCE = 1, 1e9
    same(found(engine, sampling), samples)
    counts = speculation.pace.accepted
    assert speculation.pace.drafted_steps > 2 and counts[0] and (kind == "layers" or any(counts[k] for k in (1, 2, 3)))


@slow
def test_one_compiled_step_serves_every_n(monkeypatch):
    """Traced and guarded as ever, without the C++ compiler. Oracle: the eager step."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, sampling = random_model(replace(GQA, n_layer=1)), SAMPLINGS["drawn"]
    compiled, eager = (Engine(model, compile=mode) for mode in (True, False))
    same(found(compiled, sampling, 5), found(eager, sampling, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (2, 17):
            same(found(compiled, sampling, n), found(eager, sampling, n))


@pytest.mark.parametrize("temperature", [0, 1e-6, 0.8])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_most_extreme_penalties_draw_what_exact_arithmetic_draws(temperature, penalty):
    """Logits as large as 1e4, of both signs, seen and not. Oracle: by hand; all but one token are hopeless."""
    logits, seen = torch.tensor([[1e4, 9e3, -1e4, 8e3, 0.0]]), torch.tensor([[False, True, True, False, True]])
    expected = 1 if penalty < 1 else 0
    for number in (0.0, 0.5, 1 - 2**-53):
        token, logprob = draw(
            logits, torch.tensor([number], dtype=torch.float64), Sampling(temperature, repetition_penalty=penalty), seen
        )
        assert token.item() == expected and logprob.isfinite()


@pytest.mark.parametrize("penalty", [0.0, -1.0, 1e-45, 9e-7, 1.1e6, 1e300, float("nan"), float("inf")])
def test_impossible_penalties_are_refused(penalty):
    message = re.escape(f"repetition_penalty {penalty} must be from 1e-6 to 1e6")
    with pytest.raises(ValueError, match=message):
        Sampling(repetition_penalty=penalty)
