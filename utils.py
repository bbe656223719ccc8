"""What two or more of the scripts share. A function comes here when a second script needs it, not before."""
import argparse
import collections
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from models.vamp_flow import CrossFlowVampVAE

try:
    import fcntl
except ImportError:                                       # Windows
    fcntl = None

__all__ = [
    "UserError", "run", "FlagParser", "true_false", "add_data_flags", "add_device_flag",
    "pick_device", "seeded", "cpu_count",
    "join_processes", "process_count", "is_main", "my_share", "gather", "all_mean",
    "in_processes",
    "atomic_write", "atomic_write_all", "name_again", "with_checksum", "write_json", "read_json", "brief",
    "UNSAID", "require_same_protocol", "read_arrays",
    "sha256_file", "writable_folder", "LOCK", "TEMPORARY", "lock_folder", "remove_temporary_files",
    "DATA_CACHE", "LATENT_BLOCK", "MANIFEST", "to_uint8", "to_float", "list_images", "relative_names",
    "read_image", "decode_images", "png_is_whole", "save_png", "progress_bar", "pyplot", "save_figure", "plain_text",
    "image_grid", "generate_images", "read_manifest", "MemoryImages", "StreamedImages", "spread", "load_data",
    "save_checkpoint", "read_checkpoint", "check_saved_flags", "require_finite", "load_model", "LatentHealth", "dead_note",
    "hub_file", "INCEPTION_FILE", "FEW_IMAGES", "weights_title", "is_fid", "load_hub_weights", "InceptionFeatures",
    "exact_convolutions", "extract_features", "mean_and_covariance", "frechet_distance", "cached_statistics",
]


# ---------------------------------------------------------------------------------------------------------------------
# Command line

class UserError(Exception):
    """Something the user can put right: shown as one line on standard error, exit code 2, no traceback."""


ERRNO_HINTS = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "larger than the file system, or a limit set here (ulimit -f), allows",
    errno.EACCES: "permission denied; check the owner and mode, or choose another folder",
    errno.EPERM: "permission denied; check the owner and mode, or choose another folder",
    errno.EEXIST: "a file of that name is in the way; move it away or choose another name",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file; move it away or choose another name",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "it does not exist (was it deleted while the program ran?)",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "a link that leads back to itself",
}


def _write_nowhere(stream):
    """What a stream has left for a reader that is gone would make the interpreter complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(main):
    """Call main(); errors of the user become one line and exit code 2, errors of ours stay tracebacks."""
    for stream in (sys.stdout, sys.stderr):               # a file name need not be text
        if hasattr(stream, "reconfigure"):                # not where somebody captures the output
            stream.reconfigure(errors="backslashreplace")
    message = code = None
    try:
        main()
        if sys.stdout is not None:                        # as it is where the shell closed it
            sys.stdout.flush()
    except UserError as e:
        message = str(e)
    except BrokenPipeError:
        try:
            print(flush=True)                             # is it that pipe?
        except BrokenPipeError:                           # its reader has gone, as `head` does when it has enough
            _write_nowhere(sys.stdout)
            sys.exit(141)
        raise
    except OSError as e:
        if e.errno not in ERRNO_HINTS:
            raise
        message = f"{os.fsdecode(e.filename or 'writing')}: {ERRNO_HINTS[e.errno]}"
    except SystemExit as e:
        code = e.code
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except BrokenPipeError:
                _write_nowhere(stream)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if message is None:
        leave_processes()                                 # down here, where no traceback keeps main()'s variables
        if code is None:
            return
        sys.exit(code)
    who = "" if is_main() else f"process {rank()}: "
    print("error: " + who + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)


class FlagHelp(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and behind the help of a flag its default, where there is one to name and it does not."""

    def _get_help_string(self, action):
        default, text = action.default, action.help or ""
        if any(default is none for none in (None, False, argparse.SUPPRESS)) or default == "" or "default" in text:
            return text
        value = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {value.replace('%', '%%')})".lstrip()


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, without the usage, whose help names the defaults, and which knows ~, as
    shells do before = too."""

    def __init__(self, **more):
        super().__init__(formatter_class=FlagHelp, **more)

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, (str, Path)) and str(value).startswith("~"):
                setattr(found, name, type(value)(os.path.expanduser(value)))
        return found, rest


def true_false(text):
    """argparse type for flags that take a value: True or False, in any case."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return value


def add_data_flags(parser):
    """The flags that choose and read the images, in a group of their own; returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=("cifar10", "folder", "digits"), default="cifar10",
                       help="cifar10: downloaded to data_dir; folder: any images under data_dir; digits: scikit-learn's")
    group.add_argument("--data_dir", default="./data", help="where the images are (or go)")
    group.add_argument("--img_size", type=int, default=32, help="pixels a side; other sizes are resized and cropped")
    group.add_argument("--in_channels", type=int, choices=(1, 3), default=None,
                       help="1 grey or 3 RGB (default: 1 for digits, else 3)")
    group.add_argument("--split_seed", type=int, default=0,
                       help="seed of the tenth held out for validation where the data have no test split")
    group.add_argument("--cache_gb", type=float, default=4.0,
                       help="data sets up to this many GiB are decoded once and kept on the device, others streamed")
    group.add_argument("--num_workers", type=int, default=None,
                       help="worker processes that decode a streamed data set (default: the cores, at most 8)")
    return group


def add_device_flag(group):
    group.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:1, mps or cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility and device

def keep_freed_memory():
    """Let the C library (glibc) keep what is freed instead of handing it back to the system. Tensors of more than 32 MB are
    otherwise new memory each time, which the kernel clears page by page: a tenth of a training step on the CPU and a quarter
    of the time of Inception's features. Does nothing where the library is another one."""
    mmap_max, trim_threshold = -4, -1                     # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):       # TypeError: Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def pick_device(name):
    """The torch.device for --device, from here on the one that CUDA takes where none is named; on a CPU, keep_freed_memory.
    Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA GPU is usable here; use --device cpu or leave the flag out")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: MPS is not usable here; use --device cpu or leave the flag out")
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: not supported; use auto, cuda, cuda:N, mps or cpu")
    if device.type != "cuda" and device.index:
        raise UserError(f"--device {name}: there is one {device.type} only")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)                     # what names no device, as a recorded CUDA graph, means this one
    if device.type == "cpu":
        keep_freed_memory()
    return device


def seeded(device, *key):
    """A torch.Generator on the device, seeded by any numbers and words: the same key, the same draws.

    On the CPU torch uses 32 bits of the seed, so that of 100,000 keys one pair or so draws alike: of no matter for the noise
    of two steps far apart.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def cpu_count():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# Processes, when torchrun starts several; without it there is one, the main one, and all of this does nothing

