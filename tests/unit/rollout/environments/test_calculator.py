import pytest

from megatron_tip.records import Prompt
from megatron_tip.rollout.environments.calculator import CalculatorEnvironment, CalculatorTool
from megatron_tip.rollout.environments.registry import load_environment


@pytest.mark.parametrize(
    "expression, shown",
    [
        (" ( 56 + -33 ) - 84 ", "-61"),
        ("7 // 2 * +3", "9"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.3333333333"),
        ("7 % 0", "error: division by zero"),
        ("__import__('os')", "error: not an expression of numbers, + - * / // % and brackets"),
        ("True + 1", "error: not an expression of numbers, + - * / // % and brackets"),
        ("9 ** 9 ** 9", "error: not an expression of numbers, + - * / // % and brackets"),
        ("9" * 30 + " * " + "9" * 30, "error: not an expression of numbers, + - * / // % and brackets"),
        ("1e308 * 10", "error: not an expression of numbers, + - * / // % and brackets"),
        ("1\x00", "error: not an expression of numbers, + - * / // % and brackets"),
        ("(" * 150, "error: not an expression of numbers, + - * / // % and brackets"),
        ("1" * 201, "error: the expression is longer than 200 characters"),
        ("", "error: not an expression of numbers, + - * / // % and brackets"),
    ],
)
def test_the_calculator_computes_and_runs_no_code(expression, shown):
    assert CalculatorTool().evaluate(expression) == shown


def test_calls_are_answered_and_an_answer_ends_the_episode():
    environment = load_environment("calculator")()
    assert isinstance(environment, CalculatorEnvironment)
    environment.reset(Prompt(0, "Calculate 2 + 3 * 4.", (1,)))
    two = environment.step("first <calculator>3 * 4</calculator> then <calculator>\n2 + 12\n</calculator>")
    assert (two.text, two.done) == ("12\n14", False)
    reminder = environment.step("it is 14 </answer>")
    assert "<answer>number</answer>" in reminder.text
    assert not reminder.done
    assert environment.step("so <answer>14</answer>").done
