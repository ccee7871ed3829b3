"""Generation engine: prefill each prompt once, fork its KV cache into N rows, decode, retire finished rows.

    engine = Engine.open("checkpoints/tiny")
    samples = engine.generate(engine.encode("Once upon a time"), Request(num_samples=8))

All calls that generate are one loop, scheduler.py. Each row stores only the keys and values that it decodes, and every
decode step reads a prompt's keys and values once for all its rows. Nothing is printed here.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from engine.plan import Plan, choose_device, choose_dtype
from engine.request import Request, as_tokens
from engine.runner import SILENT, ModelRunner, Monitor
from engine.samples import Piece, Sample
from engine.scheduler import (
    BatchStats,
    Outcome,
    Prompt,
    Queue,
    Scheduler,
    check_ids,
    check_prompt,
    pieces_of,
    rejection,
    samples_of,
)
from engine.scoring import Scored, Scorer
from loading.checkpoint import load_joined, read_checkpoint
from loading.hub import locate
from loading.tokenizer import load_tokenizer


class Engine(ModelRunner):
    """A model that generates and scores, from texts or token ids."""

    @classmethod
    def open(cls, path: Path | str, device: str = "auto", dtype: str = "auto", compile: bool | None = None) -> Self:
        """Load a checkpoint (a folder, the model.pth in one, or OWNER/NAME on the Hugging Face Hub) and its tokenizer.
        device, dtype: as the command-line flags.

        Raises FileNotFoundError or ValueError if they cannot be read (loading/checkpoint.py, loading/tokenizer.py).
        """
        checkpoint, place = read_checkpoint(locate(path)), choose_device(device)
        model = load_joined(checkpoint, place, choose_dtype(dtype, place))
        engine = cls(model, load_tokenizer(checkpoint.folder), compile)
        engine.eos_ids |= checkpoint.eos_ids
        return engine

    def encode(self, text: str) -> list[int]:
        """Encode a text that starts a context: with BOS, if the tokenizer has one."""
        assert self.tokenizer is not None, "text needs a tokenizer"
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Return a prompt, a text or token ids, as token ids. Raises ValueError if it is neither."""
        return self.encode(prompt) if isinstance(prompt, str) else as_tokens(prompt)

    def generate(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> list[Sample]:
        """Generate request.num_samples continuations of the prompt, a text or token ids, ordered by index; `rank` sorts
        them best first. plan: from `Engine.plan`, if already made. Raises ValueError, before any kernel runs, if the
        request does not fit the model or the memory, FloatingPointError if logits are not finite."""
        return samples_of(self.single(prompt, request, monitor, plan).run())

    def stream(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> Generator[Piece]:
        """Like `generate`, but yield the text in pieces as it comes. Text that may begin a stop string is held back."""
        return pieces_of(self.single(prompt, request, monitor, plan).run(live=True))

    def single(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> Scheduler:
        """Return a scheduler for one prompt, whose samples depend on the request's seed alone."""
        request = self.seeded(request)
        asked = Prompt(0, self.tokens(prompt), request)
        check_prompt(self.args, request, asked)
        return Scheduler(self, [asked], request, monitor, plan=plan)

    def generate_many(
        self,
        prompts: Sequence[Prompt | str],
        request: Request,
        monitor: Monitor = SILENT,
        stats: BatchStats | None = None,
        plan: Plan | None = None,
        queue: Queue | None = None,
    ) -> Iterator[Outcome]:
        """Generate request.num_samples continuations of each prompt, and yield each prompt when it is finished; first
        those that cannot be run, with the reason. A text is a prompt whose id is its number. A sample is a function of
        (request.seed, the prompt's id, its index), and in fp32 equals that of the prompt run alone with the seed
        `seed_of`. A prompt fails while running if its logits are not finite. stats: updated in place. plan: for
        `workload`, if already made. queue: that of several replicas, each of which yields the prompts that it takes.

        Raises ValueError, before any kernel runs, if ids repeat or the request does not fit.
        """
        events = self.stream_many(prompts, request, monitor, stats, plan, queue, live=False)
        return (each for each in events if isinstance(each, Outcome))

    def stream_many(
        self,
        prompts: Sequence[Prompt | str],
        request: Request,
        monitor: Monitor = SILENT,
        stats: BatchStats | None = None,
        plan: Plan | None = None,
        queue: Queue | None = None,
        live: bool = True,
    ) -> Iterator[Piece | Outcome]:
        """Like `generate_many`, but also yield pieces of text as they come, each with its prompt's id."""
        asked = [
            Prompt(number, self.encode(each)) if isinstance(each, str) else replace(each, tokens=as_tokens(each.tokens))
            for number, each in enumerate(prompts)
        ]
        check_ids(asked)
        refused = [rejection(self.args, request, prompt) for prompt in asked]
        sound = [prompt for prompt, reason in zip(asked, refused, strict=True) if reason is None]
        batch = Scheduler(self, sound, request, monitor, stats, plan, queue) if sound else None

        def run() -> Iterator[Piece | Outcome]:
            for prompt, reason in zip(asked, refused, strict=True):
                if reason is not None and (queue is None or queue.leads):
                    yield Outcome(prompt, [], reason)
            if batch is not None:
                yield from batch.run(live)

        return run()

    def score(self, context: str | Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Compute the log-probabilities of each continuation's tokens. The context, a text or token ids, is prefilled
        once. Raises ValueError if it or a continuation is empty, or a token is not in the vocabulary."""
        begun = self.tokens(context)
        return Scorer(self.model, args=self.args).score([(begun, as_tokens(each)) for each in continuations])
