"""Evaluation with one engine: EleutherAI harness tasks, perplexity of a text, N samples per problem, pass@k.

    python eval.py --checkpoint_path checkpoints/tiny --tasks TASK --include_path FOLDER
    python eval.py --perplexity FILE
    python eval.py --samples HumanEval.jsonl -n 20 --output samples.jsonl
    python eval.py --pass_at 1,5,10 --scored samples.jsonl_results.jsonl

Prefixes that requests share are read once (scoring.py). Results go to stdout and to --output, all else to stderr. No
generated code is run here: a scorer of your choice marks each sample as passed or not.
"""

import sys

from cli.system import INTERRUPTED, begin, check_new, check_writable, finish, print_error, start

if __name__ == "__main__":
    start()
    begin("--quiet" in sys.argv)

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from cli.console import Bar, settings_of
from cli.jobs import (
    Output,
    check_header,
    digest_of,
    end_output,
    make_header,
    open_output,
    parse_json,
    read_begun,
)
from cli.options import OneLineParser, as_number, as_switch, as_texts, as_whole, changed, unescaped
from cli.ranks import Ranks, join, lost_rank, restarted
from engine.engine import Engine
from engine.plan import available_memory, choose_device, choose_dtype, keep_freed_memory, out_of_memory
from engine.request import Request, Sampling, check_tokens, new_seed
from engine.samples import Sample, not_finite
from engine.scheduler import BatchStats, Outcome, Prompt, seed_of
from engine.scoring import Scorer
from loading.checkpoint import load_joined, read_checkpoint
from loading.files import check_stays, counted, files_of, read_text, write_file
from loading.hub import locate
from loading.tokenizer import load_tokenizer, read_metadata

T = TypeVar("T")

ALONE = Ranks()  # a single process
ROOT = Path(__file__).resolve().parent
MAX_NEW_TOKENS = 256  # default for requests that set none, as in the `hf` model
# Stop strings of HumanEval; Chen et al. 2021 (arXiv 2107.03374), section 2.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class HarnessTokenizer:
    """Encoder of texts as in the harness's `hf` model: the name of a control token in a text is that token.

    prefix: context token of a text without context, BOS or else EOS. eos_ids: tokens that end generation.
    """

    def __init__(self, engine: Engine, folder: Path, eos_ids: frozenset[int]) -> None:
        """eos_ids: from the model's configuration."""
        assert engine.tokenizer is not None
        self.tokenizer = tokenizer = engine.tokenizer
        metadata = read_metadata(folder)
        bos, eos = (tokenizer.specials.get(metadata.get(name) or "") for name in ("bos_token", "eos_token"))
        ends = tokenizer.eos_ids if eos is None else frozenset([eos])
        self.eos_ids = ends | eos_ids
        first = [id for id in (bos, tokenizer.bos_id, *sorted(ends), *sorted(eos_ids)) if id is not None]
        if not first:
            raise ValueError(f"the tokenizer in {folder} has neither BOS nor EOS: a text needs a token to start from")
        self.prefix = first[0]

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Encode a text. begin: prepend BOS if the tokenizer does so and the text does not begin with it."""
        parts = enumerate(self.tokenizer.names.cut(text))  # every second part is a name
        named, tokenizer = self.tokenizer.specials, self.tokenizer
        ids = [id for at, part in parts for id in ([named[part]] if at % 2 else tokenizer.encode(part) if part else [])]
        bos = tokenizer.bos_id
        return [bos, *ids] if begin and bos is not None and ids[:1] != [bos] else ids


def windows(tokens: Sequence[int], prefix: int, limit: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, continuation) windows that read at most `limit` tokens and predict each token once: first `limit`
    after the prefix, then `stride` at a time. The last window looks back as far as it can."""
    whole = [prefix, *tokens]
    begin, end = 0, min(limit, len(tokens))
    while begin < len(tokens):
        yield whole[max(0, end - limit) : begin + 1], whole[begin + 1 : end + 1]
        begin, end = end, min(end + stride, len(tokens))


