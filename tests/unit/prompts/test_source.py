import json
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_tip.config import HeldoutConfig, PromptsConfig
from megatron_tip.errors import ConfigError, InputError, OptionalDependencyError
from megatron_tip.prompts.files import read_prompt_file
from megatron_tip.prompts.reasoning_tasks import generate_questions
from megatron_tip.prompts.source import load_prompts
from megatron_tip.seeds import derive_seed
from tests.helpers.prompt_files import load, write_both, write_lines, write_texts
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

BOS = 1


def test_a_text_is_a_user_message_and_has_one_begin_token(tmp_path):
    source = load(path=write_texts(tmp_path, "2 + 2 ="), system_prompt="be brief")
    [prompt] = source.training
    assert prompt.text == "<|bos|>system: be brief\nuser: 2 + 2 =\nassistant: "
    assert prompt.prompt_ids.count(BOS) == 1
    assert prompt.prompt_ids[0] == BOS
    assert make_tiny_tokenizer().decode(prompt.prompt_ids) == prompt.text


def test_messages_are_rendered_and_keep_their_own_system_message(tmp_path):
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    path = write_lines(tmp_path, json.dumps({"chat": messages, "other": 1}))
    [prompt] = load(path=path, field="chat", system_prompt="given", apply_chat_template=False).training
    assert prompt.text == "<|bos|>system: own\nuser: hi\nassistant: "


@pytest.mark.parametrize("text", ["2 + 2 =", "<|bos|>2 + 2 ="])
def test_a_plain_text_has_one_begin_token_too(tmp_path, text):
    [prompt] = load(path=write_texts(tmp_path, text), apply_chat_template=False).training
    assert prompt.text == text
    assert make_tiny_tokenizer().decode(prompt.prompt_ids) == "<|bos|>2 + 2 ="


