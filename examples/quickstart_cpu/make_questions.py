"""Writes capitals.jsonl, the quickstart's questions, from countries.tsv.

    python examples/quickstart_cpu/make_questions.py          # from the table as it is
    python examples/quickstart_cpu/make_questions.py --ask    # first asks the teacher, as its column teacher_knows says

48 countries whose capital the teacher names are held out, drawn by a fixed seed; the others are trained on.
"""

import argparse
import csv
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
TEACHER = Path(".cache/quickstart/SmolLM2-135M-Instruct")
WORDINGS = ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.")
NUM_HELD_OUT = 48

Country = dict[str, str]


def read_countries() -> list[Country]:
    """Returns the rows of countries.tsv."""
    with (HERE / "countries.tsv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def questions(countries: list[Country]) -> str:
    """Returns the lines of capitals.jsonl: the training questions in a random order, then the held-out ones."""
    order = list(countries)
    random.Random(0).shuffle(order)
    held_out = [row for row in order if row["teacher_knows"] == "yes"][:NUM_HELD_OUT]
    rows = [(wording, row) for row in order if row not in held_out for wording in WORDINGS]
    random.Random(1).shuffle(rows)
    rows += [(WORDINGS[0], row) for row in held_out]
    lines = [{"prompt": wording.format(row["country"]), "answer": row["capital"]} for wording, row in rows]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def ask(countries: list[Country]) -> None:
    """Sets teacher_knows: whether the capital occurs in the teacher's most likely answer of at most 16 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_tip.prompts.verifier import ExpectedAnswer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER, local_files_only=True, padding_side="left")
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True, dtype=torch.float32).eval()
    for start in range(0, len(countries), 50):
        rows = countries[start : start + 50]
        messages = [[{"role": "user", "content": WORDINGS[0].format(row["country"])}] for row in rows]
        prompts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        answers = teacher.generate(**ids, max_new_tokens=16, do_sample=False)[:, ids["input_ids"].shape[1] :]
        for row, answer in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            row["teacher_knows"] = "yes" if ExpectedAnswer(row["capital"], "contains").score(answer) else "no"


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", action="store_true")
    countries = read_countries()
    if parser.parse_args().ask:
        ask(countries)
        with (HERE / "countries.tsv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, countries[0].keys(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(countries)
    (HERE / "capitals.jsonl").write_text(questions(countries), encoding="utf-8")


if __name__ == "__main__":
    main()
