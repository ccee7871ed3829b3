"""A network in parts. Oracles: the whole network in one process (fp64 for the sums, equal token ids in fp32 for real
processes over gloo); the number of collectives by the paper's count (two a layer)."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import warm
from conftest import ALIBI, GQA, ROOT, TINY, positions, random_model, random_tokens, slow
from test_cli import lines_of, run
from tp_worker import COUNTED, collectives, tokens_of

import generate
from cache import KVCache, NoCache
from cli.ranks import Ranks
from engine.engine import Engine
from engine.plan import sum_weight_sizes, weigh
from engine.request import Request, Sampling
from layers.linear import hold_linears, swap_linears
from layers.moe import MoEConfig
from layers.rope import RopeConfig
from loading.checkpoint import Checkpoint, Recipe, load_model, weight_sizes
from model import ModelArgs
from quantize import choose_layers, plain_layers, quantised_state
from sampling import RowFilters, draw
from tp import WHOLE, Shard

BASE = ModelArgs(
    dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, hidden_dim=96, vocab_size=92, context_limit=256
)  # fmt: skip
KINDS = {
    "mha": (replace(BASE, n_kv_head=4), None),
    "gqa": (replace(BASE, qkv_bias=True, qk_norm=True, vocab_size=97), None),  # a vocabulary that no world divides
    "mqa": (replace(BASE, n_kv_head=1), None),
    "tied": (replace(BASE, tied_output=True), None),
    "alibi": (replace(BASE, alibi=True, windows=(None, 4), score_softcap=2.0, post_norms=True), None),
    "experts": (replace(BASE, mixture=MoEConfig(5, 2, 48, True, shared=32, dense=(1,))), None),
    "int8": (replace(BASE, mixture=MoEConfig(3, 2, 48, False)), "int8"),
    "packed": (replace(BASE, dim=512, hidden_dim=512, vocab_size=512), None),  # large enough, in the longest request
    "int4": (BASE, "int4"),  # at 4 ranks, attention.wo is cut inside its groups of 32
}


def saved(folder: Path, name: str, args: ModelArgs, mode: str | None) -> Checkpoint:
    model = random_model(args, torch.float32)
    state, recipe = model.state_dict(), None
    if mode is not None:
        layers, kept = choose_layers(model, mode, 32)
        recipe = Recipe(mode, layers, kept, 32)
        found = {name: weight for step in plain_layers(recipe, state) for name, weight in step.items()}
        state = {"recipe": {}, "state": quantised_state(state, found)}
    path = folder / f"{name}.pth"
    torch.save(state, path)
    return Checkpoint(folder, (path,), {}, args, frozenset(), recipe)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("tp")
    return {name: saved(folder, name, *kind) for name, kind in KINDS.items()}


def requests(name: str) -> list[Request]:
    """Drawn with other random numbers each, with fewer rows, with other layouts: all of them by one kind of network."""
    sampling = Sampling(0.9, top_k=20)
    every = [
        Request(3, 12, sampling, seed=2, prefill_chunk=4),
        Request(5, 9, sampling, seed=3, rows_at_once=2),
        Request(1, 9, sampling, seed=1),
        Request(4, 20, sampling, seed=5),
        Request(3, 6, Sampling(0), seed=4, attention="contiguous"),
    ]
    filtered = [Request(2, 6, Sampling(0.9, min_p=0.05), seed=6), Request(3, 6, Sampling(0), seed=4)]
    filtered += [Request(2, 6, Sampling(0.8, 9, 0.9, repetition_penalty=1.2), seed=7)]
    recorded = [Request(5, 70, Sampling(0.9, top_k=20), seed=5, eos_ids=frozenset(range(3, 92, 30)))]
    named = {"gqa": every, "packed": every[3:4], "compiled": every[:1], "recorded": recorded}
    return named.get(name, every[1:2]) + filtered * (name == "mha")


PROMPT = random_tokens(BASE, 11).tolist()


def alone(checkpoint: Checkpoint, each: list[Request]) -> list[list[list[int]]]:
    engine = Engine(load_model(checkpoint, "cpu", torch.float32, 3), compile=False)
    engine.available = 1 << 40
    return tokens_of(engine, PROMPT, each)


def started(world: int, *arguments: object, input: str = "") -> list[warm.Command]:
    """The ranks of a run, of which the first has the input, as torchrun starts them on one machine, without its agent,
    whose imports take seconds and which ends the others where one fails. test_readme.py runs torchrun itself."""
    place = os.environ | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    own = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [warm.Command(*arguments, cwd=ROOT, input="" if rank else input, env=own[rank]) for rank in range(world)]


def torchrun(world: int, *arguments: object, input: str = "") -> subprocess.CompletedProcess:
    """All ranks, to their end. What they print stands in the order of the ranks."""
    ranks = started(world, *arguments, input=input)
    try:
        ended = [rank.end(200) for rank in ranks]
    finally:
        for rank in ranks:  # one that waits for another that has failed
            rank.process.kill()
    out, err = "".join(each.stdout for each in ended), "".join(each.stderr for each in ended)
    return subprocess.CompletedProcess(ended[0].args, max(abs(each.returncode) for each in ended), out, err)


def evaluated(*flags: object) -> subprocess.CompletedProcess:
    """eval.py in one process."""
    return warm.Command("eval.py", *flags, cwd=ROOT, input="", env=dict(os.environ)).end(200)


def own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


ROPE = replace(GQA, rope=RopeConfig(0.6, ("local", "none", "global"), 100.0, 1.2), logit_scale=0.3, norm_offset=1.0)
EXPERTS = replace(GQA, mixture=MoEConfig(5, 2, 48, True, shared=24, dense=(1,)))


@pytest.mark.parametrize("args", [ALIBI, ROPE, EXPERTS], ids=["ALiBi", "rotary", "experts"])
def test_parts_sum_to_the_whole_in_fp64(args):
    """Without any process group, so that no sum is made: attention and feed-forward part of each layer, the logits side
    by side and the whole embedding, with odd sizes, all biases and N = 3, S = 2; every head's own slopes."""
    args = replace(args, n_head=6, n_kv_head=2, vocab_size=90, qkv_bias=True, qk_norm=True, hidden_dim=54)
    args = replace(args, out_bias=True, mlp_bias=True)
    tokens, at = torch.tensor([[0, 89], [44, 45], [15, 30]]), positions(0, 3, 2)  # at the borders of the table's parts
    for world in (2, 3, 6):
        if world == 3:
            args = replace(args, n_kv_head=3)
        whole, parts, local = (
            random_model(args),
            [random_model(args) for _ in range(world)],
            Shard(0, world).local(args),
        )
        for rank, part in enumerate(parts):
            shard = Shard(rank, world)
            for name, module in part.named_modules():
                for kind, tensor in list(module.named_parameters(recurse=False)):
                    own = shard.part(f"{name}.{kind}", tensor, args)
                    module.register_parameter(kind, torch.nn.Parameter(own, requires_grad=False))
            shard.attach(part)
        x = whole.hidden(tokens, at, NoCache())  # any input will do
        assert all(torch.equal(part.tok_embeddings(tokens), whole.tok_embeddings(tokens)) for part in parts)
        for layer, block in enumerate(whole.layers):
            rotation = whole.rotation(at)
            assert_sums(block.feed_forward(x), [part.layers[layer].feed_forward(x) for part in parts])
            y = block.attention(x, *rotation, at, empty_cache(args))
            assert_sums(y, [part.layers[layer].attention(x, *rotation, at, empty_cache(local)) for part in parts])
        assert torch.cat([part.logits(x) for part in parts], -1).sub(whole.logits(x)).abs().max() < 1e-12
        assert local.kv_values_per_token * world >= args.kv_values_per_token


