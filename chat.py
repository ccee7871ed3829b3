"""A conversation: its texts to token ids by the model's own chat template, and the context that grows by them.

A template is rendered as transformers' apply_chat_template does it, in jinja2's sandbox; what it wrote is then cut at
the names of control tokens. What a message says is never one of them: a mark is put inside every such name in it before
the template sees it, and taken out again after the cut.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cache import KVCache
from engine import SILENT, Engine, Monitor, Run
from request import Request
from samples import Piece, Sample, continuation_text
from system import check_plain, read_text
from tokenizer import JSONTokenizer, Tokenizer
from vocabulary import continued, inside, read_metadata

Message = dict[str, str]  # role: system, user or assistant; content


@dataclass(frozen=True)
class Chat:
    """A chat template and what it needs. bos_token, eos_token: their names, "" for none.

    legacy: the text behind a control token begins with SentencePiece's prefix space too. So it is in Meta's Llama 2, in
    transformers 4 unless tokenizer_config.json says `legacy: false`, in transformers 5 only if it says `legacy: true`.
    """

    template: str
    bos_token: str = ""
    eos_token: str = ""
    legacy: bool = True

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of the conversation. Raises ValueError with the template's message where it cannot be rendered."""
        import templates  # with jinja2, for which a run without a template need not wait

        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        values: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None}
        values |= {name: token for name, token in names.items() if token}
        try:
            return templates.render(self.template, values | {"add_generation_prompt": add_generation_prompt})
        except Exception as error:  # a template is a program: it raises jinja2's errors and Python's own
            roles = [message["role"] for message in messages]
            hint = "; leave the system prompt out if that is what it refuses" if "system" in roles else ""
            raise ValueError(
                f"the chat template cannot render {', '.join(roles)}: {error}{hint} (or --no-chat)"
            ) from error


# The form that Llama 2 was trained on: https://github.com/meta-llama/llama, chat_completion.
LLAMA2 = Chat(
    "{% for message in messages %}{% if message.role == 'user' %}{% set system = '' %}"
    "{% if loop.previtem is defined and loop.previtem.role == 'system' %}"
    "{% set system = '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' %}{% endif %}"
    "{{ bos_token + '[INST] ' + (system + message.content) | trim + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "<s>",
    "</s>",
)


def read_chat(folder: Path, default: Chat | None = None) -> Chat | None:
    """The chat template beside a tokenizer, `default` where there is none: LLAMA2 for a Llama 2 chat model.

    Raises ValueError where the metadata or the template cannot be read.
    """
    metadata = read_metadata(folder)
    template, path = metadata.get("chat_template"), folder / "chat_template.jinja"
    try:
        if path.exists():
            check_plain(path)
            template = read_text(path)
        elif isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if not isinstance(template, str | None):
            raise TypeError(f"{template!r} is not a template")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"no chat template can be read in {folder}: {error!r}; fetch its files again") from error
    if template is None:
        return default
    bos, eos = metadata.get("bos_token") or "", metadata.get("eos_token") or ""
    return Chat(template, bos, eos, metadata.get("legacy") is not False)


def unused(texts: Iterable[str]) -> tuple[str, str]:
    """Two characters for private use that occur in none of the texts."""
    taken = set().union(*texts)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    return next(free), next(free)


def defused(messages: Sequence[Message], tokenizer: Tokenizer, mark: str) -> list[Message]:
    """The messages with `mark` inside every name of a control token."""
    within = inside(tokenizer.names.tokens)
    return [message | {"content": within.sub(mark, message["content"])} for message in messages]


def prefixes_all(chat: Chat, tokenizer: Tokenizer, control: str) -> bool:
    """Whether text after a control token is encoded as a prompt is. A tokenizer.json says so by itself."""
    if not isinstance(tokenizer, JSONTokenizer):
        return chat.legacy
    tokenizer.backend.made.encode_special_tokens = False
    _, *ids = tokenizer.backend.encode(control + "a", add_special_tokens=False).ids
    tokenizer.backend.made.encode_special_tokens = True
    return ids == tokenizer.encode("a")


