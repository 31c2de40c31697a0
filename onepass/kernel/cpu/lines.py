"""A pass that walks line by line, because rows, columns or matrices have values of their own.

A line is a row if the pass runs over elements; it is a matrix's whole column of row values, or row
of column values, if the pass runs over those. What a line has once is loaded before its elements.
What is reduced along the line is kept in LANES running values. What is reduced down the columns is
added up in memory, line after line, one value a column for each chunk of a matrix.

Of two matrices of 3 x 20, a chunk of lines 2 to 5 is

    line  group  place  base  group_base    elements 0 to 15 by vectors, 16 to 19 one by one
       2      0      2    40           0    the last row of matrix 0
       3      1      0    60          20    the rows of matrix 1, whose column values begin at 20
       4      1      1    80          20

and of the line 2, element 17 (index 57 of the tensor) goes to lane 1 of the sum along the line, and
to value 17 of the sums down the columns.
"""

from __future__ import annotations

from functools import partial

from ..graph.ir import Node, Rank
from ..graph.passes import Reduction
from ..llvm.code import LANES, Body, literal, local
from .walk import body_head

ZERO = literal(0.0, "f64")


class LinesBody(Body):
    """`body_k`: one pass over the lines [begin, end) of one tensor."""

    def text(self) -> str:
        """Return the function."""
        self.lines = [body_head(self.pass_, self.pass_index, by_lines=True), "entry:"]
        self._enter_inputs()
        self._begin_reductions()
        for i in range(len(self.pass_.along)):
            self._line(f"%line_acc{i} = alloca <{LANES} x double>, align 128")
        self._line(f"%rest = urem i64 %length, {LANES}")
        self._line("%middle = sub i64 %length, %rest")
        self._line("%first_group = udiv i64 %begin, %group_lines")
        self._line("%skipped = mul i64 %first_group, %group_lines")
        self._line("%first_place = sub i64 %begin, %skipped")
        self._clear_columns()
        self._walk()
        self._finish_reductions()
        return "\n".join([*self.lines, "  ret void", "}"])

    def _clear_columns(self) -> None:
        """Begin the sums down the columns, of all matrices that this range has a part of."""
        if not self.pass_.down:
            return
        self._line("%last_line = sub i64 %end, 1")
        self._line("%last_group = udiv i64 %last_line, %group_lines")
        self._line("%after_group = add i64 %last_group, 1")
        self._line("%clear_first = mul i64 %first_group, %length")
        self._line("%clear_begin = add i64 %clear_first, %offset")
        self._line("%clear_last = mul i64 %after_group, %length")
        self._line("%clear_end = add i64 %clear_last, %offset")
        self._line("br label %clear_head")
        self._loop("clear", "%clear_begin", "%clear_end", 1, self._clear, "cleared")
        self.lines.append("cleared:")

    def _clear(self) -> None:
        """Set one value of each sum down the columns to 0."""
        for reduction in self.pass_.down:
            sums = local(reduction.into)
            address = self._value(f"getelementptr double, ptr {sums}, i64 %clear_i")
            self._line(f"store double {ZERO}, ptr {address}")

    def _walk(self) -> None:
        """Emit the loop over the lines."""
        self._begin_line()
        wide = partial(self._use, "%wide_i", LANES)
        tail = partial(self._use, "%tail_i", 0)
        self._line("br label %wide_head")
        self._loop("wide", "0", "%middle", LANES, wide, "between")
        self.lines.append("between:")
        self._line("br label %tail_head")
        self._loop("tail", "%middle", "%length", 1, tail, "line_end")
        self.lines.append("line_end:")
        self._finish_line()
        self._next_line()

    def _begin_line(self) -> None:
        """Emit where a line and its group begin, the loads of what it has once, and its sums."""
        before = "cleared" if self.pass_.down else "entry"
        self._line("br label %line_body")
        self.lines += [
            "line_body:",
            f"  %line = phi i64 [ %begin, %{before} ], [ %line_next, %line_done ]",
            f"  %group = phi i64 [ %first_group, %{before} ], [ %group_next, %line_done ]",
            f"  %place = phi i64 [ %first_place, %{before} ], [ %place_next, %line_done ]",
            "  %base = mul i64 %line, %length",
            "  %group_base = mul i64 %group, %length",
            "  %sums_base = add i64 %group_base, %offset",
        ]
        self.once: dict[Node, str] = {}
        for node in self.pass_.loads:
            if self._is_once(node):
                self.once[node] = super()._load(node, self._once_index(node), 0)
        for i in range(len(self.pass_.along)):
            self._line(f"store <{LANES} x double> zeroinitializer, ptr %line_acc{i}")

    def _next_line(self) -> None:
        """Emit the step to the next line: of the same group, or the first of the next one."""
        self.lines += [
            "  br label %line_done",
            "line_done:",
            "  %line_next = add i64 %line, 1",
            "  %place_up = add i64 %place, 1",
            "  %wraps = icmp eq i64 %place_up, %group_lines",
            "  %place_next = select i1 %wraps, i64 0, i64 %place_up",
            "  %group_up = add i64 %group, 1",
            "  %group_next = select i1 %wraps, i64 %group_up, i64 %group",
            "  %line_more = icmp slt i64 %line_next, %end",
            "  br i1 %line_more, label %line_body, label %done",
            "done:",
        ]

    def _is_once(self, node: Node) -> bool:
        """Whether a line has this value once."""
        return node.rank != self.pass_.domain and node.rank != Rank.COLUMN

    def _once_index(self, node: Node) -> str:
        """Return the index of a value that a line has once: a row's, or a matrix's."""
        return "%line" if node.rank == Rank.ROW else "%group"

    def _load(self, node: Node, index: str, width: int) -> str:
        """Emit the load of a value at an index of the line, unless the line has it once."""
        if node in self.once:
            return self._splat(self.once[node], node.type, width)
        base = "%base" if node.rank == self.pass_.domain else "%group_base"
        return super()._load(node, self._value(f"add i64 {base}, {index}"), width)

    def _use(self, index: str, width: int) -> None:
        """Emit a line's values at an index, or at LANES of them, and what becomes of them."""
        values = self._elements(index, width)
        for r, reduction in enumerate(self.pass_.reductions):
            lane = self._lane(f"%acc{r}", index, width)
            self._accumulate(lane, reduction, values(reduction.args[0]), width)
        for i, reduction in enumerate(self.pass_.along):
            lane = self._lane(f"%line_acc{i}", index, width)
            self._accumulate(lane, reduction.node, values(reduction.node.args[0]), width)
        for reduction in self.pass_.down:
            sums = local(reduction.into)
            column = self._value(f"add i64 %sums_base, {index}")
            address = self._value(f"getelementptr double, ptr {sums}, i64 {column}")
            self._accumulate(address, reduction.node, values(reduction.node.args[0]), width)
        if self.pass_.stores:
            element = self._value(f"add i64 %base, {index}")
            for name, root in self.pass_.stores:
                self._store(name, root.type, element, values(root), width)

    def _lane(self, accumulator: str, index: str, width: int) -> str:
        """Return where a value is taken in: all lanes, or the lane of one index past `middle`."""
        if width:
            return accumulator
        lane = self._value(f"sub i64 {index}, %middle")
        return self._value(f"getelementptr double, ptr {accumulator}, i64 {lane}")

    def _finish_line(self) -> None:
        """Add up the lanes that the line has used, one after another, and keep the result."""
        along = self.pass_.along
        if not along:
            return
        self._line(f"%few = icmp slt i64 %length, {LANES}")
        self._line(f"%used = select i1 %few, i64 %length, i64 {LANES}")
        self._line("br label %lanes_body")
        self.lines += [
            "lanes_body:",
            "  %lane_i = phi i64 [ 0, %line_end ], [ %lane_next, %lanes_body ]",
        ]
        for i in range(len(along)):
            begins = f"[ {ZERO}, %line_end ], [ %so_far_next{i}, %lanes_body ]"
            self._line(f"%so_far{i} = phi double {begins}")
        for i, reduction in enumerate(along):
            self._add_lane(i, reduction)
        self.lines += [
            "  %lane_next = add i64 %lane_i, 1",
            "  %lane_more = icmp slt i64 %lane_next, %used",
            "  br i1 %lane_more, label %lanes_body, label %lanes_end",
            "lanes_end:",
        ]
        for i, reduction in enumerate(along):
            sums = local(reduction.into)
            index = self._once_index(reduction.node)
            address = self._value(f"getelementptr double, ptr {sums}, i64 {index}")
            self._line(f"store double %so_far_next{i}, ptr {address}")

    def _add_lane(self, i: int, reduction: Reduction) -> None:
        """Add lane `lane_i` of sum i to what has been added up so far."""
        address = self._value(f"getelementptr double, ptr %line_acc{i}, i64 %lane_i")
        lane = self._value(f"load double, ptr {address}")
        total = self._combine(reduction.node, f"%so_far{i}", lane, "double")
        # A name that the loop's head can refer to: adding -0.0 changes nothing.
        self._line(f"%so_far_next{i} = fadd double {total}, {literal(-0.0, 'f64')}")
