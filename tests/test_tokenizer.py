"""Text to ids and back.

Oracles: the text that went in; the bytes of it; for SentencePiece a BPE of plain loops over the pieces' scores, and
transformers' LlamaTokenizer; for tiktoken transformers' TikTokenConverter and a BPE of plain loops over the ranks; for
tokenizer.json transformers' tokenizers, as they are read from the same folder.
"""

import base64
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import regex
from conftest import SHARED, STORIES, TINY
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from engine.samples import TextStream, continuation_text
from loading.tokenizer import JSONTokenizer, SentencePieceTokenizer, load_tokenizer

TEXTS = [
    "Once upon a time, there was a cat. It's 3.14159 o'clock, SHE'LL say!",
    "  leading and   inner spaces, and a tab\t.",
    "Zoë naïve 日本語の文章。中文，한국어 🙂👩‍👩‍👧 \u200b end",
    "🇯🇵🇫🇷 flags, 👨🏽‍👩🏿‍👧‍👦🏳️‍🌈 and a family",
    "two\n\nlines\r\n",
    "def f(x):\n\treturn {'a': x[1:]}  # 12345 += 1;\n\n\n    if (a != b) { c(); }\n",
    " " * 33 + "\n" * 17 + "\t" * 9 + " x " + " " * 70 + "\r\n" * 3,
    "text with <s> and </s> and <|eot_id|>, <|im_end|>glued</s>.</s><s><unk>[INST]",
    "\x00\x01\x1b[0m\x7f\x85 \ufeff\u2028\u00a0 e\u0301 \ue000 \U0010fffd",
    "مرحبا שלום हिन्दी ไทย",
    "a",
    " ",
    "",
]
# What is published, as far as it lies beside the repository; what is made here is of the same forms.
PUBLISHED = {
    kind: path for kind, path in {"llama2": STORIES, "meta": SHARED / "tokenizers" / "llama3"}.items() if path.exists()
}
needs_meta = pytest.mark.skipif("meta" not in PUBLISHED, reason="Meta's Llama 3 tokenizer is not beside the repository")
LLAMA3 = ["llama3", *({"meta"} & PUBLISHED.keys())]
SENTENCEPIECE = ["tiny", "gemma", *({"llama2"} & PUBLISHED.keys())]
KINDS = [*SENTENCEPIECE, "bytelevel", "metaspace", *(f"{kind}{form}" for kind in LLAMA3 for form in ("", "json"))]
LLAMA3_WORD = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]


def save(folder: Path, backend: Backend, **config) -> Path:
    """A tokenizer.json, and a tokenizer_config.json where there is something to say."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def template(bos: str, id: int):
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, id)])


def byte_level(control: list[str] = CONTROL) -> Backend:
    """A small byte-level BPE that prepends nothing."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


@functools.cache
def llama_reference(path: Path, legacy: bool = True) -> LlamaTokenizer:
    vocabulary, _, merges = SentencePieceExtractor(str(path)).extract(True)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)


def gemma(folder: Path) -> Path:
    """A small SentencePiece model as Gemma's: it prepends no space and changes no character."""
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=9,
    )  # fmt: skip
    return folder


