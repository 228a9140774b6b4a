"""KL(student || teacher) of two Hugging Face directories on the student's own responses, using only transformers.

    python tools/heldout_reverse_kl.py STUDENT TEACHER PROMPTS.jsonl [--response-tokens 64] [--seed 1]

Prints the mean over the response tokens, in nats. It shares no code with the package, because it checks the package's
measurements. It is for small models: it holds the full logits of both.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(
    student: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    teacher: Annotated[Path, typer.Argument(help="Hugging Face directory with the same tokenizer.")],
    prompts: Annotated[Path, typer.Argument(help='JSONL file of {"prompt": user message}.')],
    response_tokens: Annotated[int, typer.Option(min=1, help="Maximum of new tokens per response.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 1,
) -> None:
    """Measure KL(student || teacher) on the student's own responses."""
    questions = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    typer.echo(f"{reverse_kl(student, teacher, questions, response_tokens, seed):.6f}")


@torch.inference_mode()
def reverse_kl(student: Path, teacher: Path, questions: list[str], response_tokens: int, seed: int) -> float:
    """Returns the mean KL(student || teacher), nats per response token, over the full vocabulary, at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    messages = [[{"role": "user", "content": question}] for question in questions]
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    model = load(student)
    torch.manual_seed(seed)
    sequences = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=response_tokens)
    responses = sequences[:, inputs["input_ids"].shape[1] :]
    is_end = responses == tokenizer.eos_token_id
    valid = is_end.cumsum(1) - is_end.long() == 0  # up to and including the first end
    mask = torch.cat([inputs["attention_mask"], valid.long()], 1)
    log_p = response_logprobs(model, sequences, mask, responses.shape[1])
    log_q = response_logprobs(load(teacher), sequences, mask, responses.shape[1])
    return (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean().item()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def response_logprobs(model: Any, sequences: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns `[b, num_tokens, V]` logprobs at the end of each sequence, which is padded on the left."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(sequences, attention_mask=mask, position_ids=positions, logits_to_keep=num_tokens + 1).logits
    return logits[:, :-1].log_softmax(-1)


if __name__ == "__main__":
    typer.run(main)
