"""Runs of train.py that are killed, starved of disk space or watched for hours: nothing is lost, and nothing grows.

A process is killed from inside, at a moment that is chosen, by a few lines that call train.py's main as its command line
does: in the middle of a step, with half of a file written, before or after a file takes its name.
"""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import TINY, assert_same_run, history, main, weights

import train
from utils import ERRNO_HINTS, UserError, save_checkpoint

KILLER = """
import fnmatch, json, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
import torch
import train
moment, name, number = json.loads(sys.argv.pop(1))
counts = {{}}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def due(kind, path):
    if kind != moment or not fnmatch.fnmatch(os.path.basename(os.fspath(path)), name):
        return False
    counts[path] = counts.get(path, 0) + 1
    return sum(counts.values()) == number

replace, fsync, step = os.replace, os.fsync, train.train_step

def watched_replace(source, target):
    if due("before its name", target):
        die()
    replace(source, target)
    if due("after its name", target):
        die()

def watched_fsync(fd):
    path = os.readlink(f"/proc/self/fd/{{fd}}")
    written = os.path.basename(path)[1:].rsplit(".", 2)[0]          # .NAME.random.tmp
    if due("half written", written):
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        die()
    fsync(fd)

def watched_step(trainer, *rest):
    if due("step", "step"):
        threading.Timer(0.02 * torch.rand(()).item(), die).start()
    step(trainer, *rest)

os.replace, os.fsync, train.train_step = watched_replace, watched_fsync, watched_step
sys.argv[0] = "train.py"
train.run(train.main)
"""
FLAGS = [*TINY, "--dataset", "folder", "--img_size", 8, "--epochs", 6, "--warmup_epochs", 3, "--sample_every", 6,
         "--no-tensorboard", "--exp_name", "run", "--resume", "auto"]
FILES = ("last.pth", "step_*.pth", "history.csv", "curves.png", "samples_*.png", "recon_*.png", "pseudo_*.png", "args.json")


def start(flags, cwd, moment=None, env=None):
    """train.py in a process of its own, killed at `moment` = (what, file name pattern, at which occurrence)."""
    program = ["-c", KILLER.format(root=str(ROOT)), json.dumps(moment or ("never", "", 0))]
    return subprocess.run([sys.executable, *program, *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**(env or os.environ), "OMP_NUM_THREADS": "1"})


@pytest.fixture
def images(tmp_path):
    from conftest import write_images
    write_images(tmp_path / "data/train", 40, size=8, seed=0)
    write_images(tmp_path / "data/test", 8, size=8, seed=1)
    return ["--data_dir", tmp_path / "data"]


def leftovers(folder):
    return [p.name for p in folder.rglob(".*") if p.is_file()]


