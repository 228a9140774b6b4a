"""The client of one server, against a fake that misbehaves on the wire."""

import copy
import time

import pytest

from megatron_tip.errors import (
    InputError,
    ServerAnswerError,
    ServerError,
    ServerMismatchError,
    ServerRefusedError,
)
from megatron_tip.rollout.sglang.client import SGLangClient, Timeouts
from megatron_tip.rollout.sglang.keys import ServerKeys
from tests.helpers.fake_sglang import VOCAB_SIZE, CutError, FakeSGLang, StatusError, send_json

FAST = Timeouts(connect=1.0, silence=0.4, control=1.0, retries=2, back_off=0.01)


@pytest.fixture
def fake():
    with FakeSGLang() as server:
        yield server


@pytest.fixture
def client(fake):
    with SGLangClient(fake.url, vocab_size=VOCAB_SIZE, timeouts=FAST) as one:
        yield one


def changed(**meta):
    """Misbehaviour: the last chunk with other entries; `output_ids` or those of meta_info."""

    def misbehave(number, request, chunks):
        last = chunks[-2]
        for name, value in meta.items():
            place = last if name == "output_ids" else last["meta_info"]
            place[name] = value(copy.deepcopy(place[name])) if callable(value) else value
        return chunks

    return misbehave


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_response_is_put_together_from_chunks_of_either_form(cumulative):
    with FakeSGLang(cumulative=cumulative) as fake, SGLangClient(fake.url, vocab_size=VOCAB_SIZE) as client:
        counts = []
        generation = client.generate([1, 2, 3], max_new_tokens=7, stop_token_ids=(2,), on_tokens=counts.append)
    assert generation.response_ids == (3, 4, 5, 6, 7, 8, 9)
    assert generation.logprobs == (-1.5,) * 7
    assert (generation.finish_reason, generation.weight_version) == ("length", "default")
    assert counts == [3, 7]
    sent = fake.generations()[0]
    assert sent["input_ids"] == [1, 2, 3]
    assert "text" not in sent
    assert sent["sampling_params"]["stop_token_ids"] == [2]