def test_a_parquet_column_of_texts_or_of_messages(tmp_path):
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "fox"}]]
    pq.write_table(pa.table({"text": ["hi", "fox"], "chat": messages, "id": [1, 2]}), tmp_path / "p.parquet")
    expected = ["<|bos|>user: hi\nassistant: ", "<|bos|>user: fox\nassistant: "]
    for field in ("text", "chat"):
        prompts = load(path=tmp_path / "p.parquet", field=field).training
        assert [prompt.text for prompt in prompts] == expected
        assert [prompt.index for prompt in prompts] == [0, 1]


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "line 2: expected a JSON object, got an empty line"),
        ("  ", "line 2: expected a JSON object, got an empty line"),
        ('{"prompt": "a', "line 2: expected a JSON object, got a broken line"),
        ('["prompt"]', "line 2: expected a JSON object, got list"),
        ('{"text": "a"}', r"line 2, got 'prompt'; set prompts.field to one that it has: text"),
        ('{"prompt": [{"from": "human", "value": "a"}]}', r"; rename 'from' to 'role'"),
        ('{"prompt": 3}', "line 2: expected 'prompt' to be a text or a list of messages .* got 3"),
        ('{"prompt": ""}', "line 2: expected 'prompt' to be a text, got an empty one; remove"),
        ('{"prompt": []}', "line 2: expected 'prompt' to be a text"),
        ('{"prompt": [{"role": "user"}]}', "line 2: expected 'prompt' to be a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path, '{"prompt": "good"}', line, '{"prompt": "good"}')
    with pytest.raises(InputError, match=message) as caught:
        load(path=path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(InputError, match="line 2: expected a JSON object, got a broken line"):
        load(path=tmp_path / "p.jsonl")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*nowhere\.jsonl"):
        load(path=tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"expected a \.jsonl or \.parquet file, got .*p\.csv"):
        load(path=tmp_path / "p.csv")
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(InputError, match=r"got a Git LFS pointer in .*pointer\.parquet; run `git lfs pull` there"):
        load(path=tmp_path / "pointer.parquet")
    with pytest.raises(InputError, match="got an empty file"):
        load(path=write_lines(tmp_path))
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    with pytest.raises(
        InputError, match=r"prompts\.field: .* got 'text'; set prompts.field to one that it has: prompt"
    ):
        load(path=path, field="text")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"p\.parquet: not a readable Parquet file"):
        load(path=path)
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    with pytest.raises(InputError, match="row 2: expected 'prompt' to be a text"):
        load(path=path)


def test_fewer_prompts_than_a_step_takes_are_said_to_repeat(tmp_path, caplog):
    path = write_texts(tmp_path, "fox", "dog", "quick")
    load(path=path)
    assert "fewer than" not in caplog.text
    load(path=path, heldout=2)
    assert "prompts: 1 to train on, fewer than rollout.prompts_per_step = 3" in caplog.text


def test_long_prompts_are_skipped_and_counted(tmp_path):
    path = write_texts(tmp_path, "fox", "lazy dog " * 50, "dog")
    source = load(path=path, max_prompt_tokens=40)
    assert source.num_skipped == 1
    assert [prompt.index for prompt in source.training] == [0, 2], "an index is the place in the source"
    with pytest.raises(InputError, match="all 3 prompts are longer than 2 tokens, the shortest has"):
        load(path=path, max_prompt_tokens=2)


def test_the_last_of_a_file_are_held_out_and_their_texts_not_trained_on(tmp_path):
    source = load(path=write_texts(tmp_path, "a", "d", "b", "c", "d"), heldout=2, apply_chat_template=False)
    assert [prompt.text for prompt in source.heldout] == ["c", "d"]
    assert [prompt.text for prompt in source.training] == ["a", "b"]
    assert (source.num_copies, source.num_duplicates) == (1, 0)
    with pytest.raises(InputError, match="none is left for training"):
        load(path=write_texts(tmp_path, "a", "b"), heldout=2)
    with pytest.raises(InputError, match="at least 3 held-out prompts"):
        load(path=write_texts(tmp_path, "a", "b"), heldout=3)


def test_steps_go_through_every_prompt_once_an_epoch_in_an_order_of_its_own(tmp_path):
    path = write_texts(tmp_path, *(f"{i}" for i in range(20)))
    source = load(path=path, prompts_per_step=8)
    drawn = [prompt.index for step in range(1, 6) for prompt in source.batch(step)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:]
    assert drawn[:20] != list(range(20))
    again = load(path=path, prompts_per_step=8)
    assert again.batch(3) == source.batch(3), "a step does not depend on the steps before it"
    assert load(path=path, prompts_per_step=8, seed=6).batch(1) != source.batch(1)
    in_order = load(path=path, prompts_per_step=8, shuffle=False)
    assert [prompt.index for prompt in in_order.batch(3)] == [16, 17, 18, 19, 0, 1, 2, 3]


def test_a_step_may_take_more_prompts_than_there_are(tmp_path):
    source = load(path=write_texts(tmp_path, "a", "b"), prompts_per_step=5)
    assert sorted(prompt.index for prompt in source.batch(1)[:4]) == [0, 0, 1, 1]


def test_reasoning_gym_draws_from_tasks_in_turn_and_holds_out_other_questions():
    options = {"source": "reasoning_gym", "tasks": ("basic_arithmetic", "leg_counting")}
    source = load(heldout=4, **options)
    assert len(source.training) == 6, "as many as two steps of three need"
    assert ["Calculate" in p.text or "Evaluate" in p.text for p in source.training] == [True, False] * 3
    assert load(heldout=4, **options).training == source.training
    assert load(heldout=4, seed=6, **options).training != source.training
    assert len({p.text for p in source.heldout}) == 4
    assert len(load(num_prompts=9, **options).training) == 9


def test_held_out_questions_are_never_training_questions():
    # coin_flip has few different questions, so the other seed repeats some of the training ones
    source = load(heldout=30, source="reasoning_gym", tasks=("coin_flip",), num_prompts=60, apply_chat_template=False)
    trained, held_out = ({prompt.text for prompt in prompts} for prompts in (source.training, source.heldout))
    others = {one.text for one in generate_questions(("coin_flip",), 240, derive_seed(5, 2))}
    assert trained & others, "the case must hold a repetition"
    assert len(held_out) == 30
    assert not trained & held_out
    assert source.heldout_questions.keys() == {prompt.index for prompt in source.heldout}
    assert all(source.heldout_questions[prompt.index].text in prompt.text for prompt in source.heldout)


def test_unknown_tasks_are_named():
    with pytest.raises(ConfigError, match=r"got \['no_such_task'\]; known: .*'basic_arithmetic'"):
        load(source="reasoning_gym", tasks=("basic_arithmetic", "no_such_task"))


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(OptionalDependencyError, match=r"megatron_tip\[tasks\]"):
        load(source="reasoning_gym", tasks=("basic_arithmetic",))


def test_chat_needs_a_template_and_a_plain_text_has_no_system_message(tmp_path):
    path = write_texts(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"line 1 is a plain text and prompts\.apply_chat_template is false"):
        load(path=path, apply_chat_template=False, system_prompt="s")
    tokenizer = make_tiny_tokenizer(chat_template="")
    with pytest.raises(ConfigError, match="line 1 needs a chat template and the tokenizer has none"):
        load_prompts(
            PromptsConfig(path=path), HeldoutConfig(num_prompts=0), tokenizer, prompts_per_step=1, steps=1, seed=1
        )


def test_a_template_that_refuses_is_named(tmp_path):
    tokenizer = make_tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"line 1: the tokenizer's chat template refuses .*roles must alternate"):
        load_prompts(
            PromptsConfig(path=write_texts(tmp_path, "a")),
            HeldoutConfig(num_prompts=0),
            tokenizer,
            prompts_per_step=1,
            steps=1,
            seed=1,
        )


