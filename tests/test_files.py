"""utils.py's writing of files: all or nothing."""
import errno
import os

import pytest

import utils

NAMES = [f"{i}.csv" for i in range(4)]


def contents(folder, text):
    return {folder / name: text + name.encode() for name in NAMES}


@pytest.mark.parametrize("fails", ["chmod", "fsync", "name"])
@pytest.mark.parametrize("nth", range(len(NAMES)))
def test_files_that_belong_together_are_written_all_or_not_at_all(fails, nth, tmp_path, monkeypatch):
    """The disk is full at the nth file, or there is a folder of its name."""
    utils.atomic_write_all(contents(tmp_path, b"old"))
    if fails == "name":
        (tmp_path / NAMES[nth]).unlink()
        (tmp_path / NAMES[nth]).mkdir()
    else:
        real, calls = getattr(os, fails), []

        def full(*args):
            calls.append(args)
            if len(calls) > nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*args)
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError) as error:
        utils.atomic_write_all(contents(tmp_path, b"new"))
    assert error.value.filename == str(tmp_path / NAMES[nth])
    assert sorted(os.listdir(tmp_path)) == NAMES
    assert all(p.is_dir() or p.read_bytes() == b"old" + p.name.encode() for p in tmp_path.iterdir())


def test_files_that_belong_together_replace_the_old_ones(tmp_path):
    for text in (b"old", b"new"):
        utils.atomic_write_all(contents(tmp_path, text))
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == contents(tmp_path, text)