def test_a_tied_output_is_a_view_of_the_whole_embedding(tmp_path):
    """It is weighed once, a step reads a rank's rows of it alone, and packing leaves it. Oracles: the file; the sizes
    from metadata; the storage. Two ranks of a vocabulary that they divide and of one that they do not."""
    for vocab_size, own in ((92, 46), (97, 97)):
        args = replace(BASE, vocab_size=vocab_size, tied_output=True)
        checkpoint, shard = saved(tmp_path, str(vocab_size), args, None), Shard(1, 2)
        table = torch.load(checkpoint.weights[0])["tok_embeddings.weight"]
        model = load_model(checkpoint, "cpu", torch.float32, 3, shard)
        weight = model.output.weight
        assert torch.equal(model.tok_embeddings.weight, table) and torch.equal(weight, table[-own:])
        found = weigh(model, shard.parts(args))
        assert found == sum_weight_sizes(
            weight_sizes(checkpoint, "cpu", torch.float32, 3, shard), args, shard.parts(args)
        )
        every = sum(each.nbytes for name, each in model.named_parameters() if name != "output.weight")
        assert (found.total, found.tied) == (every, own * 64 * 4)
        assert found.per_step == every - table.nbytes + found.tied
        assert "output" not in replaceable(model)
        hold_linears(model)
        assert model.output.weight.untyped_storage().data_ptr() == model.tok_embeddings.weight.data_ptr()


