"""Mutants of a file of Python: one small change each, made in its syntax tree.

Comparisons, operators, constants, branches and loops are changed as by cosmic-ray. Besides, a statement, an operand,
an element, a keyword, a decorator, an exception or a filter is left out. Annotations, docstrings, ``__all__``,
functions that Triton compiles, and what changes nothing unless something else is wrong (assertions, ``strict``) stay as
they are.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

OPPOSITES = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NEIGHBOURS = {
    ast.Eq: (ast.LtE, ast.GtE),
    ast.NotEq: (ast.Lt, ast.Gt),
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
SWAPPED = {"any": "all", "all": "any", "min": "max", "max": "min"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# From the module to a node: its parent, the parent's field, and the place in it if the field is a list.
TreePath = tuple[tuple[ast.AST, str, int | None], ...]


@dataclass(frozen=True)
class Mutant:
    """One change of ``file``, whose path is relative to the root of the repository."""

    file: str
    number: int
    line: int
    column: int
    change: str
    text: str
    statement: tuple[int, int]
    """First and last line of the statement that is changed."""
    in_function: bool
    """Whether the code of a function alone is changed, not what importing the module does."""
    _path: TreePath
    _node: ast.AST

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.change}:{self.number}"

    def code(self) -> CodeType:
        """The module's code with the change."""
        node = self._node
        for parent, field, place in reversed(self._path):
            changed = copy.copy(parent)
            if place is None:
                setattr(changed, field, node)
            else:
                values = list(getattr(parent, field))
                values[place] = node
                setattr(changed, field, values)
            node = changed
        module = ast.fix_missing_locations(node)
        assert isinstance(module, ast.Module)
        return compile(module, str(ROOT / self.file), "exec", dont_inherit=True)


def original(file: str) -> CodeType:
    """The module's code as it stands."""
    path = ROOT / file
    return compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines; those that don't compile or change no code are left out."""
    source = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = []
    for node, path in _nodes(tree):
        if _left_alone(node, path):
            continue
        statement = _statement(node, path)
        line, column = getattr(node, "lineno", statement[0]), getattr(node, "col_offset", 0)
        for change, new in _changes(node, path):
            text = source.splitlines()[line - 1].strip()
            found.append((line, column, change, text, statement, _in_function(path), path, new))
    found.sort(key=lambda one: one[:3])
    known = {_content(original(file))}
    kept = []
    for number, (line, column, change, text, statement, inside, path, new) in enumerate(found):
        mutant = Mutant(file, number, line, column, change, text, statement, inside, path, new)
        try:
            content = _content(mutant.code())
        except (SyntaxError, ValueError):
            continue
        if content not in known:
            known.add(content)
            kept.append(mutant)
    return kept


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, TreePath]]:
    stack: list[tuple[ast.AST, TreePath]] = [(tree, ())]
    while stack:
        node, path = stack.pop()
        yield node, path
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                stack.append((value, (*path, (node, field, None))))
            elif isinstance(value, list):
                stack += [(one, (*path, (node, field, i))) for i, one in enumerate(value) if isinstance(one, ast.AST)]


def _left_alone(node: ast.AST, path: TreePath) -> bool:
    chain = [parent for parent, _, _ in path] + [node]
    return (
        any(field in ("annotation", "returns") for _, field, _ in path)
        or any(isinstance(one, ast.Assert) or (isinstance(one, ast.keyword) and one.arg == "strict") for one in chain)
        or any(isinstance(one, FUNCTIONS) and any("jit" in ast.unparse(d) for d in one.decorator_list) for one in chain)
        or any(isinstance(one, ast.If) and "TYPE_CHECKING" in ast.unparse(one.test) for one in chain)
        or any(isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "__all__" for one in chain)
    )


def _statement(node: ast.AST, path: TreePath) -> tuple[int, int]:
    chain = [node, *(parent for parent, _, _ in reversed(path))]
    for one in chain:
        if isinstance(one, (ast.stmt, ast.ExceptHandler)):
            body = getattr(one, "body", None)
            return one.lineno, max(one.lineno, body[0].lineno - 1) if body else one.end_lineno or one.lineno
    return 1, 1


def _in_function(path: TreePath) -> bool:
    for parent, field, _ in path:
        if isinstance(parent, (*FUNCTIONS, ast.Lambda)):
            return field == "body"
    return False


