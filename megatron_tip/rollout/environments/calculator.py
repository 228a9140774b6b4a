"""A calculator that a student calls in its text; it computes and never runs code."""

import ast
import math
import operator
import re
from collections.abc import Callable

from megatron_tip.records import Prompt
from megatron_tip.rollout.environments.environment import Observation

_CALL = re.compile(r"<calculator>(.*?)</calculator>", re.DOTALL)
_MAX_CHARACTERS = 200
_MAX_DIGITS = 40

Number = int | float
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class CalculatorEnvironment:
    """A calculator for arithmetic questions: `<calculator>2 * (3 + 4)</calculator>` is answered with `14`.

    A turn with `<answer>...</answer>` ends the episode. A turn with neither gets a reminder, so that a student that
    knows no tools has further turns too. Several calls in a turn are answered on one line each.
    """

    def __init__(self) -> None:
        self._calculator = CalculatorTool()

    def reset(self, prompt: Prompt) -> None:
        """Does nothing: only the student needs the question."""

    def step(self, text: str) -> Observation:
        if "<answer>" in text and "</answer>" in text.partition("<answer>")[2]:
            return Observation("", done=True)
        results = self._calculator.results(text)
        reminder = "Call <calculator>an expression</calculator>, or give the <answer>number</answer>."
        return Observation("\n".join(results) or reminder, done=False)


class CalculatorTool:
    """An evaluator of `+ - * / // %` and brackets over numbers, with Python's semantics."""

    def results(self, text: str) -> list[str]:
        """Returns the result or error of each call in `text`."""
        return [self.evaluate(expression) for expression in _CALL.findall(text)]

    def evaluate(self, expression: str) -> str:
        """Returns the value of `expression`, or a message for the student that begins with "error"."""
        if len(expression) > _MAX_CHARACTERS:
            return f"error: the expression is longer than {_MAX_CHARACTERS} characters"
        try:
            return _shown(_value(ast.parse(expression.strip(), mode="eval").body))
        except ZeroDivisionError:
            return "error: division by zero"
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return "error: not an expression of numbers, + - * / // % and brackets"


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("not arithmetic")


def _bounded(value: Number) -> Number:
    if not math.isfinite(value) or abs(value) >= 10**_MAX_DIGITS:
        raise ValueError("too large")
    return value


def _shown(value: Number) -> str:
    """Formats whole numbers without a decimal point, others with ten significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.10g}"
