"""Time and peak memory of PR_Calculate.manifold_metrics against the three bare matrix products it cannot do without.

    python tests/benchmarks/bench_pr.py                                     # 10,000 x 10,000 x 256, a few seconds
    python tests/benchmarks/bench_pr.py --n 50000 --m 50000 --dims 256      # the size of the target, minutes on two cores
    python tests/benchmarks/bench_pr.py --n 50000 --m 50000 --device cuda
    python tests/benchmarks/bench_pr.py --case duplicates collapsed         # what ties and mode collapse cost

Prints one JSON line per case (report.py says what stands in it). What is counted are pairs of points; the plain way are
the products real x real, fake x fake and real x fake in float32 over blocks of the same size, of which nothing is made.
seconds and ratio (of the metric over the products: median, and ratios of all rounds) say the same in other words, and
memory_before_mb is what the process, or the GPU, held before.
"""
import argparse
from statistics import median

import numpy as np
import torch
from report import forget_peak, peak_mb, report, take_turns

from PR_Calculate import manifold_metrics
from utils import pick_device, run


def make(case, n, m, dims, seed=0):
    """Two float32 sets. gauss: like PCA features, the spread falling off over 256 dimensions; duplicates: every fourth
    point of both sets is one of a hundred real ones (of fewer, where there are not as many); collapsed: the fake points are
    ten tight clusters."""
    rng = np.random.default_rng(seed)
    spread = (1 / np.sqrt(1 + np.arange(dims))).astype(np.float32)
    real = rng.standard_normal((n, dims), np.float32) * spread
    fake = rng.standard_normal((m, dims), np.float32) * spread * np.float32(0.95)
    if case == "duplicates":
        few = min(100, (n + 2) // 4)
        real[::4] = real[1 + 4 * rng.integers(0, few, len(real[::4]))]
        fake[::4] = real[1 + 4 * rng.integers(0, few, len(fake[::4]))]
    elif case == "collapsed":
        fake = fake[rng.integers(0, 10, m)] + 1e-3 * rng.standard_normal((m, dims), np.float32) * spread
    return real, fake


def bare_products(real, fake, chunk):
    """The three products over full blocks, into a buffer allocated once; nothing is done with the results."""
    out = torch.empty(chunk * chunk, dtype=torch.float32, device=real.device)
    for x, y in ((real, real), (fake, fake), (real, fake)):
        for a in x.split(chunk):
            for b in y.split(chunk):
                torch.matmul(a, b.T, out=out[:len(a) * len(b)].view(len(a), len(b)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10000, help="real points (default 10000)")
    parser.add_argument("--m", type=int, default=10000, help="fake points (default 10000)")
    parser.add_argument("--dims", type=int, default=256, help="features (default 256)")
    parser.add_argument("--case", nargs="+", choices=("gauss", "duplicates", "collapsed"), default=["gauss"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--chunk", type=int, default=0, help="points per side of a block, 0 = the default")
    parser.add_argument("--runs", type=int, default=3, help="times that products and metric take turns (default 3)")
    args = parser.parse_args()
    device = pick_device(args.device)
    chunk = args.chunk or (8192 if device.type == "cuda" else 4096)
    torch.set_float32_matmul_precision("highest")

    for case in args.case:
        real, fake = (torch.from_numpy(x).to(device) for x in make(case, args.n, args.m, args.dims))
        warm_up = (real[:2 * chunk], fake[:2 * chunk])
        bare_products(*warm_up, chunk)
        manifold_metrics(*warm_up, device=device, chunk=chunk)
        forget_peak(device)
        before = peak_mb(device)
        bare, ours = take_turns([lambda r=real, f=fake: bare_products(r, f, chunk),
                                 lambda r=real, f=fake: manifold_metrics(r, f, device=device, chunk=chunk)], args.runs, device)
        ratios = [ours / bare for ours, bare in zip(ours.seconds, bare.seconds)]
        report(case, args.n ** 2 + args.m ** 2 + args.n * args.m, ours, device, bare, N=args.n, M=args.m, F=args.dims,
               chunk=chunk, seconds=round(median(ours.seconds), 3), bare_products_seconds=round(median(bare.seconds), 3),
               ratio=round(median(ratios), 3), ratios=[round(r, 3) for r in ratios], memory_before_mb=round(before),
               metrics=ours.result)


if __name__ == "__main__":
    run(main)