def llama3(folder: Path) -> Path:
    """A small vocabulary in the form of Llama 3's: the bytes, then merges, in lines of base64 and rank."""
    backend, pieces = Backend(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(LLAMA3_WORD), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pieces.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS * 2, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = backend.get_vocab()
    parts = [bytes(map(byte_of.get, piece)) for piece in sorted(vocabulary, key=vocabulary.get)]
    folder.mkdir()
    lines = [f"{base64.b64encode(part).decode()} {rank}\n" for rank, part in enumerate(parts)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


@functools.cache
def llama3_backend(folder: Path) -> Backend:
    """The tokenizer.json that a vocabulary of Llama 3's form is published with, as far as it matters here, by
    transformers' own converter."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    backend = TikTokenConverter(str(folder / "tokenizer.model"), extra_special_tokens=names).converted()
    begin = template(names[0], backend.token_to_id(names[0]))
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return backend


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of every kind."""
    base = tmp_path_factory.mktemp("tokenizers")
    backend = byte_level()
    backend.post_processor = template("<s>", 1)
    found = {"tiny": TINY, "bytelevel": save(base / "bytelevel", backend, bos_token="<s>", eos_token="</s>")}
    found |= {"metaspace": base / "metaspace", "gemma": gemma(base / "gemma"), "llama3": llama3(base / "llama3")}
    llama_reference(TINY / "tokenizer.model").save_pretrained(found["metaspace"])
    found |= PUBLISHED
    return found | {f"{kind}json": save(base / f"{kind}json", llama3_backend(found[kind])) for kind in LLAMA3}


@pytest.fixture(scope="session")
def loaded(folders):
    """The tokenizer of a kind, read once."""
    return functools.cache(lambda kind: load_tokenizer(folders[kind]))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind, loaded):
    return loaded(kind)


def merged(parts: list, rank) -> list:
    """The parts after all merges: always the pair of lowest rank, the leftmost of equals. rank(joined): None for none.

    Plain and slow on purpose."""
    while True:
        ranks = [rank(left + right) for left, right in zip(parts, parts[1:], strict=False)]
        best = min((each for each in ranks if each is not None), default=None)
        if best is None:
            return parts
        at = ranks.index(best)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_are_those_of_plain_loops(loaded, text):
    for kind in SENTENCEPIECE:
        tokenizer = loaded(kind)
        processor = tokenizer.processor
        pieces = {processor.id_to_piece(id): id for id in range(tokenizer.vocab_size) if not processor.is_control(id)}
        pieces = {piece: id for piece, id in pieces.items() if not processor.is_byte(id) and piece != "<unk>"}
        score = {piece: -processor.get_score(id) for piece, id in pieces.items()}
        expected, prefix = [], "" if kind == "gemma" else "▁"
        for piece in merged(list((prefix + text).replace(" ", "▁")) if text else [], score.get):
            as_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
            expected += [pieces[piece]] if piece in pieces else as_bytes
        assert tokenizer.encode(text) == expected


# LlamaTokenizer 5 adds no prefix space to text that begins with a space; SentencePiece and LlamaTokenizer 4 do.
@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith(" ")])
def test_sentencepiece_ids_are_those_of_transformers(folders, loaded, text):
    for kind in {*SENTENCEPIECE} - {"gemma"}:
        reference, tokenizer = llama_reference(folders[kind] / "tokenizer.model"), loaded(kind)
        ids = reference.encode(text, split_special_tokens=True)
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", LLAMA3)
@pytest.mark.parametrize("text", TEXTS)
def test_llama3_ids_are_those_of_transformers(folders, loaded, kind, text):
    reference = llama3_backend(folders[kind])
    reference.encode_special_tokens = True  # names of special tokens in a text are text
    expected = reference.encode(text).ids
    reference.encode_special_tokens = False
    for tokenizer in (loaded(kind), loaded(f"{kind}json")):
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == expected


