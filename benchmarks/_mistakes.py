"""The mutants of a module of the package: one small mistake each, on its syntax tree.

`mutation.py` says which mistakes there are, and lets the tests meet them.
"""

from __future__ import annotations

import ast
import builtins
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Mutant:
    """One mistake in one module.

    Attributes:
        module: the module's path below the package, without its ending.
        where: the qualified name of the function or class that has it.
        before: the statement, or the head of it, as it is.
        after: the same with the mistake.
        nth: the how manieth of this function with this ``before`` and ``after``.
        line: where the statement begins.
        lines: lines of the statement, or of its head.
        warm: whether it lies inside a function, whose code can be exchanged.
        apply: makes the mistake in the tree, for good.
        names: what a statement outside of all functions binds.
        outcome: ``"killed"``, ``"timed out"`` or ``"survived"``; empty before it was
            met.
        by: the test that killed it, or why none did.
    """

    module: str
    where: str
    before: str
    after: str
    nth: int
    line: int
    lines: tuple[int, ...]
    warm: bool
    apply: Callable[[], None] = field(repr=False, compare=False, default=lambda: None)
    names: tuple[str, ...] = ()
    outcome: str = ""
    by: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What it is known by, wherever its lines go."""
        return self.module, self.where, self.before, self.after, self.nth


COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Functions and methods, and what takes and gives the same kind of thing.
TWINS = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "sum": "mean",
    "mean": "sum",
    "floor": "ceil",
    "ceil": "floor",
    "tril": "triu",
    "triu": "tril",
    "startswith": "endswith",
    "endswith": "startswith",
    "find": "rfind",
    "rfind": "find",
    "index": "rindex",
    "append": "extend",
    "exp": "expm1",
    "log": "log1p",
    "vstack": "hstack",
    "hstack": "vstack",
    "bisect_left": "bisect_right",
    "bisect_right": "bisect_left",
}
# Functions of which the first argument, and methods of which the object, is of the kind
# that they give.
PASSED = {"abs", "sorted", "reversed", "round", "absolute", "sort", "unique"}
PASSED_METHODS = {
    *("copy", "clone", "astype", "double", "float", "clamp", "clip", "strip", "lower"),
    *("detach", "conj", "flatten", "squeeze", "abs", "rstrip", "lstrip", "long"),
}
# Keyword arguments for people, and of ``zip``: of lists that are of one length anyhow.
UNMUTATED = {"remedy", "strict"}
# Calls that make the words of an error or a warning.
WORDS = {"complaint", "shown", "warn", "TypeError", "ValueError", "RuntimeError"}


def _name(function: ast.expr) -> str:
    """The last name of what is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_text(node: ast.AST) -> bool:
    """Whether an expression is made for people, or is a text for sure."""
    if isinstance(node, ast.JoinedStr):
        return True
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def _changed(node: ast.AST, **fields: Any) -> ast.AST:
    """A copy of a node with other fields, at the same place."""
    made = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return ast.copy_location(made, node)


