"""FID features: images a second of utils.InceptionFeatures against pytorch-fid's own loop, in turns in one run, and the
difference of the two distances. Random weights of the right shapes serve as well as the published ones for the speed.

    python tests/benchmarks/bench_fid.py --images 200                # two CPU cores: a minute or two
    python tests/benchmarks/bench_fid.py --images 50000 --device cuda

One JSON line.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import FakeHub, write_images

from utils import (
    InceptionFeatures,
    cpu_count,
    decode_images,
    extract_features,
    frechet_distance,
    hub_file,
    list_images,
    mean_and_covariance,
    pick_device,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="on each of the two sides")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--dims", type=int, choices=(64, 192, 768, 2048), default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as tmp:
        if not hub_file("pt_inception-2015-12-05-6726825d.pth").is_file():
            os.environ["TORCH_HOME"] = str(Path(tmp, "hub"))
            FakeHub(Path(tmp, "hub")).inception()
        folders = [write_images(Path(tmp, name), args.images, args.size, seed, 20 * seed) for seed, name in enumerate("ab")]
        from pytorch_fid.fid_score import compute_statistics_of_path
        from pytorch_fid.inception import InceptionV3
        reference = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[args.dims]]).to(device)
        extractor = InceptionFeatures(device, args.dims)

        def ours():
            statistics_of = []
            for folder in folders:
                images = decode_images(list_images(folder), progress=False)
                features = extract_features(extractor, images.split(args.batch_size), len(images), progress=False)
                statistics_of.append(mean_and_covariance(features))
            return statistics_of

        def theirs():
            return [compute_statistics_of_path(str(f), reference, args.batch_size, args.dims, device, 4) for f in folders]

        seconds, results = {ours: [], theirs: []}, {}
        for _ in range(args.rounds):
            for way, times in seconds.items():
                start = time.perf_counter()
                results[way] = way()
                times.append(time.perf_counter() - start)
        a, b = (statistics.median(times) for times in seconds.values())
        distances = [frechet_distance(*results[way][0], *results[way][1]) for way in (ours, theirs)]
        print(json.dumps({
            "case": "fid features", "images": 2 * args.images, "dims": args.dims, "images_per_s": round(2 * args.images / a, 1),
            "pytorch_fid_images_per_s": round(2 * args.images / b, 1), "ratio_to_plain": round(b / a, 2),
            "distance": distances[0], "relative_difference": abs(distances[0] / distances[1] - 1),
            "largest_mean_difference": float(np.abs(results[ours][0][0] - results[theirs][0][0]).max()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{platform.machine()}, {cpu_count()} cores", "torch": torch.__version__}))


if __name__ == "__main__":
    main()
