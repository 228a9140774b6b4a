"""Where the scripts put servers and trainer. Both are stand-ins: SGLang is not installed beside this package's tests.

A stand-in server reads its arguments as `megatron_tip.rollout.sglang_main` does, answers /health and ends with its
input; a stand-in trainer asks the servers that it was given and notes its arguments and node.
"""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.slurm import SlurmCluster
from tests.slurm.test_scripts import SITE, SLURM

WRAPPER = """#!/bin/sh
case "$*" in
  *megatron_tip.rollout.sglang_main*) exec {python} {stand_in} serve ;;
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
    options = dict(zip(arguments[:-2:2], arguments[1:-2:2]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    note("server_" + options["--port"], {{"node": node, "options": options, "gpus": gpus}})
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
    cluster: SlurmCluster, config_path: Path, models: Path, stand_ins: dict[str, str]
):
    script = SLURM / "train_disaggregated.sbatch"
    job = cluster.submit(script, config_path, "run.seed=7", options=["--nodes=2"], env=stand_ins)
    job.wait_for("COMPLETED")
    folder = config_path.parent
    trainer, server = note(folder, "trainer_0"), note(folder, "server_31000")
    assert (trainer["node"], server["node"]) == ("n1", "n2")
    assert trainer["codes"] == [200]
    keys_file = folder / "run" / "servers" / "keys.json"
    assert trainer["arguments"][-5:] == [
        str(config_path),
        "run.seed=7",
        "rollout.engine=sglang",
        'rollout.server_urls=["http://127.0.0.1:31000"]',
        f"sglang.keys_file={keys_file}",
    ]
    keys = json.loads(keys_file.read_text())
    assert keys_file.stat().st_mode & 0o077 == 0
    options = server["options"]
    assert options["--model-path"] == f"{models}/student"
    assert (options["--api-key"], options["--admin-api-key"]) == (keys["api"], keys["admin"])
    assert options["--mem-fraction-static"] == "0.85"
    assert keys["api"] not in job.log()
    assert note(folder, "ended_31000") == "n2", "the server ended with the job"


def test_servers_share_the_trainers_nodes_where_the_site_says_so(
    cluster: SlurmCluster, config_path: Path, stand_ins: dict[str, str]
):
    site = stand_ins | {"TIP_SGLANG_PER_NODE": "2", "TIP_SGLANG_PORT": "31100"}
    job = cluster.submit(SLURM / "train.sbatch", config_path, env=site)
    job.wait_for("COMPLETED")
    folder = config_path.parent
    servers = [note(folder, f"server_{port}") for port in (31100, 31101)]
    trainer = note(folder, "trainer_0")
    assert {server["node"] for server in servers} == {trainer["node"]}
    assert [server["gpus"] for server in servers] == ["0", "1"]
    assert trainer["codes"] == [200, 200]


def test_a_split_without_a_trainer_is_refused(cluster: SlurmCluster, config_path: Path, stand_ins: dict[str, str]):
    env = stand_ins | {"TIP_ROLLOUT_NODES": "1", "TIP_TEACHER_NODES": "1"}
    job = cluster.submit(SLURM / "train_disaggregated.sbatch", config_path, options=["--nodes=2"], env=env)
    job.wait_for("FAILED")
    assert "expected some for the trainer beside 1 rollout and 1 teacher nodes" in job.log()
