"""Chat: encode turns by the model's chat template, and grow a context with them.

Templates are rendered as by transformers' apply_chat_template, in jinja2's sandbox; the text is then split at the names
of control tokens. Message text never becomes a control token: a mark is inserted into every such name in it before
rendering, and removed after the split.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock, Timer
from typing import Any, NamedTuple

from cache import KVCache
from engine.engine import Engine
from engine.request import Request, check_tokens
from engine.runner import SILENT, Monitor
from engine.samples import Piece, Sample, continuation_text
from engine.scheduler import Given, Outcome, Scheduler, pieces_of, samples_of
from loading.files import check_plain, read_text
from loading.tokenizer import JSONTokenizer, Tokenizer, continued, read_metadata

Message = dict[str, Any]  # role, content, and further fields of templates: tool_calls, name, ...
PROGRAM = Path(__file__).with_name("templates.py")
RENDERING_SECONDS, RENDERING_PATIENCE = 5, 60.0  # CPU time; wall time, if the system cannot limit CPU time
RENDERING_MEMORY, RENDERING_LENGTH = 1 << 29, 10**7  # bytes; characters beyond those of the messages


class Renderer:
    """Renderer of chat templates in a child process (templates.py), started at first use and reused.

    A template is a program: the child's time and memory are limited, and it cannot end this process.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = 0  # pid of the parent: a fork must not share the pipes

    def start(self) -> subprocess.Popen[bytes]:
        limits = map(str, (RENDERING_SECONDS, RENDERING_MEMORY, RENDERING_LENGTH))
        # A new session: Ctrl-C reaches only this process, which then ends the child.
        return subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def render(self, template: str, values: dict[str, Any]) -> str:
        """Render a template. Raises ValueError if it fails or exceeds a limit."""
        request = json.dumps([template, values]).encode() + b"\n"
        with self.lock:
            if self.child is None or self.owner != os.getpid():
                self.child, self.owner = self.start(), os.getpid()
            child = self.child
            timer = Timer(RENDERING_PATIENCE, child.kill)
            timer.start()
            try:
                assert child.stdin is not None and child.stdout is not None
                with suppress(BrokenPipeError):  # the child has ended: no answer
                    child.stdin.write(request)
                    child.stdin.flush()
                answer = json.loads(child.stdout.readline() or "{}")
            except BaseException:
                self.stop(child)  # or its answer would be read as the next request's
                raise
            finally:
                timer.cancel()
            if not answer:
                self.stop(child)
                raise ValueError(
                    f"rendering was stopped (status {child.returncode}): it may use {RENDERING_SECONDS} s of CPU time "
                    f"and {RENDERING_MEMORY >> 20} MB of memory"
                )
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def stop(self, child: subprocess.Popen[bytes]) -> None:
        self.child = None
        child.kill()
        with suppress(BrokenPipeError), child:  # closes the pipes and waits
            pass


@cache
def renderer() -> Renderer:
    """Return the shared renderer of this process."""
    return Renderer()


@dataclass(frozen=True)
class Messages:
    """A conversation as data. tools: functions that the model may call, as JSON schemas."""

    turns: list[Message]
    tools: list[Any] | None = None


def as_messages(said: Messages | Sequence[Message]) -> Messages:
    return said if isinstance(said, Messages) else Messages(list(said))


def parse_messages(said: object, tools: object = None) -> Messages:
    """Parse messages in the format of OpenAI's API: null fields are dropped, text parts of a content joined.

    Raises ValueError naming the malformed message.
    """
    if not isinstance(said, list) or not said:
        raise ValueError("messages must be a list of objects with role and content")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise ValueError("the tools beside messages must be a list of objects")
    return Messages([parse_message(number, each) for number, each in enumerate(said, 1)], tools or None)


