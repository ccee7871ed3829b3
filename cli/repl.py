"""Interactive chat on the command line: input lines and commands, kept replies, Ctrl-C."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from cli.console import Console
from cli.ranks import Ranks
from cli.system import print_error
from engine.chat import ChatEncoder, Conversation, Mark
from engine.engine import Engine
from engine.plan import Plan, out_of_memory
from engine.request import Request
from engine.samples import Ranked, Sample
from loading.files import counted


class Repl:
    """The loop of --interactive. room: the most tokens that the conversation can hold, prompts and replies together."""

    def __init__(
        self,
        options: argparse.Namespace,
        ranks: Ranks,
        dialogue: ChatEncoder,
        engine: Engine,
        request: Request,
        plan: Plan,
        room: int,
    ) -> None:
        self.options, self.ranks, self.dialogue, self.engine = options, ranks, dialogue, engine
        self.request, self.plan, self.room = request, plan, room
        self.reset()

    def reset(self) -> None:
        """Clear the conversation; the system prompt stays."""
        self.conversation = Conversation(self.engine, self.request)
        self.dialogue.messages.clear()
        self.turns: list[tuple[str, Mark, int]] = []  # text of each turn, and the state before it: mark, messages
        self.again = 0  # how often the last turn was regenerated

    def say(self, text: str) -> None:
        if not self.options.quiet:
            print(text, file=sys.stderr)

    def run(self, line: str | None) -> None:
        """Run a turn for `line`, if given, then one per line of stdin, until it ends or Ctrl-C is pressed twice."""
        self.say(f"{self.options.checkpoint_path}, seed {self.request.seed}; /help lists the commands, /exit ends")
        if self.room < self.engine.args.context_limit:
            self.say(f"memory holds a conversation of {self.room} tokens, the model {self.engine.args.context_limit}")
        goes_on, stopped = True, False
        while goes_on:
            try:
                line = self.ranks.share(partial(ask, "> ")) if line is None else line
                stopped = False
                goes_on = line is not None and self.obey(line)
            except KeyboardInterrupt:
                if stopped or self.ranks.control is not None:
                    raise
                stopped = True
                self.say("\nCtrl-C once more, or Ctrl-D, ends the conversation")
            line = None

    def obey(self, line: str) -> bool:
        """Run a command or else a turn; ignore an empty line. Returns whether the conversation continues."""
        if (command := COMMANDS.get(line.strip())) is not None:
            return command(self)
        self.again = 0
        return not line or self.turn(line)

    def turn(self, text: str) -> bool:
        """Run a turn. If no reply is kept (refused, or interrupted before the first token or while picking), nothing
        changes. Returns whether the conversation continues."""
        before, kept = (self.conversation.mark(), len(self.dialogue.messages)), len(self.turns)
        try:
            return self.draw(text)
        finally:
            if len(self.turns) == kept:
                self.back_to(*before)

    def draw(self, text: str) -> bool:
        """Draw replies, show them and keep one."""
        mark, messages, interrupt = self.conversation.mark(), len(self.dialogue.messages), None
        console = Console(self.options, self.plan, self.engine.device, None, turn=len(self.turns) + 1)
        try:
            tokens = self.dialogue.encode_turn(text)
            request = self.fitting(len(tokens))
            with console:
                if console.streams:
                    console.show_live(self.conversation.stream(tokens, console, request))
                else:
                    self.conversation.turn(tokens, console, request)
            ranked = console.show([each for part in self.ranks.gather(console.finished) for each in part])
        except KeyboardInterrupt as error:
            if self.ranks.control is not None:
                raise
            ranked, interrupt = console.ranked, error
        except (ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
            told = error if isinstance(error, ValueError | FloatingPointError) else out_of_memory(error)
            if told is None or not (self.ranks.control is None or isinstance(error, ValueError)):
                raise  # other ranks may not have failed, and wait
            if self.ranks.leads:
                print_error(f"{told}; /reset starts over" if self.turns else told)
            return True
        if ranked:
            reply = self.ranks.share(partial(pick, ranked)) if self.options.pick else ranked[0].sample
            if reply is None:
                return False
            self.conversation.keep(reply)
            self.dialogue.keep(text, reply.text or "")
            self.turns.append((text, mark, messages))
        if interrupt is not None:
            raise interrupt
        return True

    def back_to(self, mark: Mark, messages: int) -> None:
        """Drop everything after this state of the conversation."""
        self.conversation.back_to(mark)
        del self.dialogue.messages[messages:]

    def fitting(self, tokens: int) -> Request:
        """Return the request for a turn of `tokens` tokens, its replies limited to the room left."""
        left = self.room - len(self.conversation.history) - tokens
        length = min(self.request.max_new_tokens, max(1, left))
        if 1 <= left < self.request.max_new_tokens:
            self.say(f"{counted(left, 'token')} left of {self.room}: a reply ends there; /reset starts over")
        index = self.request.first_index + self.again * self.options.num_samples
        return replace(self.request, max_new_tokens=length, first_index=index)

    def take_back(self) -> str | None:
        """Remove the last turn and return its text; None if there is none."""
        if not self.turns:
            self.say("there is no turn to take back")
            return None
        text, mark, messages = self.turns.pop()
        self.back_to(mark, messages)
        return text

    def redraw(self) -> bool:
        """Repeat the last turn with the next samples of the same seed. Unless another reply is kept, restore the
        previous one."""
        turns, history, messages = list(self.turns), list(self.conversation.history), list(self.dialogue.messages)
        if (text := self.take_back()) is None:
            return True
        self.again += 1
        try:
            return self.turn(text)
        finally:
            if len(self.turns) < len(turns):
                self.again -= 1
                self.conversation.go_on_from(history)
                self.turns, self.dialogue.messages[:] = turns, messages


def begin_anew(talk: Repl) -> bool:
    talk.reset()
    talk.say("the conversation is empty")
    return True


def undo(talk: Repl) -> bool:
    if (text := talk.take_back()) is not None:
        talk.say(f"taken back: {text}")
    return True


HELP = """\
/regenerate  other replies to the last text
/undo        takes back the last text and its reply
/reset       starts over
/exit        ends the conversation
/help        this
Anything else is sent to the model; several lines that are pasted are one text. Ctrl-C stops the reply and keeps it;
twice, or Ctrl-D, it ends the conversation."""


def show_help(talk: Repl) -> bool:
    print(HELP, file=sys.stderr)
    return True


COMMANDS: dict[str, Callable[[Repl], bool]] = {
    "/reset": begin_anew,
    "/undo": undo,
    "/regenerate": Repl.redraw,
    "/exit": lambda talk: False,
    "/help": show_help,
}


def ask(question: str) -> str | None:
    """Read a line of stdin; None at its end. The prompt goes to stderr, since stdout is for samples; a terminal has
    line editing and a history, and GNU readline returns pasted lines as one."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # missing on some systems
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        with suppress(EOFError):
            return input(question)
        return None
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")
    return line.rstrip("\r\n") if line else None


def pick(ranked: Sequence[Ranked]) -> Sample | None:
    """Ask which reply to keep until the answer is a number; an empty answer keeps the best. None: end of input."""
    numbers = {str(each): ranked[each - 1].sample for each in range(1, len(ranked) + 1)}
    while (answer := ask(f"keep [1-{len(ranked)}]: ")) is not None:
        if (answer.strip() or "1") in numbers:
            return numbers[answer.strip() or "1"]
        print(f"{answer[:20]!r} is not a number from 1 to {len(ranked)}", file=sys.stderr)
    return None
