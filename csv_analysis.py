"""Sharpness of every image of a folder: three measures on the grey image, cached with a fingerprint.

    python csv_analysis.py --gen data/fake_cifar --out_dir ./results/single_image_quality --tag CrossVampVAE
    python csv_analysis.py --gen data/real_cifar --out_dir ./results/single_image_quality --tag real
    python csv_analysis.py --gen scraped_images --tag scraped --skip_corrupt --r0 0.5

Writes to out_dir
    cache_<tag>.csv         one row per image: its path below --gen and the measures, read by comparison.py
    cache_<tag>.json        the fingerprint: definitions, content of the folder, image sizes, skipped images
    <tag>_statistics.csv    n, mean, median, p90 and standard deviation (N - 1) of each measure

The cache is used again while the folder's content, the definitions and the cache itself are what the fingerprint
says, whatever the files' dates are.

Shapes: N images, H height, W width.
"""
import argparse
import csv
import hashlib
import io
import json
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import scipy.fft
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from utils import (
    FlagParser,
    UserError,
    atomic_write,
    atomic_write_all,
    cpu_count,
    in_processes,
    list_images,
    png_is_whole,
    progress_bar,
    read_image,
    read_json,
    read_manifest,
    relative_names,
    run,
    sha256_file,
    with_checksum,
    writable_folder,
    write_json,
)

METRICS = ("lap_var", "tenengrad", "hf_ratio", "hf_ratio_ac")

# Part of the fingerprint: change the wording whenever the numbers change, and every cache is computed again.
DEFINITIONS = {
    "grey": "Rec. 601 luma as PIL's mode L, in [0, 1]",
    "borders": "reflect-101",
    "lap_var": "variance of the 4-neighbour Laplacian",
    "tenengrad": "mean of Gx^2 + Gy^2, 3x3 Sobel, not normalised",
    "hf_ratio": "power at centred radius > r0 * min(H, W) / 2 over all power, DC included; 0 for a constant image",
    "hf_ratio_ac": "the same with the DC term left out of the denominator",
}

# Pixels worked on at once. Bounds the memory (about 60 bytes a pixel) and keeps 32x32 batches in the cache; the
# numbers do not depend on it.
BATCH_PIXELS = 1 << 18


# ---------------------------------------------------------------------------------------------------------------------
# Core: arrays in, numbers out

def to_grey(images):
    """uint8 (N, H, W, 3) or (N, H, W) -> uint8 (N, H, W), the integer Rec. 601 luma of PIL's convert("L")."""
    if images.ndim == 3:
        return images
    # 0.299, 0.587 and 0.114 in 16-bit fixed point, rounded: what PIL computes, bit for bit.
    # (The type is named since NumPy 1 would otherwise compute in 16 bits, and overflow.)
    luma = np.multiply(images[..., 0], 19595, dtype=np.uint32)
    luma += np.multiply(images[..., 1], 38470, dtype=np.uint32)
    luma += np.multiply(images[..., 2], 7471, dtype=np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)


