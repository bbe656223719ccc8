"""Fixtures that several test files share: random images on disk, and seeded random network weights in a torch hub cache.

The weights stand in for pretrained ones where a test needs the libraries' real loading code but no network; numbers
made with them mean nothing.
"""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def toeplitz(generator, rows, columns, scale):
    """A dense random (rows, columns) matrix over rows + 8 columns stored numbers: torch.save writes only those, so
    that the 500 MB of VGG16's linear layers become a small file, quickly made."""
    return torch.randn(rows + 8 * columns, generator=generator).mul(scale).as_strided((rows, columns), (1, 8))


class FakeHub:
    """A TORCH_HOME whose hub cache is filled on demand: each method writes one weights file and returns its path.

    home: the folder for $TORCH_HOME. env: a copy of the environment with it set, for subprocesses, which then keep to
    one core each: cores that wait for each other make small work slow where something else is running.
    """

    def __init__(self, home):
        self.home = Path(home)
        self.checkpoints = self.home / "hub" / "checkpoints"
        self.checkpoints.mkdir(parents=True)

    @property
    def env(self):
        return os.environ | {"TORCH_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def _write(self, name, build):
        path = self.checkpoints / name
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(name))
                torch.save(build(), path)
        return path

    def inception(self):
        """pytorch-fid's Inception, He-initialised, its batch norms calibrated on structured noise: features of an
        uncalibrated random network hardly differ between images, and their covariance is singular."""
        def build():
            from pytorch_fid import inception as package
            captured = {}

            def keep_initial(url, *args, **kwargs):
                raise StopIteration

            # fid_inception_v3 builds the network and then asks for the weights that do not exist yet; the network it
            # has just built is caught on the way, so that the file fits whatever version of the package is installed.
            original_load, original_net = package.load_state_dict_from_url, package._inception_v3
            def build_net(*args, **kwargs):
                captured["net"] = original_net(*args, **kwargs)
                return captured["net"]
            package.load_state_dict_from_url, package._inception_v3 = keep_initial, build_net
            try:
                package.fid_inception_v3()
            except StopIteration:
                pass
            finally:
                package.load_state_dict_from_url, package._inception_v3 = original_load, original_net
            net = captured["net"]
            for module in net.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None                    # plain average over the calibration batches
            noise = torch.nn.functional.interpolate(torch.randn(8, 3, 20, 20), (139, 139), mode="bicubic")
            with torch.no_grad():
                net.train()(noise.clamp(-1, 1))
            return net.state_dict()
        return self._write("pt_inception-2015-12-05-6726825d.pth", build)

    def _torchvision(self, name, factory):
        def build():
            with torch.device("meta"):
                shapes = factory(weights=None, init_weights=False).state_dict() if factory.__name__ == "vgg16" else \
                    factory(weights=None).state_dict()
            generator = torch.Generator().manual_seed(0)
            state = {}
            for key, value in shapes.items():
                if value.ndim == 4:
                    fan_in = value[0].numel()
                    state[key] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
                elif value.ndim == 2:
                    state[key] = toeplitz(generator, *value.shape, (2 / value.shape[1]) ** 0.5)
                else:
                    state[key] = torch.zeros(value.shape)
            return state
        return self._write(name, build)

    def vgg16(self):
        """torchvision's VGG16."""
        from torchvision.models import vgg16
        return self._torchvision("vgg16-397923af.pth", vgg16)

    def squeezenet(self):
        """torchvision's SqueezeNet 1.1, the small trunk for lpips."""
        from torchvision.models import squeezenet1_1
        return self._torchvision("squeezenet1_1-b8a52dc0.pth", squeezenet1_1)


@pytest.fixture
def one_thread():
    """torch on one core, as for FakeHub.env."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fake_hub(tmp_path_factory):
    """A FakeHub in a temporary folder, with TORCH_HOME set to it for the session: nothing is ever downloaded."""
    hub = FakeHub(tmp_path_factory.mktemp("torch_home"))
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(hub.home)
    yield hub
    if before is None:
        del os.environ["TORCH_HOME"]
    else:
        os.environ["TORCH_HOME"] = before


def write_images(folder, n, size=32, seed=0, shift=0):
    """n smooth random RGB images as PNG files in a new folder; shift moves their brightness. Returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        image = np.asarray(small.resize((size, size), Image.BICUBIC)).astype(int) + shift
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")
    return folder


def run_script(script, *arguments, env=None, timeout=300):
    """A script of the repository through its real command line, from the repository root -> CompletedProcess."""
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=ROOT, env=env, timeout=timeout,
                          capture_output=True, text=True)


@pytest.fixture
def script(request, monkeypatch, capsys):
    """Runs the test module's SCRIPT as `python SCRIPT ...` would, in this process: -> exit code, stdout, stderr."""
    path = request.module.SCRIPT

    def call(*args):
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call