def _expressions(node: ast.expr) -> Iterator[ast.AST]:
    """What an expression may be mistaken for."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                ops = [*node.ops]
                ops[place] = other()
                yield _changed(node, ops=ops)
    elif isinstance(node, ast.BinOp):
        if not (_is_text(node.left) or _is_text(node.right)):
            yield _changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield _changed(node, op=other_op)
        for place in range(len(node.values)):
            rest = node.values[:place] + node.values[place + 1 :]
            yield rest[0] if len(rest) == 1 else _changed(node, values=rest)
    elif isinstance(node, ast.UnaryOp):
        if not isinstance(node.op, ast.UAdd):
            yield node.operand
    elif isinstance(node, ast.IfExp):
        yield _changed(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Slice):
        for end in ("lower", "upper", "step"):
            if getattr(node, end) is not None:
                yield _changed(node, **{end: None})
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    others: tuple[Any, ...] = ()
    if isinstance(value, bool):
        others = (not value,)
    elif isinstance(value, int):
        others = value + 1, value - 1
    elif isinstance(value, float):
        others = (value + 1.0, value / 2) if value and math.isfinite(value) else (1.0,)
    elif isinstance(value, str) and " " not in value.strip():
        others = (f"{value}XX",)
    for other in others:
        yield _changed(node, value=other)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    name = _name(node.func)
    # Of no entries, zeros are ones.
    empty = name in {"zeros", "ones"} and node.args and _is_zero(node.args[0])
    if name in TWINS and not empty:
        twin = TWINS[name]
        if isinstance(node.func, ast.Attribute):
            yield _changed(node, func=_changed(node.func, attr=twin))
        elif not hasattr(builtins, name) or hasattr(builtins, twin):
            yield _changed(node, func=_changed(node.func, id=twin))
    if name in PASSED and node.args and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]
    if name in PASSED_METHODS and isinstance(node.func, ast.Attribute):
        yield node.func.value
    for place, keyword in enumerate(node.keywords):
        if keyword.arg not in UNMUTATED:
            rest = node.keywords[:place] + node.keywords[place + 1 :]
            yield _changed(node, keywords=rest)


def _statements(node: ast.stmt, known: set[str]) -> Iterator[ast.stmt]:
    """What a statement may be mistaken for; ``known`` are names bound before it."""
    nothing: ast.stmt = ast.copy_location(ast.Pass(), node)
    if isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete)):
        yield nothing
    elif isinstance(node, ast.Expr):
        if isinstance(node.value, (ast.Call, ast.Await)):
            yield nothing
    elif isinstance(node, ast.Assign):
        names = {
            inner.id
            for target in node.targets
            for inner in ast.walk(target)
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
        }
        # Without its first binding a name fails whatever the tests look at.
        if names <= known:
            yield nothing
    elif isinstance(node, ast.Return):
        if node.value is not None and not _is_none(node.value):
            none = ast.copy_location(ast.Constant(None), node.value)
            yield ast.copy_location(ast.Return(none), node)
    elif isinstance(node, ast.Continue):
        yield ast.copy_location(ast.Break(), node)
        yield nothing
    elif isinstance(node, ast.Break):
        yield ast.copy_location(ast.Continue(), node)
    elif isinstance(node, (ast.If, ast.While)):
        no = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        yield _changed(node, test=no)  # type: ignore[misc]
    elif isinstance(node, ast.For):
        empty = ast.copy_location(ast.Tuple([], ast.Load()), node.iter)
        yield _changed(node, iter=empty)  # type: ignore[misc]
    elif isinstance(node, ast.With):
        yield from _withs(node)
    elif isinstance(node, ast.Try):
        for place, handler in enumerate(node.handlers):
            again = ast.copy_location(ast.Raise(), handler.body[0])
            if ast.dump(handler.body[0]) != ast.dump(again):
                handlers = [*node.handlers]
                handlers[place] = _changed(handler, body=[again])  # type: ignore[call-overload]
                yield _changed(node, handlers=handlers)  # type: ignore[misc]


def _withs(node: ast.With) -> Iterator[ast.stmt]:
    for place, item in enumerate(node.items):
        if item.optional_vars is None:
            rest = node.items[:place] + node.items[place + 1 :]
            if rest:
                yield _changed(node, items=rest)  # type: ignore[misc]
            else:
                yes = ast.copy_location(ast.Constant(True), item.context_expr)
                made = ast.If(yes, node.body, [])
                yield ast.copy_location(made, node)


def _is_zero(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class Mistakes:
    """All mutants of a module.

    Args:
        module: its path below the package, without its ending.

    Attributes:
        path: the file.
        tree: its syntax tree; a mutant's ``apply`` changes it for good.
        mutants: the mutants, in the order of the file.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.path = ROOT / "captum_cage" / f"{module}.py"
        self.tree = ast.parse(self.path.read_text("utf-8"), str(self.path))
        self.mutants: list[Mutant] = []
        self._checks = {
            alias.name
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "captum_cage._checks"
            for alias in node.names
        }
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._block(self.tree, "body", (), False, set())

    @property
    def dotted(self) -> str:
        """The module's name for Python."""
        return f"captum_cage.{self.module.replace('/', '.')}"

    def _block(
        self,
        owner: ast.AST,
        name: str,
        scope: tuple[str, ...],
        warm: bool,
        known: set[str],
    ) -> None:
        statements = getattr(owner, name)
        for place, node in enumerate(statements):
            docstring = isinstance(node, ast.Expr) and _is_text(node.value)
            imports = isinstance(node, (ast.Import, ast.ImportFrom))
            if docstring or imports or _for_types(node):
                continue
            self._statement(statements, place, scope, warm, known)
            known |= {
                inner.id
                for inner in ast.walk(node)
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            }

    def _statement(
        self,
        block: list[ast.stmt],
        place: int,
        scope: tuple[str, ...],
        warm: bool,
        known: set[str],
    ) -> None:
        node = block[place]

        def put(other: ast.stmt) -> None:
            block[place] = other

        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            inside = (*scope, node.name)
            self._head(node, inside, warm)
            function = not isinstance(node, ast.ClassDef)
            bound = _arguments(node) if not isinstance(node, ast.ClassDef) else set()
            self._block(node, "body", inside, warm or function, bound)
            return
        for other in _statements(node, known):
            self._add(node, node, other, put, scope, warm)
        self._head(node, scope, warm)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                self._block(node, name, scope, warm, known)
        for handler in getattr(node, "handlers", ()):
            self._block(handler, "body", scope, warm, known)
        for case in getattr(node, "cases", ()):
            self._block(case, "body", scope, warm, known)

    def _head(
        self,
        node: ast.stmt,
        scope: tuple[str, ...],
        warm: bool,
    ) -> None:
        """Mutants of the expressions of a statement, less those of its body."""
        if isinstance(node, ast.Raise):
            return
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        first_only = {id(one) for one in _first_only(node)}
        for owner, put, found in _below(node):
            named = isinstance(owner, ast.Call) and _name(owner.func) in self._checks
            if id(found) in first_only or (named and _is_text(found)):
                continue
            for other in _expressions(found):
                self._add(node, found, other, put, scope, warm and not function)
            if isinstance(owner, ast.comprehension) and found in owner.ifs:
                no = ast.copy_location(ast.UnaryOp(ast.Not(), found), found)
                self._add(node, found, no, put, scope, warm and not function)

    def _add(
        self,
        statement: ast.stmt,
        node: ast.AST,
        other: ast.AST,
        put: Callable[[Any], None],
        scope: tuple[str, ...],
        warm: bool,
    ) -> None:
        before = _head_text(statement)
        put(other)
        after = _head_text(other if node is statement else statement)
        if isinstance(statement, ast.Try) and node is statement:
            handlers = zip(statement.handlers, other.handlers, strict=True)  # type: ignore[attr-defined]
            which = next(old for old, new in handlers if old is not new)
            before = f"except {ast.unparse(which.type) if which.type else ''}: ..."
            after = f"{before[:-3]}raise"
        elif isinstance(statement, ast.With) and isinstance(other, ast.If):
            after = "if True:"
        put(node)
        if before == after:
            return
        where = ".".join(scope)
        nth = self._seen[where, before, after]
        self._seen[where, before, after] += 1
        lines = _lines(statement)
        if node is not statement and hasattr(node, "lineno"):
            lines = tuple(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]
        self.mutants.append(
            Mutant(
                self.module,
                where,
                before,
                after,
                nth,
                statement.lineno,
                lines,
                warm,
                lambda: put(other),
                tuple(
                    inner.id
                    for inner in ast.walk(statement)
                    if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
                )
                if not warm and isinstance(statement, (ast.Assign, ast.AnnAssign))
                else (),
            )
        )

    def code(self) -> CodeType:
        """The module as it now is, compiled."""
        return compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")


