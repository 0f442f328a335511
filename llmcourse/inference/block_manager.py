"""Who holds which block of the paged cache: allocation, sharing of prefixes, eviction. Numbers only, no tensors.

A block holds the keys and values of `block_size` successive tokens (Kwon et al., 2023, section 4). A full block is
described by its tokens and by the block before it, so two sequences that begin alike can hold the same blocks; a block
that is not full belongs to one sequence. Freed blocks keep their content until somebody needs the room, the ones that
were freed longest ago going first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from llmcourse.inference.sequence import Sequence

NOTHING = -1
"""the content before a sequence's first block"""


class BlockManager:
    """Gives out `n_blocks` blocks of `block_size` tokens each.

    Raises:
        ValueError: either is not positive.
    """

    def __init__(self, n_blocks: int, block_size: int, *, share_prefixes: bool = True) -> None:
        for name, value in (("n_blocks", n_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        self.n_blocks, self.block_size, self.share_prefixes = n_blocks, block_size, share_prefixes
        self._holders = [0] * n_blocks
        self._empty = deque(range(n_blocks))  # free and without content
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, content kept; oldest first
        # A content is named by a number that is never used twice, so equal keys mean equal prefixes, without hashing.
        self._content_of: dict[tuple[int, tuple[int, ...]], int] = {}  # (content before, tokens) -> content
        self._block_of: dict[int, int] = {}  # content -> block
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> its key
        self._next_content = 0

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that many tokens take."""
        return -(-n_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Stored blocks that the sequence begins with, as (block, content). Its last token is never among them: it has
        to be computed, for its logits."""
        found: list[tuple[int, int]] = []
        if not self.share_prefixes:
            return found
        before = NOTHING
        for start in range(0, sequence.n_tokens - self.block_size, self.block_size):
            content = self._content_of.get((before, tuple(sequence.ids(start, start + self.block_size))))
            if content is None:
                break
            found.append((self._block_of[content], content))
            before = content
        return found

    def admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks for all its tokens, those of a known prefix shared; False if it has to
        wait.

        Sets `blocks`, `contents`, `n_computed` and `n_shared`.
        """
        prefix = self.find_prefix(sequence)
        revived = sum(self._holders[block] == 0 for block, _ in prefix)
        needed = self.blocks_for(sequence.n_tokens) - len(prefix)
        if needed + revived > self.n_free:
            return False
        for block, _ in prefix:
            self._kept.pop(block, None)
            self._holders[block] += 1
        sequence.blocks = [block for block, _ in prefix] + [self._take() for _ in range(needed)]
        sequence.contents = [content for _, content in prefix]
        sequence.n_computed = sequence.n_shared = len(prefix) * self.block_size
        return True

    def grow(self, sequence: Sequence) -> bool:
        """See to a slot for each token of a running sequence; False if there is no block left."""
        while len(sequence.blocks) < self.blocks_for(sequence.n_tokens):
            if not self.n_free:
                return False
            sequence.blocks.append(self._take())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Let others find the sequence's computed full blocks. Where the same content is there already, that one
        stays the known one."""
        if not self.share_prefixes:
            return
        for index in range(len(sequence.contents), sequence.n_computed // self.block_size):
            before = sequence.contents[-1] if sequence.contents else NOTHING
            start = index * self.block_size
            key = (before, tuple(sequence.ids(start, start + self.block_size)))
            content = self._content_of.get(key)
            if content is None:
                content, block = self._next_content, sequence.blocks[index]
                self._next_content += 1
                self._content_of[key], self._block_of[content], self._key_of[block] = content, block, key
            sequence.contents.append(content)

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back. The ends of a text are kept shorter than its beginnings, which more texts share."""
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)
        sequence.blocks, sequence.contents, sequence.n_computed = [], [], 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove the books right, given all sequences that hold blocks.

        Raises:
            AssertionError: a block is lost, free and held at once, or held by a number of sequences that is not the
                one that is written down.
        """
        held = [0] * self.n_blocks
        for sequence in sequences:
            assert len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence.number} holds a block twice"
            for block in sequence.blocks:
                held[block] += 1
        assert held == self._holders, "the books differ from what the sequences hold"
        free = [*self._empty, *self._kept]
        assert sorted(free) == [block for block, n in enumerate(held) if n == 0], "lost or doubly free blocks"
        assert all(block in self._key_of for block in self._kept)
        assert all(self._key_of[block] in self._content_of for block in self._key_of)
        assert len(self._content_of) == len(self._block_of) == len(self._key_of)

    def _take(self) -> int:
        """A free block, without content first; otherwise the one that was freed longest ago, whose content is
        forgotten."""
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._kept.popitem(last=False)
            content = self._content_of.pop(self._key_of.pop(block))
            del self._block_of[content]
        self._holders[block] = 1
        return block
