"""Keys and values of earlier prompts and answers, so that no beginning of a text is run twice.

    tree = PrefixTree(cache, memory=1 << 30)
    tree.store(ids, slot)           # what a slot of the cache holds of ids
    known = tree.load(ids, slot)    # the longest stored beginning of ids, into a slot: its tokens

A token's keys and values depend on it and on the tokens before it. So requests with the same system
prompt or the same examples share them, and so do the turns of a conversation: each begins with all
turns before it. A node of the tree has the keys and values of 32 tokens; its children continue it:

    root ─── Below is an instruction … request. ─┬─ ### Instruction: Sort these …
                                                 └─ ### Instruction: Name three …

Nodes are in the order of their last use, each after its children. So the oldest has no children,
and the memory stays bounded by dropping the oldest. A tree belongs to a model: with other weights
it is wrong. Paper: SGLang, arXiv:2312.07104.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from torch import Tensor

from model import KVCache

NODE_TOKENS = 32  # tokens of a node
PREFIX_MEMORY = 1 << 30  # bytes, for commands that answer one user
Key = tuple[int, tuple[int, ...]]  # the parent's number, and the tokens


class Node(NamedTuple):
    number: int
    k: Tensor  # (layers, 1, K, NODE_TOKENS, D)
    v: Tensor


class PrefixTree:
    def __init__(self, cache: KVCache, memory: int):  # bytes
        node_bytes = 2 * cache.k[:, :1, :, :1].nbytes * NODE_TOKENS
        self.max_tokens = memory // node_bytes * NODE_TOKENS
        self.nodes: OrderedDict[Key, Node] = OrderedDict()  # the least recently used first
        self.numbers = count(1)  # the root is 0

    def path(self, ids: list[int]) -> Iterator[tuple[Key, Node]]:
        """The nodes from the root on that hold the beginning of ids."""
        parent = 0
        for start in range(0, len(ids) - NODE_TOKENS + 1, NODE_TOKENS):
            key = parent, tuple(ids[start : start + NODE_TOKENS])
            if key not in self.nodes:
                return
            yield key, (node := self.nodes[key])
            parent = node.number

    def known(self, ids: list[int]) -> int:
        """How many tokens of ids `load` would find. Never the last: its logits are wanted."""
        return NODE_TOKENS * sum(1 for _ in self.path(ids[:-1]))

    def touch(self, keys: list[Key]) -> None:
        """A path from the root has been used."""
        for key in reversed(keys):  # each after its children
            self.nodes.move_to_end(key)

    def load(self, ids: list[int], slot: KVCache) -> int:
        """Replace what is in a slot by the stored beginning of ids; returns its tokens."""
        path = [*self.path(ids[:-1])]
        for i, (_, node) in enumerate(path):
            stored = slice(NODE_TOKENS * i, NODE_TOKENS * (i + 1))
            slot.k[..., stored, :], slot.v[..., stored, :] = node.k, node.v
        self.touch([key for key, _ in path])
        slot.lengths.fill_(NODE_TOKENS * len(path))
        return NODE_TOKENS * len(path)

    def store(self, ids: list[int], slot: KVCache) -> None:
        """Copy the keys and values of ids from a slot, as far as it and the memory hold them."""
        if not self.max_tokens:
            return
        ids = ids[: min(self.max_tokens, int(slot.lengths))]
        self.touch([key for key, _ in self.path(ids)])  # none of them is dropped below
        keys, parent = [], 0
        for start in range(0, len(ids) - NODE_TOKENS + 1, NODE_TOKENS):
            stored = slice(start, start + NODE_TOKENS)
            keys.append(key := (parent, tuple(ids[stored])))
            if key not in self.nodes:
                if (len(self.nodes) + 1) * NODE_TOKENS > self.max_tokens:
                    self.nodes.popitem(last=False)
                k, v = (x[..., stored, :].clone() for x in (slot.k, slot.v))
                self.nodes[key] = Node(next(self.numbers), k, v)
            parent = self.nodes[key].number
        self.touch(keys)
