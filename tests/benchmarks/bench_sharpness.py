"""Images a second of csv_analysis.py against reading, decoding and measuring them one by one.

    python tests/benchmarks/bench_sharpness.py
    python tests/benchmarks/bench_sharpness.py --images 50000 --size 32 --workers 2 --repeat 5

Writes --images random smooth PNG files into a temporary folder and prints one JSON line (report.py says what stands in it):
the command's own path from the list of files to the digests and measures, the plain loop (on a part of the files: its rate
does not depend on how many), and the largest relative difference between the two results.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import report, take_turns
from scipy import ndimage

from csv_analysis import analyse
from utils import cpu_count, list_images, run


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
        part, cpu = files[:args.naive], torch.device("cpu")
        ours, plain = take_turns([lambda: analyse(files, workers=args.workers), lambda: np.array([naive(f) for f in part])],
                                 args.repeat, cpu)
        error = np.abs(ours.result[0][:len(part)] / plain.result - 1).max()
        report("sharpness", len(files), ours, cpu, plain, len(part), size=args.size, workers=args.workers,
               largest_relative_difference=float(error))


if __name__ == "__main__":
    run(main)
