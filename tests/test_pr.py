"""PR_Calculate.py: exact equality with brute force, agreement with prdc, properties, the command line."""
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import prdc
import pytest
import torch
from conftest import ROOT, run_script, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchvision.models import VGG16_Weights, vgg16
from torchvision.transforms.functional import normalize

import PR_Calculate
from PR_Calculate import fit_pca, kernel_distance, manifold_metrics, project, squared_distances
from utils import UserError, decode_images, frechet_distance, mean_and_covariance


def distances(x, y):
    """All squared distances by direct differences in float64, (N, F), (M, F) -> (N, M)."""
    return np.stack([((row - y) ** 2).sum(-1) for row in x])


def brute_force(real, fake, k=3, k_density=5):
    """The definitions, spelled out on the whole matrices."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)

    def radii(x, k):
        d = distances(x, x)
        np.fill_diagonal(d, np.inf)
        return np.sort(d, 1)[:, k - 1]

    d = distances(real, fake)
    inside = d < radii(real, k_density)[:, None]
    return {
        "precision": (d <= radii(real, k)[:, None]).any(0).sum() / len(fake),
        "recall": (d <= radii(fake, k)[None]).any(1).sum() / len(real),
        "density": inside.sum() / (k_density * len(fake)),
        "coverage": inside.any(1).sum() / len(real),
    }


def gaussians(n=300, m=200, dims=12, shift=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, dims)), rng.standard_normal((m, dims)) + shift


DIGITS = load_digits().data                                   # 1797 real images, 64 features, integers 0..16
RNG = np.random.default_rng(1)
pytestmark = pytest.mark.usefixtures("one_thread")
TIED = {
    # Integer pixels: many equal distances.
    "digits": (DIGITS[:400], DIGITS[400:700]),
    # Real images that occur up to ten times, on both sides.
    "duplicates": (DIGITS[RNG.integers(0, 60, 300)], DIGITS[RNG.integers(30, 90, 250)]),
    "binary": (RNG.integers(0, 2, (400, 9)), RNG.integers(0, 2, (300, 9))),
    "one feature": (RNG.integers(0, 40, (200, 1)), RNG.integers(0, 40, (150, 1))),
    "constant": (np.ones((90, 5)), np.ones((70, 5))),
    # Every distance between two real points is the same.
    "simplex": (np.eye(80), np.eye(80)[:50] / 2),
    # Points whose distances drown in the rounding of a float32 product, whatever the centre.
    "two far clusters": tuple(np.round(RNG.standard_normal((n, 6)) * 4) / 2 ** 12 + 1000 * RNG.integers(0, 2, (n, 1))
                              for n in (200, 150)),
    "far from the origin": tuple(RNG.standard_normal((n, 8)) * 1e-6 + 1e3 for n in (200, 150)),
    "tiny": tuple(RNG.standard_normal((n, 8)) * 1e-100 for n in (120, 100)),
    "huge": tuple(RNG.standard_normal((n, 8)) * 1e100 for n in (120, 100)),
}


# Products too small for float32: clusters about the centre of two points far away.
TIED["underflow"] = tuple(np.concatenate((np.ones((1, 8)), -np.ones((1, 8)), RNG.standard_normal((n, 8)) * 1e-21))
                          for n in (150, 120))


@pytest.fixture(params=[1 << 19, 100], ids=["few open pairs", "many open pairs"])
def many_pairs(request, monkeypatch):
    """Both ways to deal with a block: at once, and in strips with bounds from float64 products."""
    monkeypatch.setattr(PR_Calculate, "MANY_PAIRS", request.param)


@pytest.mark.parametrize("chunk", [None, 64, 37])
@pytest.mark.parametrize("case", TIED)
def test_precision_recall_matches_brute_force(case, chunk, many_pairs):
    real, fake = TIED[case]
    assert manifold_metrics(real, fake, chunk=chunk) == brute_force(real, fake)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_float_inputs_match_brute_force(dtype):
    real, fake = (x.astype(dtype) for x in gaussians())
    assert manifold_metrics(real, fake, chunk=96) == brute_force(real, fake)
    assert manifold_metrics(torch.from_numpy(real), torch.from_numpy(fake), 1, 7) == brute_force(real, fake, 1, 7)


def test_all_digits_against_themselves_match_brute_force():
    assert manifold_metrics(DIGITS[:900], DIGITS[900:], chunk=256) == brute_force(DIGITS[:900], DIGITS[900:])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_blocks_smaller_than_k_match_brute_force(chunk):
    real, fake = DIGITS[:24], DIGITS[24:44]
    assert manifold_metrics(real, fake, chunk=chunk) == brute_force(real, fake)


def test_density_radius_may_be_smaller_than_precision_radius():
    real, fake = gaussians()
    assert manifold_metrics(real, fake, k=9, k_density=2) == brute_force(real, fake, 9, 2)


def test_agrees_with_prdc_package(capsys):
    real, fake = gaussians(500, 400)
    ours = manifold_metrics(real, fake)
    three, five = (prdc.compute_prdc(real, fake, nearest_k=k) for k in (3, 5))
    for name, reference in {"precision": three, "recall": three, "density": five, "coverage": five}.items():
        assert ours[name] == pytest.approx(reference[name], rel=1e-12), name
        assert 0.05 < ours[name] < 2                          # a case in which there is something to get wrong


def test_a_ball_other_than_the_nearest_points_counts():
    # Fake point 1 is outside the small ball of its nearest real point 0, but inside the large ball of real point 8.
    real = np.array([[0.0], [-0.1], [-0.2], [-0.3], [8.0]])
    assert manifold_metrics(real, np.array([[1.0], [1.5], [2.0], [2.5]]), 3, 3)["precision"] == 1


def test_balls_are_closed_for_precision_and_open_for_density():
    real = np.array([[0.0], [2.0]])
    got = manifold_metrics(real, np.array([[4.0], [-2.0]]), k=1, k_density=1)
    assert (got["precision"], got["density"], got["coverage"]) == (1, 0, 0)


small_sets = st.integers(0, 2 ** 32 - 1).map(np.random.default_rng).flatmap(
    lambda rng: st.tuples(st.integers(7, 40), st.integers(7, 40), st.integers(1, 6), st.sampled_from([2, 5, 1000])).map(
        lambda s: (rng.integers(0, s[3], (s[0], s[2])) * 0.1, rng.integers(0, s[3], (s[1], s[2])) * 0.1)))


@settings(deadline=None, max_examples=40)
@given(small_sets, st.integers(1, 50), st.randoms(use_true_random=False))
def test_order_of_points_and_chunk_change_nothing(sets, chunk, random):
    real, fake = sets
    expected = manifold_metrics(real, fake)
    orders = [random.sample(range(len(x)), len(x)) for x in sets]
    assert manifold_metrics(real[orders[0]], fake[orders[1]], chunk=chunk) == expected


@settings(deadline=None, max_examples=25)
@given(small_sets, st.integers(1, 6))
def test_copies_of_the_real_points_have_full_precision_and_recall(sets, k):
    real, _ = sets
    got = manifold_metrics(real, real[::-1].copy(), k=k, chunk=16)
    assert got["precision"] == got["recall"] == 1


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 70), st.integers(0, 2 ** 32 - 1))
def test_squared_distance_depends_on_the_two_points_alone(dims, seed):
    x, y = (torch.from_numpy(a) for a in np.random.default_rng(seed).standard_normal((2, 5, dims)))
    d = squared_distances(x, y)
    assert torch.equal(d, squared_distances(y, x))
    assert torch.equal(d[2:3], squared_distances(x[2:3], y[2:3]))
    assert np.array_equal(d.numpy(), squared_distances(x.numpy(), y.numpy()))
    assert d.numpy() == pytest.approx(((x - y).numpy() ** 2).sum(1), rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 2 ** 32 - 1), st.floats(-8, 8), st.booleans())
def test_bounds_hold_for_every_pair(dims, seed, log_spread, double):
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(rng.standard_normal((30, dims)) * 10 ** log_spread + rng.integers(0, 2, (30, 1)) * 100)
            for _ in range(2))
    frame = PR_Calculate._frame(x, y)
    A, B = PR_Calculate.Cloud(x, *frame), PR_Calculate.Cloud(y, *frame)
    dtype = torch.float64 if double else torch.float32
    (a, na), (b, nb) = A.lift(slice(0, 30), dtype), B.lift(slice(0, 30), dtype)
    lower = (PR_Calculate._swap(a) @ b.T).double() * -2
    upper = lower + (na[:, None] + nb) * 2 * PR_Calculate._error_factor(dims, dtype)
    true = torch.from_numpy(distances(x.numpy(), y.numpy())) * A.scale ** 2
    assert (lower <= true).all() and (true <= upper).all()


def test_memory_is_bounded_by_chunk():
    code = ("import resource, numpy as np, torch; from PR_Calculate import manifold_metrics; torch.set_num_threads(1);"
            "rng = np.random.default_rng(0); x, y = rng.standard_normal((2, 6000, 4), dtype=np.float32);"
            "x[:2000] = 1; y[:2000] = 1; manifold_metrics(x[:600], y[:600], chunk=512);"
            "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; manifold_metrics(x, y, chunk=512);"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a) / 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 70                            # MB; one float32 matrix of all pairs alone has 144


def test_thread_count_and_precision_setting_are_restored():
    torch.set_float32_matmul_precision("high")
    try:
        manifold_metrics(*gaussians())
        with pytest.raises(UserError):
            manifold_metrics(*gaussians(), k=1000)
        assert torch.get_num_threads() == 1 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("arguments, message", [
    ({"k": 200}, "--k 200: needs at least 201 fake images, there are 200"),
    ({"k_density": 300}, "--nearest_k 300: needs at least 301 real images, there are 300"),
    ({"k": 0}, "--k 0: must"),
    ({"chunk": -1}, "chunk -1"),
])
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        manifold_metrics(*gaussians(), **arguments)


def test_features_that_are_no_numbers_are_refused():
    real, fake = gaussians()
    fake[3, 2] = np.nan
    with pytest.raises(UserError, match="fake: features must be finite"):
        manifold_metrics(real, fake)
    with pytest.raises(UserError, match="12 features, fake points 5"):
        manifold_metrics(real, real[:, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("case", TIED)
def test_gpu_matches_brute_force(case):
    real, fake = TIED[case]
    torch.set_float32_matmul_precision("high")                # TF32 allowed by the caller must not reach the metric
    try:
        assert manifold_metrics(real, fake, device="cuda", chunk=128) == brute_force(real, fake)
    finally:
        torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------------------------------
# KID, PCA

def test_kid_matches_a_double_loop():
    real, fake = gaussians(30, 20, dims=6)

    def kernel(x, y):
        return (float(np.dot(x, y)) / 6 + 1) ** 3

    more, real, m = real, real[:20], 20                          # with 20 on each side there is but one subset
    total = 0.0
    for i in range(m):
        for j in range(m):
            if i != j:
                total += (kernel(real[i], real[j]) + kernel(fake[i], fake[j])) / (m * (m - 1))
            total -= 2 * kernel(real[i], fake[j]) / m ** 2
    mean, deviation = kernel_distance(real, fake, subsets=3)
    assert mean == pytest.approx(total, rel=1e-10) and math.isnan(deviation)
    assert kernel_distance(more, fake, subsets=3)[1] > 0
    assert PR_Calculate.kernel_protocol(6, 20, 20).endswith("all 20 images of each side, no subsets")
    assert "100 subsets of 20;" in PR_Calculate.kernel_protocol(6, 30, 20)
    assert "100 subsets of 1000;" in PR_Calculate.kernel_protocol(6, 1001, 1001)
    assert PR_Calculate.kernel_text({"kid": 0.1, "kid_std": deviation}, 2) == "0.10"
    assert PR_Calculate.kernel_text({"kid": 0.1, "kid_std": 0.02}, 2) == "0.10 ± 0.02"


def test_kid_is_unbiased_seeded_and_sees_a_shift():
    real, fake = gaussians(2000, 2000, dims=8, shift=0)
    mean, deviation = kernel_distance(real, fake, subsets=40, subset_size=200)
    assert abs(mean) < 3 * deviation / 40 ** 0.5 + 0.01 and deviation > 0
    assert (mean, deviation) == kernel_distance(real, fake, subsets=40, subset_size=200)
    assert mean != kernel_distance(real, fake, subsets=40, subset_size=200, seed=1)[0]
    assert kernel_distance(real, fake + 0.5, subsets=10, subset_size=200)[0] > 10 * deviation
    with pytest.raises(UserError, match="two images"):
        kernel_distance(real[:1], fake)


def test_pca_keeps_distances_and_orders_variance():
    real, fake = gaussians(60, 50, dims=10)
    real, fake = (x * np.arange(1, 11) for x in (real, fake))
    mu, components, kept = fit_pca(real, 10)
    assert kept == pytest.approx(1)
    assert components.T @ components == pytest.approx(np.eye(10), abs=1e-12)
    assert distances(project(fake, mu, components), project(real, mu, components)) == pytest.approx(
        distances(fake, real), rel=1e-4)
    variance = project(real, *fit_pca(real, 4)[:2]).var(0)
    assert (np.diff(variance) < 0).all()
    assert fit_pca(real, 4)[2] == pytest.approx(variance.sum() / real.var(0).sum(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "real", 50, seed=1)
    write_images(root / "fake", 44, seed=2, shift=20)
    shutil.copy(root / "real" / "00000.png", root / "fake" / "copy.png")
    return root


def evaluate(folders, hub, *extra, real="real", fake="fake"):
    return run_script("PR_Calculate.py", "--real_dir", folders / real, "--fake_dir", folders / fake, "--device", "cpu",
                      "--fid_dims", "64", *extra, env=hub.env)


def test_command_line_reports_every_metric_with_its_protocol(folders, fake_hub, tmp_path):
    fake_hub.inception()
    out, cache = tmp_path / "new" / "pr.json", tmp_path / "cache"
    arguments = ("--pca_dim", "16", "--out", out, "--tag", "mine", "--feature_cache", cache, "--num_images", "42")
    done = evaluate(folders, fake_hub, *arguments)
    assert done.returncode == 0, done.stderr
    assert "only 42 images" in done.stderr and "covariance" in done.stderr
    report = json.loads(out.read_text())
    assert report["tag"] == "mine" and "pixels, --fake_dir" not in done.stderr
    assert set(report["metrics"]) == {"fid", "kid", "kid_std", "precision", "recall", "density", "coverage"}
    protocol = report["protocol"]
    assert protocol["real"]["images"] == 42 and protocol["pca"].startswith("16 dimensions fitted on the real features")
    assert protocol["features"]["name"].startswith("pytorch-fid InceptionV3") and len(protocol["features"]["sha256"]) == 64
    assert protocol["real"]["choice"] == "random 42 by the seed" and protocol["k"] == 3 and protocol["nearest_k"] == 5
    for name in ("precision", "recall", "density", "coverage"):
        assert f"{report['metrics'][name]:.4f}" in done.stdout
    assert "of all images, no subsets" in done.stdout and report["metrics"].pop("kid_std") is None

    # Again from the feature cache, one file of it damaged: the same numbers, and a warning.
    files = sorted(cache.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:5000])
    again = evaluate(folders, fake_hub, *arguments)
    assert again.returncode == 0 and again.stderr.count("damaged, computed again") == 1
    metrics = json.loads(out.read_text())["metrics"]
    del metrics["kid_std"]
    assert metrics == pytest.approx(report["metrics"], rel=1e-5)
    total = len(list((folders / "real").iterdir()))                  # as many as there are: no choice
    assert PR_Calculate.survey_folder(folders / "real", "--real_dir", total).choice == "all"
    assert PR_Calculate.survey_folder(folders / "real", "--real_dir", total - 1).choice.startswith("random")


def test_a_folder_against_itself_is_perfect_and_corrupt_files_are_counted(folders, fake_hub, tmp_path):
    fake_hub.inception()
    for name in ("a", "b"):
        shutil.copytree(folders / "real", tmp_path / name)
    (tmp_path / "b" / "00007.png").write_bytes(b"no image")
    refused = evaluate(tmp_path, fake_hub, "--pca_dim", "0", "--out", tmp_path / "o.json", real="a", fake="b")
    assert refused.returncode == 2 and "00007.png" in refused.stderr and not (tmp_path / "o.json").exists()
    done = evaluate(tmp_path, fake_hub, "--pca_dim", "0", "--skip_corrupt", "--out", tmp_path / "o.json", real="a", fake="b")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    # Equal images have equal features, to the last bit: nothing but the missing image keeps this from the ideal.
    assert report["metrics"]["precision"] == 1 and report["metrics"]["recall"] > 0.95
    assert report["protocol"]["fake"]["corrupt_left_out"] == 1 and report["protocol"]["pca"] == "none"


def test_an_evaluation_of_other_images_is_not_replaced(folders, fake_hub, tmp_path):
    fake_hub.inception()
    out = tmp_path / "o.json"
    more = ("--pca_dim", "4", "--out", out, "--feature_cache", tmp_path)
    for _ in range(2):                                               # the same again is no loss
        assert evaluate(folders, fake_hub, *more).returncode == 0
    before = out.read_bytes()
    pixels = json.loads(before)["protocol"]["fake"]["pixels"][:12]
    for other, said in ((dict(fake="real"), rf"fake.pixels \({pixels}, not "), (dict(real="fake"), r"real.pixels \("),
                        (("--k", "2"), r"k \(3, not 2\)"), (("--pca_dim", "0"), r"pca \(4, not 0\)")):
        flags, sides = ((), other) if isinstance(other, dict) else (other, {})
        refused = evaluate(folders, fake_hub, *more, *flags, **sides)
        assert refused.returncode == 2 and refused.stderr.count("error: ") == 1, refused.stderr
        assert re.search(f"o.json was measured with another {said}.*; another --out keeps both", refused.stderr)
    assert out.read_bytes() == before
    assert evaluate(folders, fake_hub, *more, "--overwrite", fake="real").returncode == 0
    assert json.loads(out.read_text())["metrics"]["precision"] == 1


class PooledPixels:
    """A stand-in for a network: the image at 2x2 pixels."""
    name, key, sha256, dims, device = "2x2 pixels", "pooled", "0" * 64, 12, torch.device("cpu")

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_each_distinct_image_passes_the_network_once(tmp_path):
    real, fake = write_images(tmp_path / "real", 7, seed=1), write_images(tmp_path / "fake", 9, seed=2)
    shutil.copy(real / "00003.png", real / "00009.png")       # twice in one folder, and in both folders
    shutil.copy(real / "00005.png", fake / "00001.png")
    surveys = [PR_Calculate.survey_folder(f, "--dir") for f in (real, fake)]
    extractor, cache = PooledPixels(), tmp_path / "cache"
    cache.mkdir()
    for run in range(2):                                      # the second time from the cache
        table, rows = PR_Calculate.folder_features(extractor, surveys, 4, cache)
        assert extractor.seen == len(table) == 15
        for survey, own in zip(surveys, rows):
            assert np.array_equal(table[own], PooledPixels()(decode_images(survey.paths)).numpy()), run
    # The fake folder from its cache, after another real one.
    other = PR_Calculate.survey_folder(write_images(tmp_path / "other", 3, seed=3), "--dir")
    table, rows = PR_Calculate.folder_features(extractor, [other, surveys[1]], 4, cache)
    assert extractor.seen == 18
    assert np.array_equal(table[rows[1]], PooledPixels()(decode_images(surveys[1].paths)).numpy())


def run_pr(monkeypatch, real, fake, *more):
    """The command line with PooledPixels as the network of FID: the --fid_dims asked for, and what was written."""
    seen, out = [], real.parent / "out.json"
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", lambda device, dims, **_: seen.append(dims) or PooledPixels())
    monkeypatch.setattr(sys, "argv", ["PR_Calculate.py", "--real_dir", str(real), "--fake_dir", str(fake), "--device", "cpu",
                                      "--pca_dim", "0", "--out", str(out), "--overwrite", *map(str, more)])
    PR_Calculate.main()
    return seen, json.loads(out.read_text())


def test_pixels_name_a_folder_by_its_content_and_sizes_that_differ_are_said(tmp_path, monkeypatch, capsys):
    for name, size, seed in (("a", 8, 0), ("b", 8, 1), ("small", 4, 0)):
        write_images(tmp_path / name, 5, size=size, seed=seed)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "00000.png").rename(tmp_path / "c" / "zzz.png")
    pixels = {name: PR_Calculate.describe_folder(PR_Calculate.survey_folder(tmp_path / name, "--real_dir"))["pixels"]
              for name in ("a", "b", "c")}
    assert pixels["a"] == pixels["c"] != pixels["b"]
    for fake in ("b", "small"):
        run_pr(monkeypatch, tmp_path / "a", tmp_path / fake, "--nearest_k", 3)
        assert ("--real_dir has images of 8x8 pixels, --fake_dir of 4x4" in capsys.readouterr().err) == (fake == "small")


@pytest.mark.parametrize("pca_dim", [0, 2])
def test_pca_is_for_the_manifold_metrics_only(pca_dim, tmp_path):
    folders = write_images(tmp_path / "real", 40, seed=1), write_images(tmp_path / "fake", 30, seed=2, shift=15)
    surveys = [PR_Calculate.survey_folder(f, "--dir") for f in folders]
    args = PR_Calculate.parse_args(["--real_dir", "a", "--fake_dir", "b", "--pca_dim", str(pca_dim), "--seed", "3"])
    metrics, protocol = PR_Calculate.evaluate(args, torch.device("cpu"), PooledPixels(), *surveys)
    real, fake = (PooledPixels()(decode_images(s.paths)).numpy() for s in surveys)
    kid, kid_std = kernel_distance(real, fake, seed=3)
    expected = {"fid": frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake)), "kid": kid,
                "kid_std": kid_std}
    if pca_dim:
        mu, components, _ = fit_pca(real, pca_dim)
        real, fake = project(real, mu, components), project(fake, mu, components)
    assert metrics == pytest.approx(expected | brute_force(real, fake))
    assert ("no whitening" in protocol["pca"]) == bool(pca_dim) and protocol["seed"] == 3


def test_num_images_chooses_by_the_seed(tmp_path):
    folder = write_images(tmp_path / "many", 12)
    first, again, other = (PR_Calculate.survey_folder(folder, "--dir", 5, seed).paths for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5 and first == sorted(first)


def test_vgg16_features_are_those_of_torchvisions_classifier(fake_hub):
    fake_hub.vgg16()
    extractor = PR_Calculate.VGG16Features(torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    net = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).eval()
    caught = []
    net.classifier[4].register_forward_hook(lambda module, inputs, output: caught.append(output.clone()))
    with torch.no_grad():
        net(normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        features = extractor(images)
    assert features.shape == (2, extractor.dims) and (features >= 0).all() and features.std() > 0
    assert torch.allclose(features, caught[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_vgg16_features_from_the_command_line(fake_hub, tmp_path):
    fake_hub.vgg16()
    write_images(tmp_path / "real", 8, seed=1)
    write_images(tmp_path / "fake", 7, seed=2)
    done = run_script("PR_Calculate.py", "--real_dir", tmp_path / "real", "--fake_dir", tmp_path / "fake", "--features",
                      "vgg16", "--pca_dim", "4", "--device", "cpu", "--out", tmp_path / "o.json", env=fake_hub.env)
    assert done.returncode == 0, done.stderr
    features = json.loads((tmp_path / "o.json").read_text())["protocol"]["features"]
    assert features["name"].startswith("torchvision VGG16") and features["dims"] == 4096
    assert "not comparable with the published FID" in done.stdout


def bad_inputs(root):
    """Name -> (arguments, what the one line says)."""
    real, fake = ("--real_dir", root / "real"), ("--fake_dir", root / "fake")
    return {
        "missing folder": ((*real, "--fake_dir", root / "none"), "no such folder"),
        "empty folder": ((*real, "--fake_dir", root / "empty"), "no images there"),
        "mixed sizes": ((*real, "--fake_dir", root / "mixed"), "one size"),
        "k too large": ((*real, *fake, "--k", "45"), "--k 45: needs at least 46 fake images, there are 45"),
        "nearest_k too large": ((*real, *fake, "--nearest_k", "50"), "--nearest_k 50: needs at least 51 real images"),
        "k zero": ((*real, *fake, "--k", "0"), "--k 0"),
        "pca too large": ((*real, *fake, "--pca_dim", "51", "--fid_dims", "64"), "--pca_dim 51"),
        "no GPU": ((*real, *fake, "--device", "cuda:99"), "--device cuda:99"),
        "out is a folder": ((*real, *fake, "--out", root), "is a folder"),
        "out under a file": ((*real, *fake, "--out", root / "real" / "00000.png" / "o.json"), "--out"),
        "fid_dims with vgg16": ((*real, *fake, "--features", "vgg16", "--fid_dims", "64"), "--fid_dims"),
        "empty out": ((*real, *fake, "--out", ""), "--out '': is a folder"),
        "long out": ((*real, *fake, "--out", "x" * 300), "the name is too long"),
        "unknown choice": ((*real, *fake, "--features", "resnet"), "argument --features: invalid choice"),
        "no number": ((*real, *fake, "--seed", "nan"), "argument --seed: invalid int value"),
        "damaged manifest": ((*real, "--fake_dir", root / "damaged", "--fid_dims", "64", "--pca_dim", "0"),
                             "manifest.json: damaged"),
    }


@pytest.mark.parametrize("case", bad_inputs(ROOT))
def test_bad_input_is_one_line_and_exit_code_2(case, folders, fake_hub, monkeypatch, capsys):
    fake_hub.inception()
    (folders / "empty").mkdir(exist_ok=True)
    if not (folders / "mixed").exists():
        write_images(folders / "mixed", 9)
        write_images(folders / "mixed" / "more", 1, size=40)
    if not (folders / "damaged").exists():
        (write_images(folders / "damaged", 9) / "manifest.json").write_text('{"kind')
    arguments, message = bad_inputs(folders)[case]
    if "--device" not in arguments:
        arguments += ("--device", "cpu")
    if case in ("missing folder", "k too large"):             # the whole way; the rest in-process, which is quicker
        # Found before the weights are asked for, which are not there.
        done = run_script("PR_Calculate.py", *arguments, env=fake_hub.env | {"TORCH_HOME": str(folders / "nowhere")})
        code, error = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", ["PR_Calculate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            PR_Calculate.run(PR_Calculate.main)
        code, error = stop.value.code, capsys.readouterr().err
    # Seeded random weights are named as a stand-in as soon as they are loaded.
    lines = [line for line in error.splitlines() if "is a stand-in" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], error


def test_missing_weights_without_network_are_named(folders, tmp_path):
    env = os.environ | {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = run_script("PR_Calculate.py", "--real_dir", folders / "real", "--fake_dir", folders / "fake", "--device", "cpu",
                      "--out", tmp_path / "o.json", env=env)
    assert done.returncode == 2 and "pt_inception-2015-12-05-6726825d.pth" in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("Downloading")]    # torch 2.4 says so
    assert len(lines) == 1 and not (tmp_path / "o.json").exists()


def test_cached_features_of_another_network_are_not_taken(tmp_path):
    survey = PR_Calculate.survey_folder(write_images(tmp_path / "a", 5), "--dir")
    other = PooledPixels()
    other.key = "another"
    for network in (PooledPixels(), other):
        PR_Calculate.folder_features(network, [survey], 4, tmp_path)
        assert network.seen == 5


def test_command_line_passes_seed_and_features_on_and_counts_every_image(tmp_path, monkeypatch):
    folders = write_images(tmp_path / "real", 20, size=8), write_images(tmp_path / "fake", 20, size=8, seed=1)
    written = [run_pr(monkeypatch, *folders, "--num_images", 8, "--seed", s)[1] for s in (0, 1, 0)]
    pixels = [w["protocol"]["real"]["pixels"] for w in written]
    assert pixels[0] == pixels[2] != pixels[1]
    shutil.copy(tmp_path / "fake/00001.png", tmp_path / "fake/00002.png")
    dims, written = run_pr(monkeypatch, *folders)
    assert dims == [2048]
    assert [written["protocol"]["fake"][k] for k in ("images", "distinct_images")] == [20, 19]


def test_kid_is_the_mean_over_seeded_subsets_without_repetition():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 4)), rng.normal(size=(40, 4)) + 0.3
    draws = np.random.default_rng(7)

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    def once():
        x, y = (s[draws.choice(len(s), 20, replace=False)] for s in (real, fake))
        own = sum(v.sum() - np.trace(v) for v in (kernel(x, x), kernel(y, y)))
        return own / (20 * 19) - 2 * kernel(x, y).mean()

    values = [once() for _ in range(6)]
    found = PR_Calculate.kernel_distance(real, fake, subsets=6, subset_size=20, seed=7)
    assert found == pytest.approx((np.mean(values), np.std(values)))
    defaults = {k: v.default for k, v in inspect.signature(PR_Calculate.kernel_distance).parameters.items()}
    assert (defaults["subsets"], defaults["subset_size"], defaults["seed"]) == (100, 1000, 0)


def test_vgg16_reduces_large_images_with_antialias(fake_hub):
    fake_hub.vgg16()
    extractor = PR_Calculate.VGG16Features(torch.device("cpu"))
    shown = []
    extractor.model = lambda x: shown.append(x) or x.flatten(1)
    stripes = (255 * (torch.arange(672) % 3 == 1)).to(torch.uint8).expand(1, 3, 672, 672)
    extractor(stripes)
    pixels = (shown[0] * extractor.std + extractor.mean) * 255
    assert pixels[..., 8:-8].std() < 2 and abs(pixels[..., 8:-8].mean() - 85) < 2
