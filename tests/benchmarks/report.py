"""What the benchmarks share: ways of doing the same thing take turns, and every case becomes one line of JSON.

    {"case": ..., "per_second": ..., "ratio_to_plain": ..., "peak_memory_mb": ..., "device": ..., "versions": {...}, ...}

per_second            median over the rounds; best_per_second that of the best one, which other work disturbs least
ratio_to_plain        how many times faster than the plain way: median over the rounds, in which both met the same machine
cpu_us_each           median of all processors' time for one image (or whatever is counted), that of workers which live on
                      left out
peak_memory_mb        the most that was resident during the work, of this process without its workers, everything it had
                      loaded before included; on a GPU the most that PyTorch had reserved there
plain_...             the same of the plain way, where it was measured
"""
import contextlib
import json
import platform
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

# The benchmarks import this module first, and then those of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cpu_count

ROOT = Path(__file__).resolve().parents[2]


class Timing(NamedTuple):
    """Rounds of one way, and what it returned last."""
    seconds: list
    cpu_seconds: list
    peak_mb: float
    result: Any


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):                          # Linux only; elsewhere the peak is that since the start
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device):
    """MB since forget_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2 ** 20     # what a CUDA graph's replay uses is never allocated
    unit = 1 if platform.system() == "Darwin" else 1024         # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def cpu_seconds():
    """Of all processors, for this process and its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def take_turns(ways, rounds, device):
    """A Timing of each of the ways (functions without arguments), over rounds in which each has its turn."""
    timings = [Timing([], [], 0.0, None) for _ in ways]
    for _ in range(rounds):
        for i, way in enumerate(ways):
            forget_peak(device)
            synchronize(device)
            before, start = cpu_seconds(), time.perf_counter()
            result = way()
            synchronize(device)
            timings[i].seconds.append(time.perf_counter() - start)
            timings[i].cpu_seconds.append(cpu_seconds() - before)
            timings[i] = timings[i]._replace(peak_mb=max(timings[i].peak_mb, peak_mb(device)), result=result)
    return timings


def ratio(timing, plain):
    """How many times faster than the plain way, median over the rounds."""
    return statistics.median(p / t for p, t in zip(plain.seconds, timing.seconds))


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {cpu_count()} CPU cores"


def report(case, count, timing, device, plain=None, plain_count=None, **more):
    """Print the line of a case; returns it as a dict. count: images (or whatever is counted) of a round; more: further
    entries."""
    def numbers(prefix, timing, count):
        return {f"{prefix}per_second": rounded(count / statistics.median(timing.seconds)),
                f"{prefix}best_per_second": rounded(count / min(timing.seconds)),
                f"{prefix}cpu_us_each": rounded(1e6 * statistics.median(timing.cpu_seconds) / count),
                f"{prefix}peak_memory_mb": round(timing.peak_mb)}

    line = {"case": case, "count": count, **numbers("", timing, count)}
    if plain is not None:
        plain_count = plain_count or count
        line |= {**numbers("plain_", plain, plain_count), "ratio_to_plain": rounded(ratio(timing, plain) * count / plain_count)}
    return print_line(line | more | {"rounds": len(timing.seconds)}, device)


def print_line(line, device):
    """A line that says where it was measured; returns it."""
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": version("triton")}
    line = {**line, "device": device_name(device), "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **versions}}
    print(json.dumps(line), flush=True)
    return line


def rounded(value):
    """Four digits that count."""
    return float(f"{value:.4g}")