CHAT = '{"prompt": [{"role": "user", "content": "q"}, {"role": "%s", "content": "%s"}]}'


@pytest.mark.parametrize(
    "line, message",
    [
        (CHAT % ("assistant", "the answer"), "line 2: expected messages that the student is to answer"),
        (
            r'{"prompt": "a\ud83d b"}',
            r"line 2: expected Unicode text, got half a surrogate pair \(.ud83d\) at character 1",
        ),
        (CHAT % ("user", r"\ude00"), "line 2: expected Unicode text"),
        ("[" * 200_000, "line 2: expected a JSON object, got a broken line"),
    ],
)
def test_what_would_spoil_a_prompt_is_refused_by_its_line(tmp_path, line, message):
    path = write_lines(tmp_path, '{"prompt": "good"}', line)
    with pytest.raises(InputError, match=message):
        load(path=path)


def test_a_tokenizer_that_appends_the_end_of_sequence(tmp_path, caplog):
    """Without its end: the student would write after it. With an end that the text itself has, the text is refused."""
    tokenizer = make_tiny_tokenizer()
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    )
    source = load(path=write_texts(tmp_path, "fox", "dog"), apply_chat_template=False, tokenizer=tokenizer)
    assert [tokenizer.decode(prompt.prompt_ids) for prompt in source.training] == ["<|bos|>fox", "<|bos|>dog"]
    assert caplog.text.count("the tokenizer appends") == 1
    with pytest.raises(InputError, match="line 1: expected a prompt that the student continues"):
        load(path=write_texts(tmp_path, f"fox{eos}"), apply_chat_template=False, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ messages[-1].content }}", "the tokenizer's chat template drops it \\('be brief'\\)"),
        ("{{ 'tools: ' + messages[0].get('tools') }}", "refuses these messages: TypeError"),
        ("{{ raise_exception('no') }}", "refuses these messages: TemplateError: no"),
        ({"rag": "R", "tool_use": "T"}, "refuses these messages: ValueError: .*no default"),
    ],
)
def test_a_template_that_loses_the_system_message_or_fails(tmp_path, template, reason):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"line 1: .*{reason}"):
        load(path=write_texts(tmp_path, "q"), system_prompt="be brief", tokenizer=tokenizer)