def parse_message(number: int, said: object) -> Message:
    if not isinstance(said, dict) or not isinstance(said.get("role"), str):
        raise ValueError(f"message {number} must be an object with role and content")
    message = {name: value for name, value in said.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(f"message {number} ({said['role']}) has content that is not text: {str(part)[:40]!r}")
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise ValueError(f"message {number} ({said['role']}) has no content: expected a text, or parts of type text")
    return message


@dataclass(frozen=True)
class Chat:
    """A chat template and its settings. bos_token, eos_token: their names, "" for none. tool_use: the template for
    messages with tools, "" for the same.

    legacy: text after a control token also gets SentencePiece's prefix space, as in Meta's Llama 2, in transformers 4
    unless tokenizer_config.json says `legacy: false`, in transformers 5 only if it says `legacy: true`.
    """

    template: str
    bos_token: str = ""
    eos_token: str = ""
    legacy: bool = True
    tool_use: str = ""

    def render(self, said: Messages | Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render the conversation to text. Raises ValueError with the template's message if that fails."""
        said = as_messages(said)
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        values: dict[str, Any] = {"messages": said.turns, "tools": said.tools, "documents": None}
        values |= {name: token for name, token in names.items() if token}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return renderer().render(self.tool_use if said.tools and self.tool_use else self.template, values)
        except (ValueError, TypeError, OSError) as error:  # TypeError: a value that JSON cannot encode
            roles = [message["role"] for message in said.turns]
            hint = "; if it rejects the system message, remove that" if "system" in roles else ""
            raise ValueError(
                f"the chat template failed on the messages {', '.join(roles)}: {error}{hint} (or pass --no-chat)"
            ) from error


# Format that Llama 2 was trained on: https://github.com/meta-llama/llama, chat_completion.
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
    """Read the chat template beside a tokenizer; `default` if there is none: LLAMA2 for a Llama 2 chat model.

    Raises ValueError if the metadata or the template cannot be read.
    """
    metadata = read_metadata(folder)
    found, path = metadata.get("chat_template"), folder / "chat_template.jinja"
    try:
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        templates = {"default": found} if isinstance(found, str) else dict(found or {})
        paths = {each.stem: each for each in (folder / "additional_chat_templates").glob("*.jinja")}
        for name, each in (paths | ({"default": path} if path.exists() else {})).items():
            check_plain(each)
            templates[name] = read_text(each)
        if wrong := [text for text in templates.values() if not isinstance(text, str)]:
            raise TypeError(f"{wrong[0]!r} is not a string")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"the chat template in {folder} cannot be read ({error!r}): download its files again"
        ) from error
    if not templates:
        return default
    if "default" not in templates:
        names = ", ".join(sorted(map(str, templates)))
        raise ValueError(
            f"none of the chat templates in {folder} is named default ({names}): copy the one to use to {path}"
        )
    bos, eos = metadata.get("bos_token") or "", metadata.get("eos_token") or ""
    legacy = metadata.get("legacy") is not False
    return Chat(templates["default"], bos, eos, legacy, templates.get("tool_use", ""))


def unused(chat: Chat, said: Messages) -> tuple[str, str]:
    """Return two private-use characters that occur neither in the template nor in the messages."""
    taken = set(chat.template + chat.tool_use + json.dumps([said.turns, said.tools], ensure_ascii=False))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    return next(free), next(free)


@lru_cache(maxsize=8)
def parts_of(names: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Return all prefixes and suffixes of the names, except plain words: a template may write `<|`, a role, `|>`."""
    heads = (name[:end] for name in names for end in range(1, len(name)))
    tails = (name[begin:] for name in names for begin in range(1, len(name)))
    return frozenset(filter(re.compile(r"\W").search, heads)), frozenset(filter(re.compile(r"\W").search, tails))


def text_guard(tokenizer: Tokenizer, mark: str) -> Callable[[str], str]:
    """Return a function that inserts `mark` into a text: inside every control-token name, and at a text's beginning or
    end next to a part of a name that adjacent template text could complete."""
    names = tokenizer.names
    heads, tails = parts_of(tuple(names.tokens))
    longest = max(map(len, names.tokens), default=0)
    whole = re.compile(f"(?={names.pattern.pattern})(.)", re.DOTALL)

    def guard(text: str) -> str:
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())  # a template may trim spaces
        if any(text[max(begin, end - size) : end] in heads for size in range(1, longest)):
            text = text[:end] + mark + text[end:]
        if any(text[begin : begin + size] in tails for size in range(1, longest)):
            text = text[:begin] + mark + text[begin:]
        return whole.sub(rf"\1{mark}", text)

    return guard


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string of a JSON value, field names included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_texts(name, change): map_texts(each, change) for name, each in value.items()}
    return [map_texts(each, change) for each in value] if isinstance(value, list | tuple) else value


def defused(said: Messages, tokenizer: Tokenizer, mark: str) -> Messages:
    """Insert `mark` into every string of the messages, so that none of it encodes to a control token."""
    guard = text_guard(tokenizer, mark)
    return Messages(map_texts(said.turns, guard), map_texts(said.tools, guard))


def prefixes_all(chat: Chat, tokenizer: Tokenizer, control: str) -> bool:
    """Return whether text after a control token gets a prompt's prefix space; a tokenizer.json defines this itself."""
    if not isinstance(tokenizer, JSONTokenizer):
        return chat.legacy
    tokenizer.backend.made.encode_special_tokens = False
    _, *ids = tokenizer.backend.encode(control + "a", add_special_tokens=False).ids
    tokenizer.backend.made.encode_special_tokens = True
    return ids == tokenizer.encode("a")


def encode_chat(chat: Chat, tokenizer: Tokenizer, rendered: str, mark: str, begins: bool) -> list[int]:
    """Encode rendered text whose messages are defused by `mark`. begins: the text begins the prompt."""
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
    """Encode the first turn, as prompt_tokens."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return prompt_tokens(chat, tokenizer, [*before, {"role": "user", "content": user}])


def prompt_tokens(chat: Chat, tokenizer: Tokenizer, said: Messages | Sequence[Message]) -> list[int]:
    """Encode a whole conversation, with BOS once, whether or not the template writes it, and the generation prompt; if
    the last message is the assistant's, up to its last word, for the model to continue.

    Raises ValueError if the template refuses or drops a message.
    """
    said = as_messages(said)
    mark, sentinel = unused(chat, said)
    check_all_written(chat, said, sentinel)
    safe = defused(said, tokenizer, mark)
    rendered = unfinished(chat, safe, sentinel) if said.turns[-1]["role"] == "assistant" else chat.render(safe)
    ids, bos = encode_chat(chat, tokenizer, rendered, mark, begins=True), tokenizer.bos_id
    # The template may write whitespace before BOS.
    if bos is None or (bos in ids and not tokenizer.decode(ids[: ids.index(bos)]).strip()):
        return ids
    return [bos, *ids]


def tagged(value: Any, tag: str) -> Any:
    """Append `tag` to the texts that a template must write: contents, and the names of functions."""
    if isinstance(value, str):
        return value and value + tag
    if isinstance(value, dict):
        return {
            key: each if isinstance(each, str) and key != "name" else tagged(each, tag) for key, each in value.items()
        }
    return [tagged(each, tag) for each in value] if isinstance(value, list) else value


def check_all_written(chat: Chat, said: Messages, sentinel: str) -> None:
    """Raise ValueError naming a message, or the tools, if the template does not write it."""
    tags: dict[str, str] = {}  # the text that each is appended to

    def tag(value: Any, what: str) -> Any:
        new = f"{sentinel}{len(tags)}{sentinel}"  # digits, which no template changes
        if (changed := tagged(value, new)) != value:
            tags[new] = what
        return changed

    turns = [
        message
        | {
            field: tag(message[field], f"{field} of message {number} ({message['role']})")
            for field in ("content", "tool_calls")
            if field in message
        }
        for number, message in enumerate(said.turns, 1)
    ]
    rendered = chat.render(Messages(turns, tag(said.tools, "tools")))
    if dropped := [what for each, what in tags.items() if each not in rendered]:
        raise ValueError(f"the chat template drops the {dropped[0]}: remove it, or use another template")


def split_at(chat: Chat, said: Messages, sentinel: str, add_generation_prompt: bool = True) -> tuple[str, str]:
    """Render, and split the text at `sentinel`, which stands in the assistant's content."""
    before, found, rest = chat.render(said, add_generation_prompt).rpartition(sentinel)
    if not found:
        raise ValueError("the chat template drops the assistant's reply: pass --no-chat")
    return before, rest


def unfinished(chat: Chat, said: Messages, sentinel: str) -> str:
    """Render up to the last word of the last message, like transformers' continue_final_message."""
    *before, last = said.turns
    if last.get("tool_calls"):
        raise ValueError("the last message has tool calls: add the tools' answers, or remove the calls")
    text = last["content"]
    turns = [*before, last | {"content": f"{text}{sentinel}\t"}]
    begin, rest = split_at(chat, replace(said, turns=turns), sentinel, add_generation_prompt=False)
    trims = not rest.startswith("\t")
    return begin.removesuffix(text[len(text.rstrip()) :]) if trims else begin


def after_reply(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], user: str) -> tuple[str, str]:
    """Return what the template writes between the last reply and the reply to `user`, and the mark (see `defused`)."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's: add its reply before the next turn")
    said = Messages([*messages, {"role": "user", "content": user}])
    mark, sentinel = unused(chat, said)
    check_all_written(chat, said, sentinel)
    safe = defused(said, tokenizer, mark)
    safe.turns[-2]["content"] = sentinel
    return split_at(chat, safe, sentinel)[1], mark


def next_tokens(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], user: str) -> list[int]:
    """Encode what follows the last reply's text: the end of its turn, the user's turn and the generation prompt.

    messages: all so far, the last one an assistant's. Raises ValueError if the template refuses or drops one.
    """
    return encode_chat(chat, tokenizer, *after_reply(chat, tokenizer, messages, user), begins=False)


def end_of_turn_ids(chat: Chat, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the control token that the template writes directly after a reply, spaces aside; empty if none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    rest, _ = after_reply(chat, tokenizer, messages, "a")
    text, *parts = tokenizer.names.cut(rest)
    return frozenset() if text.strip() else frozenset(tokenizer.specials[name] for name in parts[:1])


def choose_chat(folder: Path, tokenizer: Tokenizer, asked: bool | None, interactive: bool) -> Chat | None:
    """Choose the chat template: if asked for, and with --interactive if the model has one, unless refused.

    Raises ValueError if it is asked for and there is none, nor the control tokens of Llama 2's format.
    """
    if asked is False or not (asked or interactive):
        return None
    default = LLAMA2 if asked and {"<s>", "</s>"} <= tokenizer.specials.keys() else None
    chat = read_chat(folder, default)
    if asked and chat is None:
        raise ValueError(f"no chat template found in {folder}: remove --chat, or put chat_template.jinja there")
    return chat


class ChatEncoder:
    """Encoder of chat turns to token ids: by a chat template, or, if chat is None, as plain text after BOS."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, chat: Chat | None, system: str | None) -> None:
        if system is not None and chat is None:
            raise ValueError("--system needs a chat: pass --chat, or put its text into the prompt")
        self.tokenizer, self.vocab_size, self.chat, self.system = tokenizer, vocab_size, chat, system
        self.messages: list[Message] = []
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # A model trained on texts separated only by BOS ends a text with the next BOS.
        self.eos_ids = tokenizer.eos_ids | set(self.bos)
        if chat is not None:
            with suppress(ValueError):  # a one-turn template: a second turn is refused later
                self.eos_ids |= end_of_turn_ids(chat, tokenizer)

    def encode_turn(self, text: str) -> list[int]:
        """Encode the user's next turn, to append to the context. Raises ValueError if it cannot be encoded."""
        try:
            (text + (self.system or "")).encode()
        except UnicodeEncodeError as error:  # surrogates: Python's form of bytes that are not UTF-8
            raise ValueError(
                f"the text is not UTF-8 (invalid at character {error.start}): convert it to UTF-8"
            ) from error
        if self.chat is not None and self.messages:
            tokens = next_tokens(self.chat, self.tokenizer, self.messages, text)
        elif self.chat is not None:
            tokens = opening_tokens(self.chat, self.tokenizer, self.system, text)
        else:
            tokens = ([] if self.messages else self.bos) + self.tokenizer.encode(text)
        return self.checked(tokens)

    def encode_messages(self, messages: Messages | Sequence[Message]) -> list[int]:
        """Encode a whole conversation, with the system prompt first unless it has one. Raises as `encode_turn`."""
        if self.chat is None:
            raise ValueError("messages need a chat template: remove --no-chat")
        said = messages if isinstance(messages, Messages) else parse_messages(list(messages))
        if self.system is not None and said.turns[0]["role"] != "system":
            said = replace(said, turns=[{"role": "system", "content": self.system}, *said.turns])
        return self.checked(prompt_tokens(self.chat, self.tokenizer, said))

    def checked(self, tokens: list[int]) -> list[int]:
        check_tokens(tokens, self.vocab_size)
        return tokens

    def keep(self, text: str, reply: str) -> None:
        """Append the user turn and the kept reply."""
        if not self.messages and self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class Mark(NamedTuple):
    """A position to roll back to: slots of the context, tokens of the history."""

    slots: int
    history: int


class Conversation:
    """A context that grows by each user turn and kept reply. Nothing is computed twice, unless the model's RoPE depends
    on the length of the context and that has changed."""

    def __init__(self, engine: Engine, request: Request) -> None:
        if request.kv_dtype != "auto":
            raise ValueError(f"kv_dtype {request.kv_dtype} is not supported in a conversation: use auto")
        self.engine, self.request = engine, request
        self.context = KVCache.empty(engine.args.kv_shape, 1, 0, engine.model.norm.weight)
        self.history: list[int] = []  # tokens of the context, then the pending ones
        self.read = 0  # length of the history at the last prefill
        self.replies: dict[int, KVCache] = {}  # keys and values of the last turn's samples

    @property
    def pending(self) -> list[int]:
        """Kept tokens that are not yet in the context."""
        return self.history[self.context.slots :]

    def mark(self) -> Mark:
        return Mark(self.context.slots, len(self.history))

    def back_to(self, mark: Mark) -> None:
        """Roll back to a mark."""
        self.context.resize(min(mark.slots, self.context.slots))  # fewer after a failed turn that emptied the context
        self.history, self.replies = self.history[: mark.history], {}

    def go_on_from(self, history: Sequence[int]) -> None:
        """Replace the history by one that begins with the context's tokens; the next turn reads the rest."""
        self.history, self.replies = list(history), {}

    def turn(self, tokens: Sequence[int], monitor: Monitor = SILENT, request: Request | None = None) -> list[Sample]:
        """Read the user's tokens and draw replies. Raises ValueError, with nothing changed, if they do not fit."""
        return samples_of(self.draw(self.scheduler(tokens, monitor, request), live=False))

    def stream(
        self, tokens: Sequence[int], monitor: Monitor = SILENT, request: Request | None = None
    ) -> Generator[Piece]:
        """Stream `turn`: yield pieces of text as they are drawn."""
        return pieces_of(self.draw(self.scheduler(tokens, monitor, request), live=True))

    def scheduler(self, tokens: Sequence[int], monitor: Monitor, request: Request | None) -> Scheduler:
        return self.engine.single([*self.history, *tokens], request or self.request, monitor)

    def draw(self, run: Scheduler, live: bool) -> Iterator[Piece | Outcome]:
        history = run.prompts[0][0].tokens
        scaling, end = self.engine.args.rope_scaling, len(history)
        if scaling is not None and scaling.regime(self.read) != scaling.regime(end):
            self.context.resize(0)  # its keys would now be rotated differently
        slots = self.context.slots
        try:
            self.context.resize(end)
            hidden = self.engine.prefill(self.context, history[slots:], self.request.prefill_chunk, run.monitor)
            slots, self.history, self.read = end, list(history), end
            self.replies = {}
            yield from run.run(live, Given(self.context, hidden), self.replies)
        finally:
            self.context.resize(min(slots, self.context.slots))  # drop slots that were not read

    def keep(self, reply: Sample) -> None:
        """Continue from this reply of the last turn: move its keys and values into the context."""
        tokens, tokenizer = reply.text_tokens, self.engine.tokenizer
        if tokenizer is not None and reply.finish_reason == "stop":  # only shown text: no part of the stop string
            while tokens and len(continuation_text(tokenizer, self.history, tokens)) > len(reply.text or ""):
                tokens = tokens[:-1]
        if reply.index in self.replies:  # another replica's reply is read with the next turn
            cached = tokens[: len(reply.tokens) - 1]  # the last token drawn was never run
            self.context.append(self.replies[reply.index], len(cached))
        self.history += tokens
