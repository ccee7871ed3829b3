"""Text to ids and back. Oracles: the libraries themselves, and the text that went in."""

import pytest
from conftest import SHARED, TINY

from tokenizer import JSONTokenizer, SentencePieceTokenizer, TextStream, continuation_text, load_tokenizer

TEXTS = [
    "Once upon a time, there was a cat.",
    "  leading and   inner spaces, and a tab\t.",
    "Zoë naïve 日本語 🙂👩‍👩‍👧 \u200b end",
    "two\n\nlines\r\n",
    "text with <s> and </s> and <|eot_id|> in it",
]
LLAMA3 = SHARED / "tokenizers" / "llama3"
STORIES = SHARED / "models" / "stories15M"


def json_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["tiny", "json", "llama2", "llama3"])
def tokenizer(request, tmp_path):
    folder = {"tiny": TINY, "llama2": STORIES, "llama3": LLAMA3}.get(request.param)
    if request.param == "json":
        folder = json_tokenizer(tmp_path)
    if not folder.exists():
        pytest.skip(f"{request.param}: not beside the repository")
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_names_of_special_tokens_in_text_are_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.bos_id not in ids and not tokenizer.eos_ids & set(ids)
    assert tokenizer.bos_id is not None and tokenizer.eos_ids


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer, text):
    context = tokenizer.encode("Before it.")
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, context)
    pieces = [stream.push([id]) for id in ids] + [stream.flush()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(context + ids)[len("Before it.") :]
    assert continuation_text(tokenizer, context, ids) == "".join(pieces)


@pytest.mark.parametrize("text", ["日本語🙂日本語日本", "🙂" * 20])
def test_long_runs_of_bytes_stream_as_characters(tokenizer, text):
    """A window that cut into a run of byte tokens would decode all of it to U+FFFD."""
    stream = TextStream(tokenizer, tokenizer.encode("語" * 30))
    assert "".join([stream.push([id]) for id in tokenizer.encode(text)] + [stream.flush()]).strip() == text


def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer.encode("x🙂")
    stream = TextStream(tokenizer, [])
    text = "".join(stream.push([id]) for id in ids[:-1])
    assert text.strip() == "x"
    assert set(stream.flush()) <= {"\ufffd"}


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([tokenizer.bos_id, *ids, *tokenizer.eos_ids]) == tokenizer.decode(ids)


def test_ids_of_a_padded_vocabulary_decode_to_nothing(tokenizer):
    if isinstance(tokenizer, JSONTokenizer):
        pytest.skip("the tokenizers library leaves them out itself")
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


@pytest.mark.skipif(not LLAMA3.exists(), reason="the Llama 3 tokenizer is not beside the repository")
def test_llama3_ids():
    """Ids that Meta's reference tokenizer gives: https://github.com/meta-llama/llama3, test_tokenizer.py."""
    tokenizer = load_tokenizer(LLAMA3)
    assert tokenizer.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (128000, 128256)
    assert {128001, 128009} <= tokenizer.eos_ids


def test_the_kind_is_chosen_by_content_not_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    lines = [f"{token} {rank}" for rank, token in enumerate(["YQ==", "Yg==", "YWI="])]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tiktoken = load_tokenizer(tmp_path)
    assert tiktoken.encode("ab") == [2] and tiktoken.bos_id == 3


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model or tokenizer.json in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00\x01\x02", b"{}"])
def test_a_broken_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