def replaceable(model: torch.nn.Module) -> list[str]:
    """The linear layers that packing may replace."""
    seen: list[str] = []
    swap_linears(model, lambda name, _: seen.append(name))
    return seen


def test_a_part_has_a_share_of_heads_and_widths():
    """Of groups of keys one at least, and the whole vocabulary."""
    for world, heads, groups, *widths in ((1, 12, 2, 96, 48, 24), (2, 6, 1, 48, 24, 12), (4, 3, 1, 24, 12, 6)):
        whole, part = (
            replace(GQA, n_head=heads, n_kv_head=groups, hidden_dim=dense, mixture=MoEConfig(5, 2, width, True, shared))
            for heads, groups, dense, width, shared in ((12, 2, 96, 48, 24), (heads, groups, *widths))
        )
        assert Shard(world - 1, world).local(whole) == part


def test_logits_and_tokens_are_put_together_in_their_order(monkeypatch):
    """The logits [N,S,V/world] of three ranks side by side, and the tokens of the first. A stand-in for the
    collectives, which calls them as PyTorch does; test_ranks_draw_what_one_process_draws has those of gloo."""
    held = torch.arange(3 * 2 * 5 * 4).view(3, 2, 5, 4)  # [world,N,S,V/world]

    class Collectives:
        wait_tensor = staticmethod(lambda tensor: tensor)
        all_gather_into_tensor = staticmethod(lambda own, world, group: held.flatten(0, 1))
        broadcast = staticmethod(lambda own, source, group: held[source])

    monkeypatch.setattr("tp.COLLECTIVES", Collectives)
    shard = Shard(1, 3, "some")
    assert torch.equal(shard.gather(held[1]), torch.cat([*held], -1))
    assert torch.equal(shard.broadcast(held[1]), held[0])


