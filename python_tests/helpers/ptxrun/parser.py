"""PTX text -> Module: entry functions with decoded instructions, registers, labels and variables."""

import re
from dataclasses import dataclass, field

from .errors import ParseError

TYPE_SIZE = {  # bytes of the scalar types that can name a register, a variable or a memory element
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


@dataclass(eq=False)
class Reg:
    name: str
    type: str  # declared type; registers are kept as untyped bits of this width
    index: int = -1  # number among the function's registers

    @property
    def size(self):
        return TYPE_SIZE[self.type]

    def __repr__(self):
        return self.name


@dataclass(frozen=True)
class Imm:
    kind: str  # "int", "f32", "f64" (value = bits), "dec" (value = a Python float)
    value: object

    def __repr__(self):
        return f"{self.value}" if self.kind == "int" else f"{self.kind}:{self.value}"


@dataclass(frozen=True)
class Sym:
    name: str  # variable, parameter, special register or (resolved) label

    def __repr__(self):
        return self.name


@dataclass(frozen=True)
class Mem:
    base: object  # Reg, Sym, Imm or None
    offset: int
    coords: tuple = None  # of a tensor access: [base, {c0, c1}]

    def __repr__(self):
        return f"[{self.base}{self.offset:+d}{'' if self.coords is None else ', ' + repr(self.coords)}]"


@dataclass(frozen=True)
class Vec:
    items: tuple

    def __repr__(self):
        names = [repr(x) for x in self.items]
        if len(names) > 8:  # accumulators of wgmma
            names = [names[0], f"... {len(names) - 2} more ...", names[-1]]
        return "{" + ", ".join(names) + "}"


@dataclass(frozen=True)
class Pair:  # a|b
    first: object
    second: object

    def __repr__(self):
        return f"{self.first}|{self.second}"


@dataclass(frozen=True)
class Not:  # !p
    reg: Reg

    def __repr__(self):
        return f"!{self.reg}"


@dataclass(frozen=True)
class Group:  # ( ... ) of a call
    items: tuple


SINK = Sym("_")


@dataclass(eq=False)
class Instr:
    op: str  # whole opcode, e.g. "ld.global.v4.b32"
    ops: list
    guard: object  # None, Reg or Not(Reg)
    line: int  # line of the PTX text
    loc: tuple = None  # (file number, source line) of the last .loc
    index: int = -1  # position in the function
    parts: tuple = ()

    def __post_init__(self):
        self.parts = tuple(self.op.split("."))

    def text(self):
        g = f"@{self.guard!r} " if self.guard is not None else ""
        return f"{g}{self.op} {', '.join(map(repr, self.ops))}".strip()


@dataclass(eq=False)
class Label:
    name: str
    targets: list = None  # of a .branchtargets table
    index: int = -1  # of the instruction it stands before
    used: bool = False


@dataclass
class Variable:
    name: str
    space: str  # "global", "const", "shared", "local", "param"
    size: int
    align: int
    init: bytes = None
    type: str = "b8"
    extern: bool = False
    is_pointer: bool = False


@dataclass(eq=False)
class Function:
    name: str
    params: list = field(default_factory=list)
    instrs: list = field(default_factory=list)
    registers: list = field(default_factory=list)
    variables: list = field(default_factory=list)  # local, shared and call-param variables
    reqntid: tuple = None
    directives: dict = field(default_factory=dict)


@dataclass
class Module:
    target: str = ""
    version: str = ""
    entries: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    functions: set = field(default_factory=set)  # names of .func, which calls may name


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_WORD = re.compile(r"[\w$%]+")
_INT = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def _strip_comments(text):
    return _COMMENT.sub(lambda m: "\n" * m.group().count("\n") or " ", text)


def parse_int(s):
    s = s.strip().rstrip("U")
    neg = s.startswith("-")
    s = s.lstrip("+-")
    if len(s) > 1 and s[0] == "0" and s.isdigit():
        v = int(s, 8)
    else:
        v = int(s, 0)
    return -v if neg else v


def split_commas(s):
    """Split at commas outside (), [] and {}."""
    out, depth, start = [], 0, 0
    for i, ch in enumerate(s):
        if ch in "([{":
            depth += 1
        elif ch in ")]}":
            depth -= 1
        elif ch == "," and depth == 0:
            out.append(s[start:i].strip())
            start = i + 1
    last = s[start:].strip()
    if last or out:
        out.append(last)
    return out


class _Scope:
    def __init__(self, parent=None):
        self.parent, self.regs, self.ranges, self.labels, self.vars = parent, {}, {}, {}, {}


class Parser:
    def __init__(self, text):
        self.text = _strip_comments(text)
        self.pos = 0
        self.module = Module()
        self._line_at, self._line = 0, 1

    # ---- characters -------------------------------------------------------------------------
    def line(self):
        self._line += self.text.count("\n", self._line_at, self.pos) if self.pos >= self._line_at else 0
        self._line_at = max(self.pos, self._line_at)
        return self._line

    def error(self, msg):
        raise ParseError(f"PTX line {self.line()}: {msg}")

    def skip_space(self):
        while self.pos < len(self.text) and self.text[self.pos].isspace():
            self.pos += 1

    def until(self, chars):
        """Text up to one of chars (outside quotes), which is consumed."""
        i = self.pos
        quoted = False
        while i < len(self.text):
            ch = self.text[i]
            if ch == '"':
                quoted = not quoted
            elif not quoted and ch in chars:
                out = self.text[self.pos : i]
                self.pos = i + 1
                return out, ch
            i += 1
        self.error(f"end of text while looking for one of {chars!r}")

    def to_eol(self):
        i = self.text.find("\n", self.pos)
        i = len(self.text) if i < 0 else i
        out = self.text[self.pos : i]
        self.pos = i
        return out

    def braces(self):
        """Skip a balanced { } block; pos is at '{'."""
        depth = 0
        while True:
            _, ch = self.until("{}")
            depth += 1 if ch == "{" else -1
            if depth == 0:
                return

    # ---- module level -----------------------------------------------------------------------
    def parse(self):
        while True:
            self.skip_space()
            if self.pos >= len(self.text):
                return self.module
            m = re.compile(r"\.?[\w]+").match(self.text, self.pos)
            if not m:
                self.error(f"unexpected text {self.text[self.pos : self.pos + 40]!r}")
            w = m.group()
            if w == ".version":
                self.module.version = self.to_eol().split()[1]
            elif w == ".target":
                self.module.target = self.to_eol().split()[1].rstrip(",")
            elif w == ".address_size":
                if self.to_eol().split()[1] != "64":
                    self.error("only 64-bit addresses are supported")
            elif w == ".file":
                self.file_directive()
            elif w == ".section":
                self.until("{")
                self.pos -= 1
                self.braces()
            elif w in (".visible", ".weak", ".extern", ".entry", ".func", ".global", ".shared", ".const"):
                self.declaration()
            elif w == ".pragma":
                self.until(";")
            else:
                self.error(f"unsupported directive {w}")

    def file_directive(self):
        m = re.match(r"\.file\s+(\d+)\s+\"([^\"]*)\"", self.to_eol())
        if m:
            self.module.files[int(m.group(1))] = m.group(2)

    def declaration(self):
        start = self.pos
        head = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func|global|shared|const)\b").match(
            self.text, start
        )
        if not head:
            self.error("unsupported declaration")
        kind = head.group(1)
        if kind in ("global", "shared", "const"):
            body, _ = self.until(";")
            v = self.variable(body)
            self.module.variables[v.name] = v
            return
        self.pos = head.end()
        if kind == "func":
            sig, ch = self.until("{;")
            m = re.search(r"([\w$%]+)\s*(?:\(|\.noreturn|$)", re.sub(r"^\s*\([^)]*\)", "", sig).strip())
            self.module.functions.add(m.group(1))
            if ch == "{":
                self.pos -= 1
                self.braces()
            return
        sig, ch = self.until("{;")
        if ch == ";":
            return
        m = re.match(r"\s*([\w$]+)\s*(?:\((.*?)\))?(.*)$", sig, re.S)
        fn = Function(m.group(1))
        for p in split_commas(m.group(2) or ""):
            fn.params.append(self.variable(p))
        for d in re.finditer(r"\.(\w+)([^.]*)", m.group(3)):
            fn.directives[d.group(1)] = d.group(2).strip()
        if "reqntid" in fn.directives:
            dims = [int(x) for x in fn.directives["reqntid"].split(",")]
            fn.reqntid = tuple(dims + [1] * (3 - len(dims)))
        self.body(fn)
        self.module.entries[fn.name] = fn

    def variable(self, text):
        """One .param/.shared/.global/.local declaration (without the semicolon)."""
        text, _, init = text.partition("=")
        m = re.search(r"([\w$%]+)\s*(?:\[([^\]]*)\])?(?:\[([^\]]*)\])?\s*$", text)
        name = m.group(1)
        words = text[: m.start()].split()
        space, typ, align, extern, pointer = None, None, None, False, False
        it = iter(words)
        for w in it:
            key = w.lstrip(".")
            if key in ("global", "shared", "local", "const", "param"):
                if space is None:
                    space = key
            elif key == "align":
                n = int(next(it))
                align = n if not pointer else align  # .ptr .align is about the pointee
            elif key == "ptr":
                pointer = True
            elif key in TYPE_SIZE:
                typ = key
            elif key == "extern":
                extern = True
            elif key in ("visible", "weak", "noinline"):
                pass
            else:
                self.error(f"unsupported word {w} in declaration of {name}")
        if typ is None:
            self.error(f"no type in declaration of {name}")
        n = 1
        for g in m.groups()[1:]:
            if g is not None:
                n *= int(g, 0) if g.strip() else 0
        data = None
        if init.strip():
            vals = [parse_int(x) for x in split_commas(init.strip().strip("{}"))]
            es = TYPE_SIZE[typ]
            data = b"".join((v & ((1 << 8 * es) - 1)).to_bytes(es, "little") for v in vals)
        size = n * TYPE_SIZE[typ]
        if data is not None:
            data = data.ljust(size, b"\0")
        return Variable(name, space, size, align or TYPE_SIZE[typ], data, typ, extern, pointer)

    # ---- function body ----------------------------------------------------------------------
    def body(self, fn):
        scope = top = _Scope()
        pending_labels, fixups, loc = [], [], None
        while True:
            self.skip_space()
            if self.pos >= len(self.text):
                self.error("end of text inside a function")
            ch = self.text[self.pos]
            if ch == "}":
                self.pos += 1
                if scope is top:
                    break
                scope = scope.parent
                continue
            if ch == "{":
                self.pos += 1
                scope = _Scope(scope)
                continue
            if ch == ";":
                self.pos += 1
                continue
            m = _LABEL.match(self.text, self.pos)
            if m:
                self.pos = m.end()
                lab = Label(m.group(1))
                scope.labels[lab.name] = lab
                self.skip_space()
                if self.text.startswith(".branchtargets", self.pos):
                    t, _ = self.until(";")
                    lab.targets = [x.strip() for x in t.split(None, 1)[1].split(",")]
                    fixups.append((lab, scope))
                    continue
                if self.text.startswith(".callprototype", self.pos):
                    self.until(";")
                    continue
                pending_labels.append(lab)
                continue
            if ch == ".":
                word = re.compile(r"\.\w+").match(self.text, self.pos).group()
                if word == ".loc":
                    f = self.to_eol().split()
                    loc = (int(f[1]), int(f[2]))
                elif word == ".file":
                    self.file_directive()
                elif word == ".pragma":
                    self.until(";")
                elif word == ".reg":
                    self.registers(self.until(";")[0], scope)
                elif word in (".local", ".shared", ".param"):
                    v = self.variable(self.until(";")[0])
                    scope.vars[v.name] = v
                    if any(o.name == v.name for o in fn.variables):  # same name in another { } scope
                        v.name += f"#{len(fn.variables)}"
                    fn.variables.append(v)
                else:
                    self.error(f"unsupported directive {word}")
                continue
            line = self.line()
            stmt, _ = self.until(";")
            ins = self.instruction(stmt, scope, fn, line)
            if ins is None:
                continue
            ins.loc = loc
            ins.index = len(fn.instrs)
            for lab in pending_labels:
                lab.index = ins.index
            pending_labels.clear()
            fn.instrs.append(ins)
            if ins.parts[0] in ("bra", "brx"):
                fixups.append((ins, scope))
        for lab in pending_labels:  # labels at the very end
            lab.index = len(fn.instrs)
        for what, scope in fixups:
            if isinstance(what, Label):
                what.targets = [self.find_label(t, scope) for t in what.targets]
            else:
                what.ops[-1] = self.find_label(what.ops[-1].name, scope)
        return fn

    def find_label(self, name, scope):
        while scope is not None:
            if name in scope.labels:
                lab = scope.labels[name]
                lab.used = True
                return lab
            scope = scope.parent
        self.error(f"label {name} not found")

    def registers(self, text, scope):
        m = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)$", text.strip(), re.S)
        if not m or ".v2" in text or ".v4" in text:
            self.error(f"unsupported register declaration {text.strip()!r}")
        typ = m.group(1)
        if typ not in TYPE_SIZE or typ == "b128":
            self.error(f"unsupported register type .{typ}")
        for item in m.group(2).split(","):
            item = item.strip()
            r = re.match(r"([\w$%]+)<(\d+)>$", item)
            if r:
                scope.ranges[r.group(1)] = (int(r.group(2)), typ)
            else:
                scope.regs[item] = Reg(item, typ)

    def find_reg(self, name, scope, fn):
        s = scope
        while s is not None:
            r = s.regs.get(name)
            if r is not None:
                break
            if s.ranges:
                stem = name.rstrip("0123456789")
                if stem in s.ranges and stem != name and int(name[len(stem) :]) < s.ranges[stem][0]:
                    r = s.regs[name] = Reg(name, s.ranges[stem][1])
                    break
            s = s.parent
        else:
            return None
        if r.index < 0:
            r.index = len(fn.registers)
            fn.registers.append(r)
        return r

    def instruction(self, stmt, scope, fn, line):
        s = stmt.strip()
        if not s:
            return None
        guard = None
        if s[0] == "@":
            m = re.match(r"@\s*(!?)\s*([\w$%]+)\s*", s)
            guard = self.find_reg(m.group(2), scope, fn)
            if guard is None:
                self.error(f"unknown guard predicate in {s!r}")
            if m.group(1):
                guard = Not(guard)
            s = s[m.end() :]
        m = re.match(r"[\w.:]+", s)
        if not m:
            self.error(f"cannot read statement {stmt.strip()!r}")
        try:
            ops = [self.operand(o, scope, fn) for o in split_commas(s[m.end() :].strip())]
        except (ValueError, AttributeError) as e:
            raise ParseError(f"PTX line {line}: {stmt.strip()!r}: {e}") from e
        return Instr(m.group(), ops, guard, line)

    def operand(self, s, scope, fn):
        if not s:
            raise ValueError("empty operand")
        c = s[0]
        if c == "{":
            return Vec(tuple(self.operand(x, scope, fn) for x in split_commas(s[1 : s.rindex("}")])))
        if c == "(":
            return Group(tuple(self.operand(x, scope, fn) for x in split_commas(s[1 : s.rindex(")")])))
        if c == "[":
            return self.memory_operand(s[1 : s.rindex("]")], scope, fn)
        if c == "!":
            return Not(self.operand(s[1:].strip(), scope, fn))
        if "|" in s:
            a, b = s.split("|")
            return Pair(self.operand(a.strip(), scope, fn), self.operand(b.strip(), scope, fn))
        if s == "_":
            return SINK
        m = re.match(r"0[fFdD]([0-9a-fA-F]+)$", s)
        if m:
            return Imm("f32" if s[1] in "fF" else "f64", int(m.group(1), 16))
        if _INT.match(s):
            return Imm("int", parse_int(s))
        r = self.find_reg(s, scope, fn)
        if r is not None:
            return r
        if re.match(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$", s):
            return Imm("dec", float(s))
        if re.match(r"[\w$%.]+$", s):
            while scope is not None:
                if s in scope.vars:
                    return Sym(scope.vars[s].name)
                scope = scope.parent
            return Sym(s)
        m = re.match(r"([\w$]+)\s*\+\s*(-?\w+)$", s)
        if m:
            return Mem(Sym(m.group(1)), parse_int(m.group(2)))  # address constant: symbol + offset
        raise ValueError(f"cannot read operand {s!r}")

    def memory_operand(self, s, scope, fn):
        parts = split_commas(s)
        coords = None
        if len(parts) > 1:
            coords = self.operand(parts[1], scope, fn).items
        m = re.match(r"\s*([\w$%.]+)\s*(?:([-+])\s*(-?\w+)\s*)?$", parts[0])
        if not m:
            raise ValueError(f"cannot read address {s!r}")
        off = 0
        if m.group(2):
            off = parse_int(m.group(3)) * (-1 if m.group(2) == "-" else 1)
        base = self.operand(m.group(1), scope, fn)
        if isinstance(base, Imm):
            return Mem(None, base.value + off, coords)
        return Mem(base, off, coords)


def parse(text):
    return Parser(text).parse()
