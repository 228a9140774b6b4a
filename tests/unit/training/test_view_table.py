"""The table of a view holds every token at its place, with what is known of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tip.config.io import load_config
from megatron_tip.errors import InputError
from megatron_tip.observability.token_table import read_token_table
from megatron_tip.records import Rollout, TokenSelection
from megatron_tip.training.token_views import view_content
from megatron_tip.training.view_table import token_texts, view_table
from tests.helpers.selection import make_batch
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
CONFIG = load_config(Path(__file__).parents[3] / "examples/quickstart_cpu/quickstart.toml", [])
SUPPORT_SIZE = 4


def rollout(place: int, text: str) -> Rollout:
    prompt, response = (tuple(TOKENIZER.encode(part, add_special_tokens=False)) for part in ("fox?", text))
    return Rollout(place, 0, prompt, response, (0.0,) * len(response), "stop", 0)


ROLLOUTS = [rollout(0, "the fox"), rollout(1, "dogs"), rollout(2, "the quick dog")]
LENGTHS = [len(r.response_ids) for r in ROLLOUTS]


def with_supports(statistics, num_rows):
    ids = (torch.arange(num_rows)[:, None] * 3 + torch.arange(SUPPORT_SIZE)) % 300
    logprobs = torch.linspace(-1, -4, SUPPORT_SIZE).expand(num_rows, SUPPORT_SIZE)
    supports = {"student_support_ids": ids, "teacher_support_ids": ids + 1}
    supports |= {"student_support_logprobs": logprobs, "teacher_support_logprobs": logprobs - 0.5}
    return replace(statistics, **supports)


def table_of(tmp_path, statistics, index, selection, num_samples=2):
    content = view_content(index, statistics, selection, num_samples=num_samples, num_points=9)
    path = tmp_path / "step_000007.parquet"
    path.write_bytes(view_table(content, index, statistics, selection, ROLLOUTS, TOKENIZER, CONFIG, 7))
    return read_token_table(path)


def test_rows_stand_at_their_tokens_in_any_order_of_the_replica(tmp_path):
    """As of micro-batches that do not keep the order of the rollouts; one position is masked out of the loss."""
    statistics, index = make_batch(1, LENGTHS)
    statistics = with_supports(statistics, len(index))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(3))
    order = order[(index.rollout_index[order] != 0) | (index.position[order] != 1)]
    shuffled = type(statistics)(**{k: v[order] for k, v in vars(statistics).items() if v is not None})
    places = type(index)(index.rollout_index[order], index.position[order])
    mask = places.position % 2 == 0
    medians = {"selection/median_student_entropy": 2.0, "selection/median_support_divergence": 1.0}
    selection = TokenSelection(mask, mask.float(), len(places), int(mask.sum()), medians, shuffled.compatibility / 2)
    table = table_of(tmp_path, shuffled, places, selection, num_samples=3)
    rows = table.tokens.to_pylist()
    # The table's rollouts are in the order in which `unique` lists them: by place.
    assert [(row["rollout"], row["position"]) for row in rows] == list(
        zip(index.rollout_index.tolist(), index.position.tolist(), strict=True)
    )
    assert [row["token_id"] for row in rows] == [token for r in ROLLOUTS for token in r.response_ids]
    for k, row in enumerate(rows):
        is_valid = (row["rollout"], row["position"]) != (0, 1)
        assert row["valid"] == is_valid
        assert row["selected"] == (is_valid and row["position"] % 2 == 0)
        if not is_valid:
            assert row["student_entropy"] is row["score"] is None
            assert row["student_support_ids"] == row["teacher_support_logprobs"] == []
            continue
        assert row["student_entropy"] == statistics.student_entropy[k].item()
        assert row["score"] == statistics.compatibility[k].item() / 2
        assert row["student_support_ids"] == statistics.student_support_ids[k].tolist()
        assert row["teacher_support_ids"] == statistics.teacher_support_ids[k].tolist()
        expected = statistics.teacher_support_logprobs[k].half().tolist()
        assert [float(value) for value in row["teacher_support_logprobs"]] == expected
    facts = table.facts
    assert (facts.step, facts.rule, facts.divergence, facts.medians) == (
        7, "ta_opd_teachability", "support_divergence", (2.0, 1.0),
    )  # fmt: skip
    assert [viewed.prompt for viewed in facts.rollouts] == ["fox?"] * 3
    named = {token for name in ("student", "teacher") for row in rows for token in row[f"{name}_support_ids"]}
    assert facts.id_texts == {token: TOKENIZER.decode([token]) for token in named}


def test_without_statistics_the_table_has_the_selection_alone(tmp_path):
    _, index = make_batch(1, LENGTHS)
    selection = TokenSelection(index.position == 0, torch.ones(sum(LENGTHS)), sum(LENGTHS), 3, {})
    table = table_of(tmp_path, None, index, selection, num_samples=1)
    rows = table.tokens.to_pylist()
    assert [row["selected"] for row in rows] == [True] + [False] * (LENGTHS[0] - 1)
    assert all(row["reverse_kl"] is None and row["student_support_ids"] is None for row in rows)
    assert (table.facts.medians, table.facts.id_texts) == (None, {})


def test_a_character_of_several_tokens_stands_at_the_last():
    ids = TOKENIZER.encode("the 数!", add_special_tokens=False)
    texts = token_texts(ids, TOKENIZER)
    assert "".join(texts) == "the 数!"
    place = texts.index("数")
    assert texts[place - 2 : place] == ["", ""]
    broken = [TOKENIZER.encode("数", add_special_tokens=False)[0], *TOKENIZER.encode("a", add_special_tokens=False)]
    assert token_texts(broken, TOKENIZER) == ["\ufffd", "a"]


def test_files_that_are_no_tables_are_refused_by_name(tmp_path):
    _, index = make_batch(1, LENGTHS)
    selection = TokenSelection(index.position == 0, torch.ones(sum(LENGTHS)), sum(LENGTHS), 3, {})
    table_of(tmp_path, None, index, selection)
    path = tmp_path / "step_000007.parquet"
    content = path.read_bytes()
    for name, broken in (("cut", content[:-50]), ("empty", b""), ("other", b"PAR1" + b"\0" * 50 + b"PAR1")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError, match=f"{name}: expected a token table as tracking.view_every_steps"):
            read_token_table(tmp_path / name)
    with pytest.raises(InputError, match="nowhere"):
        read_token_table(tmp_path / "nowhere")