def empty_cache(args: ModelArgs, dtype: torch.dtype = torch.float64) -> KVCache:
    return KVCache.empty(args.kv_shape, 3, 4, torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_of_ranks_are_drawn_from_as_the_whole_vocabulary_is(monkeypatch, dtype):
    """Logits of which three ranks have 67 tokens each, N = 5. Oracle: the draw from all of them. Tokens are equal, and
    log-probabilities to rounding; the last rows are greedy, with all logits equal, or the largest on several ranks."""
    logits = torch.linspace(-8, 8, 201).repeat(5, 1).to(dtype)  # without equal ones, in bfloat16 too near the largest
    logits = torch.stack([row[torch.randperm(201, generator=torch.Generator().manual_seed(4))] for row in logits])
    logits[3], logits[4, [66, 67, 80, 200]] = 0.5, 9.0
    numbers, given = torch.linspace(0.01, 0.99, 5, dtype=torch.float64), list[torch.Tensor]()

    class Collectives:
        wait_tensor = staticmethod(lambda tensor: tensor)
        all_gather_into_tensor = staticmethod(lambda own, *_: given.append(own) or torch.cat((given * 3)[-3:]))

    monkeypatch.setattr("tp.COLLECTIVES", Collectives)
    args, greedy = replace(BASE, vocab_size=201), Sampling(0)
    for first in (Sampling(0.7, 20), Sampling(1.3, 9, 0.8), Sampling(1.0, 32, 0.9, 0.1), greedy):
        for rows in ([first, first, Sampling(0.9, 5), greedy, greedy], [greedy] * 5):
            most = Shard(0, 3, "some").deciding(rows, args)
            assert most == max(each.top_k or 1 for each in rows)
            sampling = greedy if rows[0] == greedy else RowFilters.of(rows, 201, torch.device("cpu"))
            given.clear()
            for rank in range(3):
                found = Shard(rank, 3, "some").candidates(logits[:, 67 * rank : 67 * rank + 67], most)
            expected = draw(logits, numbers, sampling)
            tokens, logprobs = draw(found[0], numbers, sampling, names=found[1], total=found[2])
            assert torch.equal(tokens, expected[0]) and tokens[3:].tolist() == [0, 66]
            torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=2e-6)


def test_candidates_are_gathered_where_they_decide():
    """Not where all of the vocabulary does, where it is not divided, or where the logits are hardly more."""
    shard, args = Shard(0, 2, "some"), replace(BASE, vocab_size=6000)
    few, every = Sampling(0.9, 200, 0.9, 0.1), (Sampling(0.9), Sampling(0.9, top_p=0.9), Sampling(0.9, min_p=0.1))
    assert (
        shard.deciding([few, Sampling(0), Sampling(0.3, 7)], args) == 200 and shard.deciding([Sampling(0)], args) == 1
    )
    for each in (
        *every,
        Sampling(0, repetition_penalty=1.1),
        Sampling(0.9, 1025),
        replace(few, repetition_penalty=0.9),
    ):
        assert shard.deciding([few, each], args) is None
    assert shard.deciding([Sampling(0.9, 1024)], args) == 1024 and WHOLE.deciding([few], args) is None
    assert shard.deciding([few], replace(args, vocab_size=800)) is None
    assert shard.deciding([few], replace(args, vocab_size=6001)) is None


def test_a_bias_is_added_once():
    """Of a layer whose products are summed; that of one whose outputs are divided goes with them."""
    bias = torch.arange(64.0)
    row = [Shard(rank, 4).part("layers.1.attention.wo.bias", bias, BASE) for rank in range(4)]
    assert torch.equal(sum(row), bias) and not any(part.any() for part in row[1:])
    column = [Shard(rank, 4).part("layers.1.attention.wq.bias", bias, BASE) for rank in range(4)]
    assert torch.equal(torch.cat(column), bias)


def assert_sums(whole: torch.Tensor, parts: list[torch.Tensor]) -> None:
    assert whole.abs().max() > 0.1 and (sum(parts) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=slow)])
