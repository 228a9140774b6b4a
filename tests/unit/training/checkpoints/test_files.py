"""Checkpoints on disk: whole or not there, damage found by name, the right ones kept."""

import json
from pathlib import Path

import pytest

from megatron_tip.errors import CheckpointError, OutputError
from megatron_tip.training.checkpoints.files import FORMAT, CheckpointFiles, synced_checksums, write_state

NO_DIGEST = {"format": FORMAT, "files": {"shards/a": 6}}


@pytest.fixture
def files(tmp_path: Path) -> CheckpointFiles:
    return CheckpointFiles(tmp_path / "checkpoints")


def save(files: CheckpointFiles, step: int) -> None:
    partial = files.begin(step)
    write_state(partial, {"step": step})
    for name in ("a", "b"):
        (partial / "shards" / name).write_bytes(f"{name} of {step}".encode())
    files.commit(step, partial, synced_checksums(partial, [partial / "state.json", *(partial / "shards").iterdir()]))


def test_a_checkpoint_is_there_when_it_is_whole(files: CheckpointFiles):
    assert files.steps() == []
    partial = files.begin(4)
    assert files.steps() == []
    files.commit(4, partial, {})
    save(files, 10)
    assert files.steps() == [4, 10]
    assert files.read_state(10) == {"step": 10}
    assert files.problem_with(10) is None
    assert not list(files.folder.glob(".*"))


def test_what_a_crash_left_is_removed_by_the_next_save(files: CheckpointFiles):
    left = files.begin(2)
    save(files, 4)
    assert not left.exists()
    assert files.steps() == [4]


def test_a_step_saved_again_replaces_the_old_one(files: CheckpointFiles):
    save(files, 4)
    (files.step_folder(4) / "shards" / "stale").write_text("")
    save(files, 4)
    assert not (files.step_folder(4) / "shards" / "stale").exists()


def test_the_old_one_is_removed_only_when_the_new_one_stands_in_its_place(files: CheckpointFiles, monkeypatch):
    save(files, 4)
    partial = files.begin(4)
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: seen.append(files.step_folder(4).stat().st_ino))
    new = partial.stat().st_ino
    files.commit(4, partial, {})
    assert seen == [new]


@pytest.mark.parametrize(
    "damage,expected",
    [
        (lambda folder: (folder / "shards" / "b").write_bytes(b"b of 5"), "shards/b: its checksum"),
        (lambda folder: (folder / "shards" / "a").write_bytes(b"a of"), "shards/a: expected 6 bytes, got 4"),
        (lambda folder: (folder / "shards" / "a").unlink(), "shards/a: No such file"),
        (lambda folder: (folder / "state.json").write_bytes(b'{"step": 5}'), "state.json: its checksum"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format'), "manifest.json: missing or broken"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: missing or broken"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "x 2"}'), "expected the format"),
        (lambda folder: (folder / "manifest.json").write_text(json.dumps(NO_DIGEST)), "manifest.json: missing or"),
    ],
)
def test_damage_is_named(files: CheckpointFiles, damage, expected: str):
    save(files, 4)
    damage(files.step_folder(4))
    found = [files.problem_with(4, part=part, num_parts=2) for part in range(2)]
    assert any(expected in str(problem) for problem in found), found


def test_each_part_is_read_by_one(files: CheckpointFiles):
    save(files, 4)
    for name in ("shards/a", "shards/b", "state.json"):
        path = files.step_folder(4) / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")
        assert sum(files.problem_with(4, part=part, num_parts=3) is not None for part in range(3)) == 1
        path.write_bytes(content)


def test_the_last_and_every_tenth_are_kept(files: CheckpointFiles):
    for step in range(2, 28, 2):
        save(files, step)
        files.prune(keep_last=2, keep_every_steps=10)
    assert files.steps() == [10, 20, 24, 26]
    files.prune(keep_last=1, keep_every_steps=0)
    assert files.steps() == [26]


def test_a_damaged_one_is_set_aside_and_no_longer_counts(files: CheckpointFiles):
    save(files, 4)
    save(files, 6)
    aside = files.set_aside(6)
    assert (aside / "manifest.json").exists()
    assert files.steps() == [4]
    save(files, 6)
    assert files.set_aside(6) == aside


def test_a_commit_that_fails_leaves_no_checkpoint(files: CheckpointFiles, monkeypatch):
    partial = files.begin(4)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError, match="No space left"):
            files.commit(4, partial, {})
    assert files.steps() == []


def test_the_manifest_names_no_machine(files: CheckpointFiles):
    save(files, 4)
    manifest = json.loads((files.step_folder(4) / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["shards/a", "shards/b", "state.json"]
    assert str(files.folder) not in json.dumps(manifest)


@pytest.mark.parametrize("content", ["[]", '{"settings": {}, "progress": 3}', "[" * 200_000, "null"])
def test_a_state_of_another_shape_is_refused(files: CheckpointFiles, content: str):
    folder = files.step_folder(3)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json: "):
        files.read_state(3)


@pytest.mark.parametrize("content", ["[" * 200_000, json.dumps({"format": FORMAT, "files": {"a\0b": [1, ""]}})])
def test_a_manifest_that_cannot_be_is_damage(files: CheckpointFiles, content: str):
    folder = files.step_folder(3)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    assert files.problem_with(3)