def _first_only(node: ast.AST) -> Iterator[ast.AST]:
    """The slice of ``for one in wrong[:1]: raise``: a longer one raises alike."""
    if (
        isinstance(node, ast.For)
        and isinstance(node.body[-1], ast.Raise)
        and isinstance(node.iter, ast.Subscript)
        and isinstance(node.iter.slice, ast.Slice)
    ):
        yield from ast.walk(node.iter.slice)


def _for_types(node: ast.stmt) -> bool:
    """Whether a statement says nothing to who runs the code."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        value = node.value
        made = isinstance(value, ast.Call) and _name(value.func) in {
            "TypeVar",
            "getLogger",
        }
        # Aliases of types have capital letters and small ones.
        alias = any(one.strip("_")[:1].isupper() and not one.isupper() for one in names)
        return "__all__" in names or made or alias
    if isinstance(node, ast.FunctionDef):
        return any(_name(one) == "overload" for one in node.decorator_list)
    if isinstance(node, ast.If):
        return _name(node.test) == "TYPE_CHECKING"
    return False


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    given = node.args
    each = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    each += [one for one in (given.vararg, given.kwarg) if one is not None]
    return {one.arg for one in each}


# Fields of a node that hold no expression of its own to mutate.
_SKIPPED = {
    *("annotation", "returns", "body", "orelse", "finalbody", "handlers", "cases"),
    *("targets", "target", "type_comment", "type_params", "format_spec"),
}


def _setter(node: ast.AST, name: str, place: int) -> Callable[[Any], None]:
    """What puts another expression in the place of one."""

    def put(other: Any) -> None:
        value = getattr(node, name)
        if isinstance(value, list):
            value[place] = other
        else:
            setattr(node, name, other)

    return put


def _below(
    node: ast.AST,
) -> Iterator[tuple[ast.AST, Callable[[Any], None], ast.expr]]:
    """Owner, setter and node of each expression below a node that may be mutated."""
    for name, value in ast.iter_fields(node):
        expression = isinstance(node, ast.expr)
        subscripts = name in {"targets", "target"} and isinstance(node, ast.stmt)
        if name in _SKIPPED and not expression and not subscripts:
            continue
        many = value if isinstance(value, list) else [value]
        for place, child in enumerate(many):
            if not isinstance(child, ast.AST) or isinstance(child, ast.stmt):
                continue
            if isinstance(child, (ast.expr, ast.Slice)):
                put = _setter(node, name, place)
                if isinstance(child, ast.JoinedStr):
                    continue
                words = isinstance(child, ast.Call) and (
                    _name(child.func) in WORDS
                    or (
                        isinstance(child.func, ast.Attribute)
                        and _name(child.func.value) in {"logger", "log", "_log"}
                    )
                )
                if words:
                    continue
                yield node, put, child
            if isinstance(child, ast.keyword) and child.arg in UNMUTATED:
                continue
            yield from _below(child)


def _head_text(node: ast.AST) -> str:
    """A statement, or its head where it has a body."""
    if isinstance(node, ast.Try):
        return "try:"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        nothing: list[ast.stmt] = [ast.Expr(ast.Constant(...))]
        return ast.unparse(_changed(node, body=nothing)).removesuffix("\n    ...")
    if isinstance(node, (ast.If, ast.While, ast.For, ast.With)):
        nothing = [ast.Expr(ast.Constant(...))]
        fields = {"body": nothing}
        if hasattr(node, "orelse"):
            fields["orelse"] = []
        return ast.unparse(_changed(node, **fields)).removesuffix("\n    ...")
    return ast.unparse(node)


def _lines(node: ast.stmt) -> tuple[int, ...]:
    """Lines of a statement, or of its head."""
    last = node.end_lineno or node.lineno
    if isinstance(node, ast.Try):
        # The first line of the handlers runs only where something failed.
        return tuple(
            line
            for handler in node.handlers
            for line in range(handler.lineno, handler.lineno + 1)
        )
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        last = max(node.lineno, body[0].lineno - 1)
    return tuple(range(node.lineno, last + 1))