def test_ranks_draw_what_one_process_draws(checkpoints, tmp_path, world):
    """Every kind of network, N = 1, 3 and 5, and two prompts in one batch; and a rank holds its part of the weights and
    no more. At 4 those that are cut otherwise than at 2, one request each."""
    kinds = checkpoints if world == 2 else ("mqa", "packed", "int4")
    cases = [(name, checkpoints[name], PROMPT, requests(name)[: 9 if world == 2 else 1], False) for name in kinds]
    if world == 2:  # one graph, with the sums in it
        shallow = saved(tmp_path, "shallow", replace(BASE, n_layer=1), None)
        cases.append(("compiled", shallow, PROMPT, requests("compiled"), True))
        cases.append(("recorded", shallow, PROMPT, requests("recorded"), False))
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    files = tmp_path / "cases", tmp_path / "out"
    result = torchrun(world, "tests/tp_worker.py", *files)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out").read_text())
    for name, checkpoint, _, each, _ in cases:
        tokens, held, counted, recorded = found[name]
        assert tokens == alone(checkpoint, each), name
        args, divided = checkpoint.args, checkpoint.args.vocab_size % world == 0
        for (n, sampling), collected in zip(COUNTED, counted, strict=True):
            sums = 2 * args.n_layer * [["all_reduce", n * args.dim]]
            k, part = sampling.top_k or 1, args.vocab_size // world
            whole = sampling.temperature and sampling.top_k is None or 2 * k >= part
            gathers = divided * [["all_gather_into_tensor", n * (part if whole else 2 * k + 1)]]
            assert collected == [*sums, *gathers, ["broadcast", 2 * n]], name
        assert recorded[1:] == recorded[:-1] and (len(recorded[0]) > 2) == (name == "recorded")
        whole, part = (weight_sizes(checkpoint, "cpu", torch.float32, 3, shard) for shard in (WHOLE, Shard(0, world)))
        replicated = sum(size for tensor, size in whole.items() if part[tensor] == size)
        assert held == sum(part.values())
        if checkpoint.recipe is None:  # a part that is cut inside groups is dequantised
            assert held - replicated <= (1 / world + 0.1) * (sum(whole.values()) - replicated), name


def test_drafts_of_ranks_that_draw_otherwise_change_no_sample(checkpoints, tmp_path):
    """Two ranks hold a network in fp32, and the second moves its logits before each draw, of a draft too. The drafts:
    layers of the target and prompt look-up, whose draws and text steer collectives; a model; one that proposes other
    tokens on each rank, or nothing on one. Oracle: one process without a draft."""
    checkpoint = checkpoints["gqa"]
    request = Request(3, 40, Sampling(0.9, top_k=20), seed=2, eos_ids=frozenset())
    prompt = PROMPT * 2  # in which something is found
    engine = Engine(load_model(checkpoint, "cpu", torch.float32, 3), compile=False)
    expected = [each.tokens for each in engine.generate(prompt, request)]
    (tmp_path / "case").write_bytes(pickle.dumps((checkpoint, prompt, request)))
    result = torchrun(2, "tests/tp_worker.py", "drafts", tmp_path / "case", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1] and len(found[0]) == 5
    for name, (tokens, steps, accepted) in found[0].items():
        assert tokens == expected, name
        assert name == "plain" or (steps > 4 and sum(accepted) > 12), name
    assert found[0]["model"][2][3] == sum(found[0]["model"][2]), "the target as its own draft is always right"


def test_without_a_group_nothing_is_summed():
    """A replica by itself; in a group of one the sums are made, two a layer, and not for the vocabulary."""
    model = random_model(BASE, torch.float32)

    def step() -> None:
        model(random_tokens(BASE, 3, 2), positions(0, 3, 2), empty_cache(BASE, torch.float32))

    Shard().attach(model)
    assert collectives(step) == []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Shard(0, 1, dist.group.WORLD.group_name).attach(model)
        assert collectives(step) == 2 * BASE.n_layer * [("all_reduce", 3 * 2 * BASE.dim)]
    finally:
        dist.destroy_process_group()


def tiny(*more: object) -> list[object]:
    return ["generate.py", "--seed", 4, "--max_new_tokens", 24, "--dtype", "float32", "--no-compile", *more]


def test_replicas_divide_the_samples():
    """Two replicas of two ranks each, whose samples are ranked together; only rank 0 writes. Stop strings need the text
    on every rank."""
    arguments = tiny("-n", 5, "--temperature", 1.3, "--stop", ".", "--max_new_tokens", 10)
    arguments += ["--selfcheck", "--verbose", "--format", "jsonl"]
    drafting = ["--draft", "layers:2", "--speculate_k", 2]  # a draft changes no sample, and decides by a clock
    result = torchrun(4, *arguments, "--tp", 2, *drafting)
    mine, theirs = lines_of(run(*arguments[1:])), lines_of(result)
    assert len({line["text"] for line in mine}) == 5 and {line["finish_reason"] for line in mine} == {"stop", "length"}
    names = ("rank", "sample", "text", "tokens", "finish_reason")
    assert [[line[name] for name in names] for line in theirs] == [[line[name] for name in names] for line in mine]
    report = dict(re.findall(r"^ *(\w+)  (.*)$", result.stderr, re.MULTILINE))
    assert (report["tp"], report["replicas"], report["num_samples"]) == ("2", "2", "5")
    assert float(report["selfcheck_max_difference"]) < 1e-4


