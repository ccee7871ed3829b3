"""Where a sample ends, and its text there.

Oracle: a search of plain loops over the text that the tokens spell, with the names of control tokens in it."""

import json
import random
import shutil

import pytest
from conftest import TINY, request

from engine.chat import Conversation
from engine.engine import Engine
from engine.request import Sampling
from engine.samples import Row, StopConditions
from engine.scheduler import Prompt
from loading.tokenizer import Tokenizer, load_tokenizer

NAMES = {"<|turn|>": 2048, "<|call|>": 2049, "<|end|>": 2050}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The shipped one, with control tokens beyond its pieces."""
    folder = tmp_path_factory.mktemp("names")
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps(NAMES))
    return load_tokenizer(folder)


def ended(tokenizer: Tokenizer, stop: tuple[str, ...], tokens: list[int], eos: int = 2) -> Row:
    """A row that has recorded the tokens up to its end."""
    ending = StopConditions.of(request(1, 400, stop=stop, eos_ids=frozenset([eos])), frozenset(), tokenizer)
    row = Row(0, ending, tokenizer, tokenizer.encode("Before it."), False)
    for token in tokens:
        if row.sample.finish_reason is None:
            row.record(token, -1.0)
    return row


def expected(tokenizer: Tokenizer, stop: tuple[str, ...], tokens: list[int], eos: int) -> tuple[str, int, str | None]:
    """The text, how many tokens it takes, and what ended it: all texts spelled anew after each token."""
    holds = any(name in each for name in NAMES for each in stop)
    names, context = {id: name for name, id in NAMES.items() if holds}, tokenizer.encode("Before it.")
    begin = len(tokenizer.decode(context))
    for count in range(1, len(tokens) + 1):
        parts: list[tuple[str, bool]] = []
        for end in range(1, count + 1):
            said = tokenizer.decode(context + tokens[:end])[begin:]
            parts.append((said[len("".join(text for text, named in parts if not named)) :], False))
            parts.append((names.get(tokens[end - 1], ""), True))
        text = "".join(part for part, named in parts if not named)
        if tokens[count - 1] == eos or any(tokens[count - 1] == NAMES.get(each) for each in stop):
            return text, count, "eos"
        spelled = "".join(part for part, _ in parts)
        found = [at for each in stop if (at := spelled.find(each)) >= 0]
        if found:
            kept, left = "", min(found)
            for part, named in parts:
                kept, left = kept + ("" if named else part[:left]), max(0, left - len(part))
            return kept, count, "stop"
    return text, len(tokens), None


STOPS = [
    ("<|turn|>",), ("<|end|>",), ("<|call|><|turn|>",), ("cat<|turn|>",), ("<|turn|>cat",),
    ("<|turn|> cat", "dog<|call|>"),
    (" cat<|call|>.", "zebra"), ("cat",), ("turn|>",), ("<|turn|><|turn|>", "<|end|>"), (".<|turn|><|call|> ",),
]  # fmt: skip


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings_may_hold_names_of_control_tokens(tokenizer, stop):
    draw = random.Random(str(stop))
    words = [tokenizer.encode(word) for word in ("cat", "dog", ".", "the <|turn|> cat")]
    reasons = set()
    for _ in range(60):
        parts = draw.choices([*words, *([id] for id in NAMES.values())], k=draw.choice([3, 9, 30]))
        tokens = [id for part in parts for id in part]
        row = ended(tokenizer, stop, tokens, eos=NAMES["<|end|>"])
        text, count, reason = expected(tokenizer, stop, tokens, NAMES["<|end|>"])
        assert (row.sample.text, len(row.sample.tokens), row.sample.finish_reason) == (text, count, reason)
        reasons.add(reason)
    assert len(reasons) > 1


def test_a_stop_string_far_behind_is_found(tokenizer):
    """Past 66, 130 and 257 tokens."""
    for length in (66, 130, 257):
        tokens = tokenizer.encode("cat" * length)[:length]
        row = ended(tokenizer, ("<|call|>",), [*tokens, NAMES["<|turn|>"], NAMES["<|call|>"], *tokens])
        assert row.sample.tokens == [*tokens, NAMES["<|turn|>"], NAMES["<|call|>"]]
        assert row.sample.finish_reason == "eos" and f" {'cat' * length}".startswith(row.sample.text)


def test_a_name_in_a_stop_string_is_text_too(tokenizer):
    """A model may spell it."""
    row = ended(tokenizer, ("<|turn|>",), tokenizer.encode("the cat<|turn|> and"))
    assert (row.sample.text, row.sample.finish_reason) == (" the cat", "stop")


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Engine:
    """The shipped model, in which a token that is drawn soon is a control token."""
    folder = tmp_path_factory.mktemp("talking")
    for name in ("model.pth", "config.json", "tokenizer.model"):
        shutil.copy(TINY / name, folder)
    dot = load_tokenizer(TINY).encode("a.")[-1]
    (folder / "added_tokens.json").write_text(json.dumps({"<|turn|>": dot}))
    return Engine.open(folder, "cpu", "float32", compile=False)


def test_every_way_to_draw_stops_at_the_name_of_a_control_token(talking):
    """Samples of a prompt, of many prompts, replies: one mechanism. Oracle: the first such token of the free sample."""
    dot = talking.tokenizer.specials["<|turn|>"]
    prompts = [talking.encode(text) for text in ("Once upon a time", "The cat sat", "Lily saw a dog")]
    asked = request(3, 60, Sampling(0.7), stop=("<|turn|>",))
    for prompt in prompts:
        free = talking.generate(prompt, request(3, 60, Sampling(0.7)))
        samples = talking.generate(prompt, asked)
        for one, other in zip(samples, free, strict=True):
            assert one.tokens == other.tokens[: 1 + other.tokens.index(dot)] and one.finish_reason == "eos"
        assert samples == Conversation(talking, asked).turn(prompt)
        assert "".join(piece.text for piece in talking.stream(prompt, asked) if piece.sample == 0) == samples[0].text
    many = list(talking.generate_many([Prompt(n, prompt) for n, prompt in enumerate(prompts)], asked))
    assert all(sample.tokens.index(dot) == len(sample.tokens) - 1 for each in many for sample in each.samples)
