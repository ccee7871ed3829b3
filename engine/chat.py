"""A conversation: its texts to token ids by the model's own chat template, and the context that grows by them.

A template is rendered as transformers' apply_chat_template does it, in jinja2's sandbox; what it wrote is then cut at
the names of control tokens. What a message says is never one of them: a mark is put inside every such name in it before
the template sees it, and taken out again after the cut.
"""

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock, Timer
from typing import Any, NamedTuple

from cache import KVCache
from engine.engine import SILENT, Engine, Monitor, Run
from engine.request import Request, check_tokens
from engine.samples import Piece, Sample, continuation_text
from loading.files import check_plain, read_text
from loading.tokenizer import JSONTokenizer, Tokenizer
from loading.vocabulary import continued, read_metadata

Message = dict[str, Any]  # role, content, and what else a template knows: tool_calls, name, ...
PROGRAM = Path(__file__).with_name("templates.py")
RENDERING_SECONDS, RENDERING_PATIENCE = 5, 60.0  # of CPU time; by the clock, where the system cannot limit CPU time
RENDERING_MEMORY, RENDERING_LENGTH = 1 << 29, 10**7  # bytes; characters beyond those of the messages


class Renderer:
    """Renders chat templates in a process of its own (templates.py), started for the first and used for all.

    A template is a program: there it can take no more time and memory than it may have, and cannot end this process.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = 0  # the process that started it: a fork may not share its pipes

    def start(self) -> subprocess.Popen[bytes]:
        limits = map(str, (RENDERING_SECONDS, RENDERING_MEMORY, RENDERING_LENGTH))
        # A session of its own: Ctrl-C is for this process, which then ends the other.
        return subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def render(self, template: str, values: dict[str, Any]) -> str:
        """Raises ValueError where the template fails or passes a limit."""
        request = json.dumps([template, values]).encode() + b"\n"
        with self.lock:
            if self.child is None or self.owner != os.getpid():
                self.child, self.owner = self.start(), os.getpid()
            child = self.child
            timer = Timer(RENDERING_PATIENCE, child.kill)
            timer.start()
            try:
                assert child.stdin is not None and child.stdout is not None
                with suppress(BrokenPipeError):  # it has ended: nothing answers
                    child.stdin.write(request)
                    child.stdin.flush()
                answer = json.loads(child.stdout.readline() or "{}")
            except BaseException:
                self.stop(child)  # or its answer would be taken for that of the next request
                raise
            finally:
                timer.cancel()
            if not answer:
                self.stop(child)
                raise ValueError(
                    f"its process has ended (status {child.returncode}): it may take {RENDERING_SECONDS} s of CPU time "
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
    """Return the renderer that this process shares."""
    return Renderer()


@dataclass(frozen=True)
class Messages:
    """A conversation as data. tools: functions that the model may call, as JSON schemas."""

    turns: list[Message]
    tools: list[Any] | None = None


def as_messages(said: Messages | Sequence[Message]) -> Messages:
    return said if isinstance(said, Messages) else Messages(list(said))


def parse_messages(said: object, tools: object = None) -> Messages:
    """Messages as OpenAI's interface writes them: what is null is left out, content in parts of text is joined.

    Raises ValueError that names the message.
    """
    if not isinstance(said, list) or not said:
        raise ValueError("messages are not a list of objects with role and content")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise ValueError("the tools beside messages are not a list of objects")
    return Messages([parse_message(number, each) for number, each in enumerate(said, 1)], tools or None)


def parse_message(number: int, said: object) -> Message:
    if not isinstance(said, dict) or not isinstance(said.get("role"), str):
        raise ValueError(f"message {number} is not an object with role and content")
    message = {name: value for name, value in said.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(f"message {number} ({said['role']}) has content that is not text: {str(part)[:40]!r}")
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise ValueError(f"message {number} ({said['role']}) has no content: give a text, or parts of type text")
    return message


@dataclass(frozen=True)
class Chat:
    """A chat template and what it needs. bos_token, eos_token: their names, "" for none. tool_use: the template for
    messages with tools, "" for the same.

    legacy: the text behind a control token begins with SentencePiece's prefix space too. So it is in Meta's Llama 2, in
    transformers 4 unless tokenizer_config.json says `legacy: false`, in transformers 5 only if it says `legacy: true`.
    """

    template: str
    bos_token: str = ""
    eos_token: str = ""
    legacy: bool = True
    tool_use: str = ""

    def render(self, said: Messages | Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of the conversation. Raises ValueError with the template's message where it cannot be rendered."""
        said = as_messages(said)
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        values: dict[str, Any] = {"messages": said.turns, "tools": said.tools, "documents": None}
        values |= {name: token for name, token in names.items() if token}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return renderer().render(self.tool_use if said.tools and self.tool_use else self.template, values)
        except (ValueError, TypeError, OSError) as error:  # TypeError: a value that JSON does not know
            roles = [message["role"] for message in said.turns]
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
            raise TypeError(f"{wrong[0]!r} is not a template")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"no chat template can be read in {folder}: {error!r}; fetch its files again") from error
    if not templates:
        return default
    if "default" not in templates:
        names = ", ".join(sorted(map(str, templates)))
        raise ValueError(
            f"the chat templates in {folder} are named {names}, none of them default: put the one to use into {path}"
        )
    bos, eos = metadata.get("bos_token") or "", metadata.get("eos_token") or ""
    legacy = metadata.get("legacy") is not False
    return Chat(templates["default"], bos, eos, legacy, templates.get("tool_use", ""))