@pytest.mark.parametrize("kind", LLAMA3)
def test_llama3_ids_are_those_of_plain_loops(folders, loaded, kind):
    lines = (folders[kind] / "tokenizer.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    for text in TEXTS:
        words = [[bytes([byte]) for byte in found.encode()] for found in regex.findall(LLAMA3_WORD, text)]
        assert loaded(kind).encode(text) == [ranks[part] for word in words for part in merged(word, ranks.get)]


@needs_meta
def test_llama3_ids_are_those_that_meta_publishes(loaded):
    """https://github.com/meta-llama/llama3, test_tokenizer.py"""
    tokenizer = loaded("meta")
    assert tokenizer.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (128000, 128256)
    assert {128001, 128009} <= tokenizer.eos_ids


@pytest.mark.parametrize("kind", LLAMA3)
def test_llama3_special_tokens_are_those_of_its_json(folders, loaded, kind):
    """Of Meta's: https://huggingface.co/meta-llama/Meta-Llama-3-8B, tokenizer.json. They follow the merges."""
    offsets = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eom_id": 8, "eot_id": 9}
    base = len((folders[kind] / "tokenizer.model").read_bytes().splitlines())
    published = {f"<|{name}|>": base + offset for name, offset in offsets.items()}
    assert base == 128000 or kind != "meta"
    assert loaded(kind).specials == published
    assert published.items() <= loaded(f"{kind}json").specials.items()


def test_a_long_run_of_spaces_is_encoded(tokenizer):
    """Longer than what a library reads at a time."""
    text = " " * 450_001 + "a"
    assert tokenizer.decode(tokenizer.encode(text)).strip() == "a"


@pytest.mark.parametrize("text", TEXTS)
def test_json_ids_are_those_of_transformers(folders, loaded, text):
    for kind in ("bytelevel", "metaspace"):
        tokenizer, reference = loaded(kind), PreTrainedTokenizerFast.from_pretrained(folders[kind])
        ids = reference.encode(text, split_special_tokens=True)
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_text_comes_back(kind, tokenizer):
    for text in TEXTS:
        # Metaspace takes a leading space for the prefix space, as transformers 5 does.
        assert tokenizer.decode(tokenizer.encode(text)) == (
            text[text.startswith(" ") :] if kind == "metaspace" else text
        )


def test_names_of_special_tokens_in_text_are_text(tokenizer):
    for text in [*TEXTS, *CONTROL, "<s", "<<s>>", "</s></s>"]:
        assert not {tokenizer.bos_id, *tokenizer.specials.values()} & set(tokenizer.encode(text))
        assert tokenizer.bos_id is not None and tokenizer.eos_ids


@pytest.mark.parametrize("model", ["unigram", "words"])
def test_names_that_are_words_of_the_vocabulary_are_text_too(tmp_path, model):
    """The tokenizers library itself finds them there, even where it is told that special tokens are text."""
    options = dict(special_tokens=CONTROL, show_progress=False)
    if model == "unigram":
        backend, trainer = Backend(models.Unigram()), trainers.UnigramTrainer(vocab_size=200, **options)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend, trainer = Backend(models.WordLevel(unk_token="[?]")), trainers.WordLevelTrainer(**options)
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator([*TEXTS, "< s> /s> |eot_id|> [?]"], trainer)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert {"<s>", "</s>"} <= tokenizer.specials.keys()
    ids = tokenizer.encode("a </s> cat <s> </s>" * 50)
    assert ids and not set(tokenizer.specials.values()) & set(ids)
    assert tokenizer.encode("a cat") == backend.encode("a cat", add_special_tokens=False).ids
    if model == "unigram":
        assert "<s>" in tokenizer.decode(tokenizer.encode("a <s> b")).replace(" ", "")


def test_control_pieces_that_sentencepiece_finds_in_text_are_text(tmp_path):
    """Gemma's turns are user-defined pieces, named special in tokenizer_config.json."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:1] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        user_defined_symbols=["<end_of_turn>", "\n\n"],
        minloglevel=9,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    turn, lines = processor.piece_to_id(["<end_of_turn>", "\n\n"])
    added = {turn: {"content": "<end_of_turn>", "special": True}, lines: {"content": "\n\n", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "eos_token": "<end_of_turn>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    text = "a cat<end_of_turn><end_of_turn>was\n\n there"
    assert turn in processor.encode(text) and turn not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a\n\nb") == processor.encode("a\n\nb")
    assert tokenizer.decode([turn, lines, turn]) == "\n\n"
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "<end_of_turn>": turn}
    assert tokenizer.eos_ids == {2, turn}


def pieces_of(stream: TextStream, groups: list[list[int]]) -> list[str]:
    return [*(stream.push(group) for group in groups), stream.flush()]


def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer):
    for text in TEXTS:
        context = tokenizer.encode("Before it.")
        ids = tokenizer.encode(text)
        pieces = pieces_of(TextStream(tokenizer, context), [[id] for id in ids])
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(context + ids)[len("Before it.") :]
        assert continuation_text(tokenizer, context, ids) == "".join(pieces)


def test_streaming_in_random_groups_adds_up(tokenizer):
    for seed in range(5):
        draw = random.Random(seed)
        ids = tokenizer.encode("".join(draw.choices(TEXTS[:-1], k=4)))
        marks = sorted(draw.sample(range(len(ids) + 1), 9))
        groups = [ids[begin:end] for begin, end in zip([0, *marks], [*marks, len(ids)], strict=True)]
        pieces = pieces_of(TextStream(tokenizer, []), groups)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(ids)


def byte_ids(tokenizer, text: str) -> list[int]:
    """A token for every byte, whatever the merges say."""
    if isinstance(tokenizer, JSONTokenizer):
        to_id = tokenizer.backend.token_to_id
        if to_id("<0x00>") is not None:
            return [to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        (spelled, _), *_ = alphabet.pre_tokenize_str(text)
        return [to_id(character) for character in spelled]
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return [tokenizer.encoding.encode_single_token(bytes([byte])) for byte in text.encode()]


def test_streaming_is_right_at_every_byte_boundary(tokenizer):
    """Whatever comes before the boundary, what is shown there are the characters that are whole, and no others."""
    for cut in range(1, 41):
        text = "é日🙂ß👩‍👩‍👧 𝔘ñ字"
        ids = byte_ids(tokenizer, text)
        assert len(ids) == len(text.encode()) and len(ids) <= 40
        stream = TextStream(tokenizer, tokenizer.encode("x"))
        shown = stream.push(ids[:cut])
        whole = text.encode()[:cut].decode(errors="ignore")
        assert shown == whole or whole.startswith(shown) and cut < len(ids)
        assert shown + stream.push(ids[cut:]) + stream.flush() == text
        one_by_one = TextStream(tokenizer, tokenizer.encode("x"))
        assert "".join(one_by_one.push([id]) for id in ids[:cut]) == whole


@pytest.mark.parametrize("text", ["日本語🙂日本語日本", "🙂" * 20])
def test_long_runs_of_bytes_stream_as_characters(tokenizer, text):
    """A window that cut into a run of byte tokens would decode all of it to U+FFFD."""
    stream = TextStream(tokenizer, tokenizer.encode("語" * 30))
    assert "".join(pieces_of(stream, [[id] for id in tokenizer.encode(text)])).strip() == text


def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer):
    ids = byte_ids(tokenizer, "x🙂")
    stream = TextStream(tokenizer, [])
    assert "".join(stream.push([id]) for id in ids[:-1]) == "x"
    assert set(stream.flush()) == {"\ufffd"}


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("a b")
    mixed = [tokenizer.bos_id, *ids, *tokenizer.eos_ids, *tokenizer.specials.values()]
    assert tokenizer.decode(mixed) == tokenizer.decode(ids) == "a b"


def test_ids_of_a_padded_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("a b")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 5, 1 << 20]
    assert tokenizer.decode(beyond) == ""
    assert tokenizer.decode([*beyond, *ids, *beyond]) == "a b"


CONFIGS = [
    {},
    {"bos_token": "<s>"},
    {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": False},
    {"bos_token": None, "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("processor", ["none", "template", "sequence", "eos"])
def test_bos_of_a_json_is_what_transformers_prepends(tmp_path, processor, config):
    backend = byte_level()
    if processor != "none":
        backend.post_processor = template("<s>", 1)
    if processor == "eos":
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    if processor == "sequence":
        backend.post_processor = processors.Sequence([processors.ByteLevel(), backend.post_processor])
    folder = save(tmp_path, backend, **config)
    plain, *_ = backend.encode("cat", add_special_tokens=False).ids
    ids = PreTrainedTokenizerFast.from_pretrained(folder)("cat").input_ids
    expected = ids[: ids.index(plain)]
    bos = load_tokenizer(folder).bos_id
    assert ([] if bos is None else [bos]) == expected == [1] * (processor in ("template", "sequence"))


def test_bos_that_only_the_config_asks_for(tmp_path):
    """DeepSeek's files: transformers 4 prepends it, transformers 5 forgot to."""
    save(tmp_path, byte_level(), bos_token={"content": "<s>"}, add_bos_token=True)
    assert load_tokenizer(tmp_path).bos_id == 1


@pytest.mark.parametrize(("config", "bos"), [({"add_bos_token": False}, None), ({"add_bos_token": True}, 1), ({}, 1)])
def test_bos_of_sentencepiece(tmp_path, config, bos):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).bos_id == bos


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (-1, -1)])
def test_control_pieces_of_sentencepiece_may_come_first_or_not_at_all(tmp_path, bos, eos):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:1] * 9), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, bos_id=bos, eos_id=eos, unk_id=2 if bos == 0 else 0, minloglevel=9,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == ((0, {1}) if bos == 0 else (None, frozenset()))
    assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"


