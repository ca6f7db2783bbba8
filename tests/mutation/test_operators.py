"""The mutants of a small file."""

import pytest
from mutation import operators, plugin

SOURCE = '''
"""A module."""

import functools

__all__ = ["f"]
LIMIT = 3


def f(x: int | None, y=0):
    """A function."""
    if x is None and y > 0:
        raise ValueError("x" + "y")
    total = 0
    assert y < 9, list(zip([1], [2], strict=True))
    for one in (x, LIMIT):
        total += one
    return max(total, y)


@functools.cache
def g():
    return f(1, y=2)


def jit(f):
    return f


@jit
def kernel(x):
    return x + 1
'''


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "ROOT", tmp_path)
    (tmp_path / "small.py").write_text(SOURCE)
    return operators.mutants("small.py")


def test_changes(found):
    lines = SOURCE.splitlines()
    changes = {(lines[one.line - 1].strip(), one.change, one.in_function) for one in found}
    assert changes >= {
        ("LIMIT = 3", "one more", False),
        ("if x is None and y > 0:", "Is to IsNot", True),
        ("if x is None and y > 0:", "Gt to GtE", True),
        ("if x is None and y > 0:", "operand 0 left out", True),
        ("if x is None and y > 0:", "never", True),
        ('raise ValueError("x" + "y")', "statement left out", True),
        ("for one in (x, LIMIT):", "no iteration", True),
        ("for one in (x, LIMIT):", "element 1 left out", True),
        ("total += one", "Add to Sub", True),
        ("return max(total, y)", "min for max", True),
        ("return max(total, y)", "None returned", True),
        ("def g():", "decorator 0 left out", False),
        ("return f(1, y=2)", "keyword y left out", True),
    }
    untouched = {
        "assert y < 9, list(zip([1], [2], strict=True))",
        '"""A module."""',
        '__all__ = ["f"]',
        '"""A function."""',
        "return x + 1",
    }
    assert not untouched & {line for line, _, _ in changes}
    assert len({one.name for one in found}) == len(found)


def test_all_differ_from_the_original_and_each_other(found):
    contents = [operators._content(one.code()) for one in found]
    assert operators._content(operators.original("small.py")) not in contents
    assert len(set(contents)) == len(contents)


def test_functions_that_exist_get_the_code(found, tmp_path):
    module = {}
    exec(operators.original("small.py"), module)
    functions = {str(tmp_path / "small.py"): [module["f"], module["g"].__wrapped__]}
    (mutant,) = [one for one in found if one.change == "Add to Sub"]
    assert module["f"](4) == 7
    assert plugin.apply(mutant, functions)
    assert module["f"](4) == 0
    (constant,) = [one for one in found if one.change == "one more" and one.text == "LIMIT = 3"]
    assert not plugin.apply(constant, functions)
