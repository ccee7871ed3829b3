"""Evaluation. Oracles: one full pass of each sequence without a cache; lm_eval's own `hf` model on the same small
checkpoint; plain loops over windows and draws."""

import contextlib
import importlib.machinery
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import types
from copy import copy
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ALIBI, GQA, PROMPT, TINY, WINDOW, Letters, full, random_model, random_tokens
from test_cli import run as run_generate

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import eval as evaluation
import quantize
from cli.system import Stream
from engine import prefixes, scheduler, scoring
from engine.engine import Engine
from engine.request import Request, Sampling
from engine.scheduler import seed_of
from engine.scoring import Scored, Scorer
from eval import Evaluator, GenerationArgs, HarnessTokenizer, main, pass_at, windows
from layers.rope import RopeScaling
from loading.checkpoint import read_checkpoint, read_weights
from loading.families import args_from_config

LIMIT = 48
TEXTS = ["Äpfel und Birnen, 3 € das Stück.", "naïve 😀 smile\n", "The cat sat on the mat. " * 9, "x", "", "<s>begun"]


# Sequences against one full pass of each.


def one_pass(model, context, continuation) -> Scored:
    logits = full(model, torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1]
    found = logits.log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation, dtype=torch.long)]
    return Scored(found.tolist(), logits.argmax(-1).tolist() == list(continuation))


def items(args, preamble=37, count=6) -> list[tuple[list[int], list[int]]]:
    """Few-shot items: a preamble, contexts and endings of odd lengths, also single tokens; and sequences that share
    nothing."""
    shared, found = random_tokens(args, preamble).tolist(), []
    for item in range(count):
        context = shared + random_tokens(args, 9 + 5 * item, seed=item + 2).tolist()
        found += [(context, random_tokens(args, size, seed=70 + 9 * item + size).tolist()) for size in (1, 1 + item, 7)]
        found += [(context, [token]) for token in range(3)] + [(context[: item + 1], context[item + 1 : item + 12])]
    return [*found, (PROMPT[:1], PROMPT[1:]), ([5], [7]), ([5], [7])]


@pytest.mark.parametrize("args", [GQA, WINDOW, ALIBI], ids=["gqa", "window", "alibi"])
def test_scores_are_those_of_one_pass_however_sequences_are_grouped(args, monkeypatch):
    model = random_model(args)
    sequences = items(args)
    sequences.append((PROMPT, model_greedy(model, PROMPT, 5)))
    expected = [one_pass(model, *each) for each in sequences]
    assert expected[-1].greedy and not expected[0].greedy
    ways = ((1, 8, 512, 256), (90, 1, 512, 60), (90, 8, 10, 0), (4096, 1, 512, 9999), (4096, 999, 7, 30))
    for batch_tokens, shortest, chunk, small in ways:
        for name, value in (("SHORTEST", shortest), ("CHUNK", chunk), ("SMALL", small)):
            monkeypatch.setattr(scoring, name, value)
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", {"cpu": 5 * args.vocab_size})
        for found, one in zip(Scorer(model, batch_tokens).score(sequences), expected, strict=True):
            assert found.logprobs == pytest.approx(one.logprobs, abs=1e-9) and found.greedy == one.greedy


def model_greedy(model, context, count) -> list[int]:
    tokens = list(context)
    for _ in range(count):
        tokens.append(int(full(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(context) :]


def test_with_dynamic_scaling_each_sequence_is_rotated_by_its_own_length():
    args = replace(GQA, rope_scaling=RopeScaling("dynamic", 2.0, 24))
    model = random_model(args)
    sequences = items(args)
    # The last token is predicted and not read, so the oracle does not read it either.
    for found, (context, wanted) in zip(Scorer(model).score(sequences), sequences, strict=True):
        logits = full(model, torch.tensor([[*context, *wanted[:-1]]]))[0, len(context) - 1 :]
        expected = logits.log_softmax(-1)[torch.arange(len(wanted)), torch.tensor(wanted)]
        assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-9)


def test_what_is_shared_is_read_once():
    model = random_model(GQA)
    shared, own = random_tokens(GQA, 50).tolist(), [random_tokens(GQA, 20, seed=i).tolist() for i in (2, 3, 4)]
    scorer = Scorer(model)
    scorer.score([(shared + each, [token, 2, 3]) for each in own for token in (10, 11)])
    # Of each sequence the last token is not read.
    assert scorer.asked == 6 * 72 and scorer.read == 50 + 3 * 20 + 6 * 2


def test_sequences_that_each_extend_the_last(shallow, monkeypatch):
    """A tree of 200 levels, read as large nodes. Oracle: one pass, since no token sees those after it."""
    monkeypatch.setattr(scoring, "SMALL", 0)
    monkeypatch.setattr(scoring, "SHORTEST", 1)
    model, tokens = random_model(replace(GQA, n_layer=1)), random_tokens(GQA, 602).tolist()
    expected, scorer = one_pass(model, tokens[:1], tokens[1:]).logprobs, Scorer(model)
    ends = range(2, 602, 3)
    for end, found in zip(ends, scorer.score([(tokens[:end], tokens[end : end + 2]) for end in ends]), strict=True):
        assert found.logprobs == pytest.approx(expected[end - 1 : end + 1], abs=1e-9)
    assert scorer.read < 900, "what is shared is read once"


def test_an_engine_scores_continuations():
    engine = Engine(random_model(GQA))
    continuations = [[3], [5, 6, 7, 8], [5, 6, 1]]
    for found, each in zip(engine.score(PROMPT, continuations), continuations, strict=True):
        expected = one_pass(engine.model, PROMPT, each)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-9) and found.greedy == expected.greedy


