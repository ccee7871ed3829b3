"""Planning of a batch: the workload of its prompts, and how many rows, prompts and groups fit into memory at once.

Shapes: C rows that decode together.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from engine.plan import Plan
from engine.prefixes import Sharing
from engine.request import Request, Sampling, Workload

# Rows of many prompts that decode together, memory permitting: at 64 a step on a CPU is compute-bound
# (docs/benchmarks.md).
ROWS = {"cpu": 64, "cuda": 512}

Asked = Counter[tuple[int, Request]]  # how many prompts have so many tokens, and this request


def workload(asked: Asked, request: Request, device: torch.device) -> Workload:
    """Return the workload to plan: the rows that decode together (all, of a single prompt), the longest prompt, and
    the runs that all samples take. request: how contexts are stored and prefilled."""
    total = samples(asked)
    rows = total if asked.total() == 1 else min(total, request.rows_at_once or ROWS[device.type])
    sampling, new = heaviest({each.sampling for _, each in asked}), max(each.max_new_tokens for _, each in asked)
    how = replace(request, num_samples=rows, max_new_tokens=new, sampling=sampling)
    return how.workload(max(length for length, _ in asked), -(-total // rows))


def samples(asked: Asked) -> int:
    """Return how many samples the prompts ask for."""
    return sum(each.num_samples * times for (_, each), times in asked.items())


def heaviest(samplings: Collection[Sampling]) -> Sampling:
    """Merge distinct parameters into ones that need at least the memory of each."""
    if len(samplings) == 1:
        return next(iter(samplings))
    drawn = [each for each in samplings if each.temperature]
    few = all(each.top_k for each in drawn)
    penalty = next((each.repetition_penalty for each in samplings if each.repetition_penalty != 1), 1.0)
    sorts = any(each.top_p is not None or each.top_k is not None for each in drawn)
    top_k = max((each.top_k or 1 for each in drawn), default=1) if few else None
    return Sampling(1.0, top_k, 0.5 if sorts and not few else None, repetition_penalty=penalty)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch's caches. rows: decoding together. prompts, groups: in memory at once. root: tokens of the
    prefix that all prompts share. group, rest: most tokens of a group's prefix after the root, and of a prompt after
    its prefix. own: slots of a row for the tokens that it decodes. share: the most rows that one prompt can occupy.
    single: whether all rows continue one context; then attention needs no mask of its slots and no reordering of rows.
    staged: whether contexts may be prefilled again, apart from where they are stored."""

    rows: int
    prompts: int
    groups: int
    root: int
    group: int
    rest: int
    own: int
    share: int
    single: bool
    staged: bool

    @classmethod
    def of(cls, rows: int, asked: Asked, sharing: Sharing, width: int, held: int = 1) -> "Sizes":
        """Size a batch of C rows. A prompt's keys and values stay until its last sample ends, so there is room for
        twice as many prompts as fill the rows; if each has one sample, for a quarter more. width: most tokens of a
        step. held: contexts of each prompt in memory."""
        n, own = (max(getattr(each, name) for _, each in asked) for name in ("num_samples", "max_new_tokens"))
        total, counts = asked.total(), sorted(each.num_samples for _, each in asked.elements())
        # The fewest prompts that fill the rows for sure.
        fill = min(total, bisect_left(list(itertools.accumulate(counts)), rows) + 1)
        prompts = min(total, fill + (fill if n > 1 else fill // 4))
        prefixes = sharing.root, sharing.longest_group, sharing.longest_rest
        groups, single = min(len(sharing.groups), prompts // 2 + 1), total * held == 1
        return cls(rows, prompts * held, groups, *prefixes, own + width - 1, min(n, rows), single, held > 1)

    def needed(self, plan: Plan) -> int:
        """Return the bytes that a batch of many prompts needs, weights included."""
        token = plan.context // plan.workload.context
        held = (self.root + self.prompts * self.rest + (self.groups + 1) * self.group) * token
        held += self.rows * (plan.decoded_per_sample + plan.copied_per_sample)
        held += (self.staged or plan.workload.kv_dtype == "int8") * plan.context_while_read
        # All rows may belong to one group, so each group has room for all, rounded up to a power of two (RowMap).
        share = 1 << max(1, (self.rows - 1).bit_length())
        folded = max(self.rows, self.prompts * self.share, (self.groups + 1) * share if self.groups else 0)
        linked = bool(self.root or self.groups)
        held += max(plan.space.reading(linked), plan.space.decoding(self.rows, self.prompts, folded))
        return plan.weights.total + plan.packed_tied + held


def fit(asked: Asked, sharing: Sharing, plan: Plan, width: int, held: int) -> tuple[Sizes, Sharing]:
    """Return the sizes of the largest batch that fits into memory, and what it shares; if none fits, one row and one
    prompt that shares nothing, which `plan` has checked."""
    rows = min(samples(asked), plan.rows_at_once)
    if asked.total() > 1:
        fitting = range(1, rows + 1)
        rows = bisect_right(
            fitting, plan.available, key=lambda rows: Sizes.of(rows, asked, sharing, width, held).needed(plan)
        )
    if rows:
        return Sizes.of(rows, asked, sharing, width, held), sharing
    sharing = Sharing(0, (), sharing.lengths)
    return replace(Sizes.of(1, asked, sharing, width, held), prompts=held), sharing