@lru_cache(maxsize=32)
def high_frequency_weights(H, W, r0):
    """How often each bin of rfft2 stands in the full spectrum, (H, W // 2 + 1), and the same inside radius 0."""
    fy = np.fft.fftfreq(H, 1 / H)[:, None]
    fx = np.arange(W // 2 + 1)[None]
    # A real image's spectrum is symmetric: each column of the half stands for its mirror image too, at the same
    # radius, except the first and, for even W, the last, which mirror onto themselves.
    count = np.full((H, W // 2 + 1), 2.0)
    count[:, 0] = 1
    if W % 2 == 0:
        count[:, -1] = 1
    return count, count * (np.sqrt(fy ** 2 + fx ** 2) > r0 * min(H, W) / 2)


def _sharpness(grey, r0):
    """uint8 (N, H, W) -> float64 (N, 4), the columns METRICS."""
    N, H, W = grey.shape
    # Laplacian and Sobel are sums of grey levels: integers, so nothing is rounded before the last division.
    g = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="reflect").astype(np.int16)                 # (N, H + 2, W + 2)
    rows = g[:, :-2] + g[:, 2:]                                                                 # (N, H, W + 2)
    centre = g[:, 1:-1]
    laplacian = rows[:, :, 1:-1] + centre[:, :, :-2] + centre[:, :, 2:] - 4 * centre[:, :, 1:-1]
    smooth = rows + 2 * centre                                                                  # 1 2 1 downwards
    gx = smooth[:, :, 2:] - smooth[:, :, :-2]
    difference = g[:, 2:] - g[:, :-2]
    gy = difference[:, :, :-2] + 2 * difference[:, :, 1:-1] + difference[:, :, 2:]

    def mean_square(x):
        x = x.reshape(N, -1).astype(np.float64)
        return np.einsum("np,np->n", x, x) / (H * W)

    lap_mean = laplacian.sum((1, 2), dtype=np.int64) / (H * W)
    lap_var = mean_square(laplacian) - lap_mean ** 2
    tenengrad = mean_square(gx) + mean_square(gy)

    # The mean is taken off before the transform, so that the rounding of a large DC term does not leak into the rest.
    total = grey.sum((1, 2), dtype=np.int64)
    spectrum = scipy.fft.rfft2(grey - (total / (H * W))[:, None, None])
    power = (spectrum.real ** 2 + spectrum.imag ** 2).reshape(N, -1)
    count, high = high_frequency_weights(H, W, r0)
    high = np.einsum("nb,b->n", power, high.ravel())
    ac = np.einsum("nb,b->n", power, count.ravel())
    dc = total.astype(np.float64) ** 2
    varies = grey.reshape(N, -1).min(1) != grey.reshape(N, -1).max(1)     # decided on the pixels, not on rounding noise
    ratio = np.divide(high, ac + dc, out=np.zeros(N), where=varies)
    ratio_ac = np.divide(high, ac, out=np.zeros(N), where=varies)
    return np.stack([lap_var / 255 ** 2, tenengrad / 255 ** 2, ratio, ratio_ac], 1)


def sharpness(images, r0=0.25):
    """Sharpness of each image on its grey levels in [0, 1], borders reflected without repeating the edge (reflect-101).

    images: uint8 (N, H, W, 3) RGB or (N, H, W) grey; r0: where "high frequency" starts, as a share of the Nyquist
    frequency of the shorter side. Returns a DataFrame of N rows:
        lap_var      variance of the 4-neighbour Laplacian, grey level squared
        tenengrad    mean of Gx^2 + Gy^2 with the 3x3 Sobel kernels as they stand, grey level squared
        hf_ratio     power at a centred radius > r0 * min(H, W) / 2 over all power, the DC term included, 0 to 1
        hf_ratio_ac  the same without the DC term in the denominator, so that brightness does not enter
    A constant image has 0 throughout. Raises ValueError for another dtype or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images must be uint8 (N, H, W, 3) or (N, H, W), not {images.dtype} {images.shape}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} pixels have no sharpness")
    values = np.empty((len(images), len(METRICS)))
    step = max(1, BATCH_PIXELS // (images.shape[1] * images.shape[2]))
    for i in range(0, len(images), step):
        values[i:i + step] = _sharpness(to_grey(images[i:i + step]), r0)
    return pd.DataFrame(values, columns=METRICS)


def statistics(table):
    """DataFrame of measures -> DataFrame (metric, n, mean, median, p90, std), std with N - 1."""
    columns = [m for m in METRICS if m in table]
    values = table[columns]
    return pd.DataFrame({"metric": columns, "n": len(table), "mean": values.mean().values,
                         "median": values.median().values, "p90": values.quantile(0.9).values,
                         "std": values.std(ddof=1).values})


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder in parallel

UNREADABLE = bytes(32)                                          # stands for the digest of a file that cannot be opened


def read_bytes(path):
    with open(path, "rb", buffering=0) as f:                    # files are small: a buffer would double the time
        return f.read()


def decode_grey(path, data):
    """The bytes of an image file -> uint8 (H, W), equal to utils.read_image(path, 1). Raises UserError."""
    # Plain PNG files, which every export of this repository is, take half the time of read_image. Whatever else a
    # file may hold (rotation, transparency, 16 bits, a huge size, damage) is left to read_image.
    if data.startswith(b"\x89PNG"):
        try:
            image = PngImageFile(io.BytesIO(data)) if png_is_whole(io.BytesIO(data)) else None
            if image and image.mode in ("L", "RGB") and image.width * image.height <= Image.MAX_IMAGE_PIXELS:
                grey = image.convert("L")
                if not image.info:                              # asked after decoding: a chunk may follow the pixels
                    return np.asarray(grey)
        except (OSError, ValueError, SyntaxError):
            pass
    return read_image(path, 1)


def analyse_files(paths, r0, skip_corrupt):
    """Measure a list of image files of any sizes.

    Returns float64 (n, 4), NaN rows for what was skipped; the files' SHA-256; {"WxH": count}.
    Raises UserError that names the first unreadable file, unless skip_corrupt.
    """
    values, digests, sizes = np.full((len(paths), len(METRICS)), np.nan), [], Counter()
    waiting, pixels = {}, 0                                     # shape -> (rows, images), and how many pixels that is

    def measure():
        for (H, W), (rows, images) in waiting.items():
            values[rows] = sharpness(np.stack(images), r0)
            sizes[f"{W}x{H}"] += len(rows)
        waiting.clear()

    for row, path in enumerate(paths):
        digests.append(UNREADABLE)
        try:
            data = read_bytes(path)
            digests[row] = hashlib.sha256(data).digest()
            grey = decode_grey(path, data)
        except (UserError, OSError):
            if not skip_corrupt:
                raise
            continue
        rows, images = waiting.setdefault(grey.shape, ([], []))
        rows.append(row)
        images.append(grey)
        pixels += grey.size
        if pixels >= BATCH_PIXELS:
            measure()
            pixels = 0
    measure()
    return values, digests, sizes


def analyse(files, r0=0.25, skip_corrupt=False, workers=1, batch_size=256):
    """analyse_files over any number of files, on `workers` processes (1 = in this one), with a progress bar."""
    chunks = [[str(f) for f in files[i:i + batch_size]] for i in range(0, len(files), batch_size)]
    work = partial(analyse_files, r0=r0, skip_corrupt=skip_corrupt)
    values, digests, sizes = [], [], Counter()
    with progress_bar(len(files), "sharpness", wanted=len(files) >= 1000) as bar:
        for v, d, s in in_processes(work, chunks, workers):
            values.append(v)
            digests.extend(d)
            sizes.update(s)
            bar.update(len(d))
    return np.concatenate(values), digests, dict(sorted(sizes.items()))


def file_digests(files, workers=1, batch_size=256):
    """SHA-256 of every file's bytes, 32 bytes each."""
    def read(chunk):
        out = []
        for path in chunk:
            try:
                out.append(hashlib.sha256(read_bytes(path)).digest())
            except OSError:
                out.append(UNREADABLE)
        return out

    with ThreadPoolExecutor(workers) as pool:
        chunks = pool.map(read, [files[i:i + batch_size] for i in range(0, len(files), batch_size)])
        return [digest for chunk in chunks for digest in chunk]


def folder_digest(names, digests):
    """One SHA-256 for a folder's content: relative paths and the bytes behind them."""
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        total.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Cache

def cached_table(cache, fingerprint, definitions, names, digest, skip_corrupt):
    """(table, fingerprint dict) if the cache still holds what would be computed, else None; says why, if surprising.

    digest() gives the folder's content and is called only when everything else agrees.
    """
    if not (cache.is_file() and fingerprint.is_file()):
        return None
    try:
        known = read_json(fingerprint)
        stored = {key: known[key] for key in ("definitions", "files", "skipped", "content_sha256", "cache_sha256", "checksum")}
        damaged = stored["cache_sha256"] != sha256_file(cache)
        skipped = list(stored["skipped"])
    except (UserError, KeyError, TypeError):
        print(f"warning: {fingerprint}: damaged, the images are measured again", file=sys.stderr)
        return None
    if damaged:
        print(f"warning: {cache}: damaged or edited since it was written, the images are measured again",
              file=sys.stderr)
        return None
    if skipped and not skip_corrupt:
        return None                                             # this run must stop at the file the last one skipped
    if stored["definitions"] != definitions or stored["files"] != len(names):
        return None
    if stored["content_sha256"] != digest():
        return None
    # As text first: Python's float() gives back exactly what was written, which pandas' fast parser may miss by a bit.
    table = pd.read_csv(cache, usecols=list(METRICS), dtype=str, encoding="utf-8", encoding_errors="surrogateescape")
    return table[list(METRICS)].astype(float), known


def write_results(cache, fingerprint, summary, table, record):
    """The three files of a tag, all or none."""
    # (All names quoted: by itself pandas leaves a carriage return in one bare, at which it ends the line when it reads.)
    text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).encode("utf-8", "surrogateescape")
    record = with_checksum({**record, "cache_sha256": hashlib.sha256(text).hexdigest()})
    atomic_write_all({summary: statistics(table).to_csv(index=False, lineterminator="\n").encode(), cache: text,
                      fingerprint: (json.dumps(record, indent=2) + "\n").encode("utf-8")})


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def safe_tag(text):
    """argparse type: a tag that can stand in a file name on any system, and in a comma-separated --model_order."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no safe file name: use up to 100 letters, digits and _ . + -, "
                                         "the first a letter, digit or _")
    if text.startswith("cache_"):
        raise argparse.ArgumentTypeError(f"{text!r}: its statistics would look like a cache; leave out cache_")
    return text


def share(text):
    """argparse type: a number with 0 <= number < 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= r0 < 1, not {text}")
    return value


def positive(text):
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, not {text}")
    return value


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--gen", required=True, help="folder of images, searched to any depth")
    group.add_argument("--out_dir", default="./results/single_image_quality",
                       help="where the three files go")
    group.add_argument("--tag", required=True, type=safe_tag,
                       help="name of the variant in file names and plots; call the real images real")
    group.add_argument("--skip_corrupt", action="store_true",
                       help="go on past unreadable images and count them (default: stop at the first)")
    group = parser.add_argument_group("definition")
    group.add_argument("--r0", type=share, default=0.25,
                       help="high frequencies start above this share of the Nyquist frequency of the shorter side")
    group = parser.add_argument_group("run time")
    group.add_argument("--workers", type=positive, default=None,
                       help="processes that decode and measure (default: the cores, 1 for fewer than 1000 images)")
    group.add_argument("--batch_size", type=positive, default=256, help="images a process takes at a time")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    files = list_images(args.gen, "--gen")
    out = writable_folder(args.out_dir, "--out_dir")
    cache, fingerprint = out / f"cache_{args.tag}.csv", out / f"cache_{args.tag}.json"
    summary = out / f"{args.tag}_statistics.csv"
    manifest = read_manifest(args.gen, len(files))              # of an export: its checkpoint, seed and weights
    names = relative_names(files, args.gen)
    definitions = {**DEFINITIONS, "r0": args.r0}
    workers = args.workers or (cpu_count() if len(files) >= 1000 else 1)

    found = cached_table(cache, fingerprint, definitions, names, skip_corrupt=args.skip_corrupt,
                         digest=lambda: folder_digest(names, file_digests(files, workers, args.batch_size)))
    if found:
        table, record = found
        print(f"{cache}: up to date, {len(table):,} images")
        now = {"folder": str(args.gen), "manifest": manifest}   # the same images may lie elsewhere, or have got a manifest
        if any(record.get(key) != value for key, value in now.items()):
            record = {**record, **now}
            write_json(fingerprint, record)
        statistics_text = statistics(table).to_csv(index=False, lineterminator="\n").encode()
        if not summary.is_file() or summary.read_bytes() != statistics_text:
            with atomic_write(summary) as f:
                f.write(statistics_text)
    else:
        start = time.perf_counter()
        values, digests, sizes = analyse(files, args.r0, args.skip_corrupt, workers, args.batch_size)
        seconds = time.perf_counter() - start
        read = ~np.isnan(values[:, 0])
        skipped = [name for name, ok in zip(names, read) if not ok]
        if not read.any():
            raise UserError(f"--gen {args.gen}: none of its {len(files)} files can be read as an image")
        table = pd.DataFrame(values[read], columns=METRICS)
        table.insert(0, "file", pd.array([name for name, ok in zip(names, read) if ok], dtype=object))
        record = {"tag": args.tag, "folder": str(args.gen), "definitions": definitions, "files": len(files),
                  "images": len(table), "sizes": sizes, "skipped": skipped, "manifest": manifest,
                  "content_sha256": folder_digest(names, digests)}
        write_results(cache, fingerprint, summary, table, record)
        print(f"{cache}: {len(table):,} images in {seconds:.1f} s ({len(files) / seconds:,.0f} a second)")
    if record["skipped"]:
        print(f"warning: {len(record['skipped']):,} of {len(files):,} files could not be read and were skipped, "
              f"first {record['skipped'][0]}", file=sys.stderr)
    print(statistics(table).to_string(index=False, float_format=lambda v: f"{v:.6g}"))


if __name__ == "__main__":
    run(main)