def encode_chat(chat: Chat, tokenizer: Tokenizer, rendered: str, mark: str, begins: bool) -> list[int]:
    """Ids of rendered text whose messages are defused by `mark`. begins: it is the beginning of the prompt."""
    parts = tokenizer.names.cut(rendered)
    prefixes = tokenizer.encode("a") != continued(tokenizer.encode, "a")
    bare_first = prefixes and not begins
    bare_rest = prefixes and len(parts) > 1 and not prefixes_all(chat, tokenizer, parts[1])
    ids = []
    for index, part in enumerate(parts):
        text = part.replace(mark, "")
        if index % 2:
            ids.append(tokenizer.specials[part])
        elif bare_rest if index else bare_first:
            ids += continued(tokenizer.encode, text)
        else:
            ids += tokenizer.encode(text)
    return ids


def opening_tokens(chat: Chat, tokenizer: Tokenizer, system: str | None, user: str) -> list[int]:
    """Ids of the first prompt, as prompt_tokens."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return prompt_tokens(chat, tokenizer, [*before, {"role": "user", "content": user}])


def prompt_tokens(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a whole conversation, with BOS once, whether or not the template writes it, and the generation prompt.

    Raises ValueError where the template refuses or drops the system message.
    """
    mark, sentinel = unused([chat.template, *(message["content"] for message in messages)])
    first = messages[0] | {"content": sentinel}
    if first["role"] == "system" and sentinel not in chat.render([first, *messages[1:]]):
        raise ValueError("the chat template drops a system message: leave the system prompt out")
    ids = encode_chat(chat, tokenizer, chat.render(defused(messages, tokenizer, mark)), mark, begins=True)
    bos = tokenizer.bos_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def after_reply(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], user: str) -> tuple[str, str]:
    """What the template writes behind the last reply, where the user then says `user`, and the mark that defuses it."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's: a turn follows a reply")
    messages = [*messages[:-1], messages[-1] | {"content": ""}, {"role": "user", "content": user}]
    mark, sentinel = unused([chat.template, *(message["content"] for message in messages)])
    messages = defused(messages, tokenizer, mark)
    messages[-2]["content"] = sentinel
    _, found, rest = chat.render(messages).rpartition(sentinel)
    if not found:
        raise ValueError("the chat template drops what the assistant said: talk to this model without its template")
    return rest, mark


def next_tokens(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], user: str) -> list[int]:
    """Ids that follow the text of the last reply: the end of its turn, the user's turn and the generation prompt.

    messages: all so far, the last one an assistant's. Raises ValueError where the template refuses or drops it.
    """
    return encode_chat(chat, tokenizer, *after_reply(chat, tokenizer, messages, user), begins=False)


def end_of_turn_ids(chat: Chat, tokenizer: Tokenizer) -> frozenset[int]:
    """The control token that the template writes directly after a reply, spaces aside; empty where it writes none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    rest, _ = after_reply(chat, tokenizer, messages, "a")
    text, *parts = tokenizer.names.cut(rest)
    return frozenset() if text.strip() else frozenset(tokenizer.specials[name] for name in parts[:1])


def choose_chat(folder: Path, tokenizer: Tokenizer, asked: bool | None, interactive: bool) -> Chat | None:
    """The template to talk by: where it is asked for, and in --interactive where the model has one, unless refused.

    Raises ValueError where it is asked for and there is none, nor the control tokens of Llama 2's form.
    """
    if asked is False or not (asked or interactive):
        return None
    default = LLAMA2 if asked and {"<s>", "</s>"} <= tokenizer.specials.keys() else None
    chat = read_chat(folder, default)
    if asked and chat is None:
        raise ValueError(f"no chat template in {folder}: leave out --chat, or put chat_template.jinja there")
    return chat


