"""Trackers: what arrives in W&B's and TensorBoard's own files, and failures that stay where they are."""

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Queue, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_tip.config import Config
from megatron_tip.errors import OptionalDependencyError
from megatron_tip.observability import trackers as module
from megatron_tip.observability.metrics_file import RecordedStep
from megatron_tip.observability.run_folder import RunFolder
from megatron_tip.observability.token_table import (
    TokenTable,
    TokenTableFacts,
    ViewedRollout,
    read_token_table,
    token_table_file,
)
from megatron_tip.observability.trackers import MAX_FAILURES, FolderTracker, Trackers, check_trackers, make_trackers
from megatron_tip.observability.wandb_tracker import wandb  # first: it sets wandb's environment
from tests.helpers.processes import wait_until
from tests.helpers.tensorboard_files import values_of
from tests.helpers.training import Layout, make_config
from tests.helpers.wandb_files import finished_records_of, history_of, records_of

VIEW = TokenTable.of_columns(
    TokenTableFacts(
        step=4,
        rule="tip_divergence",
        retention_ratio=0.5,
        temperature=1.0,
        divergence="reverse_kl",
        medians=(0.3, 1.0),
        rollouts=(ViewedRollout(7, 0, 0, "stop", "1 + 1 ="),),
        points=((0.5, 1.5, True), (0.25, 0.125, False)),
    ),
    {
        "rollout": [7, 7],
        "position": [0, 1],
        "token_id": [20, 21],
        "text": ["4", " <b>"],
        "valid": [True, True],
        "selected": [True, False],
        "reverse_kl": [2.5, 0.125],
    },
)


WANDB_BLOCK_BYTES = 32 * 1024
"""W&B writes a file in whole blocks; a process that is killed loses the last one."""


def config_of(folder: Path, **tracking: Any) -> Config:
    return make_config(folder, Layout(1), tracking=tracking)


def started(config: Config, identities: dict[str, str]) -> Trackers:
    config.run.folder.mkdir(exist_ok=True)
    trackers = make_trackers(config.tracking)
    trackers.start(config, RunFolder(config.run.folder), identities)
    return trackers


