"""Vector code for the processor at hand, written as LLVM's intermediate language and compiled when it is first needed.

`Code` is a small notation over llvmlite: values with operators, loops and branches as `with` blocks, memory by address.
Vectors have the width that the kernels ask for; LLVM splits them where the processor's are shorter. No operation may
be reordered or fused but where `fma` says so: what is computed does not depend on the optimiser.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import llvmlite.binding as llvm
from llvmlite import ir

from mm_gpt.kernels.processor import ISA, machine_of

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()


class _BFloat(ir.Type):
    """bfloat, which llvmlite has no type for; only ever bitcast or rounded to."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def vector(element: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(element, lanes)


def lanes_of(element: ir.Type, lanes: int) -> ir.Type:
    """A vector, or the element itself where it would be alone."""
    return element if lanes == 1 else vector(element, lanes)


class Value:
    """A number, or a vector of them, in the code that is being written. Python numbers take the other side's type."""

    __slots__ = ("code", "ir")

    def __init__(self, code: "Code", value: ir.Value):
        self.code, self.ir = code, value

    @property
    def type(self) -> ir.Type:
        return self.ir.type

    @property
    def element(self) -> ir.Type:
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    @property
    def lanes(self) -> int:
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        return isinstance(self.element, (ir.FloatType, ir.HalfType))

    def _both(self, other: "Value | float", int_name: str, float_name: str, *, swap: bool = False) -> "Value":
        left, right = self.code.match(self, other)
        if swap:
            left, right = right, left
        name = float_name if left.is_float else int_name
        return Value(self.code, getattr(self.code.builder, name)(left.ir, right.ir))

    def __add__(self, other: "Value | float") -> "Value":
        return self._both(other, "add", "fadd")

    __radd__ = __add__

    def __sub__(self, other: "Value | float") -> "Value":
        return self._both(other, "sub", "fsub")

    def __rsub__(self, other: float) -> "Value":
        return self._both(other, "sub", "fsub", swap=True)

    def __mul__(self, other: "Value | float") -> "Value":
        return self._both(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: "Value | float") -> "Value":
        return self._both(other, "", "fdiv")

    def __rtruediv__(self, other: float) -> "Value":
        return self._both(other, "", "fdiv", swap=True)

    def __floordiv__(self, other: "Value | int") -> "Value":
        return self._both(other, "udiv", "")

    def __mod__(self, other: "Value | int") -> "Value":
        return self._both(other, "urem", "")

    def __and__(self, other: "Value | int") -> "Value":
        return self._both(other, "and_", "")

    def __or__(self, other: "Value | int") -> "Value":
        return self._both(other, "or_", "")

    def __lshift__(self, other: "Value | int") -> "Value":
        return self._both(other, "shl", "")

    def __rshift__(self, other: "Value | int") -> "Value":
        """Logical: zeros come in from above."""
        return self._both(other, "lshr", "")

    def compare(self, operator: str, other: "Value | float") -> "Value":
        left, right = self.code.match(self, other)
        method = self.code.builder.fcmp_ordered if left.is_float else self.code.builder.icmp_signed
        return Value(self.code, method(operator, left.ir, right.ir))

    def __lt__(self, other: "Value | float") -> "Value":
        return self.compare("<", other)

    def __le__(self, other: "Value | float") -> "Value":
        return self.compare("<=", other)

    def __gt__(self, other: "Value | float") -> "Value":
        return self.compare(">", other)

    def __ge__(self, other: "Value | float") -> "Value":
        return self.compare(">=", other)

    def where(self, yes: "Value | float", no: "Value | float") -> "Value":
        """`yes` where this (of booleans) is true."""
        if not isinstance(yes, Value):
            assert isinstance(no, Value)
            yes = self.code.number(no.type, yes)
        first, second = self.code.match(yes, no)
        return Value(self.code, self.code.builder.select(self.ir, first.ir, second.ir))

    def bits(self, element: ir.Type) -> "Value":
        """The same bits as lanes of another type."""
        size = {I8: 8, I16: 16, I32: 32, I64: 64, F16: 16, F32: 32, BF16: 16}
        lanes = self.lanes * size[self.element] // size[element]
        target = element if lanes == 1 else vector(element, lanes)
        return Value(self.code, self.code.builder.bitcast(self.ir, target))

    def bits_as_lanes(self) -> "Value":
        """An integer as booleans, the lowest bit first."""
        return Value(self.code, self.code.builder.bitcast(self.ir, vector(I1, self.type.width)))

    def to(self, element: ir.Type, *, signed: bool = True) -> "Value":
        """The same numbers in another type. `signed`: how integers are read; floats are cut towards 0."""
        target = vector(element, self.lanes) if self.lanes > 1 else element
        build = self.code.builder
        target_is_float = isinstance(element, (ir.FloatType, ir.HalfType)) or element is BF16
        if self.is_float and target_is_float:
            method = build.fpext if isinstance(element, ir.FloatType) else build.fptrunc
        elif self.is_float:
            method = build.fptosi
        elif target_is_float:
            method = build.sitofp if signed else build.uitofp
        elif self.element.width < element.width:
            method = build.sext if signed else build.zext
        else:
            method = build.trunc
        return Value(self.code, method(self.ir, target))

    def splat(self, lanes: int) -> "Value":
        assert self.lanes == 1
        build = self.code.builder
        one = build.insert_element(ir.Constant(vector(self.type, lanes), ir.Undefined), self.ir, ir.Constant(I32, 0))
        mask = ir.Constant(vector(I32, lanes), [0] * lanes)
        return Value(self.code, build.shuffle_vector(one, one, mask))

    def shuffle(self, lanes: Sequence[int], other: "Value | None" = None) -> "Value":
        """The lanes of this and, counted on, of the other."""
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        second = self.ir if other is None else other.ir
        return Value(self.code, self.code.builder.shuffle_vector(self.ir, second, mask))

    def part_of(self, lanes: Sequence[int]) -> "Value":
        """Lanes in any order; of a single number, copies."""
        if self.lanes == 1:
            return self if len(lanes) == 1 else self.splat(len(lanes))
        return self.lane(lanes[0]) if len(lanes) == 1 else self.shuffle(lanes)

    def part(self, start: int, count: int) -> "Value":
        return self.part_of(range(start, start + count))

    def lane(self, index: int) -> "Value":
        return Value(self.code, self.code.builder.extract_element(self.ir, ir.Constant(I32, index)))


