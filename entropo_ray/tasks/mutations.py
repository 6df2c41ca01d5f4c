"""Bugs as edits of a source text: what is wrong afterwards, by kind. Pure: nothing runs.

Edits are made at the byte positions of the syntax tree, so comments and formatting stay and a patch is as small as the
mistake. A rule may propose what does not parse or changes nothing; `mutated` says so.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Defined = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, order=True)
class Edit:
    """Bytes `start:stop` of the source become `text`."""

    start: int
    stop: int
    text: str


Edits = tuple[Edit, ...]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake in one function."""

    kind: str
    edits: Edits
    line: int


@dataclass(frozen=True)
class Function:
    """A function or method that is not inside of another; `first` is the line of its first decorator."""

    name: str
    first: int
    last: int
    node: Defined = field(compare=False, repr=False)


class Code:
    """A source text and where its nodes lie."""

    def __init__(self, text: str) -> None:
        self.text, self.data, self.tree = text, text.encode(), ast.parse(text)
        self.meaning = ast.dump(self.tree)
        self._starts = [0]
        for line in self.data.split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)

    def start(self, node: ast.AST) -> int:
        return self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined,no-any-return]

    def stop(self, node: ast.AST) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined,no-any-return]

    def of(self, node: ast.AST) -> str:
        return self.data[self.start(node) : self.stop(node)].decode()

    def line_start(self, at: int) -> int:
        return self.data.rfind(b"\n", 0, at) + 1

    def line_stop(self, at: int) -> int:
        """Where the line break behind `at` is, or the end."""
        found = self.data.find(b"\n", at)
        return len(self.data) if found < 0 else found

    def replace(self, node: ast.AST, text: str) -> Edits:
        return (Edit(self.start(node), self.stop(node), text),)

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edits]:
        """The operator between two operands changed; nothing where a comment could hold one too."""
        start, gap = self.stop(left), self.data[self.stop(left) : self.start(right)].decode()
        words = r"\s+".join(re.escape(word) for word in old.split())
        found = re.search(rf"\b{words}\b" if old[0].isalpha() else words, gap)
        if found and "#" not in gap:
            yield (Edit(start + found.start(), start + found.end(), new),)


def functions(code: Code) -> list[Function]:
    """Those of modules and classes, in order."""
    return list(_functions(code.tree.body, ""))


def _functions(body: Sequence[ast.stmt], prefix: str) -> Iterator[Function]:
    for node in body:
        if isinstance(node, Defined):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield Function(f"{prefix}{node.name}", first, node.end_lineno or first, node)
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions([*node.body, *node.orelse], prefix)


def mutations(code: Code, function: Function) -> list[Mutation]:
    """Every mistake that the rules know for a function; those of one kind stand together."""
    place = _Place(code, function.node)
    found = []
    for kind, rule in RULES.items():
        for node in place.nodes:
            found += [Mutation(kind, edits, _line(code, edits)) for edits in rule(place, node)]
    found += [Mutation(kind, edits, _line(code, edits)) for kind, edits in _bodies(place)]
    return list(dict.fromkeys(found))


def _line(code: Code, edits: Edits) -> int:
    return code.data.count(b"\n", 0, min(edits).start) + 1


def together(one: Mutation, other: Mutation) -> Mutation | None:
    """Both mistakes at once; None if they touch the same text."""
    edits = tuple(sorted((*one.edits, *other.edits)))
    if any(a.stop >= b.start for a, b in pairwise(edits)):
        return None
    return Mutation(f"{one.kind}+{other.kind}", edits, min(one.line, other.line))


def mutated(code: Code, mutation: Mutation) -> str | None:
    """The source with the mistake in it; None if that is no program, or means the same."""
    data = code.data
    for edit in sorted(mutation.edits, reverse=True):
        data = data[: edit.start] + edit.text.encode() + data[edit.stop :]
    text = data.decode()
    try:
        compile(text, "mutated", "exec", dont_inherit=True)
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    return None if ast.dump(tree) == code.meaning else text


