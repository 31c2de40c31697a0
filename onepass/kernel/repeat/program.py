"""The machine code that walks a sheet, in LLVM IR.

    step(sheet, groups, state, asked)    read everything, launch, store; for little work
    read(sheet, groups, state, asked)    read everything, and keep alive what was read
    store(sheet)                         after a launch: store numbers, count versions
    release(sheet)                       let go what `read` has kept alive

`groups` and `state` are the Python objects `optimizer.param_groups` and `optimizer.state`. `asked`
says whether the class has been asked for its flags. All hold the interpreter lock: nothing is freed
or replaced while it is looked at.

Memory is read in sweeps, each of which fetches what the next one needs. One tensor's way:

    its Python object -> its TensorImpl -> its StorageImpl -> its memory

So the processor waits for many tensors at once and not for one after the other.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ..llvm.routine import Routine
from ..tensors.same_words import DECLARATIONS, Comparing, count_change, python_function
from ..tensors.words import Words
from .fields import COUNTS, FIELDS, Answer, OptionKind

ARGUMENTS = ("ptr sheet", "ptr groups", "ptr state", "i64 asked")
ARGUMENTS_GIVEN = ("ptr %sheet", "ptr %groups", "ptr %state", "i64 %asked")
NUMBERS = (OptionKind.NUMBER, OptionKind.RATE, OptionKind.ASKED)


class Places:
    """Where things are: torch's words, Python's objects and functions, torch's functions."""

    def __init__(self, words: Words, object_layout: tuple[int, int], functions: dict[str, int]):
        self.words = words
        self.object_layout = object_layout
        self.functions = functions


def program(places: Places) -> str:
    """Return the text of all four functions."""
    return "\n".join(
        [
            DECLARATIONS,
            _Reading(places, "look").text(),
            _Storing(places, "store").text(),
            _step(places),
            _read(places),
            _release(places),
        ]
    )


class _Walk:
    """A function that walks a sheet: its routine, and the sheet's fields as values."""

    def __init__(self, places: Places, name: str, result: str, *arguments: str) -> None:
        self.places = places
        self.routine = Routine(name, result, *arguments)

    def field(self, name: str) -> str:
        """Return a field of the sheet."""
        type = "i64" if name in COUNTS else "ptr"
        return self.routine.load(type, "%sheet", FIELDS.index(name))

    def entry(self, name: str, index: str, type: str = "i64") -> str:
        """Return an entry of a table."""
        return self.routine.load(type, self.field(name), index)

    def put(self, name: str, index: str, value: str | int, type: str = "i64") -> None:
        """Set an entry of a table."""
        self.routine.store(type, value, self.field(name), index)

    def is_not_zero(self, name: str, index: str) -> str:
        """Return whether an entry of a table is not 0."""
        return self.routine.value(f"icmp ne i64 {self.entry(name, index)}, 0")

    def load_number(self, address: str, is_double: str) -> str:
        """Return the float64 or float32 at an address, as float64."""
        r = self.routine
        number = r.variable("double")
        with r.when(is_double):
            r.set(number, r.load("double", address), "double")
        with r.when(r.value(f"xor i1 {is_double}, true")):
            narrow = r.load("float", address)
            r.set(number, r.value(f"fpext float {narrow} to double"), "double")
        return r.get(number, "double")