def test_a_file_that_repeats_its_prompts(tmp_path, caplog):
    """Each is drawn once an epoch, whatever its copies; held-out ones are different ones and never trained on."""
    caplog.set_level("INFO")
    source = load(path=write_texts(tmp_path, *"abcd" * 25), heldout=2, apply_chat_template=False)
    assert [prompt.text for prompt in source.heldout] == ["c", "d"]
    assert [(prompt.index, prompt.text) for prompt in source.training] == [(0, "a"), (1, "b")]
    assert source.num_copies == 96
    assert "100 rows, 4 distinct; copies are left out" in caplog.text
    assert "2 to train on, 2 of them distinct; 2 held out; left out: 0 longer than" in caplog.text
    with pytest.raises(InputError, match="5 held-out prompts and one for training, got 4 different ones"):
        load(path=write_texts(tmp_path, *"abcd" * 25), heldout=5, apply_chat_template=False)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_rows_are_copies_if_the_fields_that_matter_are_the_same(tmp_path):
    """Not by other fields, which differ here from row to row; a different teacher makes a different prompt."""
    values = [("x", "m"), ("y", "m"), ("x", "m"), ("x", "n"), ("y", "m"), ("z", "n"), ("x", "n")]
    rows = [{"id": i, "chat": chat(text), "who": who} for i, (text, who) in enumerate(values)]
    for path in write_both(tmp_path, rows):
        found = read_prompt_file(path, "chat", "who")
        assert (found.num_rows, found.num_copies) == (7, 3)
        assert [(row.index, row.last_index, row.prompt, row.teacher) for row in found.rows] == [
            (0, 2, chat("x"), "m"),
            (1, 4, chat("y"), "m"),
            (3, 6, chat("x"), "n"),
            (5, 5, chat("z"), "n"),
        ]
        without = read_prompt_file(path, "chat")
        assert [(row.index, row.last_index) for row in without.rows] == [(0, 6), (1, 4), (5, 5)]


def test_values_that_look_alike_are_no_copies(tmp_path):
    texts = ["1", "1 ", "\u00e9", "e\u0301", '{"role": "user"}']
    for path in write_both(tmp_path, [{"prompt": text} for text in texts]):
        assert [row.prompt for row in read_prompt_file(path, "prompt").rows] == texts
    lines = [json.dumps({"prompt": "a", "teacher": "b"}), json.dumps({"prompt": chat("a"), "teacher": "b"})]
    assert read_prompt_file(write_lines(tmp_path, *lines), "prompt", "teacher").num_copies == 0


def test_a_line_of_the_same_bytes_is_not_decoded_again(tmp_path, monkeypatch):
    """The last line has no newline, which makes no difference."""
    decoded: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: decoded.append(line) or loads(line))
    path = write_texts(tmp_path, *"abab")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_prompt_file(path, "prompt").num_rows == 4
    assert len(decoded) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_copies(tmp_path, suffix):
    """Also where another field differs in every row, so that each is decoded."""
    peaks = []
    for copies in (4, 40):
        rows = [{"id": f"{i:040}", "prompt": f"{i % 1000} " * 50} for i in range(1000 * copies)]
        path = write_both(tmp_path, rows)[suffix == "parquet"]
        del rows
        tracemalloc.start()
        assert len(read_prompt_file(path, "prompt").rows) == 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 1_000_000, "ten times the rows"


def test_the_digest_knows_copies_that_change_what_is_held_out(tmp_path):
    first = load(path=write_texts(tmp_path, *"abcabc"), heldout=1)
    other = load(path=write_texts(tmp_path, *"abcacb"), heldout=1)
    assert first.heldout[0].text != other.heldout[0].text
    assert first.digest != other.digest


def test_the_digest_is_of_what_the_file_holds_and_not_of_the_day(tmp_path):
    tokenizer = make_tiny_tokenizer()
    digests = []
    for day in ("Monday", "Tuesday"):
        tokenizer.chat_template = "{{ strftime_now('" + day + "') }} {{ messages[-1].content }}"  # as the clock would
        source = load(path=write_texts(tmp_path, "a", "b"), tokenizer=tokenizer)
        digests.append((source.training[0].text, source.digest))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1], "another template is another run"
    tokenizer.chat_template = "{{ strftime_now('%f') }} {{ messages[-1].content }}"  # microseconds: new at each call
    first, second = (load(path=write_texts(tmp_path, "a", "b"), tokenizer=tokenizer) for _ in range(2))
    assert first.training[0].text != second.training[0].text
    assert first.digest == second.digest
    assert load(path=write_texts(tmp_path, "a", "c"), tokenizer=tokenizer).digest != first.digest
