"""The text of a function in LLVM IR that reads tensors and compares them with what is expected.

    compare(count, objects, expected, layouts, pointers, changed)

For each of `count` tensors it finds the `at::Tensor` inside the Python object, and asks torch's C
functions about it in an order that makes each question safe. It fills `pointers` and `changed`. It
returns how many tensors have changed.

For a `torch.empty(3, 4)` five words of memory say whether it is a tensor of the expected kind:

    objects[i]      0x7fe1173864e0    the Python object
    object + 8      0x55bb5e947280    its type: one of the three plain classes
    object + 16     0x55bb6031aaa0    its at::Tensor, which is the address of a TensorImpl
    impl + 168      0x9400010001      the dispatch keys
    expected[i, 7]  0x9400010001      the keys that are expected

The offsets 8, 16 and 168 are those of one Python and one torch; `facts` finds them when they are
first needed. Then torch is asked for layout, dtype, device, dimensions, sizes, strides, the
storage's size and the address.
"""

from __future__ import annotations

from itertools import pairwise

from .memory import PLAIN

# The expected facts of a tensor, one int64 each. `layout` is where its sizes, and then its strides,
# begin in the table of layouts.
FACTS = ("dtype", "device_type", "device_index", "dim", "layout", "bytes", "itemsize", "keys")
# What torch's C functions are asked, and the type of their answers.
QUESTIONS = {
    "layout": "i32",
    "dtype": "i32",
    "device_type": "i32",
    "device_index": "i32",
    "dim": "i64",
    "storage_size": "i64",
    "storage_offset": "i64",
    "sizes": "ptr",
    "strides": "ptr",
    "data_ptr": "ptr",
}

COMPARE = """\
define i64 @compare(i64 %count, ptr %objects, ptr %expected, ptr %layouts, \
ptr %pointers, ptr %changed) nounwind {{
entry:
{functions}
  %any = icmp sgt i64 %count, 0
  br i1 %any, label %tensor, label %done

; Where the tensor is, what is expected of it, and whether it is a plain tensor at all.
tensor:
  %i = phi i64 [ 0, %entry ], [ %next, %end ]
  %sum = phi i64 [ 0, %entry ], [ %total, %end ]
  %object_at = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object_at
  %handle = getelementptr i8, ptr %object, i64 {tensor_offset}
  %pointer_to = getelementptr i64, ptr %pointers, i64 %i
  %want_index = mul i64 %i, {facts}
  %want = getelementptr i64, ptr %expected, i64 %want_index
{wanted}
{is_plain}
  br i1 %plain, label %keys, label %differs

; What kind of tensor it is; an undefined one, which only C++ can make, has no TensorImpl.
keys:
  %tensor_impl = load ptr, ptr %handle
  %defined = icmp ne ptr %tensor_impl, null
  br i1 %defined, label %read_keys, label %differs
read_keys:
  %keys_at = getelementptr i8, ptr %tensor_impl, i64 {keys_offset}
  %is_keys = load i64, ptr %keys_at
  %same_keys = icmp eq i64 %is_keys, %want_keys
  br i1 %same_keys, label %ask_layout_, label %differs

; A strided layout (0) makes the other questions safe.
ask_layout_:
{ask_layout}
  %strided = icmp eq i32 %is_layout, 0
  br i1 %strided, label %ask_dtype_, label %differs
{codes}

; Sizes and strides, dimension by dimension.
ask_sizes_:
{ask_sizes}
{ask_strides}
  %want_sizes = getelementptr i64, ptr %layouts, i64 %want_layout
  %want_strides = getelementptr i64, ptr %want_sizes, i64 %want_dim
  %scalar = icmp eq i64 %want_dim, 0
  br i1 %scalar, label %storage, label %dimension
dimension:
  %d = phi i64 [ 0, %answer_strides_ ], [ %d_next, %dimension_good ]
  %size_at = getelementptr i64, ptr %is_sizes, i64 %d
  %size = load i64, ptr %size_at
  %want_size_at = getelementptr i64, ptr %want_sizes, i64 %d
  %want_size = load i64, ptr %want_size_at
  %same_size = icmp eq i64 %size, %want_size
  %stride_at = getelementptr i64, ptr %is_strides, i64 %d
  %stride = load i64, ptr %stride_at
  %want_stride_at = getelementptr i64, ptr %want_strides, i64 %d
  %want_stride = load i64, ptr %want_stride_at
  %same_stride = icmp eq i64 %stride, %want_stride
  %same = and i1 %same_size, %same_stride
  br i1 %same, label %dimension_good, label %differs
dimension_good:
  %d_next = add i64 %d, 1
  %d_more = icmp slt i64 %d_next, %want_dim
  br i1 %d_more, label %dimension, label %storage

; The address, if the storage holds all elements; 0 if there are none.
storage:
  %empty = icmp eq i64 %want_bytes, 0
  br i1 %empty, label %nothing, label %ask_storage_
nothing:
  store i64 0, ptr %pointer_to
  br label %end
ask_storage_:
{ask_storage_size}
{ask_storage_offset}
  %skipped = mul i64 %is_storage_offset, %want_itemsize
  %needed = add i64 %skipped, %want_bytes
  %enough = icmp sge i64 %is_storage_size, %needed
  br i1 %enough, label %ask_data_, label %differs
ask_data_:
{ask_data_ptr}
  store ptr %is_data_ptr, ptr %pointer_to
  ; Small tensors are then in the cache when they are needed. Any address will do, also a device's.
  call void @llvm.prefetch.p0(ptr %is_data_ptr, i32 0, i32 3, i32 1)
  %null = icmp eq ptr %is_data_ptr, null
  br i1 %null, label %differs, label %end

differs:
  br label %end
end:
  %wrong = phi i8 [ 0, %nothing ], [ 0, %answer_data_ptr_ ], [ 1, %differs ]
  %changed_to = getelementptr i8, ptr %changed, i64 %i
  store i8 %wrong, ptr %changed_to
  %more_changed = zext i8 %wrong to i64
  %total = add i64 %sum, %more_changed
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %tensor, label %done
done:
  %result = phi i64 [ 0, %entry ], [ %total, %end ]
  ret i64 %result
}}
"""

