import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_tip.errors import EngineError, ServerMismatchError
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.teachers import server_scorer as server_teacher
from megatron_tip.teachers.server_scorer import ScoringSettings, ServerTeacher, generated_positions
from tests.helpers.fake_teacher import FakeTeacher, scored_by
from tests.helpers.tiny import make_llama
from tests.helpers.training import make_rollouts

VOCAB = 307
SPANS = ((2, 7), (9, 11))
ROLLOUTS = [
    replace(rollout, environment_spans=SPANS if place == 1 else ())
    for place, rollout in enumerate(make_rollouts([3, 14, 0, 6]))
]
ROLLOUTS[3] = replace(ROLLOUTS[3], response_ids=(*ROLLOUTS[3].response_ids[:2], VOCAB - 1, 0, 1, VOCAB - 1))
NAMES = [""] * len(ROLLOUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("teacher"), seed=2, num_layers=2)


def teacher_of(*servers, vocab_size=VOCAB, **settings) -> ServerTeacher:
    timeouts = Timeouts(retries=0, silence=20.0)
    clients = [SGLangClient(server.url, vocab_size=vocab_size, timeouts=timeouts) for server in servers]
    return ServerTeacher({"": clients}, ScoringSettings(vocab_size=vocab_size, support_size=4, **settings))


def expected_rows(folder) -> torch.Tensor:
    rows = []
    for rollout in ROLLOUTS:
        logprobs = scored_by(folder, rollout.prompt_ids + rollout.response_ids)
        rows += [logprobs[len(rollout.prompt_ids) - 1 + place] for place in generated_positions(rollout)]
    return torch.stack(rows)


@pytest.mark.parametrize("window_tokens", [1, 4, 100])
def test_rows_are_the_models_own(folder, window_tokens):
    expected = expected_rows(folder)
    labels = torch.tensor([r.response_ids[place] for r in ROLLOUTS for place in generated_positions(r)])
    with FakeTeacher(folder) as one, FakeTeacher(folder) as two:
        teacher = teacher_of(one, two, window_tokens=window_tokens)
        teacher.check(asks_student_support=True)
        got = teacher.top_k(ROLLOUTS, NAMES)
        asked = torch.randint(0, VOCAB, (len(expected), 4), generator=torch.Generator().manual_seed(1))
        on_asked = teacher.student_support(ROLLOUTS, NAMES, asked)
        assert one.generations()
        assert two.generations(), "servers are taken in turn"
        for body in one.generations() + two.generations():
            assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
        teacher.close()
    assert len(got) == 3 + 7 + 0 + 6, "what the environment wrote is no row"
    values, ids = expected.topk(4)
    assert torch.equal(got.support_ids, ids)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got.support_logprobs.double(), values, **close)
    torch.testing.assert_close(got.label_logprobs.double(), expected.gather(1, labels[:, None]).squeeze(1), **close)
    torch.testing.assert_close(on_asked.double(), expected.gather(1, asked), **close)


def test_nothing_generated_is_nothing_asked(folder):
    with FakeTeacher(folder) as server:
        teacher = teacher_of(server)
        got = teacher.top_k(ROLLOUTS[2:3], [""])
        assert (len(got), got.support_ids.shape) == (0, (0, 4))
        assert teacher.student_support(ROLLOUTS[2:3], [""], got.support_ids).shape == (0, 4)
        assert not server.generations()


def test_several_teachers_score_their_own(folder, tmp_path):
    other = make_llama(tmp_path, seed=3, num_layers=2)
    with FakeTeacher(folder) as one, FakeTeacher(other) as two:
        clients = {
            "maths": [SGLangClient(one.url, vocab_size=VOCAB)],
            "code": [SGLangClient(two.url, vocab_size=VOCAB)],
        }
        teacher = ServerTeacher(clients, ScoringSettings(VOCAB, 4))
        teacher.check(asks_student_support=True)
        got = teacher.top_k(ROLLOUTS, ["maths", "code", "maths", "code"])
    for name, rows in ((folder, slice(0, 3)), (other, slice(3, 10))):
        place = 0 if name is folder else 1
        rollout = ROLLOUTS[place]
        logprobs = scored_by(name, rollout.prompt_ids + rollout.response_ids)
        own = logprobs[[len(rollout.prompt_ids) - 1 + p for p in generated_positions(rollout)]]
        torch.testing.assert_close(got.support_logprobs[rows].double(), own.topk(4).values, rtol=1e-4, atol=1e-4)