class _Reading(_Walk):
    """`look(sheet, groups, state, asked)`: read everything, and change nothing but the sheet."""

    def __init__(self, places: Places, name: str) -> None:
        super().__init__(places, name, "i64", *ARGUMENTS)
        layout = places.object_layout
        self.compare = Comparing(self.routine, places.words, layout, Answer.DIFFERS)

    def text(self) -> str:
        self._read_groups()
        self._read_params()
        self._read_states()
        self._compare_tensors()
        self._read_addresses()
        self._read_numbers()
        self._copy()
        self.routine.leave(Answer.DONE)
        return self.routine.text()

    def _call(self, result: str, name: str, *arguments: str) -> str:
        return self.routine.call(result, python_function(name), *arguments)

    # Options and lists of parameters.

    def _read_groups(self) -> None:
        r = self.routine
        self.compare.must_be_of("%groups", list)
        size = self._call("i64", "PyList_Size", "ptr %groups")
        self.compare.must(r.is_equal(size, self.field("groups")))
        option, param = r.variable("i64", 0), r.variable("i64", 0)
        position, name, value = r.variable("i64"), r.variable("ptr"), r.variable("ptr")
        params = r.variable("ptr")
        with r.each(self.field("groups")) as g:
            group = self._call("ptr", "PyList_GetItem", "ptr %groups", f"i64 {g}")
            self.compare.must_be_of(group, dict)
            options = self.entry("group_options", g)
            size = self._call("i64", "PyDict_Size", f"ptr {group}")
            self.compare.must(r.is_equal(size, options))
            r.set(position, 0)
            with r.each(options):
                walked = (f"ptr {group}", f"ptr {position}", f"ptr {name}", f"ptr {value}")
                self._call("i32", "PyDict_Next", *walked)
                o = r.get(option)
                self.compare.must(r.is_equal(r.get(name), self.entry("option_name", o)))
                self._read_option(o, r.get(value, "ptr"), params)
                r.set(option, r.add(o, 1))
            self._read_list(r.get(params, "ptr"), self.entry("group_params", g), param)

    def _read_option(self, o: str, value: str, params: str) -> None:
        r = self.routine
        kind, expected = self.entry("option_kind", o), self.entry("option_value", o)
        with r.when(r.is_equal(kind, OptionKind.SAME)):
            self.compare.must(r.is_equal(r.value(f"ptrtoint ptr {value} to i64"), expected))
        is_number = r.either(*(r.is_equal(kind, known) for known in NUMBERS))
        with r.when(is_number):
            self.compare.must_be_of(value, float, np.float64)
            number = self._call("double", "PyFloat_AsDouble", f"ptr {value}")
            with r.when(r.is_equal(kind, OptionKind.RATE)):
                self.compare.must(r.value(f"fcmp oge double {number}, 0.0"))
                self.compare.must(r.value(f"fcmp olt double {number}, 0x7FF0000000000000"))
            with r.when(r.is_equal(kind, OptionKind.ASKED)):
                known = self.entry("values", expected, "double")
                has_changed = r.value(f"fcmp une double {number}, {known}")
                must_ask = r.both(has_changed, r.is_equal("%asked", 0))
                r.leave_if(must_ask, Answer.ASK)
            self.put("values", expected, number, "double")
        with r.when(r.is_equal(kind, OptionKind.ROW)):
            self.compare.must_be_of(value, tuple)
            size = self._call("i64", "PyTuple_Size", f"ptr {value}")
            self.compare.must(r.is_equal(size, self.entry("option_length", o)))
            with r.each(size) as i:
                number = self._call("ptr", "PyTuple_GetItem", f"ptr {value}", f"i64 {i}")
                self.compare.must_be_of(number, float, np.float64)
                number = self._call("double", "PyFloat_AsDouble", f"ptr {number}")
                self.put("values", r.add(expected, i), number, "double")
        with r.when(r.is_equal(kind, OptionKind.PARAMS)):
            r.set(params, value, "ptr")

    def _read_list(self, params: str, count: str, param: str) -> None:
        """Read a group's list of parameters; `param` is the variable that counts those of all."""
        r = self.routine
        self.compare.must_be_of(params, list)
        size = self._call("i64", "PyList_Size", f"ptr {params}")
        self.compare.must(r.is_equal(size, count))
        with r.each(count) as i:
            p = r.get(param)
            object = self._call("ptr", "PyList_GetItem", f"ptr {params}", f"i64 {i}")
            self.put("param_object", p, object, "ptr")
            self.compare.fetch(object)
            r.set(param, r.add(p, 1))

    # Parameters and gradients.

    def _read_params(self) -> None:
        r, words = self.routine, self.places.words
        with r.each(self.field("params")) as p:
            object = self.entry("param_object", p, "ptr")
            impl = self.compare.impl_of(object)
            self.put("param_impl", p, impl, "ptr")
            self.compare.fetch_impl(impl)
            t = self.entry("param_tensor", p)
            with r.when(r.is_less(-1, t)):
                self.put("object", t, object, "ptr")
                self.put("impl", t, impl, "ptr")
        nothing = r.variable("i64", words.no_gradient)
        with r.each(self.field("params")) as p:
            meta = r.load("ptr", self.entry("param_impl", p, "ptr"), words.meta)
            has_none = r.is_null(meta)
            home = r.value(
                f"select i1 {has_none}, ptr {nothing}, ptr {r.at('i64', meta, words.gradient)}"
            )
            self.put("gradient_home", p, home, "ptr")
            self.compare.fetch(home)
        with r.each(self.field("params")) as p:
            gradient = r.load("i64", self.entry("gradient_home", p, "ptr"))
            t = self.entry("gradient_tensor", p)
            is_missing = r.is_equal(gradient, words.no_gradient)
            should_be_missing = r.is_less(t, 0)
            self.compare.must(r.is_equal(is_missing, should_be_missing, "i1"))
            with r.when(r.is_less(-1, t)):
                impl = r.value(f"inttoptr i64 {gradient} to ptr")
                self.put("impl", t, impl, "ptr")
                self.compare.fetch_impl(impl)

    # States.

    def _read_states(self) -> None:
        r = self.routine
        states = self.field("states")
        position, name, value = r.variable("i64", 0), r.variable("ptr"), r.variable("ptr")
        with r.when(r.is_less(0, states)):
            self.compare.must_be_of("%state", dict, defaultdict)
            size = self._call("i64", "PyDict_Size", "ptr %state")
            self.compare.must(r.is_equal(size, states))
        with r.each(states) as k:
            walked = ("ptr %state", f"ptr {position}", f"ptr {name}", f"ptr {value}")
            self._call("i32", "PyDict_Next", *walked)
            p = self.entry("state_param", k)
            with r.when(r.is_less(-1, p)):
                self.compare.must(r.is_equal(r.get(name), self.entry("param_object", p)))
            found = r.get(value, "ptr")
            self.put("state_dict", k, found, "ptr")
            self.compare.fetch(found)
        self._read_entries(position, name, value)
        with r.each(self.field("entries")) as e:
            t = self.entry("entry_tensor", e)
            with r.when(r.is_less(-1, t)):
                impl = self.compare.impl_of(self.entry("object", t, "ptr"))
                self.put("impl", t, impl, "ptr")
                self.compare.fetch_impl(impl)

    def _read_entries(self, position: str, name: str, value: str) -> None:
        """Read each state's dict: which Python objects it holds."""
        r = self.routine
        entry = r.variable("i64", 0)
        with r.each(self.field("states")) as k:
            entries = self.entry("state_entries", k)
            state = self.entry("state_dict", k, "ptr")
            p = self.entry("state_param", k)
            with r.when(r.is_less(-1, p)):
                self.compare.must_be_of(state, dict)
                size = self._call("i64", "PyDict_Size", f"ptr {state}")
                self.compare.must(r.is_equal(size, entries))
                r.set(position, 0)
                with r.each(entries):
                    walked = (f"ptr {state}", f"ptr {position}", f"ptr {name}", f"ptr {value}")
                    self._call("i32", "PyDict_Next", *walked)
                    e = r.get(entry)
                    self.compare.must(r.is_equal(r.get(name), self.entry("entry_name", e)))
                    t = self.entry("entry_tensor", e)
                    with r.when(r.is_less(-1, t)):
                        object = r.get(value, "ptr")
                        self.put("object", t, object, "ptr")
                        self.compare.fetch(object)
                    r.set(entry, r.add(e, 1))

    # Tensors.

    def _compare_tensors(self) -> None:
        """Compare the words of all tensors with those that are expected."""
        r, compare = self.routine, self.compare
        with r.each(self.field("tensors")) as t:
            row_index = self.entry("tensor_row", t)
            with r.when(r.is_less(-1, row_index)):
                impl = self.entry("impl", t, "ptr")
                row = compare.row(self.field("rows"), row_index)
                storage = compare.must_have_words(impl, row)
                with r.when(self.is_not_zero("tensor_moves", t)):
                    compare.must_have_plain_object(impl)
                self.put("storage", t, storage, "ptr")
                compare.fetch(storage)

    def _read_addresses(self) -> None:
        """Read where each tensor's memory is: where it was, unless it may move."""
        r, compare = self.routine, self.compare
        with r.each(self.field("tensors")) as t:
            row_index = self.entry("tensor_row", t)
            with r.when(r.is_less(-1, row_index)):
                row = compare.row(self.field("rows"), row_index)
                impl, storage = self.entry("impl", t, "ptr"), self.entry("storage", t, "ptr")
                found = compare.address(impl, storage, row)
                goal = self.entry("tensor_goal", t, "ptr")
                has_stayed = r.is_equal(r.load("i64", goal), found)
                compare.must(r.either(has_stayed, self.is_not_zero("tensor_moves", t)))
                r.store("i64", found, goal)

    # Numbers.

    def _read_numbers(self) -> None:
        """Read the numbers of states, and what those become that count steps."""
        r = self.routine
        with r.each(self.field("common")) as c:
            current = self._number(self.entry("common_tensor", c), c)
            self.put("current", c, current, "double")
            self.put("next", c, self._rounded(r.value(f"fadd double {current}, 1.0"), c), "double")
        with r.each(self.field("number_count")) as n:
            c = self.entry("number_common", n)
            found = self._number(self.entry("number_tensor", n), c)
            current = self.entry("current", c, "double")
            self.compare.must(r.value(f"fcmp oeq double {found}, {current}"))

    def _number(self, t: str, c: str) -> str:
        """Return the number in a tensor's memory, stored as the common number c is."""
        address = self.routine.load("ptr", self.entry("tensor_goal", t, "ptr"))
        return self.load_number(address, self.is_not_zero("common_is_double", c))

    def _rounded(self, number: str, c: str) -> str:
        """Return a number as it will be read when it has been stored."""
        r = self.routine
        narrow = r.value(f"fptrunc double {number} to float")
        narrow = r.value(f"fpext float {narrow} to double")
        is_double = self.is_not_zero("common_is_double", c)
        return r.value(f"select i1 {is_double}, double {number}, double {narrow}")

    def _copy(self) -> None:
        r = self.routine
        with r.each(self.field("copies")) as i:
            number = r.load("double", self.entry("copy_from", i, "ptr"))
            r.store("double", number, self.entry("copy_to", i, "ptr"))