# A question, and where its answer lies: an error code counts as a difference.
FUNCTION = """\
  %{question} = alloca {type}
  %ask_{question} = inttoptr i64 {address} to ptr"""
ASK = """\
  %code_{question} = call i32 %ask_{question}(ptr %handle, ptr %{question})
  %answered_{question} = icmp eq i32 %code_{question}, 0
  br i1 %answered_{question}, label %answer_{question}_, label %differs
answer_{question}_:
  %is_{question} = load {type}, ptr %{question}"""
# A fact that is one number: torch's number for a dtype or a device, or that of dimensions.
CODE = """\
ask_{question}_:
{ask}
  %code64_{question} = {to_i64}
  %same_{question} = icmp eq i64 %code64_{question}, %want_{question}
  br i1 %same_{question}, label %ask_{following}_, label %differs"""
WANTED = """\
  %want_{fact}_at = getelementptr i64, ptr %want, i64 {index}
  %want_{fact} = load i64, ptr %want_{fact}_at"""

# Whether an object is of one of the plain classes: its type's address is one of theirs.
IS_OF_PLAIN_TYPE = """\
  %type_at = getelementptr i8, ptr %object, i64 {type_offset}
  %type = load i64, ptr %type_at
  %is_tensor = icmp eq i64 %type, {tensor}
  %is_parameter = icmp eq i64 %type, {parameter}
  %is_buffer = icmp eq i64 %type, {buffer}
  %is_either = or i1 %is_tensor, %is_parameter
  %plain = or i1 %is_either, %is_buffer"""
# The caller has written 0 for everything that is not a plain tensor.
IS_GIVEN = """\
  %impl = load i64, ptr %handle
  %plain = icmp ne i64 %impl, 0"""


def comparison(
    addresses: dict[str, int], object_layout: tuple[int, int] | None, keys_offset: int
) -> str:
    """Return the text of `compare`.

    `addresses` are those of torch's C functions, by `QUESTIONS`. `object_layout` says where a
    Python object keeps its type and its at::Tensor, in bytes: `objects` are then Python objects. If
    it is None, they are addresses of `_cdata`. `keys_offset` is the place of the dispatch keys in a
    TensorImpl.
    """
    _, tensor_offset = object_layout or (0, 0)
    functions = [
        FUNCTION.format(question=question, type=type, address=addresses[question])
        for question, type in QUESTIONS.items()
    ]
    wanted = [WANTED.format(fact=fact, index=index) for index, fact in enumerate(FACTS)]
    asks = {f"ask_{question}": _ask(question) for question in QUESTIONS}
    return COMPARE.format(
        functions="\n".join(functions),
        tensor_offset=tensor_offset,
        facts=len(FACTS),
        wanted="\n".join(wanted),
        is_plain=_is_plain(object_layout),
        keys_offset=keys_offset,
        codes=_compare_codes(),
        **asks,
    )


def _is_plain(object_layout: tuple[int, int] | None) -> str:
    """Return the lines that find out whether an object is a plain tensor."""
    if object_layout is None:
        return IS_GIVEN
    type_offset, _ = object_layout
    tensor, parameter, buffer = map(id, PLAIN)
    return IS_OF_PLAIN_TYPE.format(
        type_offset=type_offset, tensor=tensor, parameter=parameter, buffer=buffer
    )


def _ask(question: str) -> str:
    """Return the lines that ask torch, and go on with its answer."""
    return ASK.format(question=question, type=QUESTIONS[question])


def _compare_codes() -> str:
    """Return the comparisons of dtype, device and number of dimensions, one after another."""
    order = ("dtype", "device_type", "device_index", "dim", "sizes")
    blocks = []
    for question, following in pairwise(order):
        to_i64 = f"sext i32 %is_{question} to i64"
        if QUESTIONS[question] == "i64":
            to_i64 = f"add i64 %is_{question}, 0"
        blocks.append(
            CODE.format(question=question, ask=_ask(question), to_i64=to_i64, following=following)
        )
    return "\n".join(blocks)