@pytest.fixture
def no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_DIR",
        "WANDB_SERVICE",
    ):  # the last: W&B's process of another test
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def test_offline_run_holds_config_metrics_and_views_and_goes_on_under_its_id(
    tmp_path: Path, no_wandb_environment: None
):
    config = config_of(tmp_path, wandb="offline", wandb_name="friday", wandb_tags=("night",))
    identities: dict[str, str] = {}
    trackers = started(config, identities)
    trackers.log_metrics(0, {"heldout/reverse_kl": 1.5})
    trackers.log_metrics(1, {"train/loss": 0.25})
    trackers.log_view(1, VIEW)
    trackers.finish()
    first_id = identities["wandb"]
    trackers = started(config, identities)  # as after a requeue
    trackers.log_metrics(2, {"train/loss": 0.125})
    trackers.finish()

    files = sorted((config.run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{first_id}.wandb"] * 2
    records = [finished_records_of(path) for path in files]
    run = next(record.run for record in records[0] if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.project, list(run.tags)) == ("friday", "megatron-tip", ["night"])
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["selection"]["retention_ratio"] == config.selection.retention_ratio
    history = [row for found in records for row in history_of(found)]
    assert [row["_step"] for row in history] == [0, 1, 2]
    assert history[0]["heldout/reverse_kl"] == 1.5
    assert (history[1]["train/loss"], history[2]["train/loss"]) == (0.25, 0.125)
    assert history[1]["view/responses._type"] == "table-file"
    assert history[1]["view/quadrants._type"] == "image-file"
    table = next(config.run.folder.glob("wandb/*/files/media/table/view/*.json"))
    ((prompt, _, *counts),) = json.loads(table.read_text())["data"]
    assert (prompt, counts) == ("1 + 1 =", [1, 2])


def test_online_without_a_way_out_is_kept_offline(
    tmp_path: Path, no_wandb_environment: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    init = wandb.init

    def without_network(mode: str, **arguments: Any) -> Any:
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return init(mode=mode, **arguments)

    monkeypatch.setattr(wandb, "init", without_network)
    config = config_of(tmp_path, wandb="online")
    trackers = started(config, {})
    trackers.log_metrics(1, {"train/loss": 0.25})
    trackers.finish()
    assert f"stays offline: wandb sync --append {config.run.folder}/wandb/offline-run-*" in caplog.text
    files = list((config.run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert history_of(finished_records_of(files[0]))[0]["train/loss"] == 0.25


def test_an_online_run_is_resumed_under_its_id(
    tmp_path: Path, no_wandb_environment: None, monkeypatch: pytest.MonkeyPatch
):
    asked: list[dict[str, Any]] = []
    logged: list[int] = []

    def noted(**arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "new",
            offline=False,
            starting_step=5 if arguments["id"] else 0,
            log=lambda metrics, step: logged.append(step),
            finish=lambda exit_code: None,
        )

    monkeypatch.setattr(wandb, "init", noted)
    config = config_of(tmp_path, wandb="online")
    started(config, identities := {}).finish()
    trackers = started(config, identities)
    trackers.fill_gaps([(step, {"train/loss": 0.5}) for step in range(7)])
    for step in (7, 8):
        trackers.log_metrics(step, {})
    trackers.finish()
    assert logged == [5, 6, 7, 8], "the server has steps 0 to 4"
    assert identities == {"wandb": "new"}
    assert [(one["mode"], one["id"], one["resume"]) for one in asked] == [
        ("online", None, "allow"),
        ("online", "new", "allow"),
    ]


def log_until_killed(config: Config, names: "Queue[str]") -> None:
    trackers = started(config, identities := {})
    names.put(identities["wandb"])
    for step in range(31):
        trackers.log_metrics(step, metrics_of(step))
        if step == 1:
            trackers.log_view(step, VIEW)
    (written,) = (config.run.folder / "wandb").glob("offline-run-*/*.wandb")
    wait_until(lambda: written.stat().st_size >= 2 * WANDB_BLOCK_BYTES)  # W&B's process is behind
    for process in [*psutil.Process().children(), psutil.Process()]:  # W&B's own process, then this one
        process.kill()


def metrics_of(step: int) -> dict[str, float]:
    return {f"train/metric_{place}": float("nan") if place == 0 else step + place / 64 for place in range(64)}


def test_what_a_killed_run_lost_is_logged_once_when_it_continues(tmp_path: Path, no_wandb_environment: None):
    """Killed in step 31, continued after step 28; W&B's file ends before that. Killed again and continued after 5."""
    config = config_of(tmp_path, wandb="offline")
    context = get_context("spawn")
    names = context.Queue()
    killed = context.Process(target=log_until_killed, args=(config, names))
    killed.start()
    identities = {"wandb": names.get(timeout=300)}
    killed.join()
    (cut,) = (config.run.folder / "wandb").glob("offline-run-*/*.wandb")
    cut = cut.parent.rename(f"{cut.parent}-1") / cut.name  # as W&B names a second start within a second
    kept = [row["_step"] for row in history_of(records_of(cut))]
    assert 5 < len(kept) < 28

    FolderTracker.log_view(SimpleNamespace(_folder=RunFolder(config.run.folder).views), kept[-1] + 1, VIEW)
    history, files = history_of(records_of(cut)), {cut}
    for checkpoint, last in ((28, 33), (5, 35)):
        trackers = started(config, identities)
        trackers.fill_gaps([(step, metrics_of(step)) for step in range(checkpoint + 1)])
        for step in range(checkpoint + 1, last + 1):
            trackers.log_metrics(step, metrics_of(step))
        trackers.finish()
        (written,) = set((config.run.folder / "wandb").glob("offline-run-*/*.wandb")) - files
        files.add(written)
        history += history_of(finished_records_of(written))
    assert [row["_step"] for row in history] == list(range(36))
    for row in history:
        assert {name: value for name, value in row.items() if name.startswith("train/metric")} == pytest.approx(
            metrics_of(row["_step"]), nan_ok=True
        )
    shown = [row["_step"] for row in history if "view/responses._type" in row]
    assert shown == [1, kept[-1] + 1]


def test_a_run_whose_wandb_files_are_gone_or_broken_is_logged_whole(tmp_path: Path, no_wandb_environment: None):
    config = config_of(tmp_path, wandb="offline")
    folder = config.run.folder / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").write_bytes(b"not W&B's")
    trackers = started(config, {"wandb": "abc"})
    trackers.fill_gaps([(0, {"train/loss": 1.0}), (1, {"train/loss": 2.0})])
    trackers.finish()
    (written,) = set((config.run.folder / "wandb").glob("offline-run-*/*.wandb")) - {folder / "run-abc.wandb"}
    assert [row["_step"] for row in history_of(finished_records_of(written))] == [0, 1]


def gaps_filled(config: Config, monkeypatch: pytest.MonkeyPatch, *, offline: bool = True) -> list[int]:
    """The steps that a run continued after step 2 logs again, W&B's own having none of them."""
    logged: list[int] = []
    run = SimpleNamespace(
        id="abc",
        offline=offline,
        starting_step=1,
        log=lambda metrics, step: logged.append(step),
        finish=lambda exit_code: None,
    )
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    trackers = started(config, {"wandb": "abc"})
    trackers.fill_gaps([(step, {"train/loss": 1.0}) for step in range(3)])
    trackers.log_metrics(3, {})
    trackers.finish()
    return logged


def test_an_unreadable_view_does_not_keep_later_steps_from_being_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(tmp_path, wandb="offline")
    folder = RunFolder(config.run.folder).views
    folder.mkdir(parents=True)
    token_table_file(folder, 0).write_bytes(b"no Parquet")
    assert gaps_filled(config, monkeypatch) == [0, 1, 2, 3]


def test_a_wandb_without_its_private_reader_fills_no_gaps_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "wandb.sdk.internal.datastore", None)
    config = config_of(tmp_path, wandb="offline")
    assert gaps_filled(config, monkeypatch) == [3]
    assert "cannot read its own files" in caplog.text
    assert gaps_filled(config, monkeypatch, offline=False) == [1, 2, 3], "the server says what it has"


@pytest.mark.parametrize("asks", [True, False])
def test_the_exported_student_becomes_an_artifact_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bool
):
    student, artifacts = tmp_path / "hf", []
    student.mkdir()
    (student / "config.json").write_text("{}")
    run = SimpleNamespace(id="abc", offline=True, log_artifact=artifacts.append, finish=lambda exit_code: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    trackers = started(config_of(tmp_path, wandb="offline", wandb_artifact=asks), {})
    trackers.log_student(student)
    trackers.finish()
    found = [(artifact.name, artifact.type, list(artifact.manifest.entries)) for artifact in artifacts]
    assert found == [("student-abc", "model", ["config.json"])] * asks


def test_tensorboard_gets_scalars_text_and_picture(tmp_path: Path):
    config = config_of(tmp_path, tensorboard=True)
    trackers = started(config, {})
    trackers.log_metrics(3, {"train/loss": 0.25})
    trackers.log_view(3, VIEW)
    trackers.finish()
    (path,) = (config.run.folder / "tensorboard").iterdir()
    values = {value.tag: (step, value) for step, value in values_of(path)}
    step, loss = values["train/loss"]
    assert (step, loss.simple_value) == (3, 0.25)
    assert b"**`4`**" in values["view/response_0/text_summary"][1].tensor.string_val[0]
    assert values["view/quadrants"][1].image.width > 500


def test_views_are_pages_pictures_and_tables_in_the_folder(tmp_path: Path):
    config = config_of(tmp_path, view_every_steps=2)
    trackers = started(config, {})
    trackers.log_view(4, VIEW)
    views = config.run.folder / "views"
    page = (views / "step_000004.html").read_text()
    assert "1 of 2 tokens selected (50%)" in page
    assert " &lt;b&gt;" in page  # a response is text, never markup
    assert re.search(r'background[^>]*title="2.500 nats">4</span>', page)
    assert 'style="" title="0.125 nats"' in page
    assert (views / "step_000004.png").read_bytes().startswith(b"\x89PNG")
    table = read_token_table(views / "step_000004.parquet")
    assert (table.facts, table.tokens) == (VIEW.facts, VIEW.tokens)


class Broken:
    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def start(self, config: Config, folder: RunFolder, identity: str | None) -> str:
        return "id"

    def fill_gaps(self, steps: Sequence[RecordedStep]) -> None: ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        if step != 2:
            raise ConnectionError("no route to host")

    def log_view(self, step: int, view: TokenTable) -> None: ...

    def log_student(self, path: Path) -> None: ...

    def finish(self, *, failed: bool) -> None:
        raise OSError("disk full")


class Sound(Broken):
    name = "sound"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1


def test_a_failing_tracker_is_logged_and_left_alone_and_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    broken, sound = Broken(), Sound()
    trackers = Trackers([broken, sound])
    trackers.start(config_of(tmp_path), RunFolder(tmp_path), identities := {})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 10):
            trackers.log_metrics(step, {})
        trackers.finish()
    assert identities == {"broken": "id", "sound": "id"}
    assert broken.calls == 2 + MAX_FAILURES  # one, a success at step 2, then three in a row
    assert sound.calls == 9
    assert "tracker broken, metrics: ConnectionError: no route to host; it is no longer used" in caplog.text


def test_a_job_that_is_requeued_before_its_first_checkpoint_goes_on_under_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Asked(Broken):
        def start(self, config: Config, folder: RunFolder, identity: str | None) -> str:
            return identity or "new"

    def ids_of_a_start(known: dict[str, str]) -> dict[str, str]:
        Trackers([Asked()]).start(config_of(tmp_path), RunFolder(tmp_path), known)
        return known

    ids_of_a_start({"broken": "first"})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ids_of_a_start({}) == {"broken": "first"}
    assert ids_of_a_start({"broken": "of the checkpoint"}) == {"broken": "of the checkpoint"}
    for broken in ("[1]", "{", "null"):
        (tmp_path / "trackers.json").write_text(broken)
        assert ids_of_a_start({}) == {"broken": "new"}
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert ids_of_a_start({}) == {"broken": "new"}, "another run in this folder, whose settings may be others"


def test_a_tracker_that_cannot_start_is_left_out(tmp_path: Path):
    class NoStart(Broken):
        def start(self, config: Config, folder: RunFolder, identity: str | None) -> str:
            raise RuntimeError("no licence")

    tracker = NoStart()
    trackers = Trackers([tracker])
    trackers.start(config_of(tmp_path), RunFolder(tmp_path), {})
    trackers.log_metrics(1, {})
    assert tracker.calls == 0


def test_a_tracker_without_its_package_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    check_trackers(config_of(tmp_path).tracking)
    with pytest.raises(OptionalDependencyError, match=r"tracking.wandb: .* pip install .megatron_tip\[tracking\]"):
        check_trackers(config_of(tmp_path, wandb="offline").tracking)