def _content(code: CodeType) -> Any:
    """What two code objects that do the same have in common: all but the places of lines."""
    constants = tuple(_content(one) if isinstance(one, CodeType) else (type(one), repr(one)) for one in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable, constants


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _without(values: list[Any], place: int) -> list[Any]:
    return values[:place] + values[place + 1 :]


def _changes(node: Any, path: TreePath) -> Iterator[tuple[str, ast.AST]]:
    """What is changed, and the node that takes ``node``'s place."""

    def at(new: Any) -> Any:
        return ast.copy_location(new, node)

    parent, field, _ = path[-1] if path else (None, "", None)
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                for new in (OPPOSITES[type(operator)], *NEIGHBOURS.get(type(operator), ())):
                    ops = [*node.ops[:i], new(), *node.ops[i + 1 :]]
                    yield f"{type(operator).__name__} to {new.__name__}", _with(node, ops=ops)
        case ast.BoolOp():
            yield "and for or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
            for i in range(len(node.values)):
                rest = _without(node.values, i)
                yield f"operand {i} left out", rest[0] if len(rest) == 1 else _with(node, values=rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield f"{type(node.op).__name__} left out", node.operand
        case ast.BinOp():
            if type(node.op) in ARITHMETIC and not any(isinstance(one, ast.Raise) for one, _, _ in path):
                new = ARITHMETIC[type(node.op)]
                yield f"{type(node.op).__name__} to {new.__name__}", _with(node, op=new())
                yield "right operand left out", node.left
                yield "left operand left out", node.right
        case ast.Constant(value=bool()):
            yield f"{node.value} to {not node.value}", at(ast.Constant(not node.value))
        case ast.Constant(value=int() | float()):
            yield "one more", at(ast.Constant(node.value + 1))
            yield "one less", at(ast.Constant(node.value - 1))
        case ast.IfExp():
            yield "else alone", node.orelse
            yield "if alone", node.body
        case ast.If():
            yield "always", _with(node, test=at(ast.Constant(True)))
            yield "never", _with(node, test=at(ast.Constant(False)))
            if not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
                yield "condition negated", _with(node, test=at(ast.UnaryOp(ast.Not(), node.test)))
        case ast.comprehension():
            for i in range(len(node.ifs)):
                yield f"filter {i} left out", _with(node, ifs=_without(node.ifs, i))
        case ast.Break():
            yield "continue for break", at(ast.Continue())
        case ast.Continue():
            yield "break for continue", at(ast.Break())
        case ast.For():
            yield "no iteration", _with(node, iter=at(ast.Tuple([], ast.Load())))
        case ast.ExceptHandler(type=ast.Tuple(elts=kinds)):
            for i in range(len(kinds)):
                yield f"exception {i} left out", _with(node, type=at(ast.Tuple(_without(kinds, i), ast.Load())))
        case ast.ExceptHandler() if node.type is not None:
            yield "exception left out", _with(node, type=at(ast.Tuple([], ast.Load())))
        case ast.Tuple() | ast.List() | ast.Set():
            stored = isinstance(getattr(node, "ctx", None), ast.Store)
            index = isinstance(parent, ast.Subscript) and field == "slice"
            if not stored and not index and not isinstance(parent, ast.ExceptHandler):
                for i in range(len(node.elts)):
                    yield f"element {i} left out", _with(node, elts=_without(node.elts, i))
        case ast.Dict():
            for i in range(len(node.keys)):
                keys, values = _without(node.keys, i), _without(node.values, i)
                yield f"entry {i} left out", _with(node, keys=keys, values=values)
        case ast.Call():
            for i, keyword in enumerate(node.keywords):
                if keyword.arg != "strict":
                    yield f"keyword {keyword.arg} left out", _with(node, keywords=_without(node.keywords, i))
            if isinstance(node.func, ast.Name) and (other := SWAPPED.get(node.func.id)):
                yield f"{other} for {node.func.id}", _with(node, func=at(ast.Name(other, ast.Load())))
        case ast.AugAssign() if type(node.op) in ARITHMETIC:
            new = ARITHMETIC[type(node.op)]
            yield f"{type(node.op).__name__} to {new.__name__}", _with(node, op=new())
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            for i in range(len(node.decorator_list)):
                yield f"decorator {i} left out", _with(node, decorator_list=_without(node.decorator_list, i))
        case ast.Return() if node.value is not None and not _is_false(node.value):
            yield "None returned", at(ast.Return(at(ast.Constant(None))))
        case ast.Expr(value=ast.Constant()):
            pass  # a docstring, or an ellipsis
        case ast.Expr() | ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield "statement left out", at(ast.Pass())


def _is_false(node: ast.AST) -> bool:
    """Whether None in a condition does the same."""
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)
