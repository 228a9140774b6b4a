"""The shared folder: whole or not there, and one version at a time."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_tip.conversion.safetensors_io import HfCheckpoint
from megatron_tip.conversion.weight_map import hf_shapes
from megatron_tip.errors import OutputError
from megatron_tip.rollout.sglang.client import SGLangClient
from megatron_tip.rollout.sglang.pool import PooledServer
from megatron_tip.rollout.sglang.weights.folder import FolderTransport
from tests.helpers.disk import little_space
from tests.helpers.fake_sglang import VOCAB_SIZE, FakeSGLang, send_json
from tests.helpers.tiny import make_llama


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return HfCheckpoint(make_llama(tmp_path_factory.mktemp("student"), seed=1, num_layers=1))


def weights_of(student, shift=0.0):
    for name in hf_shapes(student.architecture):
        yield name, student.read(name) + shift


def served(fake):
    return PooledServer(lambda url: SGLangClient(url, vocab_size=VOCAB_SIZE), url=fake.url)


def test_servers_read_the_files_that_were_written_and_older_versions_go(student, tmp_path):
    transport = FolderTransport(tmp_path, student, dtype=torch.float32, bucket_bytes=40_000)
    with FakeSGLang() as fake:
        server = served(fake)
        for version, shift in (("run/0", 0.0), ("run/1", 1.0)):
            assert transport.send([server], weights_of(student, shift), version) == [server]
        asked = [body for path, body, _ in fake.seen if path == "/update_weights_from_disk"]
        assert transport.refresh(server) == "run/1"
    (folder,) = tmp_path.iterdir()
    assert asked[-1]["model_path"] == str(folder)
    assert asked[-1]["weight_version"] == fake.version == "run/1"
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1
    written = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for name, tensor in weights_of(student, 1.0):
        assert torch.equal(written[name], tensor)
    assert (folder / "config.json").exists()
    assert transport.num_bytes == sum(path.stat().st_size for path in files)
    transport.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_of_the_same_run_left_goes_and_anothers_stays(student, tmp_path):
    for left in ("mine_run0_7", "mine_run1_9", "yours_run2_4"):
        (tmp_path / left).mkdir()
    transport = FolderTransport(tmp_path, student, dtype=torch.float32, bucket_bytes=10**9, owner="mine")
    with FakeSGLang() as fake:
        transport.send([served(fake)], weights_of(student), "run3/0")
    assert {path.name for path in tmp_path.iterdir()} == {"mine_run3_0", "yours_run2_4"}


def test_a_full_disk_is_an_output_error_and_the_last_version_stays_whole(student, tmp_path):
    transport = FolderTransport(tmp_path, student, dtype=torch.float32, bucket_bytes=10**9)
    with FakeSGLang() as fake:
        server = served(fake)
        transport.send([server], weights_of(student), "run/0")
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(OutputError, match="cannot be written"), little_space():  # a write in mid-file fails
            transport.send([server], weights_of(student, 1.0), "run/1")
        assert fake.version == "run/0"
        assert transport.refresh(server) == "run/0"
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_server_that_says_it_holds_something_else_is_not_taken(student, tmp_path):
    transport = FolderTransport(tmp_path, student, dtype=torch.float32, bucket_bytes=10**9)
    with FakeSGLang() as liar, FakeSGLang() as refusing, FakeSGLang() as good:
        answer = liar.respond

        def lie(handler, path, body):
            if path == "/update_weights_from_disk":
                return send_json(handler, {"success": True})
            return answer(handler, path, body)

        liar.respond = lie
        refusing.statuses["/update_weights_from_disk"] = [500]
        servers = [served(fake) for fake in (liar, refusing, good)]
        assert transport.send(servers, weights_of(student), "run/0") == servers[2:]
