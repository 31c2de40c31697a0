"""A walk over elements, whatever the tensor's shape: each program takes one block.

A program of a pass that ends in reductions takes SPAN blocks, one after the other, and leaves one
partial result of each reduction. The body is written twice, for a full block whose columns are
aligned and for any other, with a mask:

    start = block.to(tl.int64) * BLOCK
    left = (elements) - start
    ...
    if (left >= BLOCK) & (((a0 | a1) & 15) == 0):
        c0 = tl.multiple_of(c0, 16)
        x0 = tl.load(c0 + offset)
    else:
        mask = offset < tl.minimum(left, BLOCK)
        x0 = tl.load(c0 + offset, mask)
"""

from __future__ import annotations

from .uniforms import fact
from .walk import BLOCK, Walk

# Blocks that a program takes, one after the other, if its pass ends in reductions.
SPAN = 32
# The fields of a unit: of which tensor it is, and which block.
BLOCK_FIELDS = ("tensor", "block")


class BlockWalk(Walk):
    """`pass_k` as a walk over elements."""

    fields = BLOCK_FIELDS
    unit_type = "*i32"

    def shape(self) -> tuple[tuple[str, int], ...]:
        """Return the compile-time constants that say how much one program walks."""
        if self.pass_.reductions:
            return ("BLOCK", BLOCK), ("SPAN", SPAN)
        return (("BLOCK", BLOCK),)

    def text(self) -> str:
        """Return the function."""
        self._head()
        elements = "BLOCK * SPAN" if self.pass_.reductions else "BLOCK"
        self.line(f"start = block.to(tl.int64) * {elements}")
        self.line(f"left = {fact(self.program, 'numel')} - start")
        self._make_pointers(" + start")
        self.line("offset = tl.arange(0, BLOCK)")
        for r in range(len(self.pass_.reductions)):
            self.line(f"r{r} = tl.zeros([BLOCK], tl.float64)")
        self.line(f"if (left >= {elements}) & ({self._is_aligned()}):")
        self.depth += 1
        self._hint_alignment()
        self._walk_blocks(is_masked=False)
        self.depth -= 1
        self.line("else:")
        self.depth += 1
        self._walk_blocks(is_masked=True)
        self.depth -= 1
        self._store_partials(axes=1)
        return "\n".join(self.lines)

    def _walk_blocks(self, is_masked: bool) -> None:
        """Emit the walk over all blocks of a program: one, or a loop over several."""
        if not self.pass_.reductions:
            if is_masked:
                self.line("mask = offset < tl.minimum(left, BLOCK)")
            self._walk_block(is_masked)
            return
        # As many blocks as there are, and not more than a program takes.
        bound = "tl.minimum(tl.cdiv(left, BLOCK), SPAN).to(tl.int32)" if is_masked else "SPAN"
        self.line(f"for i in range(0, {bound}):")
        self.depth += 1
        self.line("offset = i * BLOCK + tl.arange(0, BLOCK)")
        if is_masked:
            self.line("mask = offset < tl.minimum(left, BLOCK * SPAN)")
        self._walk_block(is_masked)
        self.depth -= 1

    def _walk_block(self, is_masked: bool) -> None:
        """Emit loads, mathematics, and what becomes of the results."""
        mask = ", mask" if is_masked else ""
        loads = []
        for i, node in enumerate(self.pass_.loads):
            self.line(f"x{i} = tl.load({self.pointer[str(node.attr)]} + offset{mask})")
            loads.append(f"x{i}")
        results = self._values(loads)
        reductions = self.pass_.reductions
        for r, reduction in enumerate(reductions):
            self._accumulate(f"r{r}", reduction, results[r], "mask" if is_masked else None)
        stored = results[len(reductions) :]
        for (name, _), result in zip(self.pass_.stores, stored, strict=True):
            self.line(f"tl.store({self.pointer[name]} + offset, {result}{mask})")
