"""Images a second that test.py samples and writes, against a plain single-threaded PIL loop on the same images.

    python tests/benchmarks/bench_export.py                              # 5,000 images of 32x32, half a minute
    python tests/benchmarks/bench_export.py --images 50000 --threads 2
    python tests/benchmarks/bench_export.py --case write --folder /mnt/scratch --size 64

Prints one JSON line per case (report.py says what stands in it).
write   test.write_export of finished images (encoding, files, manifest) and the loop of Image.save(compress_level=1)
        and with PIL's default level, taking turns, each in a folder of its own.
sample  the decoder alone (the default network, random weights)
export  sampling and writing together, against the decoder alone: what lies below 1 is the cost of writing.
"""
import argparse
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import ROOT, ratio, report, rounded, take_turns
from scipy import ndimage

from models.vamp_flow import CrossFlowVampVAE
from utils import cpu_count, generate_images, pick_device, run

spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
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
    about, cpu, device = {"size": args.size, "writers": args.threads}, torch.device("cpu"), pick_device(args.device)

    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        fresh = (Path(root, str(i)) for i in range(10 ** 6))
        if "write" in args.case:
            images, n = smooth_images(args.images, args.size), args.images
            ways = [lambda: export(next(fresh), n, lambda start, stop: images[start:stop].split(1000), args.threads),
                    lambda: pil_loop(next(fresh), images, 1), lambda: pil_loop(next(fresh), images, 6)]
            ours, pil, default = take_turns(ways, args.repeat, cpu)
            report("write", n, ours, cpu, pil, ratio_to_pil_default_level=rounded(ratio(ours, default)),
                   bytes_per_image=round(np.mean([len(b) for b in script.encode_png(images[:500])])), **about)
        if "sample" in args.case:
            n = args.images if device.type == "cuda" else max(100, args.images // 10)
            torch.manual_seed(0)
            model = CrossFlowVampVAE(img_size=args.size).to(device).eval()

            def batches(start=0, stop=n):
                return generate_images(model, stop, 100, 0, start=start)

            decode, both = take_turns([lambda: [batch.cpu() for batch in batches()],
                                       lambda: export(next(fresh), n, batches, args.threads)], args.repeat, device)
            report("sample", n, decode, device, **about)
            report("export", n, both, device, decode, **about)


if __name__ == "__main__":
    run(main)