def survive(moments, flags, tmp_path, env=None):
    """Kill the run at each moment, resuming every time; it must end as the run that nobody touched."""
    assert start([*flags, "--save_dir", "whole"], tmp_path, env=env).returncode == 0
    killed = []
    for moment in moments:
        done = start([*flags, "--save_dir", "killed"], tmp_path, moment, env)
        assert done.returncode in (0, -signal.SIGKILL) and "Traceback" not in done.stderr, done.stderr
        killed += [moment] * (done.returncode != 0)
        if done.returncode == 0:                              # it came to its end first: check it, and begin another
            assert_same_run(tmp_path / "whole/run", tmp_path / "killed/run")
            for path in (tmp_path / "killed/run").glob("*.pth"):
                path.unlink()
            (tmp_path / "killed/run/history.csv").unlink()
    done = start([*flags, "--save_dir", "killed"], tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole/run", tmp_path / "killed/run")
    assert not leftovers(tmp_path / "killed/run")
    names = {p.relative_to(tmp_path / "whole/run") for p in (tmp_path / "whole/run").rglob("*") if "tfevents" not in p.name}
    assert names <= {p.relative_to(tmp_path / "killed/run") for p in (tmp_path / "killed/run").rglob("*")}
    return killed


def test_killed_run_resumes_to_the_same_bits(images, tmp_path):
    moments = [("step", "step", 17), ("half written", "last.pth", 2), ("before its name", "history.csv", 1)]
    assert survive(moments, [*FLAGS, *images], tmp_path) == moments


@pytest.mark.slow
def test_thirty_kills_at_random_moments(images, tmp_path, fake_hub):
    fake_hub.inception()
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    flags = [*FLAGS, *images, "--epochs", 12, "--sample_every", 1, "--fid_every", 2, "--fid_dims", 64, "--fid_samples", 10,
             "--tensorboard"]
    killed, moments = [], []
    for _ in range(60):
        kind = rng.choice(("step", "step", "half written", "before its name", "after its name"))
        name = "step" if kind == "step" else rng.choice((*FILES, "best_fid.pth", "statistics-*.npz"))
        moments.append((kind, name, 1 if name in ("args.json", "statistics-*.npz") else rng.randint(1, 8)))
    while len(killed) < 30 and moments:
        batch, moments = moments[:10], moments[10:]
        (tmp_path / str(len(moments))).mkdir()
        killed += survive(batch, flags, tmp_path / str(len(moments)), fake_hub.env)
    print(f"{len(killed)} kills survived: " + ", ".join(f"{k} {n} {i}" for k, n, i in killed))
    assert len(killed) >= 30


def test_full_disk_is_one_line_and_keeps_the_checkpoint(images, monkeypatch, tmp_path, capsys):
    fsync, calls = os.fsync, []

    def full(fd):
        if ".last.pth." in os.readlink(f"/proc/self/fd/{fd}"):
            calls.append(fd)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        train.run(lambda: main(monkeypatch, tmp_path, *FLAGS, *images))
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and [line for line in error if "error" in line] == error[-1:]
    assert "last.pth: the disk is full" in error[-1]
    run = tmp_path / "results/run"
    assert weights(run / "last.pth")["epoch"] == 2 and not leftovers(run)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
@pytest.mark.parametrize("limit", [2 ** 16, 300_000, 1_310_620])
def test_a_write_that_fails_inside_torch_save_names_the_file(limit, tmp_path):
    """A limit on the size of files, which fails as a full disk does: where torch.save writes, not at the end. There it raises
    an error of its own over the disk's."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "last.pth"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, {str(i): torch.zeros(2 ** 14) for i in range(20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG in ERRNO_HINTS and error.value.filename == str(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="of ours"):                          # no disk's fault
        save_checkpoint(path, {"x": Unsaveable()})


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("of ours")


def test_folder_deleted_while_running_is_one_line(images, tmp_path):
    flags = [*images, *TINY, "--dataset", "folder", "--img_size", 8, "--epochs", 100000, "--save_every_s", 1000]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch 1/" not in process.stdout.readline():
        assert process.poll() is None
    (tmp_path / "results").rename(tmp_path / "moved")         # deleting it would race with what is being written
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "error" in line.lower()]
    assert process.returncode == 2 and len(lines) == 1 and "was it deleted while the program ran?" in lines[0], err


def test_two_runs_in_one_folder_are_refused_and_a_dead_owner_is_not(images, tmp_path):
    flags = [*images, *TINY, "--dataset", "folder", "--img_size", 8, "--epochs", 100000, "--resume", "auto"]
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch 1/" not in first.stdout.readline():
        assert first.poll() is None
    second = start([*flags, "--stop_epoch", 100000], tmp_path)
    assert second.returncode == 2 and f"process {first.pid}" in second.stderr and second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    epoch = weights(tmp_path / "results/CrossVampVAE/last.pth")["epoch"]
    third = start([*flags, "--stop_epoch", epoch + 1], tmp_path)
    assert third.returncode == 0, third.stderr
    assert not leftovers(tmp_path / "results/CrossVampVAE")


def status(pid):
    """Resident MiB, open descriptors and child processes of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), len(children)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_memory_and_handles_stay_flat_over_200_epochs(streamed, images, tmp_path):
    flags = [*images, *TINY, "--dataset", "folder", "--img_size", 8, "--epochs", 200, "--sample_every", 5, "--check_every", 5]
    flags += ["--cache_gb", 0, "--num_workers", 2] if streamed else []
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen = []
    for line in process.stdout:
        if line.startswith("epoch") and process.poll() is None:
            time.sleep(0.01)
            seen.append(status(process.pid))
    assert process.wait() == 0 and len(seen) > 190
    early, late = seen[60:80], seen[-21:-1]
    memory = [sum(s[0] for s in part) / len(part) for part in (early, late)]
    print(f"{'streamed' if streamed else 'in memory'}: {memory[0]:.0f} -> {memory[1]:.0f} MiB, descriptors "
          f"{early[0][1]} -> {late[0][1]}, children {early[0][2]} -> {late[0][2]}")
    assert memory[1] - memory[0] < 10                         # 120 epochs of history and a larger curves.png included
    assert max(s[1] for s in late) <= max(s[1] for s in early)
    assert max(s[2] for s in late) <= max(s[2] for s in early)


def test_keep_holds_the_last_checkpoints_and_offers_them(images, monkeypatch, tmp_path):
    flags = [*FLAGS, *images, "--stop_epoch"]
    main(monkeypatch, tmp_path, *flags, 4, "--keep", 3)
    run = tmp_path / "results/run"
    assert sorted(p.name for p in run.glob("*.pth")) == ["last.pth", *(f"step_{s:09d}.pth" for s in (10, 15, 20))]
    assert [weights(run / f"step_{s:09d}.pth")["epoch"] for s in (10, 15, 20)] == [2, 3, 4]
    data = bytearray((run / "last.pth").read_bytes())
    data[len(data) // 2] ^= 1                                 # one bit, in both names of the file
    (run / "last.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"last.pth: damaged.*; the newest good one there is .*step_000000015.pth"):
        main(monkeypatch, tmp_path, *flags, 6)
    resume = [f for f in flags if f not in ("--resume", "auto")] + [6, "--resume", run / "step_000000015.pth"]
    main(monkeypatch, tmp_path, *resume)
    assert [int(r["epoch"]) for r in history(run)] == [1, 2, 3, 4, 5, 6] and weights(run / "last.pth")["step"] == 30
    assert sorted(p.name for p in run.glob("step_*")) == [f"step_{s:09d}.pth" for s in (20, 25, 30)]
