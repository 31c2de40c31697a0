"""What a sheet consists of: the names of its tables, and the kinds of its options."""

from __future__ import annotations

from enum import IntEnum


class OptionKind(IntEnum):
    """What an option must be."""

    # The same object as before.
    SAME = 0
    # A float, which is read.
    NUMBER = 1
    # A float that a learning rate may be.
    RATE = 2
    # A float on which flags depend: the class is asked for these again if it has changed.
    ASKED = 3
    # A tuple of floats, which are read.
    ROW = 4
    # The list of parameters.
    PARAMS = 5
    # Anything.
    IGNORED = 6


class Answer(IntEnum):
    """What machine code says of a step."""

    DONE = 0
    # Something differs, and nothing has been changed.
    DIFFERS = 1
    # The class must be asked for its flags, and nothing has been changed.
    ASK = 2


# 64-bit fields of one array, each a number or the address of a table. In the tables' comments
# "for each ..." is one entry of 64 bits for each of these, in order.
FIELDS = (
    # Numbers: param groups, parameters in them, parameters that have state, entries of all states,
    # tensors that are read.
    "groups",
    "params",
    "states",
    "entries",
    "tensors",
    # For each group: its parameters, its options.
    "group_params",
    "group_options",
    # For each option: its name (an address), its kind, and the same object, or the index of its
    # number among `values`; how many numbers it has.
    "option_name",
    "option_kind",
    "option_value",
    "option_length",
    # Numbers of options (float64).
    "values",
    # For each parameter: which tensors it and its gradient are, or -1. And what has been found: its
    # Python object, its TensorImpl, where its gradient is.
    "param_tensor",
    "gradient_tensor",
    "param_object",
    "param_impl",
    "gradient_home",
    # For each parameter that has state, in the state's order: which one it is, or -1 for one that
    # has no part; its entries; its dict, as found.
    "state_param",
    "state_entries",
    "state_dict",
    # For each entry of a state: its name (an address), and which tensor it is, or -1.
    "entry_name",
    "entry_tensor",
    # For each tensor: its row in `rows`, or -1 if it has no part; the address to which its address
    # is written; whether it may have moved. And what has been found: its Python object, TensorImpl
    # and StorageImpl.
    "tensor_row",
    "tensor_goal",
    "tensor_moves",
    "object",
    "impl",
    "storage",
    # Words that tensors have, see `words.template`: expected, those that matter, bytes, itemsize.
    "rows",
    # The tensors whose version counters count this step.
    "written_count",
    "written",
    # Numbers that several parameters have in common, as the step count of all that began together.
    # For each: a tensor that has it, whether it is stored as float64 (or as float32), the number
    # (float64) before and after the step, and the address where the launch leaves the new one (0
    # for one more than before), as float64 or as float32.
    "common",
    "common_tensor",
    "common_is_double",
    "current",
    "next",
    "result",
    "result_is_double",
    # The tensors that have such a number, and which one.
    "number_count",
    "number_tensor",
    "number_common",
    # What is copied before the launch: from an address to another, float64.
    "copies",
    "copy_from",
    "copy_to",
    # Launches that the machine code itself makes: functions and their arguments.
    "launches",
    "launch_function",
    "launch_arguments",
    # For each parameter: what keeps its gradient alive during a launch, or 0.
    "handle",
)
# Fields that are numbers and not addresses.
COUNTS = (
    "groups",
    "params",
    "states",
    "entries",
    "tensors",
    "written_count",
    "common",
    "number_count",
    "copies",
    "launches",
)
