"""Prefix trees: many token sequences in one row, every shared beginning computed once.

A tree has tokens for nodes, parents before children. With position ids equal to the depths of nodes and an
attention mask that lets a node see itself and its ancestors, a causal decoder computes at every node what it
would compute at the end of the path from the root to that node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Tokens = Sequence[int]


@dataclass(slots=True)
class Tree:
    """Sequences that begin alike."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Index of each node's parent, -1 for roots; always smaller than the node's own index."""
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    """Number of a sequence -> its nodes, in order."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether the tree is one sequence, for which a plain causal mask will do."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def add(self, number: int, tokens: Tokens, shared: Sequence[int]) -> None:
        """Add sequence ``number``, whose first tokens are those of the nodes ``shared``."""
        path = list(shared)
        for token in tokens[len(shared) :]:
            self.parents.append(path[-1] if path else -1)
            self.depths.append(len(path))
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.paths[number] = path

    def visible(self) -> np.ndarray:
        """Return bool [nodes, nodes]: whether the node of the row sees the node of the column."""
        seen = np.zeros((len(self), len(self)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node, : parent + 1] = seen[parent, : parent + 1]
            seen[node, node] = True
        return seen


def common_prefix(first: Tokens, second: Tokens) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def build_trees(sequences: Sequence[Tokens], *, limit: int, worth: int, fill: int) -> list[Tree]:
    """Return trees that together hold every sequence once, under its index in ``sequences``.

    Sequences are taken in lexicographic order, so that neighbours share most.

    Args:
        limit: nodes of a tree that are not exceeded by joining another sequence to it.
        worth: tokens that a sequence must share with its neighbour to join its tree.
        fill: nodes up to which any sequence joins, sharing or not, so that rows are of similar length; a tree
            then has several roots.
    """
    trees: list[Tree] = []
    previous = -1
    for number in sorted(range(len(sequences)), key=lambda number: list(sequences[number])):
        sequence = sequences[number]
        shared = common_prefix(sequences[previous], sequence) if trees else 0
        nodes = len(trees[-1]) + len(sequence) - shared if trees else 0
        if trees and (nodes <= fill or (shared >= worth and nodes <= limit)):
            trees[-1].add(number, sequence, trees[-1].paths[previous][:shared])
        else:
            trees.append(Tree())
            trees[-1].add(number, sequence, ())
        previous = number
    return trees


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return the indices of ``lengths`` in batches of similar length, longest first.

    A batch, padded to its longest member, holds at most ``budget`` tokens, or one member.
    """
    result: list[list[int]] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if result and (len(result[-1]) + 1) * widest <= budget:
            result[-1].append(index)
        else:
            result.append([index])
            widest = lengths[index]
    return result
