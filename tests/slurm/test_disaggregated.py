"""Where the scripts put servers and trainer: by stand-ins of both, and by real ones in a run with a teacher's node.

A stand-in server reads its arguments as `megatron_tip.rollout.sglang.main` does, answers /health and ends with its
input; a stand-in trainer asks the servers that it was given and notes its arguments and node.
"""

import json
import sys
from pathlib import Path

import pytest

from megatron_tip.rollout.sglang.server import CPU_ENVIRONMENT, CPU_SHIM
from tests.helpers.slurm import SlurmCluster
from tests.slurm.test_scripts import SITE, SLURM

WRAPPER = """#!/bin/sh
case "$*" in
  *megatron_tip.rollout.sglang.main*) exec {python} {stand_in} serve ;;
  *megatron_tip.cli*train*) exec {python} {stand_in} train "$@" ;;
  *) exec {python} "$@" ;;
esac
"""
STAND_IN = """
import http.server, json, os, sys, threading, urllib.request
from pathlib import Path

folder, node = Path({folder!r}), os.environ["SLURMD_NODENAME"]

def note(name, content):
    (folder / (name + ".partial")).write_text(json.dumps(content))
    (folder / (name + ".partial")).rename(folder / name)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

if sys.argv[1] == "serve":
    arguments = json.loads(sys.stdin.readline())
    options = dict(zip(arguments[:18:2], arguments[1:18:2]), further=arguments[18:])
    server = http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    note("server_" + options["--port"] + "_" + node, {{"node": node, "options": options, "gpus": gpus}})
    sys.stdin.read()
    note("ended_" + options["--port"], node)
else:
    urls = json.loads(next(a for a in sys.argv if a.startswith("rollout.server_urls=")).split("=", 1)[1])
    codes = [urllib.request.urlopen(url + "/health").status for url in urls]
    note("trainer_" + os.environ["SLURM_PROCID"], {{"node": node, "arguments": sys.argv[2:], "codes": codes}})
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """Site values with an interpreter that runs the stand-ins; they leave their notes in `tmp_path`."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(folder=str(tmp_path)))
    wrapper = tmp_path / "python"
    wrapper.write_text(WRAPPER.format(python=sys.executable, stand_in=tmp_path / "stand_in.py"))
    wrapper.chmod(0o755)
    return SITE | {"TIP_PYTHON": str(wrapper), "TIP_SGLANG_START_SECONDS": "60"}