# Supported fields of the harness's generation_kwargs: expected kind and parser.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one present counts
FIELDS: dict[str, tuple[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), ("a number", as_number)),
    **dict.fromkeys(LENGTHS, ("a whole number from 1 on", partial(as_whole, least=1))),
    **dict.fromkeys(("do_sample", "use_cache"), ("true or false", as_switch)),  # use_cache changes nothing
    "top_k": ("a whole number, 0 and -1 for off", as_whole),
    "until": ("a text or a list of texts", as_texts),
}
# Other fields, accepted only at their neutral value.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"), 1),
    **dict.fromkeys(("early_stopping", "min_length", "min_new_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("diversity_penalty", "frequency_penalty", "presence_penalty"), 0),
}


@dataclass(frozen=True)
class GenerationArgs:
    """Parameters of a generate_until request. until: stop strings."""

    until: tuple[str, ...]
    length: int
    sampling: Sampling

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "GenerationArgs":
        """Parse generation_kwargs; null means not given. Raises ValueError naming all unknown or malformed fields."""
        found: dict[str, Any] = {}
        wrong = []
        for name, value in given.items():
            if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
                continue
            if name not in FIELDS:
                wrong.append(f"{name} {value!r} is not supported")
                continue
            kind, read = FIELDS[name]
            try:
                found[name] = read(value)
            except (TypeError, ValueError, OverflowError):
                wrong.append(f"{name} {value!r} is not {kind}")
        if wrong:
            raise ValueError(f"generation_kwargs: {'; '.join(wrong)}: correct them, or remove them")
        length = next((found[name] for name in LENGTHS if name in found), MAX_NEW_TOKENS)
        temperature, sample, top_k = found.get("temperature", 0.0), found.get("do_sample"), found.get("top_k", 0)
        if sample and temperature == 0:
            raise ValueError("generation_kwargs: do_sample without a temperature above 0: set one")
        filters = top_k if top_k > 0 else None, found.get("top_p"), found.get("min_p")
        sampling = Sampling(0.0 if sample is False else temperature, *filters, found.get("repetition_penalty", 1.0))
        return cls(found.get("until", ()), length, sampling)


class Evaluator:
    """Implementation of the harness's three request types, with its signatures.

    asked: tokens of all requests. read: tokens that the network read for them. drawn: generated tokens.
    """

    def __init__(
        self,
        engine: Engine,
        texts: HarnessTokenizer,
        batch_tokens: int,
        quiet: bool = True,
        seed: int = 0,
        weights: object = "model",
        ranks: Ranks = ALONE,
    ) -> None:
        """weights: name of the weights file, for errors. ranks: replicas divide the requests, and all get all results;
        what is counted is this replica's part."""
        self.engine, self.texts, self.seed, self.weights, self.ranks = engine, texts, seed, weights, ranks
        self.limit = engine.args.max_positions or engine.args.context_limit  # as the harness counts
        self.scorer = Scorer(engine.model, batch_tokens, self.show, engine.args)
        self.bar = Bar(quiet)
        self.drawn = self.asked = self.read = self.calls = 0
        self.heads = lru_cache(1024)(lambda context: tuple(texts.encode(context)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show progress while the model computes. Raises ValueError naming the weights if logits are not finite."""
        try:
            yield
        except FloatingPointError as error:
            raise not_finite(self.weights, self.engine.dtype, error) from error
        finally:
            self.bar.clear()

    def show(self, done: int, total: int, what: str = "tokens") -> None:
        """Update the progress bar."""
        self.bar.show(done / total, f"{done}/{total} {what}")

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether all its tokens were the likeliest. Contexts too long
        for the model are truncated on the left. Raises ValueError if a continuation alone is too long."""
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.limit:
            raise ValueError(f"a continuation of {longest} tokens exceeds the model's limit of {self.limit}")
        # The last token is only predicted.
        cut = [(context[-(self.limit + 1 - len(wanted)) :], wanted) for context, wanted in pairs]
        asked, read = self.scorer.asked, self.scorer.read
        own = share_of(cut, self.ranks)

        def run() -> dict[int, tuple[float, bool]]:
            scored = self.scorer.score([cut[at] for at in own])
            return {at: (math.fsum(each.logprobs), each.greedy) for at, each in zip(own, scored, strict=True)}

        found = self.together(run)
        self.asked, self.read = self.asked + self.scorer.asked - asked, self.read + self.scorer.read - read
        return found

    def together(self, run: Callable[[], dict[int, T]]) -> list[T]:
        """Run each replica's part, and return the results of all, sorted by number. If one fails, all end."""

        def shown() -> dict[int, T]:
            with self.running():
                return run()

        # A rank that fails ends its network at once: peers would wait in an all-reduce.
        parts = self.ranks.gather(shown() if self.ranks.shard.world > 1 else self.ranks.agree(shown, patient=True))
        return [value for _, value in sorted((item for part in parts for item in part.items()), key=itemgetter(0))]

    def encode_pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Encode both as one text, with spaces between them moved to the continuation; each by itself if the
        continuation would otherwise have no token of its own. Raises ValueError if it then has none either."""
        stripped, prefix, encode = context.rstrip(), self.texts.prefix, self.texts.encode
        head = self.heads(stripped) if context else ()
        tail = encode(context + continuation)[len(head) :] if context else []
        tail = tail or encode(context[len(stripped) :] + continuation, begin=False)
        if not tail:
            raise ValueError(f"the continuation {continuation!r} of {context[-40:]!r} has no tokens: pass some text")
        if not context and tail[0] == prefix and len(tail) > 1:
            return tail[:1], tail[1:]
        return head or (prefix,), tail

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score requests of (context, continuation)."""
        return self.score([self.encode_pair(*each) for each in requests])

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """Score each whole text, in windows of the model's limit."""
        cut = [
            list(windows(self.texts.encode(text), self.texts.prefix, self.limit, self.limit)) for (text,) in requests
        ]
        found = iter(self.score([window for each in cut for window in each]))
        return [math.fsum(next(found)[0] for _ in each) for each in cut]

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Generate for requests of (context, generation_kwargs). Equal requests are samples of one prompt, or one
        shared sample if decoding is greedy."""
        places: dict[tuple[str, GenerationArgs], list[int]] = {}
        for number, (context, given) in enumerate(requests):
            places.setdefault((context, GenerationArgs.parse(given)), []).append(number)
        prompts = [
            Prompt(
                at,
                self.cut_prompt(*each),
                self.request(*each, len(asking) if each[1].sampling.temperature else 1),
                alone=True,
            )
            for at, (each, asking) in enumerate(places.items())
        ]
        asked = list(places.values())

        def run() -> dict[int, str]:
            found: dict[int, str] = {}
            for outcome in self.generate(prompts, Request(seed=self.seed), "prompts"):
                asking = asked[int(outcome.prompt.id)]
                drawn = [sample.text or "" for sample in outcome.samples]
                found |= zip(asking, drawn * (len(asking) // len(drawn)), strict=True)
            return found

        return self.together(run)

    def generate(self, prompts: Sequence[Prompt], request: Request, what: str) -> Iterator[Outcome]:
        """Yield this replica's prompts as their samples are finished. Raises FloatingPointError if logits are not
        finite."""
        stats, before, finished = BatchStats(), (self.asked, self.read, self.drawn), 0
        self.calls += 1
        for outcome in self.engine.generate_many(
            prompts, request, stats=stats, queue=self.ranks.queue(f"call {self.calls}")
        ):
            if outcome.error is not None:
                raise FloatingPointError(outcome.error)
            yield outcome
            self.read, self.drawn = before[1] + stats.read, before[2] + stats.drawn
            self.asked += len(outcome.prompt.tokens) * len(outcome.samples)
            finished += 1
            self.show(finished, len(prompts), what)

    def request(self, context: str, drawing: GenerationArgs, count: int) -> Request:
        """Build the request for `count` samples of a context, with a seed hashed from context and `drawing`."""
        seed = seed_of(self.seed, repr((context, drawing)))
        return Request(count, drawing.length, drawing.sampling, seed, eos_ids=self.texts.eos_ids, stop=drawing.until)

    def room(self, drawing: GenerationArgs) -> int:
        """Return how many tokens of a context fit before the drawn ones. Raises ValueError if none do."""
        room = self.limit - drawing.length
        if room < 1:
            raise ValueError(f"{drawing.length} new tokens leave no room in the model's limit of {self.limit}")
        return room

    def cut_prompt(self, context: str, drawing: GenerationArgs) -> list[int]:
        """Truncate a context on the left, to leave room for the drawn tokens."""
        return (self.texts.encode(context) or [self.texts.prefix])[-self.room(drawing) :]


def share_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], ranks: Ranks) -> list[int]:
    """Return the indices of the pairs that this replica scores: a run of them sorted by tokens, so that prefixes are
    shared, with its share of the tokens."""
    if ranks.replicas == 1:
        return list(range(len(pairs)))
    order = sorted(range(len(pairs)), key=lambda at: tuple(pairs[at][0]))
    sizes = [sum(map(len, pairs[at])) for at in order]
    ends, total = list(accumulate(sizes)), max(1, sum(sizes))
    begins = [(end - size) * ranks.replicas // total for end, size in zip(ends, sizes, strict=True)]
    return [at for at, replica in zip(order, begins, strict=True) if replica == ranks.replica]


def harness_model(evaluator: Evaluator) -> Any:
    """Wrap the engine as a model of the harness, an lm_eval.api.model.LM."""
    from lm_eval.api.model import LM

    class EngineLM(LM):
        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return evaluator.loglikelihood([each.args for each in requests])

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return evaluator.loglikelihood_rolling([each.args for each in requests])

        def generate_until(self, requests: list) -> list[str]:
            return evaluator.generate_until([each.args for each in requests])

    return EngineLM()


def check_tasks(tasks: Mapping[str, Any]) -> list[GenerationArgs]:
    """Parse the generation parameters of harness tasks. Raises ValueError naming the tasks that cannot run, and why."""
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        why = "run generated code to score it, which is not done here: draw with --samples, and score elsewhere"
        raise ValueError(f"tasks {', '.join(unsafe)} {why}")
    found, wrong = [], []
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                found.append(GenerationArgs.parse(task.get_config("generation_kwargs") or {}))
            except ValueError as error:
                wrong.append(f"task {name}: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return found


def load_tasks(names: Sequence[str], folder: Path | None) -> tuple[Any, list[str], list[GenerationArgs]]:
    """Return the harness's TaskManager, the tasks that names or patterns match, and their generation parameters. Only
    the folder is searched if it has them all, since listing the harness's own tasks takes seconds. Raises ValueError if
    a task is unknown or cannot run."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ValueError(f"--include_path {folder} is not a folder: pass one with tasks")
    for defaults in (False, True) if folder else (True,):
        try:
            manager = TaskManager(include_path=folder, include_defaults=defaults)
            missing = [name for name in names if not manager.match_tasks([name])]
            found = manager.match_tasks(list(names))
            loaded = {} if missing else manager.load(found)["tasks"]
        except Exception as error:  # a task's file can fail in any way
            raise ValueError(f"{', '.join(names)} cannot be loaded: {one_line(error)}") from error
        if not missing:
            return manager, found, check_tasks(loaded)
    raise ValueError(f"task {missing[0]} is not known: pass a name of the harness, or --include_path")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def run_tasks(options: argparse.Namespace, ranks: Ranks) -> None:
    """Run --tasks and print the harness's own tables of results."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.utils import handle_non_serializable, make_table
    except ModuleNotFoundError as error:
        raise ValueError("--tasks needs lm_eval: pip install lm_eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, names, drawings = load_tasks(options.tasks, options.include_path)
    evaluator = open_evaluator(options, ranks)
    for drawing in drawings:
        evaluator.room(drawing)
    begin = time.perf_counter()
    results = simple_evaluate(
        harness_model(evaluator), tasks=names, num_fewshot=options.num_fewshot, limit=options.limit,
        log_samples=False, task_manager=manager,
    )  # fmt: skip
    report = counts(evaluator, time.perf_counter() - begin)
    write(options.output, json.dumps(results | {"engine": report}, indent=2, default=handle_non_serializable))
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    emit_report(options, report)


def counts(evaluator: Evaluator, seconds: float) -> dict[str, float]:
    """Summarise a run: tokens, time, seed. tokens_per_s counts tokens of requests and drawn ones."""
    parts = evaluator.ranks.gather((evaluator.asked, evaluator.read, evaluator.drawn))
    asked, read, drawn = map(sum, zip(*parts, strict=True))
    return {
        "seconds": seconds,
        "tokens_per_s": (asked + drawn) / seconds,
        "tokens_asked": asked,
        "tokens_read": read,
        "tokens_saved": asked - read,
        "tokens_drawn": drawn,
        "seed": evaluator.seed,
    }


def emit_report(options: argparse.Namespace, report: dict[str, float]) -> None:
    if not options.quiet:
        drawn = f", {report['tokens_drawn']} drawn with seed {report['seed']}" if report["tokens_drawn"] else ""
        print(
            f"{report['tokens_asked']} tokens{drawn} in {report['seconds']:.1f} s, {report['tokens_per_s']:.0f} "
            f"tokens/s: {report['tokens_read']} were read, sharing saved {report['tokens_saved']}",
            file=sys.stderr,
        )


def open_evaluator(options: argparse.Namespace, ranks: Ranks, rows: int | None = None) -> Evaluator:
    """Load the model, or this rank's part of it, and build an evaluator. rows: usual rows of a product, to choose
    kernels; None: a batch's."""
    ranks.agree(lambda: locate(options.checkpoint_path) if ranks.local == 0 else None, patient=True)  # once per machine

    def make() -> Evaluator:
        checkpoint, device = read_checkpoint(locate(options.checkpoint_path)), choose_device(options.device)
        check_output(options.output, files_of(checkpoint.folder))
        dtype, shard = choose_dtype(options.dtype, device), ranks.shard
        model = load_joined(checkpoint, device, dtype, rows or options.batch_tokens, shard)
        free = available_memory(device, ranks.local_world_size)
        free = free if ranks.control is None else min(ranks.all(free))  # all ranks plan alike
        engine = Engine(model, load_tokenizer(checkpoint.folder), options.compile, shard, available=free)
        texts = HarnessTokenizer(engine, checkpoint.folder, checkpoint.eos_ids)
        return Evaluator(engine, texts, options.batch_tokens, options.quiet, options.seed, checkpoint.weights[0], ranks)

    return ranks.agree(make)


def run_perplexity(options: argparse.Namespace, ranks: Ranks) -> None:
    """Run --perplexity: score a text in windows, each with --stride new tokens."""
    text = read_text(options.perplexity)
    evaluator = open_evaluator(options, ranks)
    limit = evaluator.limit
    stride = limit if options.stride is None else options.stride
    if not 1 <= stride <= limit:
        raise ValueError(f"stride {stride} must be at least 1 and at most the model's limit of {limit}")
    tokens = evaluator.texts.encode(text, begin=False)
    if not tokens:
        raise ValueError(f"{options.perplexity} is empty: pass some text")
    begin = time.perf_counter()
    found = evaluator.score(list(windows(tokens, evaluator.texts.prefix, limit, stride)))
    nats = -math.fsum(logprob for logprob, _ in found)
    size = len(text.encode())
    report = {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / len(tokens),
        "perplexity": math.exp(nats / len(tokens)),
        "tokens": len(tokens),
        "bytes": size,
        "stride": stride,
    }
    timing = counts(evaluator, time.perf_counter() - begin)
    write(options.output, json.dumps(report | {"engine": timing}, indent=2))
    for name, value in report.items():
        print(f"{name:>16}  {value:.6g}" if isinstance(value, float) else f"{name:>16}  {value}")
    emit_report(options, timing)


def read_lines(path: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file and check the types of `fields`. A field may list several names; its value
    is stored under the first. A header line becomes a field of the next object. Raises ValueError naming a bad line."""
    found, header = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: fix the line") from error
        if isinstance(value, dict) and value.keys() == {"header"}:
            header = value
            continue
        for names, kind in fields.items():
            name, *others = names.split()
            given = [value[each] for each in (name, *others) if isinstance(value, dict) and each in value]
            if not given or not isinstance(given[0], kind):
                raise ValueError(f"{path}, line {number}: no {' or '.join((name, *others))} of the right kind")
            value[name] = given[0]
        found.append(header | value)
        header = {}
    if not found:
        raise ValueError(f"{path} has no line: pass a file of JSON lines")
    return found


def run_samples(options: argparse.Namespace, ranks: Ranks) -> None:
    """Run --samples: write -n samples of each problem, one per line, as problems finish. Samples are a function of
    (--seed, task_id, index)."""
    problems = read_lines(options.samples, {"task_id": (str, int), "prompt": str})[: options.limit]
    (id, times), *_ = Counter(json.dumps(each["task_id"]) for each in problems).most_common(1)
    if times > 1:
        raise ValueError(f"{options.samples} has task_id {id} {times} times: list each once, -n draws more of it")
    evaluator = open_evaluator(options, ranks, options.num_samples)
    engine, texts = evaluator.engine, evaluator.texts
    sampling = Sampling(
        options.temperature, options.top_k or None, options.top_p, repetition_penalty=options.repetition_penalty
    )
    stops = tuple(options.stop) if options.stop else STOPS
    request = Request(
        options.num_samples, options.max_new_tokens, sampling, evaluator.seed, eos_ids=texts.eos_ids, stop=stops
    )
    asked = [(each["task_id"], texts.encode(each["prompt"]) or [texts.prefix]) for each in problems]
    for task_id, tokens in asked:
        try:
            request.check_length(engine.args.context_limit, len(tokens))
            check_tokens(tokens, engine.args.vocab_size)
        except ValueError as error:
            raise ValueError(f"{task_id}: {error}") from error
    output, done = begin_output(options, evaluator, asked, request, ranks)
    left = [(task_id, tokens) for task_id, tokens in asked if json.dumps(task_id) not in done]
    begin = time.perf_counter()
    prompts = [Prompt(task_id, tokens) for task_id, tokens in left]

    def run() -> dict[int, None]:
        for outcome in evaluator.generate(prompts, request, "problems"):
            lines = sample_lines(outcome.prompt.id, outcome.samples)
            if ranks.shard.rank == 0:
                output.append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        return {}

    evaluator.together(run)
    end_output(output, ranks)
    if not options.quiet:
        before = f", {len(done)} of them done before" * bool(done)
        what = f"{counted(len(problems), 'problem')}, {counted(request.num_samples, 'sample')} of each"
        what += f", seed {evaluator.seed}{before}"
        print(f"{what}: {options.output}", file=sys.stderr)
    emit_report(options, counts(evaluator, time.perf_counter() - begin))


def begin_output(
    options: argparse.Namespace,
    evaluator: Evaluator,
    problems: Sequence[tuple[str | int, list[int]]],
    request: Request,
    ranks: Ranks,
) -> tuple[Output, set[str]]:
    """Open the output of --samples; return it and the task_ids, as JSON, of problems that it has already. Raises
    ValueError if another command has begun it."""
    begun = ranks.share(lambda: read_begun(options.output))
    dtype = str(evaluator.engine.dtype).removeprefix("torch.")
    own = {"num_samples": request.num_samples, "dtype": dtype, "stop": list(request.stop)}
    checkpoint, ends = read_checkpoint(locate(options.checkpoint_path)), evaluator.texts.eos_ids
    header = make_header(checkpoint, evaluator.seed, ends, digest_of(problems), settings_of(options) | own)
    check_header(options.output, begun, header)
    return open_output(options.output, begun, header, ranks, apart=False), begun.done


def sample_lines(task_id: str | int, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Yield one line per sample, in the format of the human-eval scorer. sample: its index, of `of`. count: samples of
    the problem with this text. finish_reason: length if truncated."""
    texts = [sample.text for sample in samples]
    for sample in samples:
        yield {
            "task_id": task_id,
            "completion": sample.text,
            "mean_logprob": sample.mean_logprob,
            "count": texts.count(sample.text),
            "finish_reason": sample.finish_reason,
            "sample": sample.index,
            "of": len(samples),
        }


@dataclass
class Completion:
    """A distinct text drawn for a problem. number: how many samples have it; mean_logprob: of the likeliest; is_cut:
    all were truncated."""

    number: int
    mean_logprob: float
    passed: bool
    is_cut: bool = True


def read_scored(path: Path) -> dict[object, list[Completion]]:
    """Read a scored file by problem: its task_id, or its id in --prompts. A text's number is that of its lines, or
    `count` if larger, since a scorer may be given each text once. Raises ValueError if a line is malformed, lines
    contradict each other, or samples that the header counts are missing."""
    fields = {"task_id id": (str, int), "completion text": str, "passed": bool, "mean_logprob": (int, float)}
    found: dict[tuple[object, str], Completion] = {}
    lines: dict[tuple[object, str], int] = {}
    total = 0
    for line in read_lines(path, fields):
        header = line.get("header")
        n = header.get("num_samples") if isinstance(header, dict) else None
        total = max(total, n if isinstance(n, int) else 0)
        key = line["task_id"], line["completion"]
        lines[key] = lines.get(key, 0) + 1
        each = found.setdefault(key, Completion(1, line["mean_logprob"], line["passed"]))
        if each.passed != line["passed"]:
            raise ValueError(f"{path}: the same text of {key[0]} has passed and has not: score it again")
        if not isinstance(count := line.get("count", 1), int) or count < 1:
            raise ValueError(f"{path}: count of {key[0]} is not a whole number from 1 on: score it again")
        each.number = max(each.number, lines[key], count)
        each.mean_logprob = max(each.mean_logprob, line["mean_logprob"])
        each.is_cut &= line.get("finish_reason") == "length"
    problems: dict[object, list[Completion]] = {}
    for (problem, _), each in found.items():
        problems.setdefault(problem, []).append(each)
    for problem, texts in problems.items():
        if (n := sum(each.number for each in texts)) < total:
            raise ValueError(f"{path}: {problem} has {n} of {total} samples: draw without --top, and score all")
    return problems


def pass_at(n: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: the probability that k of n samples, drawn without replacement, include
    one that passed; Chen et al. 2021 (arXiv 2107.03374), equation 1."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def run_pass_at(options: argparse.Namespace, ranks: Ranks) -> None:
    """Run --pass_at on the problems of --scored. Top-k are the k distinct texts of the highest mean log-probability,
    truncated ones last."""
    problems = read_scored(options.scored)
    drawn = {problem: sum(each.number for each in texts) for problem, texts in problems.items()}
    report: dict[str, float] = {}
    for k in options.pass_at:
        rates, best = [], []
        for problem, texts in problems.items():
            if (n := drawn[problem]) < k:
                raise ValueError(f"{options.scored}: {problem} has {n} samples, pass@{k} needs {k}")
            rates.append(pass_at(n, sum(each.number for each in texts if each.passed), k))
            top = sorted(texts, key=lambda each: (each.is_cut, -each.mean_logprob))[:k]
            best.append(any(each.passed for each in top))
        report |= {f"pass@{k}": sum(rates) / len(rates), f"pass@top-{k}": sum(best) / len(best)}
    size = {"problems": len(problems), "samples": sum(drawn.values())}
    write(options.output, json.dumps(report | size, indent=2))
    for name, value in report.items():
        print(f"{name:>16}  {value:.4f}")
    for name, count in size.items():
        print(f"{name:>16}  {count}")


def write(path: Path | None, text: str) -> None:
    if path is not None:
        write_file(path, lambda unfinished: unfinished.write_text(text + "\n", "utf-8"))


def numbers(text: str) -> list[int]:
    """Parse positive integers separated by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 on: write 1,5,10")
    return found


def fraction_or_count(text: str) -> float | int:
    """Parse --limit as the harness does: a number of items, or, below 1, a share of them."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number from 1 on nor a share below 1")
    return int(value) if value >= 1 else value


def build_parser() -> argparse.ArgumentParser:
    """Build the command line: all flags and defaults."""
    parser = OneLineParser(description="Evaluate a model. Give one of --tasks, --perplexity, --samples and --pass_at.")
    flag = parser.flag
    parser.section("model")
    where = "model.pth, a model's folder, or OWNER/NAME of the Hugging Face Hub; default: checkpoints/tiny"
    flag("--checkpoint_path", where, default=str(ROOT / "checkpoints" / "tiny" / "model.pth"))
    flag("--device", "cpu, cuda, cuda:1; auto is cuda where there is one", default="auto")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    flag("--dtype", "auto is bfloat16 where the device has instructions for it", choices=dtypes, default="auto")
    drawn = "the decode step of texts that are drawn (generate_until, --samples); default: where it pays"
    flag("--compile", drawn, action=argparse.BooleanOptionalAction)
    flag("--batch_tokens", "that are scored at once; fewer need less memory", type=int, default=16384)
    parts = "under torchrun, number of processes that hold one network together; default: those of a machine"
    flag("--tp", parts, type=int)
    parser.section("tasks of the EleutherAI harness (pip install lm_eval)")
    flag("--tasks", "names or patterns", nargs="+", metavar="TASK")
    flag("--include_path", "a folder with tasks of your own", type=Path, metavar="DIR")
    flag("--limit", "so many items of each task, or a share below 1; problems of --samples", type=fraction_or_count)
    flag("--num_fewshot", "examples before each item; default: the task's", type=int)
    parser.section("perplexity of a text")
    flag("--perplexity", "a UTF-8 file", type=Path, metavar="FILE")
    flag("--stride", "new tokens of each window; default: all, the model's limit", type=int)
    parser.section("samples of problems")
    flag("--samples", "JSON lines with task_id and prompt, as those of HumanEval", type=Path, metavar="FILE")
    flag("-n", "samples of each problem", "--num_samples", type=int, default=20)
    flag("--temperature", "0 takes the most likely token", type=float, default=0.8)
    flag("--top_k", "draw from the k most likely tokens; 0 is off", type=int, default=0)
    flag("--top_p", "draw from the fewest tokens that hold this mass", type=float)
    flag("--repetition_penalty", "of tokens that a text has already; 1 is off", type=float, default=1.0)
    flag("--max_new_tokens", "per sample", type=int, default=MAX_NEW_TOKENS)
    flag("--seed", "same seed, same samples; default: a new one, which stderr names", type=int)
    stop = r"end a sample before this text; \n, \t and \\ are read as escapes; repeatable; default: HumanEval's"
    flag("--stop", stop, action="append", default=[], metavar="TEXT", type=unescaped)
    parser.section("pass@k")
    flag("--pass_at", "such as 1,5,10: of --scored", type=numbers, metavar="K")
    lines = "JSON lines with passed, and with what --samples, or generate.py --prompts, wrote"
    flag("--scored", lines, type=Path, metavar="FILE")
    parser.section("output")
    flag("--output", "results as JSON; of --samples the samples (default: samples.jsonl)", type=Path)
    flag("--resume", "continue a killed --samples run that has written to --output", action="store_true")
    flag("--quiet", "no progress and no summary on stderr", action="store_true")
    return parser


MODES = {"tasks": run_tasks, "perplexity": run_perplexity, "samples": run_samples, "pass_at": run_pass_at}


def check_options(options: argparse.Namespace) -> tuple[str, argparse.Namespace]:
    """Return the one mode given, and the flags with its default output. Raises ValueError if flags do not go together,
    or a file is missing."""
    given = [name for name in MODES if getattr(options, name) is not None]
    if len(given) != 1:
        raise ValueError(f"pass one of --tasks, --perplexity, --samples and --pass_at, not {len(given)}")
    if options.resume and given != ["samples"]:
        raise ValueError("--resume continues --samples: leave it out")
    if (options.scored is not None) != (given == ["pass_at"]):
        raise ValueError("--pass_at and --scored go together: pass both or neither")
    for path in (options.perplexity, options.samples, options.scored):
        if path is not None and not path.is_file():
            raise ValueError(f"{path} not found: pass an existing file")
    if given == ["samples"]:
        options = changed(options, output=options.output or Path("samples.jsonl"))
        if not (options.resume or restarted()):
            check_new(options.output)
        if isinstance(options.limit, float):
            raise ValueError(f"--limit {options.limit} of --samples must be a whole number")
    for name in ("num_samples", "max_new_tokens", "batch_tokens", "num_fewshot"):
        least = 0 if name == "num_fewshot" else 1
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"{name} {getattr(options, name)} must be at least {least}")
    tasks = [] if options.include_path is None else options.include_path.rglob("*")
    check_output(options.output, (options.perplexity, options.samples, options.scored, *tasks))
    return given[0], options


def decide(options: argparse.Namespace) -> tuple[str, argparse.Namespace]:
    """Check the flags on one rank for all, and choose the seed. Raises ValueError as `check_options`."""
    mode, options = check_options(options)
    if options.seed is None:
        header = read_begun(options.output).header if mode == "samples" else None
        options = changed(options, seed=new_seed() if header is None else header["seed"])
    return mode, options


def check_output(output: Path | None, inputs: Iterable[Path | None]) -> None:
    """Raise ValueError if --output cannot be written, or is one of the inputs."""
    if output is not None:
        check_writable(output)
        check_stays([path for path in inputs if path is not None], output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for input that cannot be run, 130 if interrupted."""
    options = build_parser().parse_args(arguments)
    ranks = ALONE
    try:
        ranks = join(options.tp, choose_device(options.device))
        mode, options = ranks.share(partial(decide, options))
        if not ranks.leads:  # does its part of the work and prints nothing
            options = changed(options, quiet=True, output=options.output if mode == "samples" else None)
            sys.stdout = open(os.devnull, "w")
        keep_freed_memory()
        MODES[mode](options, ranks)
    except BrokenPipeError:
        return 0  # the reader closed the pipe: it has what it wanted
    except (ValueError, OSError) as error:
        if not ranks.leads and isinstance(error, ValueError):
            ranks.exit_if([str(error)])  # rank 0 prints it
        return print_error(error)
    except KeyboardInterrupt:
        begun = options.samples is not None and options.output is not None and options.output.exists()
        kept = (
            f"{options.output} holds what is finished: the same command with --resume continues"
            if begun
            else "there are no results"
        )
        print(f"\ninterrupted: {kept}", file=sys.stderr)
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if (told := out_of_memory(error, "--batch_tokens") or lost_rank(error)) is None:
            raise
        return print_error(told)
    return 0


if __name__ == "__main__":
    finish(main)