class Variable:
    """A place for a value that loops change; LLVM keeps it in a register."""

    def __init__(self, code: "Code", initial: Value):
        self._code = code
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(initial.type)
        self.set(initial)

    def get(self) -> Value:
        return Value(self._code, self._code.builder.load(self._place))

    def set(self, value: Value) -> None:
        self._code.builder.store(value.ir, self._place)


class Code:
    """Writes one function. Addresses are i64 values in bytes."""

    def __init__(self, module: "Module", builder: ir.IRBuilder):
        self.module, self.builder = module, builder

    def number(self, kind: ir.Type, value: float) -> Value:
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [value] * kind.count))
        return Value(self, ir.Constant(kind, value))

    def numbers(self, element: ir.Type, values: Sequence[float]) -> Value:
        return Value(self, ir.Constant(vector(element, len(values)), list(values)))

    def i64(self, value: "int | Value") -> Value:
        return value if isinstance(value, Value) else self.number(I64, value)

    def match(self, left: Value, right: "Value | float") -> tuple[Value, Value]:
        if not isinstance(right, Value):
            return left, self.number(left.type, right)
        if left.lanes == 1 and right.lanes > 1:
            left = left.splat(right.lanes)
        elif right.lanes == 1 and left.lanes > 1:
            right = right.splat(left.lanes)
        return left, right

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    def load(self, address: Value, kind: ir.Type, offset: "int | Value" = 0) -> Value:
        """Unaligned. `offset` in bytes."""
        pointer = self.builder.inttoptr((address + offset).ir, kind.as_pointer())
        return Value(self, self.builder.load(pointer, align=1))

    def load_i64(self, address: Value, offset: "int | Value" = 0) -> Value:
        return self.load(address, I64, offset)

    def load_first(self, address: Value, kind: ir.Type, count: Value) -> Value:
        """A vector of which only the first `count` lanes are read from memory; the others are 0."""
        mask = self.iota(I64, kind.count) < count
        pointer = self.builder.inttoptr(address.ir, kind.as_pointer())
        zeros = ir.Constant(kind, [0] * kind.count)
        name = f"llvm.masked.load.v{kind.count}{_suffix(kind.element)}.p0"
        signature = (kind, (kind.as_pointer(), vector(I1, kind.count), kind))
        return Value(self, self.builder.call(self.module.declare(name, *signature), [pointer, mask.ir, zeros]))

    def store(self, value: Value, address: Value, offset: "int | Value" = 0) -> None:
        pointer = self.builder.inttoptr((address + offset).ir, value.type.as_pointer())
        self.builder.store(value.ir, pointer, align=1)

    def prefetch(self, address: Value) -> None:
        """Asks for a cache line that will be read soon, for the second cache; the address may be anything."""
        pointer = self.builder.inttoptr(address.ir, I8.as_pointer())
        function = self.module.declare("llvm.prefetch.p0", VOID, [pointer.type, I32, I32, I32])
        self.builder.call(function, [pointer, *(ir.Constant(I32, number) for number in (0, 2, 1))])

    def iota(self, element: ir.Type, lanes: int) -> Value:
        return self.numbers(element, range(lanes))

    def intrinsic(self, name: str, *args: Value, result: ir.Type | None = None, typed: bool = True) -> Value:
        """Calls llvm.NAME; `typed`: named by its type, as the ones of all processors are."""
        first = args[0].type
        full = f"llvm.{name}"
        if typed:
            full += f".v{first.count}{_suffix(first.element)}" if args[0].lanes > 1 else f".{_suffix(first)}"
        function = self.module.declare(full, first if result is None else result, [arg.type for arg in args])
        return Value(self, self.builder.call(function, [arg.ir for arg in args]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, rounded once."""
        a, b = self.match(a, b)
        a, c = self.match(a, c)
        return self.intrinsic("fma", a, b, c)

    def sum_lanes(self, x: Value) -> Value:
        """Always halves onto halves."""
        while x.lanes > 1:
            half = x.lanes // 2
            x = x.part(0, half) + x.part(half, half)
        return x

    def sum_lanes_of(self, vectors: Sequence[Value]) -> Value:
        """`sum_lanes` of each, to the same bits, as lanes of one vector. Vectors: a power of two, up to their lanes."""
        lanes = vectors[0].lanes
        parts, group = list(vectors), lanes
        while len(parts) > 1:
            group //= 2
            first = [i for i in range(2 * lanes) if i % (2 * group) < group]
            second = [i + group for i in first]
            parts = [a.shuffle(first, b) + a.shuffle(second, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        total, count = parts[0], lanes // group
        while group > 1:
            group //= 2
            first = [i for i in range(total.lanes) if i % (2 * group) < group]
            total = total.part_of(first) + total.part_of([i + group for i in first])
        assert total.lanes == count
        return total

    def first_lane(self, x: Value, lanes: int) -> Value:
        """A vector with x in front and zeros behind."""
        zeros = ir.Constant(vector(x.type, lanes), [0] * lanes)
        return Value(self, self.builder.insert_element(zeros, x.ir, ir.Constant(I32, 0)))

    def vector_of(self, values: Sequence[Value]) -> Value:
        if len(values) == 1:
            return values[0]
        whole = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
        for index, value in enumerate(values):
            whole = self.builder.insert_element(whole, value.ir, ir.Constant(I32, index))
        return Value(self, whole)

    def max_lanes(self, x: Value) -> Value:
        """NaN if one is NaN."""
        while x.lanes > 1:
            half = x.lanes // 2
            x = self.intrinsic("maximum", x.part(0, half), x.part(half, half))
        return x

    @contextmanager
    def loop(self, start: "int | Value", end: "int | Value", step: "int | Value" = 1) -> Iterator[Value]:
        """`for i in range(start, end, step)`, step above 0."""
        end, step = self.i64(end), self.i64(step)
        index = self.variable(self.i64(start))
        head, body, after = (self.builder.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch((index.get() < end).ir, body, after)
        self.builder.position_at_end(body)
        now = index.get()
        yield now
        index.set(now + step)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def repeat(self) -> Iterator[Callable[[Value], None]]:
        """An endless loop; what it yields leaves it when a condition holds."""
        body, after = self.builder.append_basic_block("body"), self.builder.append_basic_block("after")
        self.builder.branch(body)
        self.builder.position_at_end(body)

        def leave_if(condition: Value) -> None:
            rest = self.builder.append_basic_block("rest")
            self.builder.cbranch(condition.ir, after, rest)
            self.builder.position_at_end(rest)

        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    def call(self, function: ir.Function, *args: "Value | int") -> Value:
        return Value(self, self.builder.call(function, [self.i64(arg).ir for arg in args]))

    def call_address(self, address: Value, *args: "Value | int") -> None:
        """A function without result, of i64 arguments."""
        values = [self.i64(arg).ir for arg in args]
        kind = ir.FunctionType(VOID, [I64] * len(values))
        self.builder.call(self.builder.inttoptr(address.ir, kind.as_pointer()), values)


def _suffix(element: ir.Type) -> str:
    return f"i{element.width}" if isinstance(element, ir.IntType) else {F32: "f32", F16: "f16"}[element]


class Module:
    """Functions of i64 arguments that are compiled together."""

    def __init__(self, level: ISA):
        self.isa = level
        self.ir = ir.Module()
        self.ir.triple = llvm.get_process_triple()

    def declare(self, name: str, result: ir.Type, args: Sequence[ir.Type], *, var_arg: bool = False) -> ir.Function:
        if name in self.ir.globals:
            return self.ir.globals[name]
        return ir.Function(self.ir, ir.FunctionType(result, args, var_arg=var_arg), name=name)

    @contextmanager
    def function(
        self, name: str, num_args: int, *, exported: bool = False, inline: bool | None = None
    ) -> Iterator[tuple[Code, list[Value]]]:
        """Writes a function without result; `inline` None leaves it to LLVM."""
        function = ir.Function(self.ir, ir.FunctionType(VOID, [I64] * num_args), name=name)
        function.linkage = "external" if exported else "internal"
        if inline is not None:
            function.attributes.add("alwaysinline" if inline else "noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        body = function.append_basic_block("start")
        builder.position_at_end(body)
        code = Code(self, builder)
        yield code, [Value(code, arg) for arg in function.args]
        builder.ret_void()
        builder.position_at_end(function.entry_basic_block)
        builder.branch(body)

    def compile(self) -> bytes:
        """The machine code, as an object file."""
        module = llvm.parse_assembly(str(self.ir))
        machine = machine_of(self.isa)
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        return machine.emit_object(module)
