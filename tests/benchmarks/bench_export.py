"""Images a second that test.py samples and writes, against a plain single-threaded PIL loop on the same images.

    python tests/benchmarks/bench_export.py                              # 5,000 images of 32x32, half a minute
    python tests/benchmarks/bench_export.py --images 50000 --threads 2
    python tests/benchmarks/bench_export.py --case write --folder /mnt/scratch --size 64

Prints one JSON line per case.
write   test.write_export of finished images (encoding, files, manifest) and the loop of Image.save(compress_level=1)
        and with PIL's default level, taking turns, each in a folder of its own; the best round of each, and the CPU
        time an image costs, which other work on the machine disturbs less than the rate.
sample  the decoder alone (the published network, random weights), and sampling and writing together.
"""
import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.vamp_flow import CrossFlowVampVAE
from utils import cpu_count, generate_images

spec = importlib.util.spec_from_file_location("test_script", Path(__file__).resolve().parents[2] / "test.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def smooth_images(n, size):
    """uint8 (n, 3, size, size), about as compressible as photographs."""
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.normal(0, 1, (min(n, 500), 3, size, size)), (0, 0, 1, 1))
    x = torch.from_numpy((128 + 200 * x).clip(0, 255).astype(np.uint8))
    return x.repeat(-(-n // len(x)), 1, 1, 1)[:n]


def export(folder, n, batches, threads):
    script.write_export(script.Export(folder, "--fake_dirname", {"count": n}, n, batches), 0, threads)


def pil_loop(folder, images, level):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png", compress_level=level)


def timed(work):
    """(seconds of the wall clock, of all processors)."""
    before, start = os.times(), time.perf_counter()
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])


def take_turns(ways, repeat):
    """The least of both times for each way, over rounds in which each has its turn: all meet the same machine."""
    rounds = [[timed(way) for way in ways] for _ in range(repeat)]
    return [[min(values) for values in zip(*times)] for times in zip(*rounds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("write", "sample"), default=["write", "sample"])
    parser.add_argument("--images", type=int, default=5000,
                        help="images of a round (sampling: a tenth of them on a CPU)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 16 for sampling")
    parser.add_argument("--threads", type=int, default=min(cpu_count(), 8), help="that write (default: the cores)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--device", default="cpu", help="for sampling: cpu or cuda")
    parser.add_argument("--folder", default=None, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    about = {"size": args.size, "threads": args.threads, "cores": cpu_count(), "machine": platform.machine(),
             "python": platform.python_version(), "pillow": PIL.__version__, "torch": torch.__version__}

    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        fresh = (Path(root, str(i)) for i in range(10 ** 6))
        if "write" in args.case:
            images, n = smooth_images(args.images, args.size), args.images
            ways = [lambda: export(next(fresh), n, lambda start, stop: images[start:stop].split(1000), args.threads),
                    lambda: pil_loop(next(fresh), images, 1), lambda: pil_loop(next(fresh), images, 6)]
            ours, pil, default = take_turns(ways, args.repeat)
            print(json.dumps({
                "case": "write", "images": n, "per_second": round(n / ours[0]),
                "pil_loop_per_second": round(n / pil[0]), "ratio_to_pil_loop": round(pil[0] / ours[0], 2),
                "ratio_to_pil_default_level": round(default[0] / ours[0], 2),
                "cpu_us_per_image": round(1e6 * ours[1] / n), "pil_loop_cpu_us_per_image": round(1e6 * pil[1] / n),
                "bytes_per_image": round(np.mean([len(b) for b in script.encode_png(images[:500])])), **about}))
        if "sample" in args.case:
            device = torch.device(args.device)
            n = args.images if device.type == "cuda" else max(100, args.images // 10)
            torch.manual_seed(0)
            model = CrossFlowVampVAE(img_size=args.size).to(device).eval()

            def batches(start=0, stop=n):
                return generate_images(model, stop, 100, 0, start=start)

            decode, both = take_turns([lambda: [batch.cpu() for batch in batches()],
                                       lambda: export(next(fresh), n, batches, args.threads)], args.repeat)
            print(json.dumps({
                "case": "sample", "images": n, "device": str(device), "decoded_per_second": round(n / decode[0]),
                "sampled_and_written_per_second": round(n / both[0]),
                "share_of_time_for_writing": round(max(0, 1 - decode[0] / both[0]), 3), **about}))


if __name__ == "__main__":
    main()
