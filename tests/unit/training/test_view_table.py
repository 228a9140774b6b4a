"""The table of a view holds every token at its place, with what is known of it."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_tip.config.io import load_config
from megatron_tip.errors import InputError
from megatron_tip.observability.token_table import (
    SCHEMA,
    TokenTable,
    decode_token_table,
    encode_token_table,
    read_token_table,
)
from megatron_tip.records import Rollout, TokenSelection
from megatron_tip.training.id_text import id_text
from megatron_tip.training.view_table import token_texts, view_table
from tests.helpers.selection import make_batch
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
PRUNED_PAIR = Path(__file__).parents[3] / "examples/pruned_pair/pruned_pair.toml"
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


def view_of(statistics, index, selection, *, samples=2, points=9):
    overrides = [f"tracking.view_samples={samples}", f"tracking.view_points={points}"]
    return view_table(index, statistics, selection, ROLLOUTS, TOKENIZER, load_config(PRUNED_PAIR, overrides), 7)


def selection_of(mask, scores=None):
    medians = {"selection/median_student_entropy": 2.0, "selection/median_support_divergence": 1.0}
    return TokenSelection(mask, mask.float(), len(mask), int(mask.sum()), medians, scores)


def test_rows_stand_at_their_tokens_in_any_order_of_the_replica():
    """As of micro-batches that do not keep the order of the rollouts; one position is masked out of the loss."""
    statistics, index = make_batch(1, LENGTHS)
    statistics = with_supports(statistics, len(index))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(3))
    order = order[(index.rollout_index[order] != 0) | (index.position[order] != 1)]
    shuffled = type(statistics)(**{k: v[order] for k, v in vars(statistics).items() if v is not None})
    places = type(index)(index.rollout_index[order], index.position[order])
    mask = places.position % 2 == 0
    table = view_of(shuffled, places, selection_of(mask, shuffled.compatibility / 2), samples=3)
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
    assert facts.id_texts == {token: id_text(token, TOKENIZER) for token in named}


def test_the_bytes_hold_the_whole_view():
    statistics, index = make_batch(1, LENGTHS)
    view = view_of(with_supports(statistics, len(index)), index, selection_of(index.position == 1))
    content = encode_token_table(view)
    found = decode_token_table(content)
    assert (found.facts, found.tokens) == (view.facts, view.tokens)
    assert encode_token_table(found) == content


def test_a_view_of_another_version_is_read_with_gaps():
    statistics, index = make_batch(1, LENGTHS)
    view = view_of(with_supports(statistics, len(index)), index, selection_of(index.position == 1))

    def read(tokens: pa.Table, **changes: object) -> TokenTable:
        content = io.BytesIO()
        facts = json.dumps({**asdict(view.facts), **changes})
        kept = tokens.replace_schema_metadata({"megatron_tip.token_table": facts})
        pq.write_table(kept, content)
        return decode_token_table(content.getvalue(), "older.parquet")

    older = view.tokens.drop_columns(["forward_kl", "teacher_support_ids", "teacher_support_logprobs"])
    older = older.append_column("novel", [[0.5] * len(older)])
    found = read(older)
    assert (found.facts, found.tokens.schema) == (view.facts, SCHEMA)
    gaps = {name for name in SCHEMA.names if found.tokens.column(name).null_count > view.tokens.column(name).null_count}
    assert gaps == {"forward_kl", "teacher_support_ids", "teacher_support_logprobs"}
    assert found.tokens.column("reverse_kl") == view.tokens.column("reverse_kl")
    with pytest.raises(InputError, match=r"older\.parquet: .* without values in the columns \['selected'\]"):
        read(view.tokens.drop_columns(["selected"]))
    with pytest.raises(InputError, match=r"without values in the columns \['rollout'\]"):
        read(view.tokens.set_column(0, "rollout", pa.nulls(len(view.tokens), pa.int32())))
    with pytest.raises(InputError, match=r"older\.parquet: expected a token table"):
        read(view.tokens.set_column(6, SCHEMA.names[6], [["high"] * len(view.tokens)]))
    for changes in ({"medians": [1.0]}, {"points": [["x", 1.0, True]]}, {"rollouts": [{"rollout": 0}]}, {"step": "7"}):
        with pytest.raises(InputError, match=r"older\.parquet: expected a token table"):
            read(view.tokens, **changes)
    assert read(view.tokens, novel="a fact of a later version").facts == view.facts
    place = SCHEMA.names.index("student_support_ids")
    short = pa.array([[1]] * len(view.tokens), pa.list_(pa.int32()))
    with pytest.raises(InputError, match=r"the lists of student_support_ids .* differ in length"):
        read(view.tokens.set_column(place, "student_support_ids", short))


def test_a_view_shows_the_tokens_of_the_first_responses_and_points_of_all():
    statistics, index = make_batch(1, LENGTHS)
    mask = (index.position == 1) & (index.rollout_index != 1)
    view = view_of(statistics, index, selection_of(mask), points=1000)
    first, second = (view.tokens_of(viewed) for viewed in view.facts.rollouts)
    assert ["".join(tokens.column("text").to_pylist()) for tokens in (first, second)] == ["the fox", "dogs"]
    assert [place for place, chosen in enumerate(first.column("selected").to_pylist()) if chosen] == [1]
    assert not any(second.column("selected").to_pylist())
    assert first.column("reverse_kl").to_pylist() == statistics.reverse_kl[: LENGTHS[0]].tolist()
    expected = zip(statistics.student_entropy, statistics.support_divergence, mask.tolist(), strict=True)
    assert view.facts.points == tuple((round(x.item(), 4), round(y.item(), 4), kept) for x, y, kept in expected)


def test_points_are_thinned_over_the_whole_batch():
    statistics, index = make_batch(1, [50, 50])
    ids = tuple(range(50))
    mask = torch.zeros(100, dtype=torch.bool)
    rollouts = [Rollout(place, 0, (1,), ids, (0.0,) * 50, "stop", 0) for place in range(2)]
    config = load_config(PRUNED_PAIR, ["tracking.view_points=30"])
    view = view_table(index, statistics, selection_of(mask), rollouts, TOKENIZER, config, 7)
    expected = [round(value, 4) for value in statistics.student_entropy[::4].tolist()]
    assert [point[0] for point in view.facts.points] == expected


def test_a_replica_without_valid_tokens_has_no_points():
    statistics, index = make_batch(1, [])
    view = view_of(statistics, index, selection_of(torch.zeros(0, dtype=torch.bool)))
    assert (view.facts.points, len(view.tokens)) == ((), 0)


def test_without_statistics_the_table_has_the_selection_alone():
    _, index = make_batch(1, LENGTHS)
    selection = TokenSelection(index.position == 0, torch.ones(sum(LENGTHS)), sum(LENGTHS), 3, {})
    table = view_of(None, index, selection, samples=1)
    rows = table.tokens.to_pylist()
    assert [row["selected"] for row in rows] == [True] + [False] * (LENGTHS[0] - 1)
    assert all(row["reverse_kl"] is None and row["student_support_ids"] is None for row in rows)
    assert (table.facts.medians, table.facts.points, table.facts.id_texts) == (None, (), {})


def test_a_character_of_several_tokens_stands_at_the_last():
    ids = TOKENIZER.encode("the 数!", add_special_tokens=False)
    texts = token_texts(ids, TOKENIZER)
    assert "".join(texts) == "the 数!"
    place = texts.index("数")
    assert texts[place - 2 : place] == ["", ""]
    broken = [TOKENIZER.encode("数", add_special_tokens=False)[0], *TOKENIZER.encode("a", add_special_tokens=False)]
    [cut, letter] = token_texts(broken, TOKENIZER)
    assert (cut, letter) == ("\u27e8E6\u27e9", "a")


def test_files_that_are_no_tables_are_refused_by_name(tmp_path):
    _, index = make_batch(1, LENGTHS)
    selection = TokenSelection(index.position == 0, torch.ones(sum(LENGTHS)), sum(LENGTHS), 3, {})
    content = encode_token_table(view_of(None, index, selection))
    for name, broken in (("cut", content[:-50]), ("empty", b""), ("other", b"PAR1" + b"\0" * 50 + b"PAR1")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(
            InputError, match=f"{name}: expected a token table as written with tracking.view_every_steps"
        ):
            read_token_table(tmp_path / name)
    with pytest.raises(InputError, match="nowhere"):
        read_token_table(tmp_path / "nowhere")
