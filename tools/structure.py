"""Counts what makes the package hard to read, in one or several checkouts side by side.

    python tools/structure.py [CHECKOUT...]

Per checkout: files and lines of `megatron_tip/`, functions that take the whole run, `isinstance` tests on kinds of
teachers and engines, functions with more than 8 parameters, and the records with the most fields.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_PARAMETERS = 8
NUM_RECORDS = 5
KINDS = ("Teacher", "TeacherTopK", "TopKTokenStatistics", "ServedTeacher", "ServedEngine", "Engine", "AheadGenerator")


def counts(root: Path) -> dict[str, str]:
    """Returns the rows of the table for the checkout `root`."""
    paths = sorted((root / "megatron_tip").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    records = sorted(_records(trees), reverse=True)[:NUM_RECORDS]
    return {
        "files": str(len(paths)),
        "lines": str(sum(lengths.values())),
        "lines of the longest file": str(max(lengths.values())),
        "functions": str(len(functions)),
        "functions that take the whole run": str(sum(_takes_run(function) for function in functions)),
        "type tests on teachers and engines": str(sum(map(_is_type_test, _nodes(trees)))),
        f"functions with more than {MOST_PARAMETERS} parameters": str(
            sum(len(_parameters(function)) > MOST_PARAMETERS for function in functions)
        ),
        "largest records": ", ".join(f"{name} {size}" for size, name in records),
    }


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _nodes(trees: dict[Path, ast.Module]) -> Iterator[ast.AST]:
    for tree in trees.values():
        yield from ast.walk(tree)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Returns the parameters of `function` without `self` and `cls`."""
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument for argument in found if argument.arg not in ("self", "cls")]


def _takes_run(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    annotations = [ast.unparse(a.annotation) for a in _parameters(function) if a.annotation is not None]
    return any("TrainingRun" in annotation and "Callable" not in annotation for annotation in annotations)


def _is_type_test(node: ast.AST) -> bool:
    """Tells whether `node` is an `isinstance` call on a kind of teacher or engine."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return False
    names = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
    return any(name in KINDS or name.endswith(("Engine", "Teacher")) for name in names)


def _records(trees: dict[Path, ast.Module]) -> Iterator[tuple[int, str]]:
    """Yields the number of fields and the name of every class that declares any."""
    for node in _nodes(trees):
        if isinstance(node, ast.ClassDef):
            size = sum(isinstance(statement, ast.AnnAssign) for statement in node.body)
            if size:
                yield size, node.name


def main(roots: list[Path]) -> None:
    """Prints a Markdown table with one column per checkout."""
    columns = [counts(root) for root in roots]
    print(f"| | {' | '.join(map(str, roots))} |")
    print("|---|" + "---|" * len(roots))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parents[1]])