class _Place:
    """A function as the rules see it."""

    def __init__(self, code: Code, node: Defined) -> None:
        self.code, self.node = code, node
        self.body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        self.nodes = [inner for statement in self.body for inner in _walk(statement)]
        self.nodes += [d for d in (*node.args.defaults, *node.args.kw_defaults) if isinstance(d, ast.Constant)]
        self.defaults = {id(d) for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None}
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        self.parameters = [a.arg for a in arguments if a.arg not in ("self", "cls", "mcs")]
        stored = [n for n in self.nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self.names = list(dict.fromkeys([*self.parameters, *(n.id for n in stored)]))
        self.blocks = {id(s): block for block in _blocks([node, *self.nodes]) for s in block}

    def alone(self, statement: ast.stmt) -> bool:
        return len(self.blocks.get(id(statement), [])) < 2

    def assigned_before(self, name: str, line: int) -> bool:
        stored = (n for n in self.nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        return name in self.parameters or any(n.id == name and n.lineno < line for n in stored)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below that have true positions and a meaning at run time."""
    if isinstance(node, ast.JoinedStr):  # before Python 3.12 the positions inside are wrong
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, ast.AST):
                yield from _walk(inner)


def _blocks(nodes: Iterable[ast.AST]) -> Iterator[list[ast.stmt]]:
    for node in nodes:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)  # of nodes, few have all three
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


# Operators

_TOKENS: dict[type[ast.AST], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">", ">": "<", "<=": ">=", ">=": "<=", "in": "not in", "not in": "in"}
_OPPOSITE |= {"is": "is not", "is not": "is"}
_BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "**": "*", "<<": ">>", ">>": "<<"}
_ARITHMETIC |= {"&": "|", "|": "&", "^": "|"}


def _compare(place: _Place, node: ast.AST, table: dict[str, str]) -> Iterator[Edits]:
    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            token = _TOKENS[type(op)]
            if token in table:
                yield from place.code.between(left, right, token, table[token])


def _comparison(place: _Place, node: ast.AST) -> Iterator[Edits]:
    yield from _compare(place, node, _OPPOSITE)


def _boundary(place: _Place, node: ast.AST) -> Iterator[Edits]:
    yield from _compare(place, node, _BOUNDARY)


def _arithmetic(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.BinOp) and not isinstance(node.left, ast.Constant | ast.JoinedStr):
        token = _TOKENS.get(type(node.op), "")
        if token in _ARITHMETIC:
            yield from place.code.between(node.left, node.right, token, _ARITHMETIC[token])


def _assignment(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.AugAssign):
        token = _TOKENS.get(type(node.op), "")
        if token in _ARITHMETIC:
            yield from place.code.between(node.target, node.value, f"{token}=", f"{_ARITHMETIC[token]}=")
            yield from place.code.between(node.target, node.value, f"{token}=", "=")


def _boolean(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in pairwise(node.values):
            yield from place.code.between(left, right, old, new)


def _negated(place: _Place, node: ast.AST) -> Iterator[Edits]:
    code = place.code
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield code.replace(node, f"({code.of(node.operand)})")
    elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.UnaryOp):
        simple = isinstance(node.test, ast.Name | ast.Call | ast.Attribute | ast.Subscript)
        yield code.replace(node.test, f"not {code.of(node.test)}" if simple else f"not ({code.of(node.test)})")


def _operand(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.BoolOp) and len(node.values) == 2:
        for value in node.values:
            weak = isinstance(value, ast.BoolOp | ast.IfExp | ast.Lambda | ast.NamedExpr)
            text = place.code.of(value)
            yield place.code.replace(node, f"({text})" if weak else text)


def _sign(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield place.code.replace(node, place.code.of(node.operand))


# Values and names


def _changed(node: ast.Constant, text: str) -> Iterator[str]:
    """Other literals in the place of one."""
    value = node.value
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        if value > 0:
            yield str(value - 1)
    elif isinstance(value, float):
        yield repr(value + 1)
    elif isinstance(value, str) and re.fullmatch(r"""[a-zA-Z]?("[^"\\\n]+"|'[^'\\\n]+')""", text):
        yield text[:-2] + text[-1]


def _constant(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.Constant) and id(node) not in place.defaults:
        for text in _changed(node, place.code.of(node)):
            yield place.code.replace(node, text)


def _default(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """Another default of a parameter, or none where one is asked for."""
    code = place.code
    if isinstance(node, ast.Constant) and id(node) in place.defaults:
        for text in _changed(node, code.of(node)):
            yield code.replace(node, text)
    elif isinstance(node, ast.Call) and not node.keywords:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        least = {"get": 1, "pop": 1, "getattr": 2, "next": 1}.get(name, 9)
        if len(node.args) == least + 1:
            yield (Edit(code.stop(node.args[-2]), code.stop(node.args[-1]), ""),)


def _off_by_one(place: _Place, node: ast.AST) -> Iterator[Edits]:
    code = place.code
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
        bound = node.args[min(1, len(node.args) - 1)]
        yield from _shifted(code, bound)
    elif isinstance(node, ast.Slice):
        for bound in filter(None, (node.lower, node.upper)):
            yield from _shifted(code, bound)
    elif isinstance(node, ast.Subscript) and re.fullmatch(r"-?\d+", code.of(node.slice)):
        index = int(code.of(node.slice))
        yield code.replace(node.slice, str(index + 1))
        yield code.replace(node.slice, str(index - 1))


def _shifted(code: Code, bound: ast.expr) -> Iterator[Edits]:
    text = code.of(bound)
    if re.fullmatch(r"-?\d+", text):
        yield code.replace(bound, str(int(text) + 1))
        yield code.replace(bound, str(int(text) - 1))
    elif isinstance(bound, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.BinOp):
        yield code.replace(bound, f"{text} + 1")
        yield code.replace(bound, f"{text} - 1")


_SIBLINGS = (
    "lower upper|casefold upper|startswith endswith|lstrip rstrip|strip lstrip|find rfind|index rindex|split rsplit|"
    "partition rpartition|min max|any all|keys values|items values|add discard|union intersection|append extend|"
    "popleft pop|setdefault get|floor ceil|isdigit isalpha|isalnum isalpha|ljust rjust|match search|fullmatch match|"
    "title capitalize|islower isupper|issubset issuperset|isinstance issubclass|insert append|remove discard|"
    "search fullmatch|sorted list|appendleft append|bisect_left bisect_right|real imag|minimum maximum|first last|"
    "start end|year month|days seconds|key value|left right|head tail|width height|getattr hasattr|list tuple|"
    "splitlines split|encode decode|count index|difference symmetric_difference|update add|replace strip"
)
_SIBLING: dict[str, list[str]] = {}
for _pair in _SIBLINGS.split("|"):
    _one, _other = _pair.split()
    _SIBLING.setdefault(_one, []).append(_other)
    _SIBLING.setdefault(_other, []).append(_one)


def _attribute(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A method, attribute or builtin in the place of its sibling."""
    code = place.code
    if isinstance(node, ast.Attribute):
        for other in _SIBLING.get(node.attr, []):
            yield (Edit(code.stop(node) - len(node.attr.encode()), code.stop(node), other),)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for other in _SIBLING.get(node.func.id, []):
            if hasattr(builtins, other):
                yield code.replace(node.func, other)


def _variable(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """The two names that come next in the same scope."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in place.names:
        at = place.names.index(node.id)
        for other in (place.names[at + 1 :] + place.names[:at])[:2]:
            yield place.code.replace(node, other)


def _exception(place: _Place, node: ast.AST) -> Iterator[Edits]:
    others = {"ValueError": "TypeError", "TypeError": "ValueError", "KeyError": "IndexError", "IndexError": "KeyError"}
    others |= {"AttributeError": "ValueError", "RuntimeError": "ValueError", "LookupError": "KeyError"}
    others |= {"NotImplementedError": "TypeError", "OSError": "ValueError", "StopIteration": "IndexError"}
    if isinstance(node, ast.Raise):
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    else:
        kind = node.type if isinstance(node, ast.ExceptHandler) else None
    for name in kind.elts if isinstance(kind, ast.Tuple) else [kind]:
        if isinstance(name, ast.Name) and name.id in others:
            yield place.code.replace(name, others[name.id])


# Calls


def _arguments(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.Call):
        yield from _swapped(place.code, node.args)


def _order(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
        yield from _swapped(place.code, node.elts)


def _swapped(code: Code, nodes: Sequence[ast.expr]) -> Iterator[Edits]:
    for left, right in pairwise(nodes):
        if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred) and code.of(left) != code.of(right):
            yield (*code.replace(left, code.of(right)), *code.replace(right, code.of(left)))


def _keyword(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A keyword argument left out."""
    if isinstance(node, ast.Call):
        given = sorted([*node.args, *node.keywords], key=place.code.start)
        for before, after in pairwise(given):
            if isinstance(after, ast.keyword) and after.arg:
                yield (Edit(place.code.stop(before), place.code.stop(after), ""),)
        if given and isinstance(given[0], ast.keyword) and given[0].arg and len(given) == 1:
            yield place.code.replace(given[0], "")


_WRAPPERS = {"str", "int", "list", "sorted", "set", "tuple", "abs", "reversed", "dict", "bool", "float", "frozenset"}


def _unwrapped(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A call left out, its argument or object kept."""
    code = place.code
    if isinstance(node, ast.Call) and not node.keywords:
        if isinstance(node.func, ast.Attribute) and not node.args:
            yield (Edit(code.stop(node.func.value), code.stop(node), ""),)
        elif isinstance(node.func, ast.Name) and node.func.id in _WRAPPERS and len(node.args) == 1:
            (argument,) = node.args
            if isinstance(argument, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
                yield code.replace(node, code.of(argument))


# Statements


def _lines(place: _Place, statement: ast.stmt) -> Iterator[Edits]:
    """The whole lines of a statement left out; `pass` where nothing else would stay."""
    code, start, stop = place.code, place.code.start(statement), place.code.stop(statement)
    begin, end = code.line_start(start), code.line_stop(stop)
    before, after = code.data[begin:start], code.data[stop:end].strip()
    if before.strip() or (after and not after.startswith(b"#")):
        return
    if place.alone(statement):
        yield (Edit(start, stop, "pass"),)
    else:
        yield (Edit(begin, min(end + 1, len(code.data)), ""),)


def _statement(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Yield)):
        yield from _lines(place, node)
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
        kept = isinstance(target, ast.Name) and place.assigned_before(target.id, node.lineno)
        if kept or isinstance(target, ast.Attribute | ast.Subscript):
            yield from _lines(place, node)


_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _guard(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A condition that leaves left out, or one that does something small."""
    if isinstance(node, ast.If) and not node.orelse and not _elif(place.code, node) and len(node.body) <= 3:
        yield from _lines(place, node)


def _branch(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """What is done otherwise left out."""
    if isinstance(node, ast.If | ast.For | ast.While) and node.orelse:
        code = place.code
        start, stop = code.line_stop(code.stop(node.body[-1])), code.line_stop(code.stop(node.orelse[-1]))
        yield (Edit(start, stop, ""),)


def _branches(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """What is done if and what is done otherwise exchanged."""
    code = place.code
    if isinstance(node, ast.IfExp):
        yield (*code.replace(node.body, code.of(node.orelse)), *code.replace(node.orelse, code.of(node.body)))
    elif isinstance(node, ast.If) and node.orelse and not _elif(code, node.orelse[0]):
        ends = [(block[0], block[-1]) for block in (node.body, node.orelse)]
        (a, b), (c, d) = [(code.start(first), code.stop(last)) for first, last in ends]
        if code.data.count(b"\n", a, d) <= 8:
            yield (Edit(a, b, code.data[c:d].decode()), Edit(c, d, code.data[a:b].decode()))


def _elif(code: Code, node: ast.AST) -> bool:
    return code.data.startswith(b"elif", code.start(node))


def _early_exit(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A loop that ends after its first turn."""
    if isinstance(node, ast.For | ast.While) and not isinstance(node.body[-1], _LEAVES):
        code, last = place.code, node.body[-1]
        stop = code.line_stop(code.stop(last))
        yield (Edit(stop, stop, "\n" + " " * node.body[0].col_offset + "break"),)


def _loop(place: _Place, node: ast.AST) -> Iterator[Edits]:
    if isinstance(node, ast.Break | ast.Continue):
        yield place.code.replace(node, "continue" if isinstance(node, ast.Break) else "break")


def _result(place: _Place, node: ast.AST) -> Iterator[Edits]:
    """A value computed and not returned."""
    if isinstance(node, ast.Return) and node.value and place.code.of(node.value) != "None":
        if isinstance(node.value, ast.Call):
            yield (Edit(place.code.start(node), place.code.start(node.value), ""),)
        else:
            yield place.code.replace(node.value, "None")


def _bodies(place: _Place) -> Iterator[tuple[str, Edits]]:
    """A function that was never written, and one that makes it too easy for itself."""
    code, node = place.code, place.node
    if not place.body or place.body[0].lineno == node.lineno or all(isinstance(s, ast.Pass) for s in place.body):
        return
    start, stop = code.start(place.body[0]), code.stop(place.body[-1])
    yield "missing_body", (Edit(start, stop, "raise NotImplementedError"),)
    if place.parameters and any(isinstance(n, ast.Return) and n.value for n in place.nodes):
        yield "naive_body", (Edit(start, stop, f"return {place.parameters[0]}"),)


Rule = Callable[[_Place, ast.AST], Iterator[Edits]]

RULES: dict[str, Rule] = {
    "comparison": _comparison,
    "boundary": _boundary,
    "arithmetic": _arithmetic,
    "assignment": _assignment,
    "boolean": _boolean,
    "negated": _negated,
    "operand": _operand,
    "sign": _sign,
    "constant": _constant,
    "default": _default,
    "off_by_one": _off_by_one,
    "attribute": _attribute,
    "variable": _variable,
    "exception": _exception,
    "arguments": _arguments,
    "order": _order,
    "keyword": _keyword,
    "unwrapped": _unwrapped,
    "statement": _statement,
    "guard": _guard,
    "branch": _branch,
    "branches": _branches,
    "early_exit": _early_exit,
    "loop": _loop,
    "result": _result,
}