class _Storing(_Walk):
    """`store(sheet)`: store the numbers, and count in each version counter."""

    def __init__(self, places: Places, name: str) -> None:
        super().__init__(places, name, "void", "ptr sheet")

    def text(self) -> str:
        r = self.routine
        with r.each(self.field("common")) as c:
            result = self.entry("result", c, "ptr")
            with r.when(r.value(f"icmp ne ptr {result}, null")):
                number = self.load_number(result, self.is_not_zero("result_is_double", c))
                self.put("next", c, number, "double")
        with r.each(self.field("number_count")) as n:
            c = self.entry("number_common", n)
            goal = self.entry("tensor_goal", self.entry("number_tensor", n), "ptr")
            self._store_number(self.entry("next", c, "double"), r.load("ptr", goal), c)
        with r.each(self.field("written_count")) as w:
            # Read again: a launch may have let other threads run, which may swap tensors.
            object = self.entry("object", self.entry("written", w), "ptr")
            _, tensor_offset = self.places.object_layout
            impl = r.load("ptr", r.at("i8", object, tensor_offset))
            count_change(r, self.places.words, impl)
        r.leave()
        return r.text()

    def _store_number(self, number: str, address: str, c: str) -> None:
        r = self.routine
        is_double = self.is_not_zero("common_is_double", c)
        with r.when(is_double):
            r.store("double", number, address)
        with r.when(r.value(f"xor i1 {is_double}, true")):
            r.store("float", r.value(f"fptrunc double {number} to float"), address)