def test_replicas_divide_the_prompts(tmp_path):
    """Two replicas, which write to one file and hold two prompts at a time. Oracle: one process, which holds all."""
    path, report = tmp_path / "p.jsonl", tmp_path / "r.json"
    path.write_text(
        "".join(json.dumps(f"A {word} sat") + "\n" for word in ("cat", "big dog", "bird", "man", "red car"))
    )
    arguments = tiny("-n", 3, "--max_new_tokens", 9, "--ignore_eos", "--prompts", path, "--output")
    many = torchrun(2, "tests/tp_worker.py", "windows", *arguments[1:], tmp_path / "2", "--tp", 1, "--report", report)
    assert (many.returncode, many.stdout) == (0, ""), many.stderr
    assert run(*arguments[1:], tmp_path / "1").returncode == 0
    names = ("id", "rank", "of", "sample", "text", "tokens", "seed")
    found = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "12"]
    one, two = (sorted([line.get(name) for name in names] for line in lines[1:]) for lines in found)
    assert one == two and len(one) == 15 and found[0][0] == found[1][0]
    made = json.loads(report.read_text())
    assert (made["prompts"], made["replicas"], made["tokens"]) == (5, 2, 5 * 3 * 9)


def test_a_batch_whose_first_process_died_is_drawn_once(tmp_path):
    """The other replica goes on: until it has ended too, no run goes on with the output; then one does, and has what it
    drew. Oracle: one process."""
    path, output, go = tmp_path / "p.jsonl", tmp_path / "o", tmp_path / "go"
    path.write_text("".join(json.dumps(f"A {word} sat") + "\n" for word in ("cat", "dog", "bird", "man", "red car")))
    arguments = tiny(
        "-n", 3, "--max_new_tokens", 9, "--ignore_eos", "--temperature", 1.5, "--prompts", path, "--output"
    )
    first, other = started(2, "tests/tp_worker.py", "leave", go, *arguments[1:], output, "--tp", 1)
    assert first.end(100).returncode == -signal.SIGKILL
    refused = run(*arguments[1:], output, "--resume")
    go.touch()
    ended = other.end(100)
    assert refused.returncode == 2 and "another run writes to" in refused.stderr
    assert ended.returncode == 2 and "rank 1 lost the connection to another rank" in ended.stderr
    result = run(*arguments[1:], output, "--resume")
    assert result.returncode == 0 and "2 done before" in result.stderr, result.stderr
    assert run(*arguments[1:], tmp_path / "1").returncode == 0
    names = ("id", "rank", "of", "sample", "text", "tokens", "seed")
    found = [[json.loads(line) for line in file.read_text().splitlines()[1:]] for file in (output, tmp_path / "1")]
    one, two = (sorted([line.get(name) for name in names] for line in lines) for lines in found)
    assert (
        one == two
        and len(one) == 15
        and sorted(each.name for each in tmp_path.iterdir()) == ["1", "go", "o", "p.jsonl"]
    )


