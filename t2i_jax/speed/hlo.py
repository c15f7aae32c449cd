"""What a compiled program does, read from its text: collectives, FLOPs, large arrays.

XLA's own counts take the body of a loop once. Here every instruction counts as often as it runs:
the body of a loop as often as its condition says, a branch once, what a fusion or call holds as
often as the fusion. Sizes are those of one device.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
import functools
import math
import re
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "f64": 8, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|c64|[fsu]\d+(?:e\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_NAME = r"%?([\w.-]+)"
_INSTRUCTION = re.compile(rf"\s*(?:ROOT )?{_NAME} = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(rf"(?:ENTRY )?{_NAME} \(.*\) -> .* \{{")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# What holds no memory of its own, or is not a result.
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


class Array(NamedTuple):
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]
    host: bool = False  # whether it lies in the host's memory

    @property
    def bytes(self) -> float:
        """Of its elements, without padding."""
        bits = re.search(r"\d+", self.dtype)  # of a token or an opaque handle: none
        width = _BYTES.get(self.dtype) or (int(bits[0]) / 8 if bits else 0)
        return width * math.prod(self.shape)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # its result, a tuple flattened
    rest: str  # operands and attributes, as they stand
    root: bool = False  # whether it is the result of its computation

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split("), ", 1)[0])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\S+?),? ", self.rest + " ")
        return found and found[1].rstrip(",")

    @property
    def scope(self) -> str:
        """Where in the program it comes from: 'jit(train_step)/.../dot_general'."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """A collective, as often as it runs in one step."""

    kind: str
    count: float
    bytes: float  # that a device receives, all runs together
    dtypes: tuple[str, ...]
    group: int  # devices that take part
    asynchronous: bool
    scope: str


class Program:
    """The parsed text of a compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                body = self.computations.setdefault(header[1], {})
                if line.startswith("ENTRY"):
                    self._entry = header[1]
            elif found := _INSTRUCTION.match(line):
                name, types, opcode, rest = found.groups()
                arrays = tuple(
                    Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(5)" in layout)
                    for dtype, dims, layout in _ARRAY.findall(types)
                )
                root = line.lstrip().startswith("ROOT ")
                body[name] = Instruction(name, opcode, arrays, rest, root)
        self._lines = _source_lines(text)

    @functools.cached_property
    def runs(self) -> Counter[str]:
        """How often each computation runs in one run of the program."""
        runs: Counter[str] = Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, {}).values():
                for callee, factor in self._callees(instruction):
                    visit(callee, times * factor)

        visit(self._entry, 1)
        return runs

    def _callees(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        rest = instruction.rest
        if instruction.opcode == "while":
            condition, body = (instruction.attribute(n).lstrip("%") for n in ("condition", "body"))
            yield body, self._trips(condition)
            return
        for name in re.findall(r"\b(?:calls|to_apply)=%([\w.-]+)", rest):
            yield name, 1
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            yield from ((name, 1) for name in re.findall(r"%([\w.-]+)", branches[1]))
        for name in re.findall(r"\b(?:true|false)_computation=%([\w.-]+)", rest):
            yield name, 1

    def _trips(self, condition: str) -> int:
        """How often a loop from 0 runs, whose condition compares with a constant."""
        body = self.computations[condition]
        constants = [
            int(found[1])
            for i in body.values()
            if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.rest))
        ]
        return max(constants, default=1)

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """(instruction, the computation it is in, how often it runs) of all that run."""
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, {}).values():
                yield instruction, name, times

    def collectives(self, devices: int) -> list[Collective]:
        """Those between several of the `devices`.

        One that runs inside of other work is there several times, as its start, its steps and its
        end, of one channel; it counts once in the body of a loop, and once more where the compiler
        has taken a turn out of the loop.
        """
        found: dict[tuple[Any, ...], Collective] = {}
        for instruction, where, times in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            group = _group(instruction.rest, devices) if kind in COLLECTIVES else 1
            if group == 1:
                continue
            if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the slice that follows is in the fusion, too
            operands = self._operand_arrays(instruction, where)
            received = _received(kind, operands, group)
            channel = instruction.attribute("channel_id") or instruction.name
            key = (kind, channel, operands, self._around.get(where, where))
            begun = instruction.opcode.endswith("-start") or where in self._begun
            asynchronous = begun or key in found
            dtypes = tuple(sorted({a.dtype for a in operands}))
            scope = instruction.scope or self._scopes.get(where, "")
            found[key] = Collective(
                kind, times, received * times, dtypes, group, asynchronous, scope
            )
        return list(found.values())

    def _operand_arrays(self, instruction: Instruction, where: str) -> tuple[Array, ...]:
        body = self.computations[where]
        return tuple(a for name in instruction.operands if name in body for a in body[name].arrays)

    @functools.cached_property
    def _scopes(self) -> dict[str, str]:
        return {
            callee: instruction.scope
            for body in self.computations.values()
            for instruction in body.values()
            for callee, _ in self._callees(instruction)
        }

    @functools.cached_property
    def _begun(self) -> set[str]:
        """Computations that are begun and waited for later: on tpu7x, those of its sparse cores."""
        return {
            callee
            for body in self.computations.values()
            for instruction in body.values()
            if instruction.opcode.endswith("-start")
            for callee, _ in self._callees(instruction)
        }

    @functools.cached_property
    def _around(self) -> dict[str, str]:
        """Computation of a fusion or call -> the one that it is part of, a loop's or the entry."""
        within = {
            callee: name
            for name, body in self.computations.items()
            for instruction in body.values()
            if instruction.opcode not in ("while", "conditional")
            for callee, _ in self._callees(instruction)
        }

        def outermost(name: str) -> str:
            return outermost(within[name]) if name in within else name

        return {name: outermost(name) for name in within}

    def flops(self) -> dict[str, float]:
        """Of matrix products and convolutions, and of attention kernels, by name of the part."""
        out: defaultdict[str, float] = defaultdict(float)
        for instruction, where, times in self.instructions():
            if instruction.opcode in ("dot", "convolution"):
                operands = self._operand_arrays(instruction, where)
                count = _product_flops(instruction, *operands)
            elif "tpu_custom_call" in instruction.rest and "splash" in instruction.name:
                count = _attention_flops(instruction, self._operand_arrays(instruction, where))
            else:
                continue
            out[part_of(instruction.scope or self._scopes.get(where, ""))] += count * times
        return dict(out)

    def stacked(self, scope: str, layers: int) -> float:
        """Bytes that the loops of a scope hand on with a leading axis of `layers`, made in them."""
        total = 0.0
        for instruction, _, _ in self.instructions():
            if instruction.opcode != "while":
                continue
            origin = instruction.scope or self._condition_scope(instruction)
            if scope not in origin or "transpose" in origin:
                continue
            body = self.computations[instruction.attribute("body").lstrip("%")]
            (root,) = [i for i in body.values() if i.root]
            for name in root.operands:
                made = body[name]
                origin = body[made.operands[0]] if made.opcode == "get-tuple-element" else made
                if origin.opcode == "parameter":  # handed on as it came
                    continue
                total += sum(
                    a.bytes for a in made.arrays if a.shape[:1] == (layers,) and not a.host
                )
        return total

    def _condition_scope(self, loop: Instruction) -> str:
        """Of a loop that has lost its own."""
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        return next((i.scope for i in condition.values() if i.root), "")

    def largest(self, count: int) -> list[tuple[Array, int, str]]:
        """(type, how many instructions make one, source line) of the largest arrays in memory."""
        there = (i for i in self._unfused() if i.opcode not in _NO_BUFFER)
        rows = (row for row in self._counted(there) if not row[0].host)
        ranked = sorted(rows, key=lambda row: -row[0].bytes)
        return ranked[:count]

    def across(self, lengths: Iterable[tuple[int, int]]) -> list[tuple[Array, int, str]]:
        """The same of all that have an axis for each of a pair of lengths, of any dtype.

        Those that hold no memory of their own are there, too: of another's they show the shape.
        """
        pairs = [Counter(pair) for pair in lengths]
        rows = self._counted(self._unfused())
        return [row for row in rows if any(pair <= Counter(row[0].shape) for pair in pairs)]

    def _unfused(self) -> Iterator[Instruction]:
        """The instructions that run, but for those whose results a fusion does not write out."""
        fused = {
            callee
            for body in self.computations.values()
            for i in body.values()
            if i.opcode == "fusion"
            for callee, _ in self._callees(i)
        }
        return (i for i, where, _ in self.instructions() if where not in fused)

    def _counted(self, instructions: Iterator[Instruction]) -> list[tuple[Array, int, str]]:
        """(type, how many make one, source line) of the results."""
        found: Counter[Array] = Counter()
        lines: dict[Array, str] = {}
        for instruction in instructions:
            for array in instruction.arrays:
                found[array] += 1
                line = self._lines.get(_frame(instruction.rest), instruction.scope)
                if line.startswith("t2i_jax") or not lines.get(array):
                    lines[array] = line
        return [(array, times, lines[array]) for array, times in found.items()]