def test_eos_comes_from_the_metadata_and_from_known_names(tmp_path):
    folder = save(tmp_path, byte_level(["<s>", "<bye>", "<|im_end|>"]))
    assert load_tokenizer(folder).eos_ids == {2}
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<bye>", "bos_token": "<s>"}')
    assert load_tokenizer(folder).eos_ids == {1, 2}
    (folder / "tokenizer_config.json").write_text('{"eos_token": null, "add_bos_token": true}')
    assert load_tokenizer(folder).eos_ids == {2} and load_tokenizer(folder).bos_id == 0


def test_an_eos_that_the_json_does_not_flag_is_special_as_in_transformers(tmp_path):
    folder = save(tmp_path, byte_level(), eos_token="<|im_end|>")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert PreTrainedTokenizerFast.from_pretrained(folder).all_special_tokens == ["<|im_end|>"]
    assert tokenizer.specials == {"<|im_end|>": 4} and tokenizer.eos_ids == {4}
    assert 4 not in tokenizer.encode("<|im_end|>") and 1 in tokenizer.encode("<s>")


def test_a_json_that_truncates_and_pads_gives_the_whole_text(tmp_path):
    backend = byte_level()
    expected = backend.encode(TEXTS[0]).ids
    backend.enable_truncation(5)
    backend.enable_padding(length=999)
    assert load_tokenizer(save(tmp_path, backend)).encode(TEXTS[0]) == expected


