"""Prefixes that prompts share: which of them to prefill and store once.

The root is a prefix of all prompts, a group one of some. Shapes: none, only token lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from engine.scoring import Node, shared, tree

# Fewest tokens worth a root, and a group: every step pays for one more link of the chain.
ROOT, GROUP = 8, 64


@dataclass(frozen=True)
class Group:
    """Prompts, by number, with a shared prefix. length: tokens of the prefix, root included."""

    length: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens saved by storing the prefix once instead of for every member."""
        return self.length * (len(self.members) - 1)


@dataclass(frozen=True)
class Sharing:
    """Shared prefixes of prompts. root: tokens of the prefix that all share. lengths: tokens of each prompt."""

    root: int
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]

    @classmethod
    def among(cls, prompts: Sequence[Sequence[int]], share: bool = True, root: int | None = None) -> Self:
        """Find the prefixes to share. A prompt's last token is never shared, so that each has an output of its own to
        sample from. share: whether to share at all. root: length of the root, if already known."""
        leaves = [Node(tuple(tokens), 2, (number,)) for number, tokens in enumerate(prompts)]
        leaves.sort(key=lambda leaf: leaf.tokens)  # type: ignore[arg-type, return-value]
        lengths = tuple(map(len, prompts))
        if not share or len(leaves) < 2:
            return cls(root or 0, (), lengths)
        common = shared(leaves[0], leaves[-1])
        root = (common if common >= ROOT else 0) if root is None else root
        found = choose_groups(tree(leaves, GROUP, root), root)
        return cls(root, tuple(sorted(found, key=lambda group: group.members)), lengths)

    @property
    def longest_group(self) -> int:
        return max((group.length for group in self.groups), default=self.root) - self.root

    @property
    def longest_rest(self) -> int:
        """The most tokens that a prompt has after its shared prefix."""
        return max(length - behind for length, (_, behind) in zip(self.lengths, self.places(), strict=True))

    def places(self) -> list[tuple[int, int]]:
        """Return for each prompt the number of its group (from 1; 0: none) and the tokens that it shares."""
        found = [(0, self.root)] * len(self.lengths)
        for number, group in enumerate(self.groups, 1):
            for member in group.members:
                found[member] = number, group.length
        return found

    def order(self) -> list[int]:
        """Return the prompts in the order in which they start: as given, but the members of a group together."""
        first = list(range(len(self.lengths)))
        for group in self.groups:
            for member in group.members:
                first[member] = group.members[0]
        return sorted(range(len(first)), key=first.__getitem__)

    def units(self, replicas: int) -> list[list[int]]:
        """Divide the prompts, in order, into units that replicas take in turn: small ones, of which each takes several;
        a group stays together unless it is more than a replica's share."""
        count, places = len(self.lengths), self.places()
        if replicas == 1:
            return [self.order()]
        few, share = max(1, count // (8 * replicas)), -(-count // replicas)
        units: list[list[int]] = []
        for number in self.order():
            group = places[number][0]
            together = bool(units) and group > 0 and group == places[units[-1][-1]][0]
            if units and len(units[-1]) < (share if together else few):
                units[-1].append(number)
            else:
                units.append([number])
        return units


def choose_groups(roots: Sequence[Node], above: int) -> list[Group]:
    """Choose the groups that save the most tokens, each prompt in at most one: for each subtree its top node, or the
    best groups below it. above: tokens of the root, which all share."""
    found: list[tuple[Node, int]] = []  # parents before children; each with the prefix length at its end
    todo = [(node, above) for node in roots]
    while todo:
        node, begin = todo.pop()
        found.append((node, begin + len(node.tokens)))
        todo += [(child, found[-1][1]) for child in node.children]
    best: dict[int, tuple[int, int, list[tuple[Node, int]]]] = {}  # by node id: members below, tokens saved, groups
    for node, length in reversed(found):
        below = [best.pop(id(child)) for child in node.children]
        members, saved = len(node.ends) + sum(each[0] for each in below), sum(each[1] for each in below)
        chosen = [each for _, _, parts in below for each in parts]
        if node.children and length * (members - 1) >= saved:
            saved, chosen = length * (members - 1), [(node, length)]
        best[id(node)] = members, saved, chosen
    every = [each for _, _, parts in best.values() for each in parts]
    return [Group(length, tuple(sorted(end for each in node.walk() for end in each.ends))) for node, length in every]
