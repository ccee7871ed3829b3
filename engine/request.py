"""Request and sampling parameters, as plain values.

Nothing here imports PyTorch, which takes seconds: the command line needs these for its flags and their defaults, and
--help must be fast.
"""

import numbers
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass

from loading.files import counted

# How N samples store one context; layouts.py maps each name to its cache.
LAYOUT_NAMES = ("bifurcated", "contiguous", "expanded")


def as_tokens(tokens: Sequence[int]) -> list[int]:
    """Convert token ids to a list of ints. Raises ValueError if one is not an integer."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise ValueError(f"{tokens!r:.60} is not a list of tokens: pass those of tokenizer.encode") from None


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError if a token has no row in the model's embedding."""
    for id in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= id < vocab_size:
            raise ValueError(f"token {id} is not one of the model's {vocab_size}: use the model's own tokenizer")


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature: 0 is greedy. Filters, each off if None, apply in the order top_k (exactly the k
    most likely), top_p (the fewest of those left that hold mass p), min_p (those at least min_p times as likely as the
    most likely). repetition_penalty: on tokens that the text already has, before all else (sampling.penalised); 1 is
    off."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (the most likely token) or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or on the command line 0, which is off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be from 0 to 1")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be from 1e-6 to 1e6; 1 is off")


def new_seed() -> int:
    """Return a random seed below 2^31."""
    return int.from_bytes(os.urandom(4), "little") >> 1


@dataclass(frozen=True)
class Workload:
    """Size of a run, for planning. context: prompt tokens. attention, kv_dtype, prefill_chunk, sampling: as in Request.
    runs: how often the same is run. drafted: draft tokens that a step verifies per row. draft_token: bytes per token of
    a draft's own keys and values."""

    context: int
    num_samples: int
    max_new_tokens: int
    attention: str = "bifurcated"
    kv_dtype: str = "auto"
    runs: int = 1
    drafted: int = 0
    draft_token: int = 0
    prefill_chunk: int | None = None
    sampling: Sampling = Sampling()

    @property
    def own_slots(self) -> int:
        """Slots of a row for the tokens that it decodes."""
        return self.max_new_tokens + self.drafted


@dataclass(frozen=True)
class Request:
    """Generation request. seed: same seed, same samples; None: random for each call, and recorded in its samples.
    attention: one of LAYOUT_NAMES. eos_ids: None: the engine's. stop: stop strings. prefill_chunk: prompt tokens per
    prefill step; None: by the device (plan.choose_chunk). rows_at_once: most rows that decode together, taken in turn
    by more samples; None: as memory allows.
    kv_dtype: of the context's keys and values during decoding: auto, the network's, or int8. first_index: index of the
    first sample: a replica generates only a part of them."""

    num_samples: int = 1
    max_new_tokens: int = 200
    sampling: Sampling = Sampling(0.8, top_k=200)
    seed: int | None = None
    attention: str = "bifurcated"
    eos_ids: frozenset[int] | None = None
    stop: tuple[str, ...] = ()
    prefill_chunk: int | None = None
    rows_at_once: int | None = None
    kv_dtype: str = "auto"
    first_index: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "prefill_chunk", "rows_at_once", "seed"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral | None):
                raise ValueError(f"{name} {value!r} is not a whole number")
            if name != "seed" and value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.attention not in LAYOUT_NAMES:
            raise ValueError(f"attention {self.attention!r} is not known: use {', '.join(LAYOUT_NAMES)}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be at least 0 and below 2^63")
        if self.kv_dtype != "auto" and (self.kv_dtype != "int8" or self.attention != "bifurcated"):
            raise ValueError(f"kv_dtype {self.kv_dtype!r} with {self.attention}: use auto, or int8 with bifurcated")
        if isinstance(self.stop, str) or not all(isinstance(each, str) for each in self.stop):
            raise ValueError(f"stop {self.stop!r} is not a tuple of texts: pass one, such as ('END',)")
        object.__setattr__(self, "stop", tuple(self.stop))  # hashable, whatever was passed
        if self.eos_ids is not None:
            object.__setattr__(self, "eos_ids", frozenset(self.eos_ids))
        if "" in self.stop:
            raise ValueError("a stop string is empty: it would end every sample at once")

    def check_length(self, limit: int, context: int) -> None:
        """Raise ValueError if `context` is 0, or exceeds the model's limit together with the new tokens."""
        if context < 1:
            raise ValueError("the prompt is empty: pass at least one token")
        if (total := context + self.max_new_tokens) > limit:
            raise ValueError(
                f"prompt of {counted(context, 'token')} + max_new_tokens {self.max_new_tokens} = {total} exceeds the "
                f"model's context limit of {limit}: shorten one of them"
            )

    def workload(self, context: int, runs: int = 1) -> Workload:
        sizes = (context, self.num_samples, self.max_new_tokens)
        how = self.attention, self.kv_dtype, runs
        return Workload(*sizes, *how, prefill_chunk=self.prefill_chunk, sampling=self.sampling)