class Dialogue:
    """What is said in turn, as token ids: by a chat template, or, where chat is None, the bare texts after BOS."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, chat: Chat | None, system: str | None) -> None:
        if system is not None and chat is None:
            raise ValueError("--system is a part of a chat: add --chat, or put it into the prompt")
        self.tokenizer, self.vocab_size, self.chat, self.system = tokenizer, vocab_size, chat, system
        self.messages: list[Message] = []
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # A model trained on texts that BOS alone separates ends one by beginning the next.
        self.eos_ids = tokenizer.eos_ids | set(self.bos)
        if chat is not None:
            with suppress(ValueError):  # a template of one turn: a second one is refused when it comes
                self.eos_ids |= end_of_turn_ids(chat, tokenizer)

    def encode_turn(self, text: str) -> list[int]:
        """What to append to the context for the user's next text. Raises ValueError where it cannot be said."""
        try:
            (text + (self.system or "")).encode()
        except UnicodeEncodeError as error:  # how Python passes on bytes that are not UTF-8
            raise ValueError(f"the text is not UTF-8 (character {error.start}): convert it") from error
        if self.chat is not None and self.messages:
            tokens = next_tokens(self.chat, self.tokenizer, self.messages, text)
        elif self.chat is not None:
            tokens = opening_tokens(self.chat, self.tokenizer, self.system, text)
        else:
            tokens = ([] if self.messages else self.bos) + self.tokenizer.encode(text)
        return self.checked(tokens)

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A whole conversation, with the system text before it where it has none. Raises as `encode_turn`."""
        if self.chat is None:
            raise ValueError("messages need a chat template: leave out --no-chat")
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.checked(prompt_tokens(self.chat, self.tokenizer, messages))

    def checked(self, tokens: list[int]) -> list[int]:
        if max(tokens, default=0) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {max(tokens)}, the model has {self.vocab_size}: it is not its tokenizer"
            )
        return tokens

    def keep(self, text: str, reply: str) -> None:
        """Both were said."""
        if not self.messages and self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class Mark(NamedTuple):
    """How far a conversation has come: slots of its context, tokens of its history, and those pending."""

    slots: int
    history: int
    pending: tuple[int, ...]


class Conversation:
    """A context that grows by what the user says and the reply that is kept. Nothing is computed twice."""

    def __init__(self, engine: Engine, request: Request) -> None:
        if request.kv_dtype != "auto":
            raise ValueError(f"kv_dtype {request.kv_dtype}: a context that grows is not held so, give auto")
        self.engine, self.request = engine, request
        self.context = KVCache.empty(engine.args, 1, 0, engine.model.norm.weight)
        self.history: list[int] = []  # the tokens of the context, then the pending ones
        self.pending: list[int] = []  # kept, but not yet in the context
        self.replies: dict[int, KVCache] = {}  # keys and values of the last turn's samples

    def mark(self) -> Mark:
        return Mark(self.context.slots, len(self.history), tuple(self.pending))

    def back_to(self, mark: Mark) -> None:
        """Forgets all that came since."""
        self.context.resize(mark.slots)
        self.history, self.pending, self.replies = self.history[: mark.history], list(mark.pending), {}

    def turn(self, tokens: Sequence[int], monitor: Monitor = SILENT) -> list[Sample]:
        """Reads the user's tokens and draws replies. Raises ValueError, with nothing changed, where they do not fit."""
        run = Run(self.engine, self.request, [*self.history, *tokens], monitor)
        deque(self.draw(run, tokens), maxlen=0)
        return run.samples

    def stream(self, tokens: Sequence[int], monitor: Monitor = SILENT) -> Generator[Piece]:
        """`turn`, piece by piece as the text comes."""
        run = Run(self.engine, self.request, [*self.history, *tokens], monitor)
        run.live = True
        return self.draw(run, tokens)

    def draw(self, run: Run, tokens: Sequence[int]) -> Generator[Piece]:
        new, slots = [*self.pending, *tokens], self.context.slots
        try:
            end = slots + len(new)
            self.context.resize(end, end + run.own_slots if run.extends else 0)
            logits = self.engine.prefill(self.context, new, self.request.prefill_chunk, run.monitor)
            slots, self.history, self.pending = end, list(run.history), []
            run.kept = self.replies = {}
            yield from run.draw(self.context, logits)
        finally:
            self.context.resize(slots)  # what was not read, or was drawn in it, goes

    def keep(self, reply: Sample) -> None:
        """Goes on from this reply of the last turn: its keys and values move into the context."""
        tokens, tokenizer = reply.text_tokens, self.engine.tokenizer
        if tokenizer is not None and reply.finish_reason == "stop":  # only what was shown: no part of the stop string
            while tokens and len(continuation_text(tokenizer, self.history, tokens)) > len(reply.text or ""):
                tokens = tokens[:-1]
        cached = []  # a reply that another replica drew is read with the next turn
        if reply.index in self.replies:
            cached = tokens[: len(reply.tokens) - 1]  # the last token drawn was never run
            self.context.append(self.replies[reply.index], len(cached))
        self.pending = tokens[len(cached) :]
        self.history += tokens