def test_replicas_divide_an_evaluation(tmp_path):
    """Perplexity in windows, and samples of problems, of which one is refused by all ranks in one line. Oracle: one
    process."""
    text, problems = tmp_path / "text", tmp_path / "problems"
    text.write_text("Once upon a time there was a little cat who sat in the sun. " * 20)
    lines = [{"task_id": at, "prompt": f"Once upon a time there was a {word}"} for at, word in enumerate("abcdefg")]
    problems.write_text("".join(json.dumps(each) + "\n" for each in lines))
    common = ["--dtype", "float32", "--no-compile", "--seed", 3]
    scored = ["--perplexity", text, "--stride", 60, *common]
    drawn = ["--samples", problems, "-n", 3, "--max_new_tokens", 9, *common, "--output"]
    for flags in (scored, [*drawn, tmp_path / "2"]):
        many = torchrun(2, "eval.py", *flags, "--tp", 1)
        assert many.returncode == 0, many.stderr
        one = evaluated(*flags[:-1], tmp_path / "1") if flags is not scored else evaluated(*flags)
        assert one.returncode == 0 and many.stdout == one.stdout, one.stderr
        assert "tokens" in many.stderr and many.stderr.count("were read") == 1
    names = ("task_id", "sample", "of", "completion", "finish_reason")
    found = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "12"]
    one, two = (sorted([line[name] for name in names] for line in lines) for lines in found)
    assert one == two and len(one) == 21 and not list(tmp_path.glob("*replica*"))
    refused = torchrun(2, "eval.py", *scored, "--stride", 10**6, "--tp", 1)
    assert refused.returncode == 2 and refused.stderr.count("error: ") == 1, refused.stderr


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_torchrun_starts_again_goes_on(tmp_path, rank):
    """A rank dies in the middle of a prompt's lines: no line is lost, none is there twice. Oracle: one process."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(f"A {word} sat") + "\n" for word in ("cat", "dog", "bird", "man", "cow") * 3))
    arguments = tiny("-n", 3, "--max_new_tokens", 9, "--temperature", 1.5, "--prompts", path, "--output")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
    agent += [
        f"--master_port={free_port()}",
        "tests/tp_worker.py",
        "once",
        rank,
        *arguments[1:],
        tmp_path / "2",
        "--tp",
        1,
    ]
    result = subprocess.run(list(map(str, agent)), capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert result.returncode == 0 and "done before" in result.stderr, result.stderr
    assert run(*arguments[1:], tmp_path / "1").returncode == 0
    names = ("id", "rank", "of", "sample", "text", "tokens", "seed")
    found = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()[1:]] for name in "12"]
    one, two = (sorted([line.get(name) for name in names] for line in lines) for lines in found)
    assert one == two and len(one) == 45 and sorted(each.name for each in tmp_path.iterdir()) == ["1", "2", "p.jsonl"]


@slow
def test_two_machines_with_different_memory(tmp_path):
    """Two agents of torchrun, as on two machines, which hold one network; the smaller memory decides for both."""
    port = free_port()
    agents = []
    for rank, memory in enumerate(("1GB", "4100kB")):
        flags = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", "--master_addr=localhost"]
        flags += [f"--master_port={port}", *tiny("-n", 5, "--tp", 2, "--max_memory", memory)]
        command = [sys.executable, "-m", "torch.distributed.run", *flags]
        agents.append(subprocess.Popen(list(map(str, command)), stdout=-1, stderr=-1, text=True, cwd=ROOT))
    (out, err), (other, _) = (agent.communicate(timeout=200) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], err
    rows = re.search(r"running (\d+) samples? at a time", err)
    assert rows and 1 <= int(rows[1]) < 5 and other == ""
    assert out == run(*tiny("-n", 5)[1:]).stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_a_conversation_is_held_by_all_ranks():
    """Read by one of two replicas, which keeps the reply that the other drew."""
    arguments = tiny("--interactive", "-n", 3)
    result = torchrun(2, *arguments, "--tp", 1, input="hello\nand then\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(*arguments[1:], input="hello\nand then\n").stdout


def test_the_death_of_a_rank_ends_all():
    """By SIGKILL, after its first token."""
    ranks = started(2, "tests/tp_worker.py", "die", *tiny("-n", 3)[1:])
    first, other = (rank.end(100) for rank in ranks)
    assert (other.returncode, first.returncode, first.stdout) == (-signal.SIGKILL, 2, "")
    (line,) = own_lines(first.stderr)
    assert "rank 0 lost the connection to another rank" in line


def test_a_rank_of_a_conversation_without_memory_ends_all():
    """Which the others, who wait for its sums, would not know."""
    ranks = started(2, "tests/tp_worker.py", "memory", *tiny("--interactive", "-n", 3)[1:], input="hello\nand then\n")
    first, other = (rank.end(60) for rank in ranks)
    assert (first.returncode, other.returncode, first.stdout) == (2, 2, "")
    assert (
        "error: rank 0 lost the connection to another rank" in first.stderr
        and "error: CUDA out of memory" in other.stderr
    )


def test_each_wait_has_its_group(monkeypatch):
    """What rank 0 alone has is broadcast, what takes some longer is waited for, what all do alike is not. Oracle: the
    collectives, and their groups."""
    seen = []

    def gathered(values: list, value: object, group: object) -> None:
        seen.append(("gather", group))
        values[:] = [value] * 4

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda value, source, group: seen.append((source, group)))
    monkeypatch.setattr(dist, "barrier", lambda group: seen.append(("barrier", group)))
    ranks = Ranks(replicas=2, shard=Shard(0, 2), control="short", patient="long")  # type: ignore[arg-type]
    assert (ranks.share(lambda: 5), ranks.gather(6), ranks.agree(lambda: 7), ranks.all(8)) == (5, [6, 6], 7, [8] * 4)
    assert ranks.agree(lambda: 9, patient=True) == 9
    ranks.wait()
    gathers = [("gather", group) for group in ("long", "short", "short", "long")]
    assert seen == [(0, "long"), *gathers, ("barrier", "long")]


def test_a_draft_is_fetched_with_the_model(monkeypatch):
    """By the one process of a machine that fetches, so that the others find both."""
    fetched = []
    monkeypatch.setattr(generate, "locate", fetched.append)
    for draft in (None, "own/draft"):
        generate.fetch(SimpleNamespace(checkpoint_path="own/model", draft_checkpoint_path=draft))
    assert fetched == ["own/model", "own/model", "own/draft"]


def test_what_cannot_be_run_is_refused_once(tmp_path):
    """Before anything is read, and where it is found out while all ranks load."""
    shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"intermediate_size": 390}))
    for arguments, words in (
        (["--tp", 3], "2 processes cannot be divided into groups of 3: pass --tp 1 or 2 (1: one replica per process)"),
        (["--checkpoint_path", tmp_path / "other"], "the weights do not match config.json"),
    ):
        result = torchrun(2, *tiny(*arguments))
        assert result.returncode != 0 and result.stdout == ""
        (line,) = own_lines(result.stderr)
        assert words in line


def test_samples_are_divided_and_none_is_lost():
    for total in (2, 5, 64):
        parts = [Ranks(replica=replica, replicas=2).samples(total) for replica in range(2)]
        assert [*parts[0], *parts[1]] == list(range(total)) and len(parts[0]) >= len(parts[1])
    with pytest.raises(ValueError, match="-n 1 is less than one sample for each of 2 replicas"):
        Ranks(replicas=2).samples(1)


@pytest.mark.parametrize("world,fits", [(3, "1"), (4, "1"), (8, "1 or 2 or 4"), (12, "1 or 2 or 4")])
def test_heads_that_cannot_be_divided_are_refused_with_what_divides_them(world, fits):
    """4 heads among 3 ranks and among 8 and 12; a width of 97 among 4."""
    args = replace(BASE, n_kv_head=4, hidden_dim=97 if world == 4 else 96)
    told = f"do not divide among {world} processes: pass --tp {fits} \\(1: one replica per process\\)"
    with pytest.raises(ValueError, match=f"4 heads, 4 key/value heads .* {told}"):
        Shard(0, world).local(args)


def test_tp_without_torchrun_is_refused():
    result = run("--tp", 2)
    assert (result.returncode, result.stdout) == (2, "") and "torchrun --nproc_per_node=2" in result.stderr
