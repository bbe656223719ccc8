"""utils.py's writing of files: all or nothing, and by one process at a time."""
import errno
import os
import platform
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

import utils
from utils import LOCK, UserError, lock_folder

NAMES = [f"{i}.csv" for i in range(4)]


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_enough_ends_the_program_quietly(unbuffered):
    """As `python csv_analysis.py ... | head -1` does; what fails elsewhere with the same error is not hidden."""
    for work, code in (("print('x' * 10)", 141), ("print('x' * 10 ** 6)", 141), ("raise BrokenPipeError('a worker')", 1),
                       ("with contextlib.suppress(BrokenPipeError): print('x' * 10, flush=True)\n    sys.exit(7)", 7)):
        source = f"import contextlib, sys, utils\ndef main():\n    input()\n    {work}\nutils.run(main)"
        program = subprocess.Popen([sys.executable, *unbuffered, "-c", source], cwd=ROOT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
        if code != 1:
            program.stdout.close()
        program.stdin.write("go\n")
        program.stdin.close()
        said = program.stderr.read()
        assert program.wait() == code and ("a worker" in said if code == 1 else said == "")


def test_a_closed_output_is_no_error():
    done = subprocess.run(f"{sys.executable} -c 'import utils; utils.run(lambda: print(1))' >&-", shell=True, cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_on_a_cpu_freed_memory_is_kept():
    """Tensors of 64 MB, one after the other, come to take each other's pages instead of new ones. (Not from the first on: an
    aligned block leaves a small one before it, which joins its neighbour only once the allocator has enough of that size.)"""
    source = """
import resource, sys, torch, utils
if sys.argv[1] == "kept":
    utils.pick_device("cpu")
for _ in range(50):
    torch.ones(2 ** 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2 ** 24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2 ** 20)"""
    new = {how: float(subprocess.run([sys.executable, "-c", source, how], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
           for how in ("kept", "usual")}
    assert new["kept"] < 1 and new["usual"] > 1, new             # MB


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


# -- locks ------------------------------------------------------------------------------------------------------------

OWNER = """
import os, sys
from utils import lock_folder
with lock_folder(sys.argv[1], "--there"):
    worker = os.fork() if sys.argv[2] == "fork" else None
    if worker != 0:
        print(worker or 0, flush=True)
    sys.stdin.read()                                            # until the test closes it
    if worker == 0:
        os._exit(0)
"""


class Owner:
    """Another process, with a forked worker or without, that holds a folder until it is closed or killed."""

    def __init__(self, folder, fork=""):
        self.process = subprocess.Popen([sys.executable, "-c", OWNER, folder, fork], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.worker = int(self.process.stdout.readline() or -1)     # -1: it was refused

    def close(self):
        return self.process.communicate()[1]

    def kill(self):
        self.process.kill()
        self.process.wait()


def test_folder_belongs_to_one_process_until_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    owner = Owner(folder)
    with pytest.raises(UserError) as error:
        with lock_folder(folder, "--here"):
            pass
    assert all(word in str(error.value) for word in (
        f"--here: {folder} is being written by process {owner.process.pid} on {socket.gethostname()} (since 2",
        "another --here"))
    (folder / "result").write_text("x")
    assert owner.close() == "" and os.listdir(folder) == ["result"]
    with lock_folder(folder, "--here"):
        refused = Owner(folder)
        assert refused.worker == -1 and f"by process {os.getpid()} on" in refused.close()
    assert os.listdir(folder) == ["result"]


@pytest.mark.parametrize("fork", ["", "fork"])
def test_killed_owner_is_succeeded_even_while_its_worker_lives(fork, tmp_path):
    owner = Owner(tmp_path, fork)
    owner.kill()
    if fork:
        os.kill(owner.worker, 0)                                # raises if it is not there
    assert os.listdir(tmp_path) == [LOCK]
    names = [".last.pth.ab_12xyz.tmp", ".hidden", ".notes.tmp", "plan.ab_12xyz.tmp", "last.pth"]
    for name in names:
        (tmp_path / name).write_text("x")
    with lock_folder(tmp_path, "--here"):
        assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], LOCK])
        refused = Owner(tmp_path)
        assert refused.worker == -1 and f"by process {os.getpid()} on" in refused.close()
    owner.close()


def test_files_of_a_killed_write_are_recognised(tmp_path):
    with pytest.raises(KeyError), utils.atomic_write(tmp_path / "last.pth"):
        assert [bool(utils.TEMPORARY.fullmatch(name)) for name in os.listdir(tmp_path)] == [True]
        raise KeyError


def test_one_process_cannot_lock_a_folder_twice(tmp_path):
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)
    with lock_folder(folder, "--here"):
        for again in (folder, link):
            with pytest.raises(UserError, match="--again: .* by this process already"):
                with lock_folder(again, "--again"):
                    pass
        refused = Owner(folder)                                 # the attempts have not cost the lock
        assert refused.worker == -1 and "UserError" in refused.close()
    for _ in range(2):
        with pytest.raises(KeyError), lock_folder(folder, "--here"):
            raise KeyError
    assert not folder.exists()                                  # nothing came into it


def test_lock_file_that_its_owner_just_removed_is_not_trusted(tmp_path, monkeypatch):
    lockf, calls = utils.fcntl.lockf, []

    def slow(fd, how):
        calls.append(fd)
        if len(calls) < 3:
            (tmp_path / LOCK).unlink()
        if len(calls) == 2:
            (tmp_path / LOCK).write_text("of a third process")
        lockf(fd, how)
    monkeypatch.setattr(utils.fcntl, "lockf", slow)
    with lock_folder(tmp_path, "--here"):
        assert len(calls) == 3
        refused = Owner(tmp_path)
        assert refused.worker == -1 and f"by process {os.getpid()} on" in refused.close()


@pytest.mark.parametrize("system", ["Windows", "no locks on this file system"])
def test_without_kernel_locks_the_file_only_says_who_writes(system, tmp_path, monkeypatch):
    def no_locks(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")
    if system == "Windows":
        monkeypatch.setattr(utils, "fcntl", None)
    else:
        monkeypatch.setattr(utils.fcntl, "lockf", no_locks)
    with lock_folder(tmp_path, "--here"):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert os.listdir(tmp_path) == []