def _step(places: Places) -> str:
    """`step`: look; launch in this thread; store."""
    walk = _Walk(places, "step", "i64", *ARGUMENTS)
    r = walk.routine
    found = r.call("i64", "look", *ARGUMENTS_GIVEN)
    r.leave_unless(r.is_equal(found, Answer.DONE), found)
    with r.each(walk.field("launches")) as i:
        function = walk.entry("launch_function", i, "ptr")
        arguments = walk.entry("launch_arguments", i, "ptr")
        r.call("void", function, f"ptr {arguments}", "i32 1", "ptr null")
    r.call("void", "store", "ptr %sheet")
    r.leave(Answer.DONE)
    return r.text()


def _read(places: Places) -> str:
    """`read`: look; keep alive what was found."""
    walk = _Walk(places, "read", "i64", *ARGUMENTS)
    r = walk.routine
    found = r.call("i64", "look", *ARGUMENTS_GIVEN)
    r.leave_unless(r.is_equal(found, Answer.DONE), found)
    with r.each(walk.field("params")) as p:
        walk.put("handle", p, 0)
    with r.each(walk.field("tensors")) as t:
        r.call("void", python_function("Py_IncRef"), f"ptr {walk.entry('object', t, 'ptr')}")
    with r.each(walk.field("params")) as p:
        is_there = r.is_less(-1, walk.entry("gradient_tensor", p))
        with r.when(is_there):
            home = walk.entry("gradient_home", p, "ptr")
            goal = r.at("i64", walk.field("handle"), p)
            keep = places.functions["aoti_torch_new_tensor_handle"]
            failed = r.call("i32", keep, f"ptr {home}", f"ptr {goal}")
            with r.when(r.value(f"icmp ne i32 {failed}, 0")):
                # There is no memory for it.
                walk.put("handle", p, 0)
                r.call("void", "release", "ptr %sheet")
                r.leave(Answer.DIFFERS)
    r.leave(Answer.DONE)
    return r.text()


def _release(places: Places) -> str:
    """`release`: let go what `read` has kept alive."""
    walk = _Walk(places, "release", "void", "ptr sheet")
    r = walk.routine
    with r.each(walk.field("params")) as p:
        handle = walk.entry("handle", p, "ptr")
        with r.when(r.value(f"icmp ne ptr {handle}, null")):
            let_go = places.functions["aoti_torch_delete_tensor_object"]
            r.call("i32", let_go, f"ptr {handle}")
    with r.each(walk.field("tensors")) as t:
        r.call("void", python_function("Py_DecRef"), f"ptr {walk.entry('object', t, 'ptr')}")
    r.leave()
    return r.text()