def join_processes(device_name):
    """The torch.device for --device; under torchrun, one GPU for each process (NCCL), or the CPU (gloo).

    Only the main process writes to the screen from here on; errors say which process they come from.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(device_name)
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, and LOCAL_RANK is not: start several processes with torchrun, or unset WORLD_SIZE")
    device, local = pick_device(device_name), int(os.environ["LOCAL_RANK"])
    if device.type == "mps" or device.index is not None:
        raise UserError(f"--device {device_name}: several processes need cuda (a GPU each) or cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs of this machine")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    importlib.import_module("torch.distributed.nn")       # before there is a group, which its functions' defaults would keep
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    return device


def leave_processes():
    """Without this a thread of gloo's may still hold a tensor of Python's when the interpreter is gone, and abort.

    Such threads end with the last reference to the group, of which DistributedDataParallel has one. Not called where a run
    ends with an error: the others may be waiting in the middle of something.
    """
    if process_count() > 1:
        gc.collect()
        dist.destroy_process_group()


def process_count():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_main():
    """Is this the process that writes?"""
    return rank() == 0


def my_share(n):
    """The slice of range(n) that is this process's: contiguous, in order of the processes, equal to within one."""
    return slice(n * rank() // process_count(), n * (rank() + 1) // process_count())


def gather(value):
    """[value of every process], in their order, on all of them."""
    if process_count() == 1:
        return [value]
    values = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def all_mean(tensor):
    """The mean of every process's tensor; no gradient passes."""
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / process_count()


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes

def in_processes(work, items, workers):
    """work(item) for each of a list of items, in order, from worker processes (fewer than two: in this one).

    For what is mostly Python, where threads only wait for each other. Raises what work raises, and UserError if a worker is
    killed. The workers end when this process does, even by kill -9.
    """
    workers = min(workers, len(items))
    if workers < 2:
        yield from map(work, items)
        return
    # A forked worker starts at once; a spawned one imports everything again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
    try:
        yield from pool.map(work, items)
    except BrokenProcessPool:
        raise UserError("a worker process was killed, out of memory perhaps; free some and run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(owner):
    """Leave signals to the owner, and end with it: the pool's workers would wait for work for ever."""
    def watch():
        while os.getppid() == owner:
            time.sleep(1)
        os._exit(1)

    _leave_signals_to_the_parent(None)
    threading.Thread(target=watch, daemon=True).start()


def _leave_signals_to_the_parent(_worker):
    # A process group of its own: Ctrl-C, or a signal to the whole job, asks the parent alone, which then ends its workers
    # (so they must not ignore SIGTERM themselves).
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _from_loader(loader):
    """What a DataLoader gives; a UserError in a worker arrives with its traceback as the message, and is one here."""
    try:
        yield from loader
    except UserError as e:
        raise UserError(str(e).rsplit("UserError: ", 1)[-1].strip()) from None
    except RuntimeError as e:
        if "DataLoader worker (pid" not in str(e):
            raise
        raise UserError("a worker process was killed, out of memory perhaps; free some and run again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Files

LOCK = ".lock"                      # in a folder that a process is writing to
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")               # what a killed atomic_write leaves


@contextlib.contextmanager
def _temporary_file(path):
    """A new file beside `path`, to be filled and renamed to it: its name. Removed on any error, which then names `path`."""
    path = Path(path)
    if path.is_dir():                                         # found now, not when other files have taken their names
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)                    # mkstemp makes files that only their owner can read
        yield tmp
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        if isinstance(e, OSError) and e.filename is None:     # a full disk does not say which file it was
            e.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Open a file that takes the name `path` only when it is whole and on the disk; on any error nothing is left."""
    with _temporary_file(path) as tmp:
        with open(tmp, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)


def atomic_write_all(contents):
    """Write files that belong together, {path: bytes}: all are whole and on the disk before the first takes its name."""
    with contextlib.ExitStack() as stack:
        names = []
        for path, content in contents.items():
            tmp = stack.enter_context(_temporary_file(path))
            names.append((tmp, path))
            with open(tmp, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        for tmp, path in names:
            os.replace(tmp, path)


def name_again(path, other):
    """Give a file a second name (a copy where the file system has no links), atomically. Files that have taken their
    name are never written to again, so that sharing one is safe."""
    with _temporary_file(other) as tmp:
        os.unlink(tmp)
        try:
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)
        os.replace(tmp, other)


def with_checksum(value):
    """A dict for a JSON file -> the same with a "checksum" of the rest: JSON itself would not show a flipped digit."""
    rest = {k: v for k, v in value.items() if k != "checksum"}
    return {**rest, "checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def write_json(path, value):
    """A dict as indented JSON with its checksum, atomically; NaN and infinity become null."""
    def clean(v):
        if isinstance(v, dict):
            return {str(k): clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        if isinstance(v, (float, np.floating)):
            return float(v) if math.isfinite(v) else None
        return v.item() if isinstance(v, np.generic) else v
    with atomic_write(path, "w", encoding="utf-8") as f:
        json.dump(with_checksum(clean(value)), f, indent=2)
        f.write("\n")


def read_json(path):
    """The dict in a JSON file. Raises UserError if it is damaged or something else.

    A file without a "checksum" (written by hand, say) is taken as it is.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, not readable as JSON; delete it and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not the JSON object expected here")
    if "checksum" in value and value["checksum"] != with_checksum(value)["checksum"]:
        raise UserError(f"{path}: damaged, or edited since it was written (its checksum is wrong); delete it and run again")
    return value


def brief(value):
    """A value of a manifest or protocol for a message: hashes shortened."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else value


# What manifests and protocols mean that were written before they said it.
UNSAID = {"mixture_weights": "as trained"}


def require_same_protocol(path, wanted, instead):
    """Raise UserError if the numbers at `path` are of another model, other images or fewer, say, than `wanted`: entries of
    their protocol, those of a part of it as "part.entry". instead: what keeps both."""
    if not path.is_file():
        return

    protocol = read_json(path).get("protocol")

    def stated(key):
        value = protocol
        for name in key.split("."):
            value = value.get(name, UNSAID.get(key)) if isinstance(value, dict) else None
        return str(value).partition(" ")[0].replace("none", "0") if key == "pca" else value     # as pca_protocol words it

    differs = [f"{key} ({brief(stated(key))}, not {brief(value)})" for key, value in wanted.items() if stated(key) != value]
    if differs:
        raise UserError(f"{path} was measured with another {', '.join(differs)}; {instead} keeps both, --overwrite replaces it")


def read_arrays(path, key):
    """The arrays of an .npz file as a dict, if its entry `key` says what it should; None, aloud, if it is damaged.

    Each entry is read to its end, where its checksum is verified: numpy itself stops where a damaged header says so.
    """
    try:
        with zipfile.ZipFile(path) as z:
            if all(entry.compress_type == zipfile.ZIP_STORED for entry in z.infolist()):
                arrays = {}
                for name in z.namelist():
                    with z.open(name) as f:
                        arrays[name.removesuffix(".npy")] = np.lib.format.read_array(f, allow_pickle=False)
                        if f.read():
                            raise ValueError("more than the array")
                if str(arrays.pop("key")) == key:
                    return arrays
    except Exception:                                     # a damaged archive can raise anything
        pass
    print(f"warning: {path}: damaged, computed again", file=sys.stderr)
    return None


def sha256_file(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def writable_folder(path, flag):
    """Make the folder if need be and prove that a file can be written there. Raises UserError that names the flag."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        reason = ERRNO_HINTS.get(e.errno, e.strerror)
        raise UserError(f"{flag} {path}: cannot write there: {reason}") from None
    return path


def remove_temporary_files(folder):
    """Remove what a killed atomic_write has left in a folder that nobody else writes to."""
    for name in os.listdir(folder):
        if TEMPORARY.fullmatch(name):
            os.unlink(Path(folder, name))


_locked = set()                     # (device, inode) of the folders that this process holds


@contextlib.contextmanager
def lock_folder(folder, flag):
    """Be the only process that writes to a folder: made if need be, and gone again if nothing came into it.

    Raises UserError, naming the flag and the owner, if another process holds it. The lock is the kernel's, on
    folder/.lock: it ends with the process however that ends, and forked workers do not inherit it. Without such locks
    (Windows, some network file systems) the file only says who is writing. What an earlier owner that was killed left
    half-written, temporary files of atomic_write, is removed.
    """
    folder = Path(folder)
    path, made = folder / LOCK, not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stat = folder.stat()
    key = stat.st_dev, stat.st_ino
    if key in _locked:                                    # the kernel would grant it again, and the first to end would end both
        raise UserError(f"{flag}: {folder} is being written by this process already")
    fd = _open_locked(path, flag)
    _locked.add(key)
    try:
        remove_temporary_files(folder)
        with contextlib.suppress(OSError):                # a courtesy: the lock holds without it, on a full disk too
            os.ftruncate(fd, 0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(fd, f"process {os.getpid()} on {socket.gethostname()} (since {now})\n".encode())
        yield
    finally:
        if fcntl is None:                                 # Windows does not remove an open file
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)
        if fcntl is not None:                             # not before: the name could be another process's lock by then
            os.close(fd)
        _locked.remove(key)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _open_locked(path, flag):
    """A descriptor of the lock file at `path`, locked. The lock ends as soon as this process closes any descriptor of
    that file, so nothing else here may open it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:                         # its owner ended, and removed it, in between
            pass
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return fd                                 # this file system has no locks
            owner = os.read(fd, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(fd)
            raise UserError(f"{flag}: {path.parent} is being written by {owner}; wait until it ends, or choose another "
                            f"{flag}") from None
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------------------
# Images

# Images that are too large or damaged are refused by name in read_image; PIL's own warnings would only double the line.
# Set once: changing warning filters around each image is not safe among threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Of other formats, what is counted where it lies among images: that it is not read should not go unsaid.
OTHER_IMAGES = {".arw", ".avif", ".cr2", ".dng", ".exr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".nef", ".pbm",
                ".pcx", ".pnm", ".psd", ".svg", ".tga"}
IMAGE_EXTENSIONS = {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DATA_CACHE = "data_cache"           # below save_dir: decoded images
LATENT_BLOCK = 1000                 # latents drawn at once; another number gives other samples for the same seed
MANIFEST = "manifest.json"          # in every folder of exported images; its "kind" is one of these
KINDS = ("real", "samples", "reconstructions")
# What a folder that these scripts have filled is known by; the folder data set passes such folders over.
MADE_HERE = {"exported images": {MANIFEST}, "a training run": {"args.json", "train_log.txt"},
             "pictures of test.py": {"test_log.txt"}, "a report of comparison.py": {"report.html", "summary.csv"},
             "a grid of variants": {"grid.json", "grid.csv"}}


def to_uint8(x):
    """Images in [-1, 1] -> uint8, round((x + 1) * 127.5): what every picture and every metric sees."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x):
    """uint8 images -> float32 in [-1, 1], the inverse of to_uint8."""
    return x.float() / 127.5 - 1


def list_images(folder, flag="--data_dir", skip_made_here=False):
    """The paths of the image files under a folder, as strings (a Path for each of 60,000 takes a second), sorted by folder
    and name. Hidden files are passed over, links followed (loops are not).

    Folders below it that these scripts have filled (MADE_HERE) are passed over, and that is said; with skip_made_here the
    folder itself as well. Raises UserError if there are no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    files, seen, others = [], set(), collections.Counter()
    for here, dirs, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        if real in seen:
            dirs.clear()
            continue
        seen.add(real)
        made = [f"{what} (by its {' and '.join(sorted(marks))})" for what, marks in MADE_HERE.items()
                if marks <= {*names} and (MANIFEST not in marks or is_manifest(Path(here, MANIFEST)))]
        if made and (skip_made_here or Path(here) != folder):
            print(f"{here}: {made[0]}, not among the images")
            dirs.clear()
            continue
        dirs[:] = sorted(d for d in dirs if not d.startswith("."))
        prefix = below(here)
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in IMAGE_EXTENSIONS:
                files.append(prefix + name)
            else:
                others[extension] += 1
    if not files:
        raise UserError(f"{flag} {folder}: no images there ({', '.join(sorted(e[1:] for e in IMAGE_EXTENSIONS))})")
    if passed_over := sorted(others.keys() & OTHER_IMAGES):
        number = sum(others[e] for e in passed_over)
        print(f"{folder}: {number:,} file{'s' * (number > 1)} of formats that are not read here ({', '.join(passed_over)}), "
              f"not among the images")
    return sorted(files, key=lambda file: file.replace(os.sep, "\0"))         # by folder: no name has a character before \0


def below(folder):
    """What the path of every file below a folder starts with: the folder and a separator, nothing for "."."""
    folder = str(Path(folder))
    return "" if folder == "." else os.path.join(folder, "")


def is_manifest(path):
    """Is this an export's manifest, a damaged one perhaps, and not another program's file of that name?"""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return b'"kind' in content or b'"done"' in content
    return isinstance(value, dict) and ("done" in value if "kind" not in value else value["kind"] in KINDS)


def read_manifest(folder, count):
    """What an export says of itself, None if the folder is none; a warning where its `count` images are not all of it."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    if not is_manifest(path):
        print(f"warning: {path} is no manifest of test.py and says nothing of these images here", file=sys.stderr)
        return None
    manifest = read_json(path)
    if "checksum" not in manifest:
        print(f"warning: {path} has no checksum: damage to it, or an edit, would not show", file=sys.stderr)
    whole = manifest.get("count", count)
    done = manifest.get("done", whole)
    if done != whole or count != whole:
        print(f"warning: {folder}: {count:,} images of an export of {whole}" + (f", {done} of them finished; run its test.py "
              f"command again" if done != whole else ""), file=sys.stderr)
    return manifest


def relative_names(paths, folder):
    """The names of list_images' paths below that folder or one above it, with forward slashes on every system."""
    prefix = below(folder)
    return [path.removeprefix(prefix).replace(os.sep, "/") for path in paths]


def _raise(error):
    raise error


def png_is_whole(f):
    """Do the chunks of a PNG file, open at its start, have their checksums, up to the last? PIL skips the pixels' own."""
    f.seek(8)
    while len(head := f.read(8)) == 8:
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if length > 2 ** 31 or zlib.crc32(f.read(length), zlib.crc32(name)) != int.from_bytes(f.read(4), "big"):
            return False
        if name == b"IEND":
            return True
    return False


def read_image(path, channels=3, size=None):
    """One image file -> uint8 array (H, W) for 1 channel, (H, W, 3) for 3. Raises UserError that names the file.

    EXIF rotation is applied, 16-bit grey is scaled to 8, alpha is dropped, palette and CMYK become RGB, an animation
    gives its first frame. With size, the shorter side is resized to it (bicubic, antialiased) and the centre cropped.
    A damaged PNG file is known by its checksums; the other formats have none.
    """
    try:
        with open(path, "rb") as f, Image.open(f) as image:                # reads the header only
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "PNG":
                position = f.tell()
                if not png_is_whole(f):
                    raise ValueError("checksum")
                f.seek(position)
            if image.mode == "F":
                raise UserError(f"{path}: floating-point images have no defined range; convert it to 8 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None and image.size != (size, size):
                scale = size / min(image.size)
                if size * round(max(image.size) * scale) > Image.MAX_IMAGE_PIXELS:     # a line of pixels, made wide
                    raise Image.DecompressionBombError
                image = image.resize([max(size, round(s * scale)) for s in image.size], Image.BICUBIC)
                left, top = (image.width - size) // 2, (image.height - size) // 2
                image = image.crop((left, top, left + size, top + size))
            return np.asarray(image)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused") from None
    except UserError:
        raise
    except Exception as e:                                # a damaged file can raise anything
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.ENOENT):
            raise
        raise UserError(f"{path}: cannot be read as an image; delete or replace it") from None


MANY_IMAGES = 4096                  # from here on, starting worker processes to decode them is worth it
CHUNK = 256                         # images that a worker decodes at a time, fewer of large ones


def _read_stack(paths, channels, size, like):
    """Image files of one size (or brought to `size`) -> uint8 (n, H, W) or (n, H, W, 3); like: (path, shape) of the first."""
    images = []
    for path in paths:
        image = read_image(path, channels, size)
        if image.shape != like[1]:
            raise UserError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels, but {like[0]} has "
                            f"{like[1][1]}x{like[1][0]}; one size is needed here")
        images.append(image)
    return np.stack(images)


def decode_images(paths, channels=3, size=None, desc="decoding images", progress=True):
    """Image files of one size (or brought to `size`) -> uint8 tensor (N, C, H, W); many, or large ones, in parallel."""
    shape = read_image(paths[0], channels, size).shape
    out = np.empty((len(paths), *shape), np.uint8)
    read = functools.partial(_read_stack, channels=channels, size=size, like=(paths[0], shape))
    chunk = min(CHUNK, max(1, 2 ** 22 // out[0].size))    # of 4 MiB at most
    chunks = [paths[i:i + chunk] for i in range(0, len(paths), chunk)]
    many, small = len(paths) >= MANY_IMAGES, os.path.getsize(paths[0]) < 32 * 1024
    decoded = in_processes(read, chunks, min(cpu_count() // process_count(), 16)) if many else \
        map(read, chunks) if small else _in_threads(read, [[path] for path in paths])
    start = 0
    with progress_bar(len(paths), desc, wanted=progress and len(paths) >= 1000) as bar:
        for images in decoded:
            out[start:start + len(images)] = images
            start += len(images)
            bar.update(len(images))
    tensor = torch.from_numpy(out)
    return tensor[:, None] if channels == 1 else tensor.permute(0, 3, 1, 2).contiguous()


DECODER = 2                         # to be raised when read_image makes other pixels of the same file


def decode_kept(paths, root, channels, size, name, folder):
    """decode_images of the `name` images below root, kept in `folder` (None: nowhere) for the next start if they are many.

    They are used again as long as names, sizes and times (of content and of status) of the files, and what decodes them,
    are the same. A damaged file is decoded again, aloud; one that no longer fits is replaced; and where it cannot be
    written, or another process is writing there, the run goes on without.
    """
    def decode():
        return decode_images(paths, channels, size, f"decoding {name} images")

    if folder is None or len(paths) < MANY_IMAGES:
        return decode()
    digest = hashlib.sha256(repr((DECODER, PIL.__version__)).encode())
    for path, file in zip(paths, relative_names(paths, root)):
        stat = os.stat(path)
        # The time of the last change of status too: that of the content can be set to anything, and tar and rsync do.
        digest.update(repr((file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
    key = digest.hexdigest()
    place = hashlib.sha256(repr((os.path.realpath(root), name, channels, size)).encode()).hexdigest()[:16]
    kept = Path(folder) / f"images-{place}-{key[:16]}.npz"
    arrays = read_arrays(kept, key) if os.path.isfile(kept) else None
    if arrays is not None and "images" in arrays:
        print(f"decoded     {name} images from {kept}")
        return torch.from_numpy(arrays["images"])
    images = decode()
    if is_main():
        try:                                              # the lock also removes what a killed process has left half-written
            with lock_folder(kept.parent, "--save_dir"):
                with atomic_write(kept) as f:
                    np.savez(f, key=key, images=images.numpy())
                for old in kept.parent.glob(f"images-{place}-*.npz"):
                    if old != kept:
                        old.unlink(missing_ok=True)
            print(f"decoded     {name} images, kept in {kept} ({images.numel() / 2 ** 20:.0f} MiB) for the next start")
        except OSError as e:                              # a convenience
            print(f"note: {kept}: not kept, {ERRNO_HINTS.get(e.errno, e.strerror)}")
        except UserError:                                 # another process is at it
            pass
    return images


def progress_bar(total, desc, unit="img", wanted=True, **more):
    """A bar for eyes, not for log files, which would have thousands of lines of it; of the main process alone."""
    return tqdm(total=total, desc=desc, unit=unit, leave=False, disable=None if wanted and is_main() else True, **more)


def _in_threads(work, items):
    """work(item) for each item, in order, from a thread a core; an error stops the work soon."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(items), 256):
            yield from pool.map(work, items[start:start + 256])


@torch.no_grad()
def generate_images(model, n, batch_size, seed, temperature=1.0, start=0, purpose="samples"):
    """n images of the prior as uint8 batches (B, C, H, W), B <= batch_size; for FID in training and for export alike.

    Latents are drawn in blocks, each whole and from a generator of its own on the CPU: the same seed gives the same
    latents whatever the batch size or device, and the same first ones whatever n. start: the first `start` images are
    passed over, not decoded. Another purpose draws others: a checkpoint chosen by the FID of some is not measured on them.
    """
    prior = model.prior_params()
    rest = prior[0][:0]                                       # latents that wait for a full batch, (b, D)
    for block in range(start // LATENT_BLOCK, math.ceil(n / LATENT_BLOCK)):
        first = block * LATENT_BLOCK
        z = model.sample_latents(LATENT_BLOCK, temperature, seeded("cpu", seed, purpose, block), prior)
        *full, rest = torch.cat([rest, z[max(start - first, 0):n - first]]).split(batch_size)
        for batch in full:
            yield to_uint8(model.decode(batch))
    if len(rest):
        yield to_uint8(model.decode(rest))


# Fonts with Chinese characters, as Windows, macOS and Linux distributions bring them; Matplotlib's own has none.
CHINESE_FONTS = ("Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Hiragino Sans GB", "Noto Sans CJK SC",
                 "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
                 "AR PL UMing CN", "Arial Unicode MS")


@functools.cache
def pyplot():
    """matplotlib.pyplot that draws into files, Chinese names too wherever the system has a font for them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager
    installed = set(font_manager.get_font_names())
    plt.rcParams["font.family"] = ["sans-serif", *(font for font in CHINESE_FONTS if font in installed)]
    return plt


def save_figure(path, fig, dpi):
    """Write a matplotlib figure as PNG and let go of it."""
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=dpi)
    pyplot().close(fig)


def plain_text(text):
    """Any text, as a file's name may be, for a figure: never read as a formula."""
    return text.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace("$", r"\$")


def image_grid(images, columns):
    """uint8 (N, C, H, W) -> one uint8 picture (C, H', W'), white lines of two pixels between the images."""
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    grid = images.new_full((C, rows * (H + 2) + 2, columns * (W + 2) + 2), 255)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        grid[:, 2 + y * (H + 2):2 + y * (H + 2) + H, 2 + x * (W + 2):2 + x * (W + 2) + W] = image
    return grid


def save_png(path, image, zoom=1):
    """uint8 (C, H, W), C 1 or 3 -> a PNG file (RGB), atomically; zoom repeats pixels."""
    array = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    array = array.repeat(zoom, 0).repeat(zoom, 1)
    with atomic_write(path) as f:
        Image.fromarray(array).save(f, "PNG", compress_level=1)


# ---------------------------------------------------------------------------------------------------------------------
# Data

class MemoryImages:
    """A data set decoded once: uint8 (N, C, H, W) that lives on a device."""

    def __init__(self, images, device="cpu"):
        self.shape = tuple(images.shape[1:])
        digest = hashlib.sha256(repr(tuple(images.shape)).encode())
        digest.update(np.ascontiguousarray(images.numpy()))
        self.fingerprint = digest.hexdigest()
        self.images = images.to(device)

    def __len__(self):
        return len(self.images)

    def take(self, indices):
        """uint8 (n, C, H, W) of these indices (a sequence of int)."""
        return self.images[torch.as_tensor(indices, device=self.images.device)]

    def batches(self, index_batches, device):
        """uint8 batches on the device, one for each tensor (or row) of indices."""
        if isinstance(index_batches, torch.Tensor):       # one copy to the device instead of one a step
            index_batches = index_batches.to(self.images.device)
        for indices in index_batches:
            yield self.images[indices.to(self.images.device)].to(device)


def spread(n, total):
    """n indices evenly spaced over range(total), all of them if n is 0 or too many: the files of a data set are often
    sorted by class, and the first n would show only one."""
    n = min(n or total, total)
    return torch.arange(n) * total // n


class StreamedImages:
    """A data set too large to keep: files decoded as they are needed, by worker processes."""

    def __init__(self, root, paths, channels, size, workers):
        self.paths, self.channels, self.size, self.workers = paths, channels, size, workers
        self.shape = (channels, size, size)
        # All names and sizes, and what stands in some of the files: a copy on another machine is the same data set, and
        # to read all of a large one at each start would take minutes.
        digest = hashlib.sha256(repr(self.shape).encode())
        for path, name in zip(paths, relative_names(paths, root)):
            digest.update(repr((name, os.path.getsize(path))).encode())
        for i in spread(256, len(paths)).tolist():
            digest.update(bytes.fromhex(sha256_file(paths[i])))
        self.fingerprint = digest.hexdigest()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            image = torch.from_numpy(read_image(self.paths[i], self.channels, self.size).copy())
        except OSError as e:                              # a worker's arrives without its number, which run() goes by
            if e.errno not in ERRNO_HINTS:
                raise
            raise UserError(f"{self.paths[i]}: {ERRNO_HINTS[e.errno]}") from None
        return image[None] if self.channels == 1 else image.permute(2, 0, 1)

    def take(self, indices):
        return decode_images([self.paths[int(i)] for i in indices], self.channels, self.size)

    def batches(self, index_batches, device):
        loader = torch.utils.data.DataLoader(self, batch_sampler=[b.tolist() for b in index_batches],
                                             num_workers=self.workers, pin_memory=device.type == "cuda",
                                             worker_init_fn=_leave_signals_to_the_parent)
        for batch in _from_loader(loader):
            yield batch.to(device, non_blocking=True)


def _resize(images, size):
    """uint8 (N, C, H, W) -> (N, C, size, size), bicubic with antialias."""
    if images.shape[2:] == (size, size):
        return images
    out = [F.interpolate(chunk.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
           for chunk in images.split(4096)]
    return torch.cat(out)


def _set_channels(images, channels):
    """uint8 (N, C, H, W) with C 1 or 3 -> the wanted number of channels (Rec. 601 grey)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(c.float() * weights).sum(1, keepdim=True).round().byte() for c in images.split(4096)])


def _load_cifar10(data_dir):
    from torchvision.datasets import CIFAR10
    try:
        for here in range(process_count()):               # one after the other: the first downloads for all
            if here == rank():
                with contextlib.redirect_stdout(sys.stderr):
                    sets = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
            gather(None)
    except OSError as e:                                  # no network: URLError is an OSError
        if e.errno in ERRNO_HINTS:
            raise
        raise UserError(f"CIFAR-10 is not under --data_dir {data_dir} and cannot be downloaded ({e}); put "
                        f"cifar-10-python.tar.gz there, or use --dataset folder or --dataset digits") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as e:
        raise UserError(f"CIFAR-10 under --data_dir {data_dir} is damaged ({e}); delete cifar-10-batches-py and "
                        f"cifar-10-python.tar.gz there and run again") from None
    return [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in sets]


def _load_digits():
    from sklearn.datasets import load_digits
    return torch.from_numpy(np.round(load_digits().images * (255 / 16)).astype(np.uint8))[:, None]


def _hold_out(n, seed):
    """Indices of n images split into nine tenths and one tenth, at least one each."""
    if n == 1:
        return [0], [0]
    order = np.random.default_rng(seed).permutation(n)
    held = max(1, n // 10)
    return sorted(order[held:].tolist()), sorted(order[:held].tolist())


def _find_splits(root):
    """The folders `train` and `test` (or `val`, `valid`, `validation`) below root, each None if it is not there. Both in
    capitals or such are the splits too, and that is said; one alone may be a class of vehicles."""
    names = sorted(e.name for e in os.scandir(root) if e.is_dir()) if root.is_dir() else []
    folders = {}
    for spelling in (str.lower, str):                     # the exact name, where there is one, comes last and stays
        folders.update({spelling(name): root / name for name in names})
    train = folders.get("train")
    test = next((folders[n] for n in ("test", "val", "valid", "validation") if n in folders), None)
    if train and train.name != "train":
        if not test:
            return None, None
        print(f"{root}: {train.name} and {test.name} are taken as its splits")
    return train, test


def load_data(args, device, cache=None):
    """The training and the held-out images of the --dataset flags: two of MemoryImages or StreamedImages.

    folder: the splits that _find_splits finds below data_dir; without them all images below it, of which a seeded tenth is
    held out. A single image is both. cache: see decode_kept. Raises UserError on anything unusable.
    """
    channels = args.in_channels or (1 if args.dataset == "digits" else 3)
    for name, low in (("img_size", 1), ("split_seed", 0), ("cache_gb", 0), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name} {value}: must be {low} or more")
    if args.dataset == "folder":
        root = Path(args.data_dir)
        train_dir, test_dir = _find_splits(root)
        if train_dir:
            paths = list_images(train_dir, skip_made_here=True)
            test_paths = list_images(test_dir, skip_made_here=True) if test_dir else None
        else:
            paths, test_paths = list_images(root, skip_made_here=True), None
        halves = _hold_out(len(paths), args.split_seed) if test_paths is None else None
        gib = (len(paths) + len(test_paths or ())) * channels * args.img_size ** 2 / 2 ** 30
        if gib > args.cache_gb:
            workers = min(cpu_count() // process_count(), 8) if args.num_workers is None else args.num_workers
            return [StreamedImages(root, p, channels, args.img_size, workers)
                    for p in ((paths, test_paths) if halves is None else ([paths[i] for i in half] for half in halves))]
        if halves is None:
            images = [decode_kept(p, root, channels, args.img_size, name, cache)
                      for name, p in (("training", paths), ("held-out", test_paths))]
        else:                                             # decoded and kept as a whole, whatever --split_seed makes of it
            whole = decode_kept(paths, root, channels, args.img_size, "all", cache)
            keep, held = map(torch.tensor, halves)
            held_out = whole[held]
            for i, some in enumerate(keep.split(1024)):   # in place, for memory: keep ascends, so that none is lost
                whole[1024 * i:1024 * i + len(some)] = whole[some]
            images = [whole[:len(keep)], held_out]
    else:
        if args.dataset == "cifar10":
            images = _load_cifar10(args.data_dir)
        else:
            digits = _load_digits()
            images = [digits[i] for i in _hold_out(len(digits), args.split_seed)]
        images = [_set_channels(_resize(x, args.img_size), channels) for x in images]
        gib = sum(x.numel() for x in images) / 2 ** 30
    return [MemoryImages(x, device if gib <= args.cache_gb else "cpu") for x in images]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT_KEYS = {"model": dict, "ema": (dict, type(None)), "epoch": int, "step": int, "model_args": dict, "args": dict}


def save_checkpoint(path, checkpoint):
    """torch.save, atomically. An OSError is the one that the disk gave, which torch.save covers with one of its own."""
    with atomic_write(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:
            cause = e
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or e from None


def read_checkpoint(path, resumable=False):
    """The dict of a checkpoint file, loaded with weights_only=True to the CPU, its weights those of its model_args.

    It takes no more memory than the file has bytes, whatever the file says of its sizes: a checkpoint may come from
    anywhere. Raises UserError that says what is wrong with it and which of the files beside it is good: the furthest, with
    its optimiser state if it is to be resumed from.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a checkpoint; name a file in it" + (f", {path / 'last.pth'}" if (
            path / "last.pth").is_file() else ""))
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such checkpoint" + (f"; beside it lies {', '.join(near)}" if near else ""))
    try:
        return _read_checkpoint(path)
    except UserError as e:
        good = []
        for other in path.parent.glob("*.pth"):
            with contextlib.suppress(UserError, OSError):
                if not other.samefile(path):
                    checkpoint = _read_checkpoint(other)
                    if checkpoint.get("optimizer") or not resumable:
                        good.append((checkpoint["step"], str(other)))
        raise UserError(f"{e}; " + (f"the newest good one there is {max(good)[1]}" if good else "no good one lies beside it")
                        ) from None


def _read_checkpoint(path):
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
            # torch.save compresses nothing and starts at the first byte. What does otherwise may unpack to any size, or
            # be read by torch in another place than the one whose checksums are verified here.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or min(e.header_offset for e in entries) or \
                    sum(e.file_size for e in entries) > path.stat().st_size:
                raise UserError(f"{path}: packed otherwise than torch.save does, refused")
            damaged = z.testzip()                         # torch.load itself does not look at the checksums
        if damaged:
            raise UserError(f"{path}: damaged (checksum of {damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, OSError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, refused; not a checkpoint of train.py") from None
    except Exception:                                     # a damaged pickle can raise anything
        raise UserError(f"{path}: truncated or not a checkpoint") from None
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of train.py (no {', '.join(missing)})")
    wrong = [k for k, kind in CHECKPOINT_KEYS.items() if not isinstance(checkpoint[k], kind)]
    if wrong or min(checkpoint["epoch"], checkpoint["step"]) < 0:
        raise UserError(f"{path}: not a checkpoint of train.py ({', '.join(wrong) or 'epoch or step'} of another kind)")
    try:
        for key in (k for k in ("model", "ema") if checkpoint[k] is not None):
            # Without the metadata PyTorch hangs on it, which can say that loading is to replace parameters, so that the
            # optimiser trains what is no longer there; check_weights itself would leave it so.
            checkpoint[key] = dict(checkpoint[key])
            check_weights(checkpoint[key], checkpoint["model_args"], path.stat().st_size)
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"{path}: its weights and model_args do not fit this code ({str(e)[:200]})") from None
    # An older checkpoint lacks newer arguments: it was trained with what are their defaults.
    defaults = {name: p.default for name, p in inspect.signature(CrossFlowVampVAE).parameters.items()}
    checkpoint["model_args"] = {**{k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()},
                                **checkpoint["model_args"]}
    return checkpoint


def check_weights(state, model_args, most_bytes):
    """Raise ValueError, or what PyTorch raises, if these are not the weights of a model of these arguments."""
    if any(t.layout is not torch.strided or t.is_complex() or t.is_quantized for t in state.values()):
        raise ValueError("tensors of an unknown kind")
    if sum(t.numel() * t.element_size() for t in state.values()) > most_bytes:   # one may claim more than is stored of it
        raise ValueError("tensors larger than the file")
    with torch.device("meta"):                            # sizes without memory
        CrossFlowVampVAE(**model_args).load_state_dict(state, strict=True, assign=True)
    for name, t in state.items():
        if name.endswith(".perm") and not torch.equal(t.sort().values, torch.arange(len(t), device=t.device)):
            raise ValueError(f"{name} is no permutation")


def check_saved_flags(parser, saved, path):
    """Raise UserError if a checkpoint's args hold, for a flag of the parser, what its command line cannot give."""
    for action in parser._actions:
        if action.dest not in saved:
            continue
        value, default = saved[action.dest], action.default
        kinds = {int: [int], float: [int, float]}.get(action.type, [bool, str] if default is None else [type(default)])
        if isinstance(default, list):
            length = None if action.nargs == "+" else action.nargs
            right = isinstance(value, list) and value and length in (None, len(value)) and all(type(v) in kinds for v in value)
        else:
            right = (type(value) in kinds and (not action.choices or value in action.choices)) or value is default is None
        if not right:
            raise UserError(f"{path}: --{action.dest} {value!r:.80} is no value of that flag; not a checkpoint of train.py")


def require_finite(state, path):
    """Raise UserError if the weights of the checkpoint at `path` are not finite."""
    if not all(v.isfinite().all() for v in state.values()):
        raise UserError(f"{path}: its weights are not finite, the training diverged; use an earlier checkpoint")


def load_model(checkpoint_path, device, weights="ema"):
    """(model in eval mode on the device, checkpoint dict). weights: "ema" or "raw"; raw, said aloud, where EMA was off."""
    checkpoint = read_checkpoint(checkpoint_path)
    state = checkpoint["model"]
    if weights == "ema":
        if checkpoint["ema"] is None:
            print(f"{checkpoint_path}: trained without EMA, the raw weights are used", file=sys.stderr)
        else:
            state = checkpoint["ema"]
    model = CrossFlowVampVAE(**checkpoint["model_args"]).to(device)
    model.load_state_dict(state, strict=True)
    require_finite(state, checkpoint_path)
    return model.eval(), checkpoint


class LatentHealth:
    """What posterior collapse looks like, accumulated over batches of posterior samples (design: Burda et al. 2016,
    arXiv 1509.00519, for the active units; Tomczak & Welling 2018 for the mixture).

    add(model, out, kl) after each batch; summary() gives plain numbers, nats where nothing else is said.
    """

    def __init__(self):
        self.mu, self.var, self.parts, self.responsibility, self.count = [], [], [], 0.0, 0

    @torch.no_grad()
    def add(self, model, out, kl):
        """out: VAEOutput of a batch, kl: model.kl_terms(out)."""
        self.mu.append(out.mu.float().cpu())
        self.var.append(out.logvar.float().exp().cpu())
        self.parts.append(torch.stack(kl).cpu().double().mean(1) * len(out.mu))
        self.responsibility = self.responsibility + model.responsibilities(out).cpu().double().sum(0)
        self.count += len(out.mu)

    @classmethod
    def together(cls, shares):
        """One LatentHealth of what several processes have seen."""
        whole = cls()
        for share in shares:
            for name, value in vars(share).items():
                setattr(whole, name, getattr(whole, name) + value)
        return whole

    def summary(self):
        """dict: kl_raw, log_q0, log_det, log_p, active_units, signal_share (list of D), effective_components,
        dead_components, mean_responsibility (list of K)."""
        mu, var = torch.cat(self.mu).double(), torch.cat(self.var).double()
        kl, log_q0, log_det, log_p = (torch.stack(self.parts).sum(0) / self.count).tolist()
        spread = mu.var(0, unbiased=False)                                                      # Var_x(mu_d)
        r = self.responsibility / self.count                                                    # (K,)
        entropy = -(r * r.clamp_min(1e-300).log()).sum()
        return {
            "kl_raw": kl, "log_q0": log_q0, "log_det": log_det, "log_p": log_p,
            "active_units": int((spread > 0.01).sum()),
            "signal_share": (spread / (spread + var.mean(0))).tolist(),
            "effective_components": entropy.exp().item(),
            "dead_components": int((r < 0.1 / len(r)).sum()),
            "mean_responsibility": r.tolist(),
        }


def dead_note(model, args, history):
    """A line for the screen if half of the samples or more are of components into which no image is encoded, else None; from
    the model, the flags and the history of its run (as the checkpoint has them, whatever wrote that)."""
    dead = history[-1].get("dead_components") if history and isinstance(history[-1], dict) else None
    if not isinstance(dead, int) or model.prior_logits is not None or dead < max(1, model.num_components / 2):
        return None
    ways = "test.py --refit_weights draws by use, as --mixture_weights learned does from the start"
    flags = ["--pseudo_init noise --warmup_epochs 0"] * (args.get("pseudo_init") != "noise" or bool(args.get("warmup_epochs")))
    flags += ["--balance 1"] * (args.get("lpips_net", "none") != "none" and not args.get("balance"))
    if model.prior == "vamp" and flags:
        ways += f", and {' '.join(flags)} keeps more of them alive"
    return (f"note: {dead} of {model.num_components} components are dead, no image being encoded into them, and samples are "
            f"drawn from these as from the others; {ways} (README.md, Results)")


# ---------------------------------------------------------------------------------------------------------------------
# Features and Fréchet distance

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


def hub_file(name):
    """Where the torch hub cache keeps a weights file: $TORCH_HOME/hub/checkpoints/name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


STAND_IN = "a stand-in of that name"
FEW_IMAGES = 2048            # with fewer images than pool3 features the covariance behind the published FID is singular


def weights_title(name, digest):
    """How a report names a hub's weights file with this SHA-256, whose beginning the published file has in its name."""
    return name if digest.startswith(Path(name).stem.rsplit("-", 1)[-1]) else f"{name}, {STAND_IN}"


def is_fid(name, dims):
    """May a Fréchet distance of these features (as a protocol names them, and how many) be called FID? It is defined on the
    published Inception's 2048."""
    return str(dims) == "2048" and STAND_IN not in name


def load_hub_weights(name, without, build):
    """(build(), SHA-256 of the file): build loads the hub's weights file `name`, downloading it if need be.

    Says aloud if another file lies under that name. Raises UserError that names the file, where it goes, and the flag
    (`without`) that does without it.
    """
    path = hub_file(name)
    try:
        with warnings.catch_warnings(), tensors_only():
            warnings.simplefilter("ignore")               # lpips calls torchvision's deprecated spelling
            model = build()
        digest = sha256_file(path)
        if weights_title(name, digest) != name and is_main():
            print(f"note: {path} is a stand-in, not the published file of that name (SHA-256 {digest[:8]}...): numbers that "
                  f"depend on it compare with one another only", file=sys.stderr)
        return model, digest
    except Exception as e:                                # a damaged pickle can raise anything
        # (RuntimeError: torch.hub's, of a download that was cut short or is another file, and is deleted then.)
        if isinstance(e, (URLError, HTTPException, TimeoutError, ConnectionError)) or (
                isinstance(e, RuntimeError) and not path.is_file()):
            raise UserError(f"the weights {name} are neither at {path} nor can they be downloaded ({str(e)[:120]}); put the "
                            f"file there, or {without}") from None
        if not path.is_file() or (isinstance(e, OSError) and e.errno in ERRNO_HINTS):
            raise
        raise UserError(f"{path}: damaged, or not the weights of that name ({str(e)[:120]}); delete it so that it is "
                        f"downloaded again, or {without}") from None


@contextlib.contextmanager
def tensors_only():
    """torch.load refuses anything but tensors and plain values, also where a library calls it without weights_only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class InceptionFeatures:
    """pytorch-fid's InceptionV3 (its weights, its bilinear resize to 299 without antialias) as a feature extractor, each
    batch norm folded into the convolution before it.

    dims: 2048 (pool3, the published FID), or the shallower 768, 192, 64 that pytorch-fid's --dims offers.
    """

    def __init__(self, device, dims=2048, without="use --fid_every 0"):
        from pytorch_fid.inception import InceptionV3
        from torchvision.models.inception import BasicConv2d
        block = InceptionV3.BLOCK_INDEX_BY_DIM[dims]
        model, self.sha256 = load_hub_weights(INCEPTION_FILE, without, lambda: InceptionV3([block]))
        model.eval()
        for layer in model.modules():                     # one pass less over what each gives; rounding alone differs
            if isinstance(layer, BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), torch.nn.Identity()
        # (On a GPU that layout is the slower one in float32.)
        layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)
        self.device, self.dims = device, dims
        self.name = (f"pytorch-fid InceptionV3 ({weights_title(INCEPTION_FILE, self.sha256)}), {dims} dimensions, bilinear 299 "
                     f"without antialias")
        self.key = f"inception-{dims}-bilinear299-{self.sha256}"

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (B, C, H, W), C 1 or 3 -> float32 (B, dims) on the CPU."""
        x = images.to(self.device).expand(-1, 3, -1, -1).float() / 255
        h = self.model(x)[0]
        return F.adaptive_avg_pool2d(h, 1).flatten(1).float().cpu()


@contextlib.contextmanager
def exact_convolutions():
    """Convolutions in float32 on a GPU too, which otherwise rounds their inputs to 10 bits, and without a search for the
    fastest of their algorithms: whichever script asks, the features and the images are the same."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def extract_features(extractor, batches, total, desc="features", progress=True):
    """Features of an iterable of uint8 batches, `total` images in all -> float32 array (total, dims)."""
    out, n = np.empty((total, extractor.dims), np.float32), 0
    with progress_bar(total, desc, wanted=progress) as bar, exact_convolutions():
        for batch in batches:
            out[n:n + len(batch)] = extractor(batch).numpy()
            n += len(batch)
            bar.update(len(batch))
    if n != total:
        raise ValueError(f"expected {total} images, got {n}")
    return out


def mean_and_covariance(features):
    """(N, F) -> mean (F,), covariance (F, F) with N - 1, both float64. Raises UserError below two images."""
    if len(features) < 2:
        raise UserError("a covariance needs at least two images")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), the Fréchet distance of two Gaussians (Heusel et al. 2017,
    arXiv 1706.08500), in float64.

    The eigenvalues of S1 S2 are those of the symmetric R^T S2 R for any R with R R^T = S1: no general matrix square root is
    needed, and a singular covariance (fewer images than dimensions) does no harm.
    """
    sigma1 = np.asarray(sigma1, np.float64)
    try:
        root = np.linalg.cholesky(sigma1)
    except np.linalg.LinAlgError:                         # singular
        values, vectors = np.linalg.eigh(sigma1)
        root = vectors * np.sqrt(values.clip(0))
    cross = np.linalg.eigvalsh(root.T @ np.asarray(sigma2, np.float64) @ root)
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(cross.clip(0)).sum()
    return float(difference @ difference + max(trace, 0))       # (of equal ones rounding makes it negative)


def cached_statistics(folder, key, compute):
    """mean and covariance from `folder`/<hash of key>.npz, else from compute() -> features (N, F), then cached.

    key says everything the numbers depend on (data, weights, preprocessing). A damaged file is computed again, aloud.
    """
    path = Path(folder) / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    found = None
    if path.is_file():
        arrays = read_arrays(path, key)
        if arrays is not None:
            found = arrays["mu"], arrays["sigma"]
    if all(gather(found is not None)):                    # several processes compute together or not at all
        return found
    mu, sigma = mean_and_covariance(compute())
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            np.savez(f, mu=mu, sigma=sigma, key=key)
    return mu, sigma