@pytest.mark.parametrize(
    "misbehaviour, message",
    [
        (changed(output_ids=lambda ids: ids[:-1]), "response ids so far"),
        (changed(output_ids=lambda ids: [*ids, 4]), "response ids so far"),
        (changed(completion_tokens=5, output_ids=[3, 4], output_token_logprobs=[[-1, 3, None]]), "one logprob"),
        (changed(output_ids=[VOCAB_SIZE] * 3, output_token_logprobs=[[-1, VOCAB_SIZE, None]] * 3), "below 307"),
        (changed(output_ids=[-1] * 3, output_token_logprobs=[[-1, -1, None]] * 3), "below 307"),
        (changed(output_token_logprobs=[[-1, 9, None]] * 3), "logprob of id"),
        (changed(output_token_logprobs=lambda triples: [[None, token, None] for _, token, _ in triples]), "finite"),
        (
            changed(output_token_logprobs=lambda triples: [[float("nan"), token, None] for _, token, _ in triples]),
            "finite",
        ),
        (changed(output_token_logprobs=lambda triples: [[0.5, token, None] for _, token, _ in triples]), "finite"),
        (changed(output_token_logprobs=None), "one logprob"),
        (changed(finish_reason=None), "no finish_reason"),
        (changed(weight_version=7), "weight_version"),
        (changed(output_ids="3 4 5"), "output_ids"),
        (lambda number, request, chunks: [], "a truncated answer"),
        (lambda number, request, chunks: chunks[:-1], "a truncated answer"),
        (lambda number, request, chunks: ["[DONE]"], "empty stream"),
        (lambda number, request, chunks: ["<html>", "[DONE]"], "GenerateAnswer"),
        (lambda number, request, chunks: ["[1, 2", "[DONE]"], "GenerateAnswer"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(fake, client, misbehaviour, message):
    fake.misbehave = misbehaviour
    with pytest.raises(ServerAnswerError, match=message):
        client.generate([1, 2, 3], max_new_tokens=6)


def test_more_ids_than_asked_for_are_refused(fake, client):
    fake.misbehave = lambda number, request, chunks: fake.chunks({"sampling_params": {"max_new_tokens": 8}}, 0)
    with pytest.raises(ServerAnswerError, match="at most 6"):
        client.generate([1, 2, 3], max_new_tokens=6)


def test_half_an_answer_on_a_connection_that_is_cut_is_a_server_error(fake, client):
    def cut(number, request, chunks):
        raise CutError(chunks[:1])

    fake.misbehave = cut
    with pytest.raises(ServerError):
        client.generate([1, 2, 3], max_new_tokens=6)


def test_silence_ends_in_time(fake, client):
    def sleep(number, request, chunks):
        time.sleep(3.0)
        return chunks

    fake.misbehave = sleep
    begin = time.monotonic()
    with pytest.raises(ServerError, match="no sign of life"):
        client.generate([1, 2, 3], max_new_tokens=6)
    assert time.monotonic() - begin < 2.5


@pytest.mark.parametrize("status, kind", [(500, ServerError), (503, ServerError), (400, ServerRefusedError)])
def test_a_failed_generation_is_not_repeated_here(fake, client, status, kind):
    def fail(number, request, chunks):
        raise StatusError(status)

    fake.misbehave = fail
    with pytest.raises(kind, match=str(status)) as caught:
        client.generate([1, 2, 3], max_new_tokens=6)
    assert isinstance(caught.value, ServerRefusedError) == (status == 400)
    assert len(fake.generations()) == 1


def test_an_error_within_a_stream_is_the_error_that_it_names(fake, client):
    error = {"error": {"message": "too long", "type": "invalid_request_error", "code": 400}}
    fake.misbehave = lambda number, request, chunks: [error, "[DONE]"]
    with pytest.raises(ServerRefusedError, match="too long"):
        client.generate([1, 2, 3], max_new_tokens=6)


def test_a_busy_server_is_asked_again_and_a_broken_one_is_not(fake, client):
    fake.statuses["/model_info"] = [503, 503]
    assert client.model_info().model_type == "llama"
    fake.statuses["/model_info"] = [503] * 3
    with pytest.raises(ServerError, match="503"):
        client.model_info()
    fake.seen.clear()
    fake.statuses["/model_info"] = [500]
    with pytest.raises(ServerError, match="500"):
        client.model_info()
    assert len(fake.seen) == 1


@pytest.mark.parametrize("input_ids", [[], [1, VOCAB_SIZE], [-1]])
def test_ids_that_would_end_a_server_are_not_sent(fake, client, input_ids):
    with pytest.raises(InputError, match="307"):
        client.generate(input_ids, max_new_tokens=2)
    with pytest.raises(InputError, match="307"):
        client.generate_answers({"input_ids": [[1, 2], input_ids], "sampling_params": {}})
    assert not fake.seen


def test_the_right_model_passes(client):
    client.check_model(model_type="llama")


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE + 1])
def test_another_vocabulary_is_refused(vocab_size):
    with (
        FakeSGLang(vocab_size=vocab_size) as fake,
        SGLangClient(fake.url, vocab_size=VOCAB_SIZE) as client,
        pytest.raises(ServerMismatchError, match="exactly 307"),
    ):
        client.check_model(model_type="llama")


def test_another_model_is_refused(client):
    with pytest.raises(ServerMismatchError, match=r"expected a qwen3 model .* got a llama"):
        client.check_model(model_type="qwen3")


@pytest.mark.parametrize("content", [[1], {"model": "gpt-4"}, {"is_generation": True, "model_path": "x"}])
def test_a_server_that_is_not_sglang_is_refused(fake, client, content):
    fake.respond = lambda handler, path, body: send_json(handler, content)
    with pytest.raises(ServerMismatchError, match="expected an SGLang server"):
        client.check_model(model_type="llama")


def test_nobody_there_is_an_error_with_the_url():
    with FakeSGLang() as fake:
        url = fake.url
    with SGLangClient(url, vocab_size=9, timeouts=FAST) as client, pytest.raises(ServerError, match=url):
        client.model_info()


def test_weight_endpoints_get_the_admin_key_and_generation_does_not(fake):
    keys = ServerKeys(api="the-api-key", admin="the-admin-key")
    with SGLangClient(fake.url, vocab_size=VOCAB_SIZE, keys=keys, timeouts=FAST) as client:
        client.generate([1], max_new_tokens=2)
        client.weights_endpoint("begin_weight_update")
        client.pause("abort")
        shown = repr(client) + repr(keys)
    assert [(path, key) for path, _, key in fake.seen] == [
        ("/generate", "Bearer the-api-key"),
        ("/begin_weight_update", "Bearer the-admin-key"),
        ("/pause_generation", "Bearer the-admin-key"),
    ]
    assert "the-a" not in shown


def test_a_weight_endpoint_that_reports_failure_is_refused(fake, client):
    fake.respond = lambda handler, path, body: send_json(handler, {"success": False, "message": "no such tensor"})
    with pytest.raises(ServerRefusedError, match="no such tensor"):
        client.weights_endpoint("update_weights_from_distributed", {})
