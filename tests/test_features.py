"""Features and Fréchet distance in utils.py: agreement with pytorch-fid's command line and with closed forms."""
import http.client
import os
import pickle
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, write_images

import utils
from utils import (
    InceptionFeatures,
    UserError,
    cached_statistics,
    decode_images,
    extract_features,
    frechet_distance,
    hub_file,
    list_images,
    load_hub_weights,
    mean_and_covariance,
    sha256_file,
    weights_title,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def folder_statistics(extractor, folder):
    images = decode_images(list_images(folder))
    return mean_and_covariance(extract_features(extractor, images.split(32), len(images), progress=False))


def random_covariance(rng, n):
    a = rng.standard_normal((n, 3 * n))
    return a @ a.T / n


def test_fid_equals_pytorch_fid_command_line(fake_hub, tmp_path):
    fake_hub.inception()
    # More images than dimensions, and two different sizes on disk.
    folders = [write_images(tmp_path / "a", 80, seed=1), write_images(tmp_path / "b", 75, size=48, seed=2, shift=25)]
    done = subprocess.run([sys.executable, "-m", "pytorch_fid", *map(str, folders), "--dims", "64", "--device", "cpu",
                           "--num-workers", "0"], cwd=ROOT, env=fake_hub.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reference = float(done.stdout.split("FID:")[1])
    extractor = InceptionFeatures(torch.device("cpu"), 64)
    ours = frechet_distance(*(s for f in folders for s in folder_statistics(extractor, f)))
    assert ours == pytest.approx(reference, rel=1e-3)
    assert reference > 0.01                                   # the seeded network does tell the folders apart


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_features_equal_those_of_pytorch_fid(fake_hub, dims):
    """To the rounding of float32, with no batch norm left to do."""
    from pytorch_fid.inception import InceptionV3
    fake_hub.inception()
    extractor = InceptionFeatures(torch.device("cpu"), dims)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in extractor.model.modules())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).double().eval()(images.double() / 255)[0].mean((2, 3))
    assert (extractor(images) - wanted).norm() < 2e-6 * wanted.norm()


def test_grey_images_have_the_features_of_their_rgb_copies(fake_hub):
    fake_hub.inception()
    extractor = InceptionFeatures(torch.device("cpu"), 192)
    grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    features = extractor(grey)
    assert features.shape == (2, 192) and torch.equal(features, extractor(grey.repeat(1, 3, 1, 1)))


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_damaged_or_malicious_weights_are_named_and_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = hub_file("weights.pth")
    path.parent.mkdir(parents=True)

    def load():
        load_hub_weights("weights.pth", "leave it out", lambda: torch.load(path, weights_only=False))

    rng = np.random.default_rng(0)
    for size in (0, 1, *[1000] * 200):                        # random bytes are read as pickle opcodes: many errors
        path.write_bytes(rng.bytes(size))
        with pytest.raises(UserError, match="damaged, or not the weights.*leave it out"):
            load()
    for data in (pickle.dumps(Payload(tmp_path / "harm")), pickle.dumps({"weights": Payload(tmp_path / "harm")})):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged, or not the weights"):
            load()
    torch.save(Payload(tmp_path / "harm"), path)
    with pytest.raises(UserError, match="damaged, or not the weights"):
        load()
    assert not (tmp_path / "harm").exists()


