"""A pass that walks line by line, because rows, columns or matrices have values of their own.

A line is a row where the pass runs over elements, and a matrix's whole column of row values, or row
of column values, where it runs over those. What a line has once is loaded before its elements; what
is reduced along the line is kept in LANES running values, element j of a line in lane j modulo
LANES; what is reduced down the columns is added up in memory, line after line, one value a column
for each chunk of a matrix.
"""

from __future__ import annotations

from ..graph.ir import Node, Rank
from ..graph.passes import Reduction
from ..llvm.code import LANES, Body, literal, local
from .walk import body_head

ZERO = literal(0.0, "f64")


class LinesBody(Body):
    """`body_k`: one pass over the lines [begin, end) of one tensor."""

    def text(self) -> str:
        self.lines = [body_head(self.pass_, self.pass_index, by_lines=True), "entry:"]
        self._enter_inputs()
        self._begin_reductions()
        # What is reduced along a line, and what is reduced down the columns.
        down = self.pass_.domain == Rank.ELEMENT
        self.along = [s for s in self.pass_.sums if not (down and s.node.rank == Rank.COLUMN)]
        self.down = [s for s in self.pass_.sums if down and s.node.rank == Rank.COLUMN]
        for i in range(len(self.along)):
            self._line(f"%line_acc{i} = alloca <{LANES} x double>, align 128")
        self._line(f"%rest = urem i64 %length, {LANES}")
        self._line("%middle = sub i64 %length, %rest")
        self._line("%first_group = udiv i64 %begin, %per")
        self._line("%skipped = mul i64 %first_group, %per")
        self._line("%first_place = sub i64 %begin, %skipped")
        self._clear_columns()
        self._walk()
        self._finish_reductions()
        return "\n".join([*self.lines, "  ret void", "}"])

    def _clear_columns(self) -> None:
        """Begin the sums down the columns, of all matrices that this range has a part of."""
        if self.down:
            self._line("%last_line = sub i64 %end, 1")
            self._line("%last_group = udiv i64 %last_line, %per")
            self._line("%after_group = add i64 %last_group, 1")
            self._line("%clear_first = mul i64 %first_group, %length")
            self._line("%clear_begin = add i64 %clear_first, %offset")
            self._line("%clear_last = mul i64 %after_group, %length")
            self._line("%clear_end = add i64 %clear_last, %offset")
            self._line("br label %clear_head")
            self._loop("clear", "%clear_begin", "%clear_end", 1, self._clear, "cleared")
            self.lines.append("cleared:")

    def _clear(self) -> None:
        for one in self.down:
            at = self._value(f"getelementptr double, ptr {local(one.into)}, i64 %clear_i")
            self._line(f"store double {ZERO}, ptr {at}")

    def _walk(self) -> None:
        before = "cleared" if self.down else "entry"
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
        self.once = {
            n: super(LinesBody, self)._load(n, self._once_at(n), 0)
            for n in self.pass_.loads
            if self._is_once(n)
        }
        for i in range(len(self.along)):
            self._line(f"store <{LANES} x double> zeroinitializer, ptr %line_acc{i}")
        self._line("br label %wide_head")
        self._loop("wide", "0", "%middle", LANES, lambda: self._at("%wide_i", LANES), "between")
        self.lines.append("between:")
        self._line("br label %tail_head")
        self._loop("tail", "%middle", "%length", 1, lambda: self._at("%tail_i", 0), "line_end")
        self.lines.append("line_end:")
        self._finish_line()
        self.lines += [
            "  br label %line_done",
            "line_done:",
            "  %line_next = add i64 %line, 1",
            "  %place_up = add i64 %place, 1",
            "  %wraps = icmp eq i64 %place_up, %per",
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

    def _once_at(self, node: Node) -> str:
        return "%line" if node.rank == Rank.ROW else "%group"

    def _load(self, node: Node, index: str, width: int) -> str:
        if node in self.once:
            return self._splat(self.once[node], node.type, width)
        base = "%base" if node.rank == self.pass_.domain else "%group_base"
        return super()._load(node, self._value(f"add i64 {base}, {index}"), width)

    def _at(self, index: str, width: int) -> None:
        """All values of a line at an index, or at LANES of them: reductions take them in, stores
        write them."""
        values = self._elements(index, width)
        for r, reduction in enumerate(self.pass_.reductions):
            self._accumulate(
                self._lane(f"%acc{r}", index, width), reduction, values(reduction.args[0]), width
            )
        for i, one in enumerate(self.along):
            self._accumulate(
                self._lane(f"%line_acc{i}", index, width), one.node, values(one.node.args[0]), width
            )
        for one in self.down:
            place = self._value(f"add i64 %sums_base, {index}")
            place = self._value(f"getelementptr double, ptr {local(one.into)}, i64 {place}")
            self._accumulate(place, one.node, values(one.node.args[0]), width)
        if self.pass_.stores:
            place = self._value(f"add i64 %base, {index}")
            for name, root in self.pass_.stores:
                self._store(name, root.type, place, values(root), width)

    def _lane(self, accumulator: str, index: str, width: int) -> str:
        """Where a value is taken in: all lanes, or that of one index beyond the last full ones."""
        if width:
            return accumulator
        lane = self._value(f"sub i64 {index}, %middle")
        return self._value(f"getelementptr double, ptr {accumulator}, i64 {lane}")

    def _finish_line(self) -> None:
        """Add up the lanes that the line has used, one after another, and keep the result."""
        if not self.along:
            return
        self._line(f"%few = icmp slt i64 %length, {LANES}")
        self._line(f"%used = select i1 %few, i64 %length, i64 {LANES}")
        self._line("br label %lanes_body")
        self.lines += [
            "lanes_body:",
            "  %lane_i = phi i64 [ 0, %line_end ], [ %lane_next, %lanes_body ]",
        ]
        for i in range(len(self.along)):
            self._line(
                f"%so_far{i} = phi double [ {ZERO}, %line_end ], [ %so_far_next{i}, %lanes_body ]"
            )
        for i, one in enumerate(self.along):
            self._add_lane(i, one)
        self.lines += [
            "  %lane_next = add i64 %lane_i, 1",
            "  %lane_more = icmp slt i64 %lane_next, %used",
            "  br i1 %lane_more, label %lanes_body, label %lanes_end",
            "lanes_end:",
        ]
        for i, one in enumerate(self.along):
            at = self._value(
                f"getelementptr double, ptr {local(one.into)}, i64 {self._once_at(one.node)}"
            )
            self._line(f"store double %so_far_next{i}, ptr {at}")

    def _add_lane(self, i: int, one: Reduction) -> None:
        lane_at = self._value(f"getelementptr double, ptr %line_acc{i}, i64 %lane_i")
        lane = self._value(f"load double, ptr {lane_at}")
        total = self._combine(one.node, f"%so_far{i}", lane, "double")
        # A name that the loop's head can refer to: adding -0.0 changes nothing.
        self._line(f"%so_far_next{i} = fadd double {total}, {literal(-0.0, 'f64')}")
