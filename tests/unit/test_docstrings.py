"""The package's docstrings keep one style: functions begin with a verb in the third person."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_tip"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

NOT_VERBS = {"Always", "Arguments", "As", "Columns", "Has", "Is", "Its", "Rows", "This", "Thus", "Tokens", "Was"}
"""Words that end like a verb in the third person and begin no docstring of a function."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("file", FILES)
def test_functions_begin_with_a_verb(file: str) -> None:
    wrong = [
        f"{file}:{function.lineno} {function.name}: {text.splitlines()[0]}"
        for function in _functions(_tree(file))
        if not _is_property(function) and (text := ast.get_docstring(function)) and not begins_with_a_verb(text)
    ]
    assert not wrong, "begin with a verb in the third person, as in Returns or Writes:\n" + "\n".join(wrong)


@pytest.mark.parametrize("file", FILES)
def test_modules_have_a_docstring_and_plain_annotations(file: str) -> None:
    """Annotations are evaluated where they stand, everywhere; one that refers to a later name is quoted."""
    tree = _tree(file)
    assert ast.get_docstring(tree), f"{file} has no docstring"
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "__future__" not in imported, f"{file}: quote the annotations that refer to later names"


@pytest.mark.parametrize("file", FILES)
def test_public_classes_have_a_docstring(file: str) -> None:
    classes = [node for node in ast.walk(_tree(file)) if isinstance(node, ast.ClassDef)]
    missing = [node.name for node in classes if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not missing, f"{file}: classes without a docstring: {missing}"


@pytest.mark.parametrize(
    "text,is_verb",
    [
        ("Returns the rows.", True),
        ("Raises: nothing", True),
        ("Writes\nthe file", True),
        ("The rows.", False),
        ("returns the rows.", False),
        ("`[n]`: the rows.", False),
        ("Return the rows.", False),
        ("This returns the rows.", False),
        ("Rows of the batch.", False),
        ("", False),
    ],
)
def test_what_counts_as_a_verb(text: str, is_verb: bool) -> None:
    assert begins_with_a_verb(text) == is_verb


def test_which_functions_are_held_to_it() -> None:
    tree = ast.parse(
        "def a():\n    def nested(): ...\nclass C:\n    def b(self): ...\n    @property\n    def c(self): ...\n"
        "    class D:\n        async def d(self): ...\nif True:\n    def e(): ...\n"
    )
    found = list(_functions(tree))
    assert [function.name for function in found] == ["a", "b", "c", "d", "e"]
    assert [function.name for function in found if _is_property(function)] == ["c"]


def begins_with_a_verb(text: str) -> bool:
    """Returns whether the first word is a capitalised one that ends in s and is not known to be no verb."""
    first = text.split(maxsplit=1)[0].rstrip(",:;") if text.strip() else ""
    return re.fullmatch(r"[A-Z][a-z]*s", first) is not None and first not in NOT_VERBS


def _tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def _functions(node: ast.AST) -> Iterator[Function]:
    """Yields functions and methods, without those that are defined within a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from _functions(child)


def _is_property(function: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)