def unused(chat: Chat, said: Messages) -> tuple[str, str]:
    """Two characters for private use that occur neither in the template nor in what is said."""
    taken = set(chat.template + chat.tool_use + json.dumps([said.turns, said.tools], ensure_ascii=False))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    return next(free), next(free)


@lru_cache(maxsize=8)
def parts_of(names: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Return all prefixes and all suffixes of the names, except plain words: a template may well write `<|`, a role and
    `|>`."""
    heads = (name[:end] for name in names for end in range(1, len(name)))
    tails = (name[begin:] for name in names for begin in range(1, len(name)))
    return frozenset(filter(re.compile(r"\W").search, heads)), frozenset(filter(re.compile(r"\W").search, tails))


def text_guard(tokenizer: Tokenizer, mark: str) -> Callable[[str], str]:
    """A function that puts `mark` into a text: inside every name of a control token, and before or behind a part of a
    name that other text, put beside this one by a template, could complete."""
    names = tokenizer.names
    heads, tails = parts_of(tuple(names.tokens))
    longest = max(map(len, names.tokens), default=0)
    whole = re.compile(f"(?={names.pattern.pattern})(.)", re.DOTALL)

    def guard(text: str) -> str:
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())  # a template may trim it
        if any(text[max(begin, end - size) : end] in heads for size in range(1, longest)):
            text = text[:end] + mark + text[end:]
        if any(text[begin : begin + size] in tails for size in range(1, longest)):
            text = text[:begin] + mark + text[begin:]
        return whole.sub(rf"\1{mark}", text)

    return guard


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON with every text in it changed, names of fields included."""
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


def prompt_tokens(chat: Chat, tokenizer: Tokenizer, said: Messages | Sequence[Message]) -> list[int]:
    """Ids of a whole conversation, with BOS once, whether or not the template writes it, and the generation prompt;
    where the last message is the assistant's, up to its last word, from which the model goes on.

    Raises ValueError where the template refuses or drops a message.
    """
    said = as_messages(said)
    mark, sentinel = unused(chat, said)
    check_all_written(chat, said, sentinel)
    safe = defused(said, tokenizer, mark)
    rendered = unfinished(chat, safe, sentinel) if said.turns[-1]["role"] == "assistant" else chat.render(safe)
    ids, bos = encode_chat(chat, tokenizer, rendered, mark, begins=True), tokenizer.bos_id
    # The template may write white space before it.
    if bos is None or (bos in ids and not tokenizer.decode(ids[: ids.index(bos)]).strip()):
        return ids
    return [bos, *ids]


def tagged(value: Any, tag: str) -> Any:
    """The same with `tag` behind what a template is there to write: contents, and the names of functions."""
    if isinstance(value, str):
        return value and value + tag
    if isinstance(value, dict):
        return {
            key: each if isinstance(each, str) and key != "name" else tagged(each, tag) for key, each in value.items()
        }
    return [tagged(each, tag) for each in value] if isinstance(value, list) else value


def check_all_written(chat: Chat, said: Messages, sentinel: str) -> None:
    """Raises ValueError that names a message, or the tools, of which the template writes nothing."""
    tags: dict[str, str] = {}  # what each is behind

    def tag(value: Any, what: str) -> Any:
        new = f"{sentinel}{len(tags)}{sentinel}"  # digits, which no template spells otherwise
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
        raise ValueError(f"the chat template drops the {dropped[0]}: leave it out, or take another template")


def split_at(chat: Chat, said: Messages, sentinel: str, add_generation_prompt: bool = True) -> tuple[str, str]:
    """Render, and split the text at `sentinel`, which stands in the assistant's content."""
    before, found, rest = chat.render(said, add_generation_prompt).rpartition(sentinel)
    if not found:
        raise ValueError("the chat template drops what the assistant said: talk to this model without its template")
    return before, rest


def unfinished(chat: Chat, said: Messages, sentinel: str) -> str:
    """Render up to the last word of the last message, as transformers' continue_final_message."""
    *before, last = said.turns
    if last.get("tool_calls"):
        raise ValueError("the last message calls tools: add what they answer, or leave the calls out")
    text = last["content"]
    turns = [*before, last | {"content": f"{text}{sentinel}\t"}]
    begin, rest = split_at(chat, replace(said, turns=turns), sentinel, add_generation_prompt=False)
    trims = not rest.startswith("\t")
    return begin.removesuffix(text[len(text.rstrip()) :]) if trims else begin


def after_reply(chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message], user: str) -> tuple[str, str]:
    """What the template writes behind the last reply, where the user then says `user`, and the mark that defuses it."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's: a turn follows a reply")
    said = Messages([*messages, {"role": "user", "content": user}])
    mark, sentinel = unused(chat, said)
    check_all_written(chat, said, sentinel)
    safe = defused(said, tokenizer, mark)
    safe.turns[-2]["content"] = sentinel
    return split_at(chat, safe, sentinel)[1], mark


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


class ChatEncoder:
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

    def encode_messages(self, messages: Messages | Sequence[Message]) -> list[int]:
        """A whole conversation, with the system text before it where it has none. Raises as `encode_turn`."""
        if self.chat is None:
            raise ValueError("messages need a chat template: leave out --no-chat")
        said = messages if isinstance(messages, Messages) else parse_messages(list(messages))
        if self.system is not None and said.turns[0]["role"] != "system":
            said = replace(said, turns=[{"role": "system", "content": self.system}, *said.turns])
        return self.checked(prompt_tokens(self.chat, self.tokenizer, said))

    def checked(self, tokens: list[int]) -> list[int]:
        check_tokens(tokens, self.vocab_size)
        return tokens

    def keep(self, text: str, reply: str) -> None:
        """Both were said."""
        if not self.messages and self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class Mark(NamedTuple):
    """A position to return to: slots of the context, tokens of the history."""

    slots: int
    history: int


class Conversation:
    """A context that grows by what the user says and the reply that is kept. Nothing is computed twice, unless the
    model rotates by the length of its context and that has changed."""

    def __init__(self, engine: Engine, request: Request) -> None:
        if request.kv_dtype != "auto":
            raise ValueError(f"kv_dtype {request.kv_dtype}: a context that grows is not held so, give auto")
        self.engine, self.request = engine, request
        self.context = KVCache.empty(engine.args.kv_shape, 1, 0, engine.model.norm.weight)
        self.history: list[int] = []  # the tokens of the context, then the pending ones
        self.read = 0  # the length of the history when a prompt was last read
        self.replies: dict[int, KVCache] = {}  # keys and values of the last turn's samples

    @property
    def pending(self) -> list[int]:
        """Tokens that are kept, but not yet in the context."""
        return self.history[self.context.slots :]

    def mark(self) -> Mark:
        return Mark(self.context.slots, len(self.history))

    def back_to(self, mark: Mark) -> None:
        """Forget all that came since."""
        self.context.resize(min(mark.slots, self.context.slots))  # fewer where a turn that failed was to read all anew
        self.history, self.replies = self.history[: mark.history], {}

    def go_on_from(self, history: Sequence[int]) -> None:
        """Take over a history that begins with what the context holds; the next turn reads the rest of it."""
        self.history, self.replies = list(history), {}

    def turn(self, tokens: Sequence[int], monitor: Monitor = SILENT) -> list[Sample]:
        """Reads the user's tokens and draws replies. Raises ValueError, with nothing changed, where they do not fit."""
        run = Run(self.engine, self.request, [*self.history, *tokens], monitor)
        deque(self.draw(run), maxlen=0)
        return run.samples

    def stream(self, tokens: Sequence[int], monitor: Monitor = SILENT) -> Generator[Piece]:
        """`turn`, piece by piece as the text comes."""
        return self.draw(Run(self.engine, self.request, [*self.history, *tokens], monitor), live=True)

    def draw(self, run: Run, live: bool = False) -> Generator[Piece]:
        scaling, end = self.engine.args.rope_scaling, len(run.history)
        if scaling is not None and scaling.regime(self.read) != scaling.regime(end):
            self.context.resize(0)  # its keys would be rotated otherwise today
        slots = self.context.slots
        try:
            self.context.resize(end, end + run.own_slots if run.extends else 0)
            new = run.history[slots:]
            logits = self.engine.prefill(self.context, new, self.request.prefill_chunk, run.monitor)
            slots, self.history, self.read = end, list(run.history), end
            self.replies = {}
            yield from run.draw(self.context, logits, live, self.replies)
        finally:
            self.context.resize(slots)  # what was not read, or was drawn in it, goes

    def keep(self, reply: Sample) -> None:
        """Goes on from this reply of the last turn: its keys and values move into the context."""
        tokens, tokenizer = reply.text_tokens, self.engine.tokenizer
        if tokenizer is not None and reply.finish_reason == "stop":  # only what was shown: no part of the stop string
            while tokens and len(continuation_text(tokenizer, self.history, tokens)) > len(reply.text or ""):
                tokens = tokens[:-1]
        if reply.index in self.replies:  # a reply that another replica drew is read with the next turn
            cached = tokens[: len(reply.tokens) - 1]  # the last token drawn was never run
            self.context.append(self.replies[reply.index], len(cached))
        self.history += tokens
