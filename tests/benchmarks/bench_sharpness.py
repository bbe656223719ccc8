"""Images a second of csv_analysis.py against reading, decoding and measuring them one by one.

    python tests/benchmarks/bench_sharpness.py
    python tests/benchmarks/bench_sharpness.py --images 50000 --size 32 --workers 2 --repeat 5

Writes --images random smooth PNG files into a temporary folder, measures them in `repeat` rounds, and prints the best
round of each: the command's own path from the list of files to the digests and measures, the naive loop (on a part of
the files, its rate does not depend on how many), and the CPU time an image costs, which other work on the machine
disturbs less than the rate. The two results are compared as well.
"""
import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from csv_analysis import analyse
from utils import cpu_count, list_images


def naive(path, r0=0.25):
    """One image by the definitions, as one would write them down."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L")) / 255
    H, W = grey.shape
    gx, gy = ndimage.sobel(grey, 1, mode="mirror"), ndimage.sobel(grey, 0, mode="mirror")
    laplacian = ndimage.convolve(grey, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0.0]]), mode="mirror")
    power = np.abs(np.fft.fftshift(np.fft.fft2(grey))) ** 2
    y, x = np.mgrid[:H, :W]
    high = power[np.hypot(y - H // 2, x - W // 2) > r0 * min(H, W) / 2].sum()
    return laplacian.var(), (gx ** 2 + gy ** 2).mean(), high / power.sum(), high / (power.sum() - power[H // 2, W // 2])


def best_of(repeat, work):
    """Seconds of the wall clock and of all processors, the least of each, and the last result."""
    walls, processors = [], []
    for _ in range(repeat):
        before, start = os.times(), time.perf_counter()
        result = work()
        walls.append(time.perf_counter() - start)
        processors.append(sum(os.times()[:4]) - sum(before[:4]))
    return min(walls), min(processors), result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="PNG files to write and measure")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="processes (default: the cores)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--naive", type=int, default=1500, help="files that the naive loop measures")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(args.images):
            image = ndimage.gaussian_filter(rng.normal(0, 1, (args.size, args.size, 3)), (1, 1, 0))
            image = (128 + 200 * image).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(Path(folder, f"{i:05d}.png"), compress_level=1)
        files = list_images(folder)
        wall, processor, (values, _, _) = best_of(args.repeat, lambda: analyse(files, workers=args.workers))
        part = files[:args.naive]
        naive_wall, naive_processor, reference = best_of(args.repeat, lambda: np.array([naive(f) for f in part]))

    error = np.abs(values[:len(part)] / reference - 1).max()
    print(f"{args.images} PNG files of {args.size}x{args.size}, {cpu_count()} cores, {platform.machine()}, "
          f"Python {platform.python_version()}, NumPy {np.__version__}, Pillow {PIL.__version__}, best of {args.repeat}")
    print(f"csv_analysis, {args.workers} workers  {len(files) / wall:9,.0f} images/s  "
          f"{1e6 * processor / len(files):7.0f} us of CPU an image")
    print(f"naive loop, 1 process    {len(part) / naive_wall:9,.0f} images/s  "
          f"{1e6 * naive_processor / len(part):7.0f} us of CPU an image")
    print(f"ratio                    {len(files) / wall / (len(part) / naive_wall):9.1f}           "
          f"{naive_processor / len(part) / (processor / len(files)):9.1f}")
    print(f"largest relative difference {error:.1e}")


if __name__ == "__main__":
    main()