def test_published_weights_are_told_from_stand_ins(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = {"weight": torch.arange(3.0)}
    other = hub_file("net-01234567.pth")
    other.parent.mkdir(parents=True)
    torch.save(content, other)
    digest = sha256_file(other)
    published = hub_file(f"net-{digest[:8]}.pth")
    published.write_bytes(other.read_bytes())
    loaded, found = load_hub_weights(published.name, "leave it out", lambda: torch.load(published))
    assert loaded["weight"].tolist() == [0, 1, 2] and found == digest
    assert capsys.readouterr().err == "" and weights_title(published.name, digest) == published.name
    load_hub_weights(other.name, "leave it out", lambda: torch.load(other))
    assert f"note: {other} is a stand-in" in capsys.readouterr().err
    assert weights_title(other.name, digest) == "net-01234567.pth, a stand-in of that name"


def test_inception_weights_are_loaded_through_the_checks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = hub_file("pt_inception-2015-12-05-6726825d.pth")
    path.parent.mkdir(parents=True)
    torch.save({"conv": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=f"(?s){path}: damaged, or not the weights of that name.*--fid_every 0"):
        InceptionFeatures(torch.device("cpu"), 64)


def test_frechet_distance_matches_general_matrix_square_root():
    rng = np.random.default_rng(0)
    s1, s2 = random_covariance(rng, 12), random_covariance(rng, 12)
    m1, m2 = rng.standard_normal((2, 12))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_covariances_that_hardly_vary_in_most_directions():
    """As those of features: standard deviations over fourteen orders of magnitude. Against the closed form, in a rotated basis,
    where rounding alone stands for the smallest; and 0 for equal distributions."""
    rng = np.random.default_rng(0)
    rotation, std = np.linalg.qr(rng.standard_normal((400, 400)))[0], 10.0 ** np.linspace(0, -14, 400)
    s1, s2 = ((rotation * (factor * std) ** 2) @ rotation.T for factor in (1.0, 1.5))
    zero, expected = np.zeros(400), (0.5 * std) @ (0.5 * std)
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(zero, s1, zero, s1) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [3, 40, 300])
def test_frechet_distance_is_symmetric_and_0_for_equal_samples(n):
    """With fewer samples than dimensions too, where a covariance is singular."""
    rng = np.random.default_rng(n)
    scale = np.exp(-np.arange(80) / 8)
    a, b = (mean_and_covariance((rng.standard_normal((size, 80)) * scale).astype(np.float32)) for size in (n, 200))
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-6) and frechet_distance(*a, *b) > 0.01
    for x in (a, b):
        assert frechet_distance(*x, *x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(1)
    v1, v2 = rng.uniform(0, 4, (2, 20))
    v1[:3] = 0                                                # singular on purpose
    m1, m2 = rng.standard_normal((2, 20))
    expected = ((m1 - m2) ** 2).sum() + ((v1 ** 0.5 - v2 ** 0.5) ** 2).sum()
    assert frechet_distance(m1, np.diag(v1), m2, np.diag(v2)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(m1, np.diag(v1), m1, np.diag(v1)) == pytest.approx(0, abs=1e-6)


def test_mean_and_covariance_accumulate_in_float64():
    x = np.random.default_rng(2).standard_normal((500, 3)).astype(np.float32) + np.float32(1e4)
    mu, sigma = mean_and_covariance(x)
    assert mu.dtype == sigma.dtype == np.float64
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    assert sigma == pytest.approx(centred.T @ centred / 499, rel=1e-9)
    with pytest.raises(UserError, match="two images"):
        mean_and_covariance(x[:1])


def test_cached_statistics_are_reused_and_recomputed_when_damaged(tmp_path, capsys):
    x, calls = np.random.default_rng(3).standard_normal((50, 4)), []

    def compute():
        calls.append(1)
        return x

    first = cached_statistics(tmp_path, "key", compute)
    again = cached_statistics(tmp_path, "key", compute)
    assert len(calls) == 1 and all(np.array_equal(a, b) for a, b in zip(first, again))
    cached_statistics(tmp_path, "another key", compute)
    assert len(calls) == 2
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF                          # one flipped byte
        file.write_bytes(data)
    repaired = cached_statistics(tmp_path, "key", compute)
    assert len(calls) == 3 and all(np.array_equal(a, b) for a, b in zip(first, repaired))
    assert "damaged, computed again" in capsys.readouterr().err
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])             # cut short
    cached_statistics(tmp_path, "key", compute)
    assert len(calls) == 4


def test_features_are_the_same_whoever_asks():
    """On a GPU, TF32 would make those of PR_Calculate.py and train.py others than those of test.py, which is without."""
    class Extractor:
        dims = 2

        def __call__(self, images):
            return torch.tensor([[float(torch.backends.cudnn.allow_tf32), 1.0]]).expand(len(images), -1)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        features = extract_features(Extractor(), [torch.zeros(3, 3, 4, 4, dtype=torch.uint8)], 3, progress=False)
        assert features.tolist() == 3 * [[0.0, 1.0]] and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("error", [RuntimeError('invalid hash value (expected "397923af", got "0")'),
                                   http.client.IncompleteRead(b""), URLError("no route"), ConnectionResetError("reset")])
def test_a_broken_download_is_one_line(error, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def build():
        raise error
    with pytest.raises(UserError, match="vgg16-397923af.pth are neither at .* nor can they be downloaded .*, or do without"):
        load_hub_weights("vgg16-397923af.pth", "do without", build)


def test_cached_statistics_are_of_these_weights(fake_hub):
    fake_hub.inception()
    network = utils.InceptionFeatures(torch.device("cpu"), 64)
    assert network.sha256 in network.key and "64" in network.key