def part_of(scope: str) -> str:
    """The part of the model that an instruction is of: 'dit', 'llm', 'autoencoder', ..."""
    for part, mark in (
        ("autoencoder", "Autoencoder"),
        ("clip", "CLIP"),
        ("llm", "/llm/"),
        ("memory", "/memory"),
        ("dit", "/dit/"),
    ):
        if mark in scope:
            return part
    return "other"


def _received(kind: str, operands: tuple[Array, ...], group: int) -> float:
    """Bytes that a device receives from others, by the best algorithms on a ring."""
    given = sum(a.bytes for a in operands)
    share = (group - 1) / group
    return {
        "all-gather": given * (group - 1),
        "reduce-scatter": given * share,
        "all-reduce": 2 * given * share,
        "all-to-all": given * share,
        "collective-permute": given,
    }[kind]


def _group(rest: str, devices: int) -> int:
    """Devices in a group of a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?\)?)? ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"source_target_pairs=\{\{", rest):
        return 2
    return devices


def _product_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """2 x multiplications of a dot or convolution whose operands have these types."""
    (out,) = instruction.arrays
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        return 2 * math.prod(out.shape) * math.prod(left.shape[int(d)] for d in dims.split(","))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    ins, kernel, outs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    window = dict(p.split("=") for p in window[1].split()) if window else {}
    pairs = 1.0
    for axis in (c for c in outs if c.isdigit()):
        i = sorted(c for c in outs if c.isdigit()).index(axis)
        pairs *= _pairs(left.shape[ins.index(axis)], out.shape[outs.index(axis)], window, i)
    features = out.shape[outs.index("b")] * out.shape[outs.index("f")]
    return 2 * pairs * features * right.shape[kernel.index("i")]


def _pairs(length: int, positions: int, window: dict[str, str], axis: int) -> int:
    """(output position, kernel position) pairs of one axis that meet an input, not padding."""

    def value(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    size, stride = int(value("size", "1")), int(value("stride", "1"))
    low = int(value("pad", "0_0").split("_")[0])
    base, dilation = int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    count = 0
    for k in range(size):
        at = [p * stride - low + k * dilation for p in range(positions)]
        count += sum(a >= 0 and a % base == 0 and a // base < length for a in at)
    return count


def _attention_flops(instruction: Instruction, operands: tuple[Array, ...]) -> float:
    """Of a splash kernel on (B, N, I, H) and (B, K, S, H): 2 products forwards, 5 backwards.

    Causal or not: blocks that a mask empties are a small part at these lengths.
    """
    floats = (a.shape for a in operands if a.dtype in ("bf16", "f32"))
    wide = [(1, *shape)[-4:] for shape in floats if len(shape) in (3, 4)]  # a batch of one is none
    (batch, heads, queries, width), keys = wide[0], wide[1][2]
    products = 5 if "dkv" in instruction.name else 2
    return 2.0 * products * batch * heads * queries * keys * width


def _frame(rest: str) -> int:
    found = re.search(r"stack_frame_id=(\d+)", rest)
    return int(found[1]) if found else 0


def _source_lines(text: str) -> dict[int, str]:
    """Stack frame -> 'file:line' of the nearest caller in this package, from the text's tables."""

    def table(name: str) -> list[str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return found[1].splitlines() if found else []

    files = dict(re.match(r'(\d+) "(.*)"', line).groups() for line in table("FileNames"))
    numbers = [
        {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)} for line in table("FileLocations")
    ]
    frames = [
        {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)} for line in table("StackFrames")
    ]

    def nearest(i: int, seen: int = 0) -> str:
        if not 0 < i <= len(frames) or seen > 100:
            return ""
        place = numbers[frames[i - 1]["file_location_id"] - 1]
        file = files[str(place["file_name_id"])]
        if "/t2i_jax/" in file:
            return f"t2i_jax/{file.rsplit('/t2i_jax/', 1)[1]}:{place['line']}"
        parent = frames[i - 1].get("parent_frame_id", i)
        return "" if parent == i else nearest(parent, seen + 1)

    return {i + 1: line for i in range(len(frames)) if (line := nearest(i + 1))}