def test_a_larger_vocabulary_is_cut_to_the_shared_ids(folder):
    """The server's padding ids are among its top-K; they are left out and the next ones move up."""
    expected = expected_rows(folder)
    first = int(expected.topk(4).indices.amax())  # some row has it in its top-K
    with FakeTeacher(folder) as server:
        rollouts = [replace(r, response_ids=tuple(min(i, first - 1) for i in r.response_ids)) for r in ROLLOUTS]
        teacher = teacher_of(server, vocab_size=first)
        teacher.check(asks_student_support=True)
        got = teacher.top_k(rollouts, NAMES)
        assert got.support_ids.shape == (16, 4)
        assert int(got.support_ids.max()) < first
        assert {body.get("top_logprobs_num") for body in server.generations()[2:]} == {12}


def nan_label(meta):
    meta["input_token_logprobs"][1][0] = None


def other_token(meta):
    meta["input_token_logprobs"][1][1] += 1


def half(meta):
    meta["input_top_logprobs"] = meta["input_top_logprobs"][:-1]


def twice(meta):
    meta["input_top_logprobs"][1][1] = meta["input_top_logprobs"][1][0]


def positive(meta):
    meta["input_top_logprobs"][1][0][0] = 0.5


@pytest.mark.parametrize(
    "spoil, message",
    [
        (nan_label, "expected finite logprobs"),
        (other_token, "expected the logprobs of 3 ids"),
        (half, "expected input_top_logprobs of 3 tokens, got 2"),
        (twice, "expected 4 different ids"),
        (positive, "expected finite logprobs <= 0"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_goes_to_the_next_server(folder, spoil, message):
    rollouts, names = ROLLOUTS[:1], [""]
    with FakeTeacher(folder) as bad, FakeTeacher(folder) as good:
        bad.spoil = spoil
        both = teacher_of(bad, good).top_k(rollouts, names)
        alone = teacher_of(good).top_k(rollouts, names)
        assert torch.equal(both.support_logprobs, alone.support_logprobs)
        with pytest.raises(EngineError, match=f"none of its 1 servers scored a rollout; the last error: .*{message}"):
            teacher_of(bad).top_k(rollouts, names)


def test_a_dead_server_is_passed_over(folder):
    with FakeTeacher(folder) as good:
        dead = FakeTeacher(folder)
        dead.stop()
        assert len(teacher_of(dead, good).top_k(ROLLOUTS, NAMES)) == 16
        with pytest.raises(EngineError, match="none of its 1 servers"):
            teacher_of(dead).top_k(ROLLOUTS, NAMES)


def test_servers_that_are_gone_for_a_while_are_waited_for(folder, monkeypatch):
    with FakeTeacher(folder) as server:
        expected = teacher_of(server).top_k(ROLLOUTS, NAMES)
        server.stop()
        paused = []

        def sleep(seconds):
            paused.append(seconds)
            if len(paused) == 1:
                server.come_back()

        monkeypatch.setattr(server_teacher, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        got = teacher_of(server, wait_seconds=60.0, max_concurrent=1).top_k(ROLLOUTS, NAMES)
        assert paused == [1.0]
        assert torch.equal(got.support_logprobs, expected.support_logprobs)
        server.spoil = lambda meta: meta.pop("input_top_logprobs")
        with pytest.raises(EngineError, match="none of its 1 servers"):  # not worth waiting for
            teacher_of(server, wait_seconds=60.0, max_concurrent=1).top_k(ROLLOUTS, NAMES)
        assert paused == [1.0]


def test_a_server_that_names_no_ids_is_refused_where_they_are_needed(folder):
    with FakeTeacher(folder, names_ids=False) as server:
        teacher_of(server).check(asks_student_support=False)
        with pytest.raises(ServerMismatchError, match=r"input_token_ids_logprobs .*student_support = \"skip\""):
            teacher_of(server).check(asks_student_support=True)


def test_a_smaller_vocabulary_is_refused(folder):
    with (
        FakeTeacher(folder) as server,
        pytest.raises(ServerMismatchError, match="at least the student's 308 vocabulary entries"),
    ):
        teacher_of(server, vocab_size=308).check(asks_student_support=True)