def note(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_servers_get_nodes_of_their_own_and_the_trainer_their_urls(
    cluster: SlurmCluster, config_path: Path, stand_ins: dict[str, str]
):
    script = SLURM / "train_disaggregated.sbatch"
    env = stand_ins | {"TIP_SGLANG_ARGUMENTS": "--log-level error"}
    job = cluster.submit(script, config_path, "run.seed=7", options=["--nodes=2"], env=env)
    job.wait_for("COMPLETED")
    folder = config_path.parent
    trainer, server = note(folder, "trainer_0"), note(folder, "server_31000_n2")
    assert (trainer["node"], server["node"]) == ("n1", "n2")
    assert trainer["codes"] == [200]
    keys_file = folder / "run" / "servers" / "keys.json"
    assert trainer["arguments"][-7:] == [
        str(config_path),
        "run.seed=7",
        "rollout.engine=sglang",
        'rollout.server_urls=["http://127.0.0.2:31000"]',
        f"sglang.keys_file={keys_file}",
        "sglang.share_gpus=false",
        "sglang.gpus=[]",
    ]
    keys = json.loads(keys_file.read_text())
    assert keys_file.stat().st_mode & 0o077 == 0
    options = server["options"]
    described = folder / "run" / "servers" / "model"  # the student has lost two layers
    assert (options["--model-path"], options["--load-format"]) == (str(described), "dummy")
    assert json.loads((described / "config.json").read_text())["num_hidden_layers"] == 4
    assert (options["--api-key"], options["--admin-api-key"]) == (keys["api"], keys["admin"])
    assert options["--mem-fraction-static"] == "0.5"  # of a node without GPUs
    assert options["further"][-2:] == ["--log-level", "error"]
    assert keys["api"] not in job.log()
    assert note(folder, "ended_31000") == "n2", "the server ended with the job"


def test_servers_share_the_trainers_nodes_where_the_site_says_so(
    cluster: SlurmCluster, config_path: Path, stand_ins: dict[str, str]
):
    """Two nodes that say that they have two GPUs each, with one worker on each of them."""
    site = stand_ins | {"TIP_GPUS_PER_NODE": "2", "TIP_TASKS_PER_NODE": "1", "TIP_SGLANG_PORT": "31100"}
    overrides = ("rollout.engine=sglang", "sglang.share_gpus=true", "sglang.gpus=[0,1]")
    job = cluster.submit(SLURM / "train.sbatch", config_path, *overrides, options=["--nodes=2"], env=site)
    job.wait_for("COMPLETED")
    folder = config_path.parent
    servers = [note(folder, f"server_{port}_{node}") for node in ("n1", "n2") for port in (31100, 31101)]
    assert [(server["node"], server["gpus"]) for server in servers] == [
        ("n1", "0"),
        ("n1", "1"),
        ("n2", "0"),
        ("n2", "1"),
    ]
    trainers = [note(folder, f"trainer_{rank}") for rank in (0, 1)]
    assert [trainer["node"] for trainer in trainers] == ["n1", "n2"]
    assert [trainer["codes"] for trainer in trainers] == [[200] * 4] * 2
    assert "trainer, ranks 0-1" in job.log(), "the log has the placement"


def test_a_split_without_a_trainer_is_refused(cluster: SlurmCluster, config_path: Path, stand_ins: dict[str, str]):
    env = stand_ins | {"TIP_ROLLOUT_NODES": "1", "TIP_TEACHER_NODES": "1"}
    job = cluster.submit(SLURM / "train_disaggregated.sbatch", config_path, options=["--nodes=2"], env=env)
    job.wait_for("FAILED")
    assert "expected some for the trainer besides 1 rollout and 1 teacher nodes" in job.log()


CPU_SERVERS = """#!/bin/sh
case "$*" in
  *megatron_tip.rollout.sglang.main*) {environment} exec {python} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.mark.sglang
def test_a_run_with_nodes_for_its_rollouts_and_its_teacher(cluster: SlurmCluster, config_path: Path, tmp_path: Path):
    """Real servers of both, on the CPU: the trainer's node trains on what two others generate and score."""
    settings = {**CPU_ENVIRONMENT, "PYTHONPATH": f"{CPU_SHIM}:{SLURM.parent}"}
    wrapper = tmp_path / "python"
    environment = " ".join(f"{name}={value}" for name, value in settings.items())
    wrapper.write_text(CPU_SERVERS.format(environment=environment, python=sys.executable))
    wrapper.chmod(0o755)
    cpu = "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch --sleep-on-idle"
    site = SITE | {
        "TIP_PYTHON": str(wrapper),
        "TIP_TEACHER_NODES": "1",
        "TIP_SGLANG_PORT": "31300",
        "TIP_SGLANG_ARGUMENTS": f"{cpu} --max-total-tokens 4096 --mem-fraction-static 0.2",
    }
    overrides = ("training.steps=2", "loss.divergence=topk_reverse_kl", "selection.support_size=8")
    script = SLURM / "train_disaggregated.sbatch"
    job = cluster.submit(script, config_path, *overrides, options=["--nodes=3"], env=site)
    job.wait_for("COMPLETED")
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'server_urls = [\n    "http://127.0.0.2:31300",\n]' in config
    assert 'urls = [\n    "http://127.0.0.3:31300",\n]' in config
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert abs(lines[0]["heldout/topk_reverse_kl"]) > 0  # the student lost two of the teacher's layers
    assert lines[2]["rollout/num_stale"] == 0
    keys = json.loads((tmp_path / "run" / "servers" / "keys.json").read_text())
    assert keys["api"] not in job.log(), "SGLang prints its arguments"