def test_added_tokens_of_sentencepiece_are_special(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 2049, "<|im_start|>": 2048}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "<|im_end|>": 2049, "<|im_start|>": 2048}
    assert tokenizer.decode([2048, *tokenizer.encode("a"), 2049]) == "a"


FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
SURROUNDED = [
    "a <think> b",
    "a<think>b",
    "<think> b",
    "b <think>",
    "<think><think>\n<think>",
    "_<think>, 日<think>",
    ".",
]
SURROUNDED += [
    "a  \t\n<think>\n\n  b<thinks> <think",
    "x" * 66 + "<think> ." * 130 + "é🙂 <think> 🙂",
    " " * 70 + "<think>",
]


def llama_with(*tokens: AddedToken, legacy: bool = False) -> LlamaTokenizer:
    """transformers' tokenizer of the shipped model, with more tokens."""
    vocabulary, _, merges = SentencePieceExtractor(str(TINY / "tokenizer.model")).extract(True)
    found = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=False)
    found.add_tokens(list(tokens))
    return found


def beside(folder: Path, *tokens: AddedToken, **config) -> Path:
    """The shipped tokenizer.model, and a tokenizer_config.json with these added tokens."""
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    added = [{"content": each.content} | {flag: getattr(each, flag) for flag in flags} for each in tokens]
    shutil.copy(TINY / "tokenizer.model", folder)
    config |= {"added_tokens_decoder": {2048 + index: token for index, token in enumerate(added)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_added_tokens_that_are_text_are_those_of_transformers(tmp_path, flags):
    tokens = [AddedToken(name, special=False, normalized=False, **flags) for name in ("<think>", "<thinks>")]
    reference, tokenizer = llama_with(*tokens), load_tokenizer(beside(tmp_path, *tokens, legacy=False))
    assert tokenizer.specials == {"<s>": 1, "</s>": 2} and tokenizer.vocab_size == 2050
    for text in SURROUNDED:
        if text.startswith(" "):  # where LlamaTokenizer 5 adds no prefix space
            continue
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert tokenizer.decode([1, *ids, 2]) == reference.decode([1, *ids, 2], skip_special_tokens=True)


def test_text_behind_an_added_token_has_a_prefix_space_where_transformers_gives_it_one(tmp_path):
    token = AddedToken("<think>", special=False, normalized=False)
    reference, tokenizer = llama_with(token, legacy=True), load_tokenizer(beside(tmp_path, token, legacy=True))
    for text in ("a<think>b", "<think>b", "a<think><think>cat<think>"):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


def test_added_tokens_json_says_nothing_of_tokens_that_the_config_knows(tmp_path):
    beside(tmp_path, AddedToken("<think>", special=False, normalized=False), legacy=False)
    (tmp_path / "added_tokens.json").write_text('{"<think>": 2048, "<|end|>": 2049}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "<|end|>": 2049}
    assert tokenizer.decode([2048, 2049]) == "<think>" and tokenizer.encode("<think>") == [2048]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_names_are_cut_with_the_flags_of_their_tokens(tmp_path, flags):
    """In what a template writes control tokens are found by name. Oracle: transformers, of both kinds of files."""
    token = AddedToken("<think>", special=True, normalized=False, **flags)
    backend = byte_level()
    backend.add_special_tokens([token])
    spelled = PreTrainedTokenizerFast.from_pretrained(save(tmp_path / "json", backend))
    for folder, reference in ((beside(tmp_path, token), llama_with(token)), (tmp_path / "json", spelled)):
        tokenizer = load_tokenizer(folder)
        for text in SURROUNDED:
            names = tokenizer.names.cut(text)[1::2]
            id = reference.convert_tokens_to_ids("<think>")
            assert len(names) == reference.encode(text, add_special_tokens=False).count(id), text
            kept = "".join(tokenizer.names.cut(text)[::2])
            assert kept == "".join(texts_of(backend if reference is spelled else reference.backend_tokenizer, text))


def texts_of(backend: Backend, text: str) -> list[str]:
    """What lies between the control tokens of a text."""
    found = backend.encode(text, add_special_tokens=False)
    spans = [span for span, id in zip(found.offsets, found.ids, strict=True) if id == backend.token_to_id("<think>")]
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def test_tokenizer_json_comes_before_the_tokenizer_model_of_a_base_model(tmp_path):
    """As in transformers: what it adds is in tokenizer.json alone."""
    reference = llama_with()
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    reference.save_pretrained(tmp_path)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, JSONTokenizer)
    assert tokenizer.specials["<|im_end|>"] == 2049 and tokenizer.bos_id is None
    for text in ("Once upon a time", "a cat\n"):
        assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(tmp_path).encode(text)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("prefix", [True, False])
def test_control_tokens_that_only_the_metadata_names_may_be_any_pieces(tmp_path, file, prefix):
    """User-defined pieces, as in folders of 2023, and plain ones. Oracle: the text that went in."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:1] * 50, "an endless end"] * 3), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330, model_type="bpe", byte_fallback=True, add_dummy_prefix=prefix, minloglevel=9,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"], remove_extra_whitespaces=False,
    )  # fmt: skip
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    start, end, unk = plain.piece_to_id(["<|im_start|>", "<|im_end|>", "<unk>"])
    word = next(
        id for id in range(261, plain.vocab_size()) if plain.id_to_piece(id).isalpha() and len(plain.decode([id])) > 1
    )
    name = plain.id_to_piece(word)
    names = {"eos_token": {"content": "<|im_end|>"}, "unk_token": "<unk>", "pad_token": name, "mask_token": None}
    names |= {"add_eos_token": False, "extra_special_tokens": {"turn": "<|im_start|>"}, "sep_token": "not a piece"}
    (tmp_path / file).write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {2, end} and unk not in tokenizer.specials.values()
    assert tokenizer.specials == {"<s>": 1, "</s>": 2, "<|im_start|>": start, "<|im_end|>": end, name: word}
    assert tokenizer.decode([start, *plain.encode("a"), word, end]) == "a"
    for text in ("a<|im_start|>b", f"<|im_end|>{name} <|im_end|>", f"x{name}y", f"a {name}<|im_start|>  b"):
        ids = tokenizer.encode(text)
        assert not {start, end, word} & set(ids) and tokenizer.decode(ids) == text


def test_the_kind_is_chosen_by_content_not_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tiktoken = load_tokenizer(tmp_path)
    assert tiktoken.encode("ab") == [256] and tiktoken.bos_id == 257


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model or tokenizer.json found in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00\x01\x02", b"{}", b"YQ== 0\nnonsense"])
def test_a_broken_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a valid tokenizer"):
        load_tokenizer(tmp_path)


BROKEN = [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"bos_token": 5}', b'{"eos_token": {"special": true}}']
BROKEN += [b'{"added_tokens_decoder": [1]}', b'{"added_tokens_decoder": {"x": {"content": "<s>", "special": true}}}']


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", BROKEN)
def test_broken_metadata_is_named(tmp_path, name, content):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is invalid"):
        load_tokenizer(tmp_path)


class Counting:
    """A tokenizer that counts the tokens that are decoded."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


def runs_of(tokenizer) -> dict[str, list[int]]:
    """Tokens of which no window ends well: what an unbounded one would grow by."""
    stray = byte_ids(tokenizer, "é")[1:]
    return {
        "bytes that are no character": stray * 515,
        "beginnings of characters": byte_ids(tokenizer, "語")[:2] * 257,
        "U+FFFD by its bytes": byte_ids(tokenizer, "\ufffd") * 130,
        "U+FFFD": tokenizer.encode("\ufffd" * 130),
        "characters of three bytes": byte_ids(tokenizer, "語" * 130),
        "characters of two and four bytes": byte_ids(tokenizer, "é🙂" * 66),
        "control tokens": [min(tokenizer.eos_ids)] * 515,
        "control tokens behind half a character": stray + [min(tokenizer.eos_ids)] * 515,
    }


@pytest.mark.parametrize("begun", ["nothing", "text", "half a character"])
def test_every_run_of_tokens_streams_in_linear_time_and_shows(tokenizer, begun):
    """Of what cannot become a character no more than three U+FFFD are held. Oracle: the text of the whole."""
    context = {"nothing": [], "text": tokenizer.encode("x")}.get(begun, byte_ids(tokenizer, "é")[:1])
    for name, tokens in runs_of(tokenizer).items():
        tokens = [*tokens, *tokenizer.encode("a b")]
        counting = Counting(tokenizer)
        stream, shown = TextStream(counting, context), ""
        whole = continuation_text(tokenizer, context, tokens)
        for end, token in enumerate(tokens, 1):
            shown += stream.push([token])
            if end in (66, 130, 257):
                so_far = continuation_text(tokenizer, context, tokens[:end])
                assert so_far.startswith(shown) and len(so_far) - len(shown) <= 3, name
        assert shown + stream.flush() == whole, name
        assert counting.decoded < 50 * len(tokens), name


def test_random_tokens_stream_as_they_decode(tokenizer):
    """Whatever the groups are, the pieces are those of one token at a time, and a text that is cut anywhere is the
    beginning of the whole. Oracle: the text of the context and all tokens."""
    for seed in range(3):
        draw = random.Random(seed)
        pool = byte_ids(tokenizer, "\n語é🙂\ufffd") + tokenizer.encode(" a cat's\n\n") + [*tokenizer.specials.values()]
        ids = draw.choices(pool, k=130)
        context = tokenizer.encode("Before it.") + draw.choices(pool, k=seed % 3)
        expected = tokenizer.decode([*context, *ids])
        for _ in range(4):
            marks = sorted(draw.choices(range(len(ids) + 1), k=draw.choice([3, 40, 200])))
            groups = [ids[begin:end] for begin, end in zip([0, *marks], [*marks, len(ids)], strict=True)]
            pieces = pieces_of(TextStream(tokenizer, context), groups)
            assert "".join(pieces) == continuation_text(tokenizer, context, ids)
            assert expected.endswith("".join(pieces))


def test_a_context_that_ends_within_a_character_loses_none_of_what_follows(tokenizer):
    first, *rest = byte_ids(tokenizer, "語")
    stream = TextStream(tokenizer, [*tokenizer.encode("x"), first])
    assert "".join(pieces_of(stream, [[id] for id in (*rest, *byte_ids(tokenizer, "abc"))])) == "語abc"


def test_a_text_that_is_cut_within_a_character_is_the_same_live_and_at_once(tmp_path):
    """Llama 2's tokenizer.json: its decoder takes a whole run of bytes for U+FFFD where the last are no character."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {letter: 259 + index for index, letter in enumerate("▁abc")}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = load_tokenizer(save(tmp_path, backend))
    context = tokenizer.encode("abc")
    smile = [3 + byte for byte in "🙂".encode()]
    for tokens, text in (
        ([13, *smile[:2]], "\n\ufffd"), ([13, *smile], "\n🙂"), ([13, 131, vocabulary["a"]], "\n\ufffda"),
        ([13, 2, *smile[:2], 2, *smile[2:]], "\n🙂"), ([131, 13, *smile, 13, 131], "\ufffd\n🙂\n\ufffd"),
    ):  # fmt: skip
        stream = TextStream(tokenizer, context)
        assert "".join(pieces_of(stream, [[token] for token in tokens])) == text
        assert continuation_text(tokenizer, context, tokens) == text
