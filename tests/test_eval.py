"""Evaluation. Oracles: one full pass of each sequence without a cache; lm_eval's own `hf` model on the same small
checkpoint; plain loops over windows and draws."""

import contextlib
import importlib.machinery
import io
import itertools
import json
import math
import os
import sys
import types
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ALIBI, GQA, PROMPT, TINY, WINDOW, Letters, full, random_model, random_tokens

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import engine as road
import eval as evaluation
import quantize
import scoring
from checkpoint import read_checkpoint
from engine import Engine
from eval import Evaluator, Texts, main, pass_at, windows
from request import Request, Sampling
from rotary import RopeScaling
from scoring import Scored, Scorer

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
    return [*found, (PROMPT, []), (PROMPT[:1], PROMPT[1:]), ([5], [7]), ([5], [7])]


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
    sequences = [(context, wanted) for context, wanted in items(args) if wanted]
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


def test_an_engine_scores_continuations_and_refuses_an_empty_context():
    engine = Engine(random_model(GQA))
    continuations = [[3], [], [5, 6, 7, 8], [5, 6, 1]]
    for found, each in zip(engine.score(PROMPT, continuations), continuations, strict=True):
        expected = one_pass(engine.model, PROMPT, each) if each else Scored([], True)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-9) and found.greedy == expected.greedy
    with pytest.raises(ValueError, match="a context is empty"):
        engine.score([], [[3]])


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
    return Evaluator(engine, Texts(engine, folder, read_checkpoint(folder).eos_ids), 200)


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
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(instances(requests), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


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
    with mock.patch.object(evaluation, "SHARED_PROMPT", 4):
        read = ours.read
        assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 8 and any(len(text) > 4 for text in expected)
    lengths = [len(ours.cut_prompt(prompt, evaluation.Drawing.parse(given))) for prompt, given in requests]
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
    monkeypatch.setitem(road.LOOK_EVERY, "cpu", look)
    monkeypatch.setattr(evaluation, "SHARED_PROMPT", 4)
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
    """A tree of 200 levels. Oracle: the likeliest token by one pass of the longest prompt."""
    monkeypatch.setattr(evaluation, "SHARED_PROMPT", 1)
    letters = Letters()
    letters.specials = {}
    engine = Engine(random_model(replace(GQA, n_layer=1)), letters, compile=False)
    texts = SimpleNamespace(tokenizer=letters, encode=letters.encode, prefix=0, eos_ids=frozenset())
    story = letters.decode(random_tokens(GQA, 600).tolist())
    evaluator = Evaluator(engine, texts, 200)
    found = evaluator.generate_until([(story[:end], {"max_gen_toks": 1}) for end in range(3, 603, 3)])
    likeliest = full(engine.model, torch.tensor([letters.encode(story)]))[0].argmax(-1).tolist()
    assert found == [letters.decode(likeliest[end - 1 : end]) for end in range(3, 603, 3)]
    assert evaluator.read < 900, "what is shared is read once"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "num_beams are not known"),
        ({"do_sample": True}, "no temperature above 0"),
        ({"max_gen_toks": LIMIT}, "leave no room"),
    ],
)
def test_generation_kwargs_that_are_not_served_are_refused(ours, given, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until([("the", given)])


def test_a_continuation_over_the_limit_is_refused(ours):
    with pytest.raises(ValueError, match=f"over the model's limit of {LIMIT}"):
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
    texts = Texts(engine, TINY, read_checkpoint(TINY).eos_ids)
    for prompt, part in zip(prompts, (lines[:7], lines[7:]), strict=True):
        request = evaluation.Request(7, 4, Sampling(0.6), 3, eos_ids=texts.eos_ids, stop=(",",))
        samples = engine.generate(engine.encode(prompt), request)
        assert [line["completion"] for line in part] == [each.text for each in samples]
        assert [line["mean_logprob"] for line in part] == pytest.approx([each.mean_logprob for each in samples])
        counted = [sum(other["completion"] == line["completion"] for other in part) for line in part]
        assert [line["count"] for line in part] == counted
        assert [line["finish_reason"] for line in part] == [each.finish_reason for each in samples]
    assert max(line["count"] for line in lines) > 1 and not any("," in line["completion"] for line in lines)


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
        ([], "give one of --tasks"),
        (["--perplexity", "text", "--samples", "text"], "give one of --tasks"),
        (["--perplexity", "missing"], "missing is not there"),
        (["--perplexity", "empty"], "empty is empty"),
        (["--perplexity", "bytes"], "is not UTF-8"),
        (["--perplexity", "text", "--stride", "0"], "stride 0"),
        (["--perplexity", "text", "--stride", "999"], "stride 999"),
        (["--perplexity", "text", "--output", "text"], "text is read, and would be replaced"),
        (["--perplexity", "text", "--output", "no/out"], "cannot be written"),
        (["--perplexity", "text", "--checkpoint_path", "missing"], "no checkpoint at missing"),
        (["--samples", "text"], "text, line 1: not JSON"),
        (["--samples", "problems", "-n", "0"], "num_samples 0"),
        (["--samples", "problems", "--max_new_tokens", "9999"], "A: prompt of"),
        (["--samples", "problems", "--limit", "0.5"], "must be a whole number"),
        (["--samples", "second"], "second, line 3: no prompt"),
        (["--samples", "problems", "--limit", "x"], "'x' is neither"),
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


def local_manager():
    from lm_eval.tasks import TaskManager

    return lambda include_path, include_defaults: TaskManager(include_path=include_path, include_defaults=False)


def test_without_the_harness_one_line_says_what_to_install():
    with mock.patch.dict(sys.modules, {"lm_eval": None, "lm_eval.evaluator": None}):
        status, _, err = run("--tasks", "hellaswag")
    assert (status, err) == (2, "error: --tasks needs lm_eval: pip install lm_eval\n")
