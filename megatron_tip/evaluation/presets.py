"""The benchmarks by name, each with its full protocol: data, prompt, sampling, scoring."""

import difflib
from dataclasses import dataclass, replace

from megatron_tip.errors import InputError

_REASON = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Preset:
    """One benchmark.

    `harness_task`: the file, within lm-evaluation-harness's tasks, of the task whose data, extraction and scoring are
    used; "": none. `metric`: the key of the result that counts. `prompt`: Jinja over a question's fields, put into the
    chat template as the user's message. `fields`: those that a question of an offline file must have.
    `evalscope_dataset`: EvalScope's name for it; "": not available there. `executes_code`: the answers are programs,
    run by `code_execution` and not scored by the harness. `scoring`: in words. `context`: of the model that the preset
    was fitted to; None: not known. `max_tokens_asked`: `max_tokens` before it was fitted (`context.fitted`).
    """

    name: str
    harness_task: str
    metric: str
    prompt: str
    fields: tuple[str, ...]
    evalscope_dataset: str
    scoring: str
    max_tokens: int = 32768
    temperature: float = 0.6
    top_p: float = 0.95
    executes_code: bool = False
    context: int | None = None
    max_tokens_asked: int | None = None


_GPQA_CHOICES = "".join(f"\n({letter}) {{{{choice{k}}}}}" for k, letter in enumerate("ABCD", start=1))
_ROWS = (
    Preset(
        "gsm8k",
        "gsm8k/gsm8k-cot-zeroshot.yaml",
        "exact_match,flexible-extract",
        "{{question}}\nLet's think step by step.",
        ("question", "answer"),
        "gsm8k",
        "the last number of the answer equals the reference",
        max_tokens=4096,
    ),
    Preset(
        "math500",
        "minerva_math/minerva_math500.yaml",
        "math_verify,none",
        "{{problem}}" + _REASON,
        ("problem", "solution"),
        "math_500",
        "math-verify: the answer's expression is equivalent to the reference's",
    ),
    Preset(
        "aime24",
        "aime/aime24.yaml",
        "exact_match,none",
        "{{Problem}}" + _REASON,
        ("Problem", "Answer"),
        "aime24",
        "the last boxed expression equals the reference",
    ),
    Preset(
        "aime25",
        "aime/aime25.yaml",
        "exact_match,none",
        "{{problem}}" + _REASON,
        ("problem", "answer"),
        "aime25",
        "the last boxed expression equals the reference",
    ),
    Preset(
        "gpqa_diamond",
        "gpqa/cot_zeroshot/gpqa_diamond_cot_zeroshot.yaml",
        "exact_match,flexible-extract",
        "What is the correct answer to this question: {{Question}}\nChoices:" + _GPQA_CHOICES + "\nLet's think step by "
        'step, and end with "The answer is (X).", X being the letter of your choice.',
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        "gpqa_diamond",
        "the last letter in parentheses is the correct choice's; choices are shuffled",
    ),
    Preset(
        "humaneval",
        "",
        "pass@1",
        "Complete the following function. Answer with the whole function in one Python code block.\n"
        "```python\n{{prompt}}\n```",
        ("prompt", "test", "entry_point"),
        "",
        "the first code block that defines the function, or the body given instead, passes the question's tests",
        max_tokens=8192,
        executes_code=True,
    ),
    Preset(
        "ifeval",
        "ifeval/ifeval.yaml",
        "prompt_level_strict_acc,none",
        "{{prompt}}",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        "ifeval",
        "all instructions of the prompt are followed, strictly",
        max_tokens=4096,
    ),
)
PRESETS = {preset.name: preset for preset in _ROWS}


def load_presets(
    names: list[str], *, temperature: float | None = None, top_p: float | None = None, max_tokens: int | None = None
) -> list[Preset]:
    """Returns the presets of those names, with the sampling replaced where given.

    Raises:
        InputError: an unknown name, or sampling out of range.
    """
    for name in names:
        if name not in PRESETS:
            nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
            raise InputError(
                f"benchmarks: expected names among {', '.join(PRESETS)}, got {name!r}; the nearest is {nearest!r}"
            )
    if not names:
        raise InputError(f"benchmarks: expected at least one of {', '.join(PRESETS)}, got none")
    if temperature is not None and temperature < 0:
        raise InputError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p: expected a share in (0, 1], got {top_p}")
    asked = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    given = {name: value for name, value in asked.items() if value is not None}
    return [replace(PRESETS[name], **given) for name in dict.fromkeys(names)]
