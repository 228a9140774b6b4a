"""New folders appear whole or not at all; what is read of JSON is what it says, or refused."""

from pathlib import Path

import pytest

from megatron_tip.errors import OutputError
from megatron_tip.files import finite_number, new_folder, parse_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "file").write_text("text")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "file").read_text() == "text"
    assert names(tmp_path / "deep") == ["new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("text")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "new") as folder:
        fail(folder)
    assert names(tmp_path) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(OutputError, match="it exists"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True):
        raise RuntimeError
    assert names(target) == ["old"]
    with new_folder(target, overwrite=True) as folder:
        (folder / "file").write_text("")
    assert names(target) == ["file"]
    assert names(tmp_path) == ["new"]


def test_leftovers_of_a_killed_process_are_in_nobodys_way(tmp_path: Path) -> None:
    for kind in ("partial", "replaced"):
        (tmp_path / f".new.{kind}").mkdir()
        (tmp_path / f".new.{kind}" / "old").write_text("")
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new", overwrite=True) as folder:
        (folder / "file").write_text("")
    assert names(tmp_path / "new") == ["file"]
    assert names(tmp_path) == ["new"]


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "new"):
        pass


def test_json_that_nests_too_deep_is_a_value_error_like_any_other() -> None:
    assert parse_json(b'{"a": [1, 2]}') == {"a": [1, 2]}
    for broken in (b"[" * 200_000, "[" * 200_000 + "]" * 200_000, b'{"a": ', b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(broken)


def test_a_number_is_one_that_sums_can_hold() -> None:
    assert [finite_number(value) for value in (3, -0.5, True, 3.3e38)] == [3.0, -0.5, 1.0, 3.3e38]
    for odd in (None, "3", [3], float("nan"), float("-inf"), 10**400, 1e39):
        assert finite_number(odd) is None