@pytest.mark.parametrize(
    "context, continuations, message",
    [
        ([], [[3]], "a context is empty"),
        (PROMPT, [[3], []], "a continuation is empty"),  # which would be certain
        ([1], [[-5]], "token -5 is not one of the model's 97"),
        ([1], [[3], [5, 97]], "token 97 is not one of the model's 97"),
        ([1, 99, 2], [[3]], "token 99 is not one of the model's 97"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(context, continuations, message):
    with pytest.raises(ValueError, match=message):
        Engine(random_model(GQA)).score(context, continuations)


@pytest.mark.parametrize("length", [66, 130, 257])
def test_progress_is_told_within_a_long_sequence(length, monkeypatch):
    """Beside a short one. A chunk's scores are those of one pass, whose tokens are predicted as they are read."""
    monkeypatch.setattr(scoring, "CHUNK", 13)
    monkeypatch.setattr(scoring, "SMALL", 40)
    model, told = random_model(GQA), []
    tokens = random_tokens(GQA, length).tolist()
    sequences = [(tokens[:1], tokens[1:]), (tokens[:5], [3]), (tokens[:40], tokens[40:] + [7])]
    scorer = Scorer(model, done=lambda *counts: told.append(counts))
    for asked in (sequences[:1], sequences):  # the second call counts anew
        told.clear()
        for found, each in zip(scorer.score(asked), asked, strict=True):
            assert found.logprobs == pytest.approx(one_pass(model, *each).logprobs, abs=1e-9)
        read, (total, *others) = [each[0] for each in told], {each[1] for each in told}
        assert len(read) >= length // 13 and read == sorted(read) and read[-1] == total >= length - 1 and not others


@pytest.mark.parametrize("length", [1, 6, 7, 8, 29])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_predict_each_token_once_after_all_that_fits(length, stride):
    tokens, limit, predicted = list(range(100, 100 + length)), 7, []
    for context, wanted in windows(tokens, 99, limit, stride):
        end = len(predicted) + len(wanted)
        assert context + wanted == [99, *tokens][max(0, end - limit) : end + 1]
        assert len(wanted) == (min(limit, length) if not predicted else min(stride, length - len(predicted)))
        predicted += wanted
    assert predicted == tokens


# The harness, against its own model.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama as Hugging Face stores it, with a tokenizer of bytes and some merges that puts BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("eval") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("Ġ", "c"), ("Ġc", "at"), ("Ġ", "Ġ")]
    vocabulary = ["<s>", "</s>", *letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=LIMIT, bos_token_id=0,
        eos_token_id=1, initializer_range=0.4, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    engine = Engine.open(folder, "cpu", "float32", compile=False)
    return Evaluator(engine, HarnessTokenizer(engine, folder, read_checkpoint(folder).eos_ids), 200)


@pytest.fixture(scope="module")
def theirs(folder):
    """It imports accelerate, whose part is to launch several processes: for one, names that stand for it are enough."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stubs = {name: types.ModuleType(name) for name in ("accelerate", "accelerate.utils")}
    for name, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for each in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory"):
            setattr(stub, each, None)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        from lm_eval.models.huggingface import HFLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, backend="causal")


def instances(requests) -> list:
    return [SimpleNamespace(args=each, task_name=None) for each in requests]


def test_loglikelihoods_equal_those_of_hf(ours, theirs):
    contexts = ["The cat", "The cat ", "The cat   ", "", " ", "Où est le\n", "the " * 60, "<s>the", "a</s>b", "😀"]
    endings = [" sat", "s", " the the the", "é", "\n", "<s>", " 😀 the cat", "</s>"]
    requests = list(itertools.product(contexts, endings))
    requests.remove(("", "<s>"))  # of which hf scores nothing
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(instances(requests), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


def test_a_continuation_that_melts_into_its_context_is_encoded_alone(ours):
    """ "t" and "h" are one token together, and so are "th" and "e", " c" and "at": hf has nothing to score there, and
    refuses. Oracle: one pass over the tokens of both."""
    model, encode = ours.engine.model, ours.texts.tokenizer.encode
    pairs = [("t", "h"), ("sat th", "e"), ("The c", "at"), ("sat  ", " the")]
    assert all(len(encode(context + more)) <= len(encode(context)) for context, more in pairs[:3])
    for (context, more), found in zip(pairs[:3], ours.loglikelihood(pairs[:3]), strict=True):
        expected = one_pass(model, [0, *encode(context)], encode(more))
        assert found == (pytest.approx(sum(expected.logprobs), abs=1e-4), expected.greedy) and found[0] < 0
    assert ours.loglikelihood([("", "<s>")])[0][0] == pytest.approx(one_pass(model, [0], [0]).logprobs[0], abs=1e-4)


@pytest.mark.parametrize("context", ["", "The cat"])
def test_a_continuation_without_text_is_refused_by_name(ours, context):
    with pytest.raises(ValueError, match="the continuation '' of .* has no tokens"):
        ours.loglikelihood([("The cat", " sat"), (context, "")])


def test_rolling_loglikelihoods_equal_those_of_hf(ours, theirs):
    requests = [(text,) for text in TEXTS]
    expected = theirs.loglikelihood_rolling(instances(requests), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


GENERATION = [
    {"until": ["\n"], "max_gen_toks": 9},
    {"until": "e", "max_new_tokens": 20, "do_sample": False, "temperature": 0.7},
    {"until": ["Z", "é"], "max_gen_toks": 17},
    {"max_tokens": 5},
]


def test_generated_texts_equal_those_of_hf(ours, theirs):
    """Distinct prompts, one that is asked for twice, ones that begin alike, and one that is too long."""
    prompts = ["The cat", "Où", "the " * 60, "", "The cat", "a cat, the cat, " * 2 + "x", "a cat, the cat, " * 2 + "y"]
    requests = [(prompt, given) for given in GENERATION for prompt in prompts]
    copies = [(prompt, json.loads(json.dumps(given))) for prompt, given in requests]  # hf adds to `until`
    expected = theirs.generate_until(instances(copies), disable_tqdm=True)
    with mock.patch.object(prefixes, "ROOT", 4), mock.patch.object(prefixes, "GROUP", 4):
        read = ours.read
        assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 8 and any(len(text) > 4 for text in expected)
    lengths = [len(ours.cut_prompt(prompt, evaluation.GenerationArgs.parse(given))) for prompt, given in requests]
    assert ours.read - read < sum(lengths) - sum(lengths[4::7]), (
        "neither shared beginnings nor equal prompts are reread"
    )


def test_several_requests_for_one_prompt_are_its_samples(ours):
    given = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
    texts = ours.generate_until([("The cat", given), ("the", given), ("The cat", given), ("The cat", given)])
    assert len({texts[0], texts[2], texts[3]}) > 1
    assert texts == ours.generate_until([("The cat", given), ("the", given), ("The cat", given), ("The cat", given)])


@pytest.mark.parametrize("look", [1, 8])
def test_long_texts_are_those_of_each_prompt_alone(monkeypatch, look):
    """Past 256 tokens, in fp64, with what prompts share read once. Oracle: the engine's own sample of each."""
    monkeypatch.setitem(scheduler.SYNC_EVERY, "cpu", look)
    monkeypatch.setattr(prefixes, "GROUP", 4)
    letters = Letters()
    letters.specials = {}
    engine = Engine(random_model(replace(GQA, n_layer=1)), letters, compile=False)
    texts = SimpleNamespace(tokenizer=letters, encode=letters.encode, prefix=0, eos_ids=frozenset())
    prompts = ["Once upon a time, a cat", "Once upon a time, a dog", "Tom"]
    found = Evaluator(engine, texts, 200).generate_until([(each, {"max_gen_toks": 261}) for each in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        (sample,) = engine.generate(letters.encode(prompt), Request(1, 261, Sampling(0)))
        assert text == letters.decode(sample.tokens) and len(text) == 261


def test_texts_after_prompts_that_each_extend_the_last(shallow, monkeypatch):
    """A tree of 200 levels, of which a root and one group are shared. Oracle: the likeliest token by one pass of the
    longest prompt."""
    monkeypatch.setattr(prefixes, "GROUP", 1)
    letters = Letters()
    letters.specials = {}
    engine = Engine(random_model(replace(GQA, n_layer=1)), letters, compile=False)
    texts = SimpleNamespace(tokenizer=letters, encode=letters.encode, prefix=0, eos_ids=frozenset())
    story = letters.decode(random_tokens(GQA, 600).tolist())
    evaluator = Evaluator(engine, texts, 200)
    found = evaluator.generate_until([(story[:end], {"max_gen_toks": 1}) for end in range(3, 603, 3)])
    likeliest = full(engine.model, torch.tensor([letters.encode(story)]))[0].argmax(-1).tolist()
    assert found == [letters.decode(likeliest[end - 1 : end]) for end in range(3, 603, 3)]
    assert evaluator.read < 0.6 * evaluator.asked, "what is shared is read once"


def test_the_name_of_a_control_token_ends_a_text(ours):
    """Which has no text of its own: <s>, id 0, beside the model's own </s>, id 1."""
    drawing = GenerationArgs.parse({"until": ["<s>"], "max_gen_toks": 40, "temperature": 5.0})
    samples = ours.engine.generate(ours.texts.encode("the"), ours.request("the", drawing, 99))
    assert {0, 1} == {sample.tokens[-1] for sample in samples if sample.finish_reason == "eos"}


def flat_evaluator(seed: int = 3) -> Evaluator:
    """Its network says the same of every token: what is drawn is a function of the random numbers alone."""
    letters = Letters()
    letters.specials = {}
    model = random_model(replace(GQA, n_layer=1))
    for parameter in model.parameters():
        parameter.zero_()
    texts = SimpleNamespace(tokenizer=letters, encode=letters.encode, prefix=0, eos_ids=frozenset())
    return Evaluator(Engine(model, letters, compile=False), texts, 200, seed=seed)


def test_no_two_requests_for_text_share_random_numbers():
    """Contexts of one length, and one context that is drawn from in several ways; samples of one request neither."""
    asked = {"until": [], "max_gen_toks": 67, "temperature": 1.0}
    ways = (asked, asked | {"max_gen_toks": 66}, asked | {"temperature": 0.9}, asked | {"until": ["~~~~~~~~"]})
    requests = [(context, way) for way in ways for context in ("a cat", "a dog", "Peter") for _ in range(3)]
    found = flat_evaluator().generate_until(requests)
    assert len({text[:9] for text in found}) == len(requests) == 36
    assert flat_evaluator().generate_until(requests[::-1]) == [
        *itertools.chain(*(found[at : at + 3] for at in range(33, -1, -3)))
    ]
    assert not set(found) & set(flat_evaluator(4).generate_until(requests))


NEUTRAL = {
    "num_beams": 1, "early_stopping": False, "length_penalty": 1.0, "num_return_sequences": 1, "use_cache": True,
    "top_k": -1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "temperature": None, "max_tokens": None, "nonsense": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_generation_kwargs_that_change_nothing_pass(name):
    base = {"until": ["\n"], "max_gen_toks": 20}
    assert GenerationArgs.parse(base | {name: NEUTRAL[name]}) == GenerationArgs.parse(base)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    given = {"temperature": "7e-1", "top_p": "0.5", "max_gen_toks": "20", "top_k": 5.0, "until": "5"}
    assert GenerationArgs.parse(given) == GenerationArgs(("5",), 20, Sampling(0.7, 5, 0.5))


def test_all_that_is_wrong_in_generation_kwargs_is_named_at_once():
    wrong = {
        "num_beams": 4, "nonsense": True, "top_p": "high", "until": 5, "do_sample": "no", "temperature": [1],
        "top_k": 2.5, "min_p": True, "max_gen_toks": 0, "max_tokens": 1e400, "repetition_penalty": 10**400,
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        GenerationArgs.parse(wrong | {"early_stopping": False, "max_new_tokens": 5})
    assert [part.split()[0] for part in str(error.value).removeprefix("generation_kwargs: ").split("; ")] == [*wrong]
    with pytest.raises(ValueError, match=r"until \['a', 5\] is not a text or a list of texts"):
        GenerationArgs.parse({"until": ["a", 5]})


def test_a_stop_string_is_searched_and_cut_in_one_rendering():
    """SentencePiece drops the space that a text begins with, and so does hf: there " girl" has not come. Oracle: the
    text without stop strings, cut. Past 66 tokens."""
    engine = Engine.open(TINY, "cpu", "float32", compile=False)
    evaluator = Evaluator(engine, HarnessTokenizer(engine, TINY, read_checkpoint(TINY).eos_ids), 1024)
    prompt, length = "Once upon a time, there was a little", {"max_gen_toks": 67, "do_sample": False}
    (free,) = evaluator.generate_until([(prompt, length)])
    words = free.split(" ")
    assert len(words) > 40 and not free.startswith(" ")
    stops = [" " + words[0], words[0], " " + words[1], words[5] + " " + words[6], " " + words[-1], free[:1]]
    found = evaluator.generate_until([(prompt, length | {"until": [stop]}) for stop in stops])
    assert found == [free.split(stop)[0] for stop in stops]
    assert evaluator.generate_until([(prompt, length | {"until": stops[2:4]})]) == [min(found[2:4], key=len)]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "num_beams 4 is not supported"),
        ({"do_sample": True}, "without a temperature above 0"),
        ({"max_gen_toks": LIMIT}, "leave no room"),
    ],
)
def test_generation_kwargs_that_are_not_served_are_refused(ours, given, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until([("the", given)])


YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES = {
    "none": (None, LIMIT), "linear": ({"rope_type": "linear", "factor": 4.0}, LIMIT),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 4 * LIMIT),
    "yarn": (YARN | {"original_max_position_embeddings": LIMIT}, 4 * LIMIT),
    "yarn, stretched": (YARN | {"original_max_position_embeddings": LIMIT // 4}, LIMIT),
}  # fmt: skip


@pytest.mark.parametrize("scaling,reach", ROPES.values(), ids=ROPES)
def test_windows_are_as_long_as_the_harness_makes_them(folder, ours, theirs, scaling, reach, monkeypatch):
    """Oracle: the harness's own length, asked of transformers' config. The model may reach further."""
    from transformers import LlamaConfig

    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}
    del config["rope_parameters"]
    args = args_from_config(config)
    monkeypatch.setattr(theirs.model, "config", LlamaConfig.from_dict(config | {"rope_scaling": copy(scaling)}))
    found = Evaluator(Engine(random_model(args)), ours.texts, 200)
    assert found.limit == theirs.max_length == LIMIT and args.context_limit == reach


def test_a_continuation_over_the_limit_is_refused(ours):
    with pytest.raises(ValueError, match=f"exceeds the model's limit of {LIMIT}"):
        ours.loglikelihood([("a", "b" * (LIMIT + 1))])


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
num_fewshot: 1
fewshot_split: train
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ctx}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "drawn": """
output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 7, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, ours):
    folder = tmp_path_factory.mktemp("tasks")
    words = ["the", "cat", "Äpfel", "sat", "😀", "on", "mat", "naïve"]
    docs = []
    for item in range(11):
        said = [words[(item * 3 + i * i) % 8] for i in range(4 + item % 5)]
        context = " ".join(said)
        endings = [" ".join(reversed(said))[: 4 + item], words[item % 8], "the cat sat"]
        # Every other target is what the model says.
        target = "no" if item % 2 else ours.generate_until([(context, {"until": ["e", "\n"], "max_gen_toks": 7})])[0]
        docs.append({"ctx": context, "endings": endings, "label": item % 3, "target": target})
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)), "utf-8")
    files = f"{{train: {folder / 'docs.jsonl'}, test: {folder / 'docs.jsonl'}}}"
    for name, text in TASKS.items():
        source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(source + text, "utf-8")
    return folder


def run(*arguments) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("error,status", [(OSError(28, "No space left on device"), 2), (BrokenPipeError(), 0)])
@pytest.mark.parametrize("mode", ["perplexity", "pass_at"])
def test_results_are_written_where_stdout_takes_nothing(tmp_path, mode, error, status, capsys):
    """Not even one line, as where it is not buffered. Oracle: the results without an output that fails."""
    (tmp_path / "text").write_text("Once upon a time there was a cat.")
    line = {"task_id": "a", "completion": "x", "mean_logprob": -1.0, "passed": True}
    (tmp_path / "scored").write_text(json.dumps(line) + "\n")
    modes = {"perplexity": ["--perplexity", tmp_path / "text", "--dtype", "float32"]}
    flags = modes.get(mode, ["--pass_at", "1", "--scored", tmp_path / "scored"])
    flags = [str(each) for each in (*flags, "--quiet", "--output")]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    with mock.patch.object(sys, "stdout", Stream(mock.Mock(write=mock.Mock(side_effect=error)))):
        assert main([*flags, str(tmp_path / "kept")]) == status
    told = capsys.readouterr().err
    assert ("stdout cannot be written (No space left" in told) == (status == 2) == (told != "")
    kept, whole = (json.loads((tmp_path / name).read_text()) for name in ("kept", "whole"))
    assert {name: kept[name] for name in kept if name != "engine"} == {
        name: whole[name] for name in whole if name != "engine"
    }


def test_tasks_have_the_results_of_hf_and_its_table(folder, tasks, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets.config
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        expected = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    output = tmp_path / "results.json"
    where = ("--checkpoint_path", folder, "--include_path", tasks, "--output", output)
    status, out, err = run(*where, "--tasks", *TASKS, "--dtype", "float32", "--device", "cpu", "--batch_tokens", 300)
    assert status == 0, err
    report = json.loads(output.read_text("utf-8"))
    assert report["results"].keys() == set(TASKS)
    for name, values in expected.items():
        for metric, value in values.items():
            exact = isinstance(value, str) or metric.startswith(("acc", "exact_match"))
            assert report["results"][name][metric] == (value if exact else pytest.approx(value, rel=1e-5)), metric
    assert 0 < report["results"]["drawn"]["exact_match,none"] < 1
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == "Tasks" and [name for name in rows[2:] if name] == sorted(expected)
    assert report["engine"]["tokens_saved"] > 0 and "sharing saved" in err


def test_a_limit_and_few_shots_reach_the_harness(folder, tasks, tmp_path):
    pytest.importorskip("lm_eval")
    output = tmp_path / "results.json"
    where = ("--checkpoint_path", folder, "--include_path", tasks, "--output", output, "--quiet")
    status, _, err = run(*where, "--tasks", "ch*", "--limit", 3, "--num_fewshot", 0, "--dtype", "float32")
    assert status == 0, err
    report = json.loads(output.read_text("utf-8"))
    assert report["n-shot"]["choice"] == 0 and report["n-samples"]["choice"]["effective"] == 3


# What is built in.


def test_perplexity_is_that_of_plain_loops(folder, ours, tmp_path):
    (tmp_path / "text").write_text("The cat sat on the mät. " * 8, "utf-8")
    data = (tmp_path / "text").read_bytes()
    tokens = ours.texts.tokenizer.encode(data.decode("utf-8"))
    for stride in (None, 20):
        nats, begin = 0.0, 0
        while begin < len(tokens):
            size = LIMIT if begin == 0 else stride or LIMIT
            wanted = tokens[begin : begin + size]
            context = [0, *tokens[:begin]][-(LIMIT + 1 - len(wanted)) :]
            nats -= sum(one_pass(ours.engine.model, context, wanted).logprobs)
            begin += size
        given = [] if stride is None else ["--stride", stride]
        status, out, err = run(
            "--checkpoint_path", folder, "--dtype", "float32", "--perplexity", tmp_path / "text",
            "--output", tmp_path / "out.json", *given,
        )  # fmt: skip
        assert status == 0, err
        report = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(data), rel=1e-5)
        assert report["perplexity"] == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)
        assert report["nats_per_token"] == pytest.approx(nats / len(tokens), rel=1e-5)
        assert "bits_per_byte" in out


def test_a_quantised_model_is_evaluated(tmp_path):
    """Oracle: the dequantised network's one pass."""
    (tmp_path / "text").write_text("Once upon a time there was a little dog.", "utf-8")
    model = tmp_path / "model" / "int8.pth"
    model.parent.mkdir()
    assert quantize.main(["--checkpoint_path", str(TINY), "--mode", "int8", "--output", str(model)]) == 0
    output = tmp_path / "out.json"
    status, _, err = run(
        "--checkpoint_path", model, "--dtype", "float32", "--perplexity", tmp_path / "text", "--output", output
    )  # fmt: skip
    assert status == 0, err
    engine = Engine.open(model, "cpu", "float32", compile=False)
    bos, *tokens = engine.encode("Once upon a time there was a little dog.")
    expected = -sum(one_pass(engine.model, [bos], tokens).logprobs) / len(tokens)
    assert json.loads(output.read_text("utf-8"))["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_samples_are_lines_that_a_scorer_reads(tmp_path):
    """Oracle: the engine's own samples; a text that came several times has as many lines, each with their number."""
    prompts = ["Once upon a time", "The dog"]
    problems = [{"task_id": f"T/{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "problems").write_text("\n".join(map(json.dumps, problems)), "utf-8")
    output = tmp_path / "samples.jsonl"
    status, _, err = run(
        "--samples", tmp_path / "problems", "-n", 7, "--temperature", 0.6, "--max_new_tokens", 4, "--seed", 3,
        "--stop", ",", "--output", output, "--no-compile", "--dtype", "float32",
    )  # fmt: skip
    assert status == 0, err
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["task_id"] for line in lines] == ["T/0"] * 7 + ["T/1"] * 7
    engine = Engine.open(TINY, "cpu", "float32", compile=False)
    texts = HarnessTokenizer(engine, TINY, read_checkpoint(TINY).eos_ids)
    for prompt, part in zip(prompts, (lines[:7], lines[7:]), strict=True):
        seed = seed_of(3, part[0]["task_id"])
        request = evaluation.Request(7, 4, Sampling(0.6), seed, eos_ids=texts.eos_ids, stop=(",",))
        samples = engine.generate(engine.encode(prompt), request)
        assert [line["completion"] for line in part] == [each.text for each in samples]
        assert [line["mean_logprob"] for line in part] == pytest.approx([each.mean_logprob for each in samples])
        counted = [sum(other["completion"] == line["completion"] for other in part) for line in part]
        assert [line["count"] for line in part] == counted
        assert [line["finish_reason"] for line in part] == [each.finish_reason for each in samples]
    assert max(line["count"] for line in lines) > 1 and not any("," in line["completion"] for line in lines)


def test_problems_of_one_prompt_have_samples_of_their_own(tmp_path):
    """Eight ids, of which a second run has some, in another order: the same samples of each. At this temperature the
    random numbers alone say what is drawn. Longer than 66 tokens."""
    flags = ["-n", 3, "--max_new_tokens", 67, "--temperature", 500, "--seed", 5, "--dtype", "float32", "--no-compile"]
    found = []
    for ids in (["a", "b", 1, "1", 2, 3, 4, 5], [5, "b"]):
        problems = [json.dumps({"task_id": id, "prompt": "Once upon a time"}) for id in ids]
        (tmp_path / "problems").write_text("\n".join(problems), "utf-8")
        output = tmp_path / f"{len(ids)}.jsonl"
        status, _, err = run("--samples", tmp_path / "problems", "--output", output, *flags, "--stop", "no such text")
        assert status == 0, err
        lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        found.append([(each["task_id"], each["completion"], each["mean_logprob"]) for each in lines])
    whole, part = found
    assert len({text for _, text, _ in whole}) == len(whole) == 24
    assert [each[:2] for each in part] == [each[:2] for each in whole[21:] + whole[3:6]]
    for (*_, one), (*_, other) in zip(part, whole[21:] + whole[3:6], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The story model's first 300 tokens, beside its whole tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    config = json.loads((TINY / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    weights = read_weights(read_checkpoint(TINY))
    state = {name: t[:300].clone() if len(t) == 2048 else t.clone() for name, t in weights.items()}
    torch.save(state, folder / "model.pth")
    return folder


@pytest.mark.parametrize("mode", ["--perplexity", "--samples", "loglikelihood"])
def test_ids_beyond_the_embedding_are_refused_by_name(foreign, mode, tmp_path):
    told = "one of the model's 300: use the model's own tokenizer"
    if mode == "loglikelihood":
        engine = Engine.open(foreign, "cpu", "float32", compile=False)
        evaluator = Evaluator(engine, HarnessTokenizer(engine, foreign, frozenset([2])), 1024)
        for request in (("Once upon a time", " there"), ("a", " upon a time"), ("", "Once")):
            with pytest.raises(ValueError, match=told):
                evaluator.loglikelihood([("a", "b"), request])
        return
    (tmp_path / "text").write_text(json.dumps({"task_id": "A", "prompt": "Once upon a time"}))
    flags = ["--checkpoint_path", foreign, "--dtype", "float32", "--output", tmp_path / "out"]
    status, out, err = run(mode, tmp_path / "text", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["--perplexity", "--samples"])
def test_logits_that_are_not_finite_name_the_file_and_the_dtype(mode, tmp_path):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    state = {name: t * (1e9 if name == "norm.weight" else 1) for name, t in read_weights(read_checkpoint(TINY)).items()}
    torch.save(state, tmp_path / "model.pth")
    (tmp_path / "text").write_text(json.dumps({"task_id": "A", "prompt": "Once upon a time"}))
    flags = ["--checkpoint_path", tmp_path, "--dtype", "float16", "--output", tmp_path / "out"]
    status, out, err = run(mode, tmp_path / "text", *flags, "--no-compile")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "model.pth in float16: the logits are not finite" in err and "pass --dtype bfloat16 or float32" in err


@pytest.mark.parametrize(
    "arguments, kept",
    [
        (["--perplexity", "text"], "there are no results"),
        (
            ["--samples", "text", "--output", "out"],
            "out holds what is finished: the same command with --resume continues",
        ),
    ],
)
def test_ctrl_c_is_one_line(arguments, kept, tmp_path, monkeypatch):
    """As Python's handler raises it, in the model's first pass."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(json.dumps({"task_id": "A", "prompt": "Once upon a time"}))
    stopped = mock.Mock(side_effect=lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("model.Transformer.hidden", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(*arguments, "--dtype", "float32", "--no-compile") == (130, "", f"\ninterrupted: {kept}\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.called


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_grows_within_a_window_and_is_cleared_before_what_is_told(monkeypatch, tmp_path):
    """Also before an error."""
    monkeypatch.setattr(scoring, "CHUNK", 32)
    (tmp_path / "text").write_text("Once upon a time there was a little dog. " * 30)
    arguments = ["--perplexity", str(tmp_path / "text"), "--dtype", "float32"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(Terminal()) as screen:
        assert main(arguments) == 0
        monkeypatch.setattr(scoring, "check_finite", mock.Mock(side_effect=[None] * 100 + [FloatingPointError("bad")]))
        assert main(arguments) == 2
    first, last = screen.getvalue().split("tokens/s")
    shares = [len(bar) for bar in re.findall(r"\[(#*) *\] \d+/\d+ tokens", first)]
    assert len(set(shares)) > 9 and shares == sorted(shares)
    assert re.search(r"left\r +\r", first) and re.search(r"left\r +\rerror: ", last)


PROBLEMS = {"T/0": "Once upon a time", "T/1": "The dog", "T/2": "A big red ball", "T/3": "Tom"}


@pytest.fixture
def drawing(tmp_path, monkeypatch) -> list[object]:
    """The flags that draw three samples of each problem, in fp32."""
    lines = (json.dumps({"task_id": id, "prompt": prompt}) for id, prompt in PROBLEMS.items())
    (tmp_path / "problems").write_text("\n".join(lines), "utf-8")
    monkeypatch.chdir(tmp_path)
    flags = ["--samples", tmp_path / "problems", "-n", 3, "--max_new_tokens", 5, "--temperature", 1.5]
    return [*flags, "--no-compile", "--dtype", "float32"]


def test_samples_that_are_there_are_not_replaced(drawing, tmp_path):
    """Of another command, a file of the user, the default's name too."""
    (tmp_path / "samples.jsonl").write_text("mine\n")
    for flags, words in (
        ([], "samples.jsonl already exists: pass --resume"),
        (["--output", tmp_path / "samples.jsonl"], "samples.jsonl already exists: pass --resume"),
        (["--resume"], "samples.jsonl has no header of a batch"),
    ):
        status, _, err = run(*drawing, *flags)
        assert (status, err.count("\n")) == (2, 1) and words in err
    assert (tmp_path / "samples.jsonl").read_text() == "mine\n"
    status, _, err = run("--perplexity", tmp_path / "problems", "--resume")
    assert status == 2 and "--resume continues --samples" in err


@pytest.mark.parametrize("left", [0, 1, 3, 5, 12])
def test_samples_go_on_where_they_were_stopped(drawing, tmp_path, left):
    """After so many lines and a part of the next one. Oracle: the whole file."""
    whole, output = tmp_path / "whole", tmp_path / "o.jsonl"
    assert run(*drawing, "--seed", 3, "--output", whole)[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:left]) + (lines[left][:9] if left < len(lines) else b""))
    seed = [] if left > 2 else ["--seed", 3]  # which the header has
    status, _, err = run(*drawing, *seed, "--output", output, "--resume")
    assert status == 0, err
    assert f"{left // 3} of them done before" in err or left < 3
    found, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (output, whole))
    for one, other in zip(found, expected, strict=True):
        assert one.pop("mean_logprob") == pytest.approx(other.pop("mean_logprob"), abs=1e-4) and one == other
    assert [line["task_id"] for line in found] == [id for id in PROBLEMS for _ in range(3)]
    for flags, word in (
        (["--temperature", 0.9], "temperature 1.5"),
        (["--seed", 4], "seed 3"),
        (["-n", 4], "num_samp"),
    ):
        status, _, err = run(*drawing, *flags, "--output", output, "--resume")
        assert status == 2 and f"was begun with {word}" in err


@pytest.mark.parametrize("top", [None, 1])
def test_pass_at_reads_what_a_batch_wrote(tmp_path, top):
    """Lines of generate.py --prompts, to which a scorer has added `passed`. Oracle: the counts of the lines; where some
    samples are not among them there is none."""
    prompts, drawn = tmp_path / "p", tmp_path / "o"
    prompts.write_text("".join(json.dumps({"id": id, "prompt": prompt}) + "\n" for id, prompt in PROBLEMS.items()))
    flags = ["--dtype", "float32", "-n", 6, "--max_new_tokens", 3, "--seed", 2, "--temperature", 1.2, "--output", drawn]
    assert run_generate("--prompts", prompts, *flags, *([] if top is None else ["--top", top])).returncode == 0
    header, *lines = map(json.loads, drawn.read_text("utf-8").splitlines())
    scored = [line | {"passed": len(line["text"]) % 2 == 0} for line in lines]
    (tmp_path / "scored").write_text("".join(json.dumps(line) + "\n" for line in (header, *scored)), "utf-8")
    status, out, err = run("--pass_at", 2, "--scored", tmp_path / "scored")
    if top is not None:
        assert status == 2 and "of 6 samples: draw without --top" in err
        return
    assert status == 0, err
    passed = {id: sum(line["count"] for line in scored if line["id"] == id and line["passed"]) for id in PROBLEMS}
    assert 0 < sum(passed.values()) < 24 and max(line["count"] for line in lines) > 1
    rate = sum(1 - math.comb(6 - each, 2) / math.comb(6, 2) for each in passed.values()) / 4
    found = dict(line.split() for line in out.splitlines())
    assert float(found["pass@2"]) == pytest.approx(rate, abs=1e-4)
    assert (found["problems"], found["samples"]) == ("4", "24")


def test_pass_at_k_is_the_share_of_draws_that_pass():
    for n, passed, k in ((5, 0, 2), (5, 2, 1), (6, 2, 3), (6, 5, 3), (4, 4, 4)):
        draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        assert pass_at(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("merged", [False, True])
def test_pass_at_counts_a_text_as_often_as_it_was_drawn(merged, tmp_path):
    """Problem a: six samples, of which one text, drawn three times, passes and is third by its mean; b: none passes."""
    drawn = [
        ("a", "x", -0.1, False, 2),
        ("a", "y", -0.5, False, 1),
        ("a", "z", -0.9, True, 3),
        ("b", "w", -1, False, 6),
    ]
    lines = [
        {"task_id": task, "completion": text, "mean_logprob": mean - 0.01 * i, "passed": passed, "count": count}
        for task, text, mean, passed, count in drawn
        for i in range(1 if merged else count)
    ]
    (tmp_path / "scored").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    output = tmp_path / "out.json"
    status, out, err = run("--pass_at", "1,2,3", "--scored", tmp_path / "scored", "--output", output)
    assert status == 0, err
    report = json.loads(output.read_text("utf-8"))
    assert report["pass@1"] == pytest.approx(0.25) and report["pass@2"] == pytest.approx((1 - 3 / 15) / 2)
    assert (report["pass@top-1"], report["pass@top-2"], report["pass@top-3"]) == (0, 0, 0.5)
    assert "pass@top-3  0.5000" in out


def test_the_best_of_k_is_no_text_that_was_cut(tmp_path):
    """Without finish_reason, as in older files, by the mean alone."""
    drawn = {"x": ("length", -0.1, False), "y": ("stop", -0.9, True), "z": (None, -0.5, False)}
    lines = [scored(completion=x, finish_reason=f, mean_logprob=m, passed=p) for x, (f, m, p) in drawn.items()]
    older = [json.dumps({k: v for k, v in json.loads(line).items() if k != "finish_reason"}) for line in lines]
    for written, best in ((lines[:2], "1.0000"), (lines, "0.0000"), (older[:2], "0.0000")):
        (tmp_path / "scored").write_text("\n".join(written), "utf-8")
        status, out, err = run("--pass_at", "1", "--scored", tmp_path / "scored")
        assert status == 0 and f"pass@top-1  {best}" in out, (out, err)


def scored(**fields) -> str:
    return json.dumps({"task_id": "a", "completion": "x", "mean_logprob": -1.0, "passed": True} | fields)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "pass one of --tasks"),
        (["--perplexity", "text", "--samples", "text"], "pass one of --tasks"),
        (["--perplexity", "missing"], "missing not found: pass an existing file"),
        (["--perplexity", "empty"], "empty is empty"),
        (["--perplexity", "bytes"], "is not UTF-8"),
        (["--perplexity", "text", "--stride", "0"], "stride 0"),
        (["--perplexity", "text", "--stride", "999"], "stride 999"),
        (["--perplexity", "text", "--output", "text"], "text is an input and would be overwritten"),
        (["--perplexity", "text", "--output", "no/out"], "cannot be written"),
        (["--perplexity", "text", "--checkpoint_path", "missing"], "checkpoint missing not found"),
        (["--samples", "text"], "text, line 1: not JSON"),
        (["--samples", "problems", "-n", "0"], "num_samples 0"),
        (["--samples", "problems", "--max_new_tokens", "9999"], "A: prompt of"),
        (["--samples", "problems", "--limit", "0.5"], "must be a whole number"),
        (["--samples", "second"], "second, line 3: no prompt"),
        (["--samples", "problems", "--limit", "x"], "'x' is neither"),
        (["--tasks", "any", "--limit", "inf"], "'inf' is neither"),
        (["--tasks", "any", "--limit", "1e999"], "'1e999' is neither"),
        (["--tasks", "any", "--limit", "nan"], "'nan' is neither"),
        (["--samples", "twice"], 'twice has task_id "A" 2 times: list each once, -n draws more of it'),
        (["--pass_at", "1"], "--pass_at and --scored go together"),
        (["--pass_at", "0,1", "--scored", "scored"], "is not a list of whole numbers"),
        (["--pass_at", "3", "--scored", "scored"], "a has 2 samples, pass@3 needs 3"),
        (["--pass_at", "1", "--scored", "unscored"], "unscored, line 2: no passed"),
        (["--pass_at", "1", "--scored", "torn"], "the same text of a has passed and has not"),
        (["--tasks", "nosuchtask", "--include_path", "no"], "--include_path no is not a folder"),
        (["--batch_tokens", "0", "--perplexity", "text"], "batch_tokens 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Once upon a time")
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    (tmp_path / "problems").write_text('{"task_id": "A", "prompt": "x"}')
    (tmp_path / "twice").write_text('{"task_id": "A", "prompt": "x"}\n{"task_id": "B", "prompt": "x"}\n' * 2)
    (tmp_path / "second").write_text('{"task_id": "A", "prompt": "x"}\n\n{"task_id": "B"}\n')
    (tmp_path / "scored").write_text(f"{scored()}\n{scored(completion='y')}\n")
    (tmp_path / "unscored").write_text(f"{scored()}\n{scored(passed=None)}\n")
    (tmp_path / "torn").write_text(f"{scored()}\n{scored(passed=False)}\n")
    status, out, err = run(*arguments)
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_a_task_that_is_not_known_or_not_right_is_one_line(tmp_path, folder):
    pytest.importorskip("lm_eval")
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: nosuch\n")
    manager = mock.patch("lm_eval.tasks.TaskManager", side_effect=local_manager())
    with manager:  # the harness's own tasks take seconds to list
        for name, message in (("nosuchtask", "task nosuchtask is not known"), ("bad", "bad cannot be loaded")):
            status, _, err = run("--tasks", name, "--include_path", tmp_path, "--checkpoint_path", folder)
            assert status == 2 and err.count("\n") == 1 and message in err, err
    (tmp_path / "unnamed.yaml").write_text("task: null\ndataset_path: json\n")  # which cannot be sorted by its name
    status, _, err = run("--tasks", "bad", "--include_path", tmp_path, "--checkpoint_path", folder)
    assert status == 2 and err.count("\n") == 1 and "bad cannot be loaded" in err, err


GENERATING = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: {metric}}}]
"""


def test_tasks_that_cannot_be_run_are_refused_before_anything_is_loaded_or_scored(tmp_path, folder, monkeypatch):
    """Every one is named, with all that is wrong with it; a length that needs the model's limit, before any request."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "docs").write_text(json.dumps({"ctx": "the", "target": " cat"}))
    given = {
        "beams": {"generation_kwargs": {"until": ["."], "num_beams": 4, "top_p": "high"}},
        "none": {"generation_kwargs": {"until": [5], "num_beams": 1, "top_k": None}},
        "unsafe": {"unsafe_code": True},
        "long": {"generation_kwargs": {"until": ["."], "max_gen_toks": LIMIT}},
    }
    for name, fields in given.items():
        text = GENERATING.format(docs=tmp_path / "docs", kind="generate_until", metric="exact_match")
        (tmp_path / f"{name}.yaml").write_text(text + "\n".join(f"{k}: {json.dumps(v)}" for k, v in fields.items()))
    text = GENERATING.format(docs=tmp_path / "docs", kind="loglikelihood", metric="acc")
    (tmp_path / "scored.yaml").write_text(text)
    for path in tmp_path.glob("*.yaml"):
        path.write_text(f"task: {path.stem}\n" + path.read_text())
    beams = "task beams: generation_kwargs: num_beams 4 is not supported; top_p 'high' is not a number"
    cases = [
        (["scored", "none", "beams"], "no/such/model", [beams, "task none: generation_kwargs: until [5] is"]),
        (["scored", "unsafe"], "no/such/model", ["tasks unsafe run generated code", "draw with --samples"]),
        (["scored", "long"], folder, [f"{LIMIT} new tokens leave no room in the model's limit of {LIMIT}"]),
    ]
    monkeypatch.setattr(Evaluator, "loglikelihood", mock.Mock(side_effect=AssertionError("scored")))
    for names, model, messages in cases:
        where = ("--include_path", tmp_path, "--checkpoint_path", model, "--dtype", "float32")
        status, out, err = run("--tasks", *names, *where)
        told = err.splitlines()[-1]  # what datasets shows of its reading comes before
        assert (status, out) == (2, "") and told.startswith("error: "), err
        assert all(message in told for message in messages), told


def local_manager():
    from lm_eval.tasks import TaskManager

    return lambda include_path, include_defaults: TaskManager(include_path=include_path, include_defaults=False)


def test_without_the_harness_one_line_says_what_to_install():
    with mock.patch.dict(sys.modules, {"lm_eval": None, "lm_eval.evaluator": None}):
        status, _, err = run("--tasks", "hellaswag")
    assert (status, err) == (2, "error: --tasks needs lm_eval: pip install lm_eval\n")
