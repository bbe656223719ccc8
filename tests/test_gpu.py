"""What can be known of the GPU's training step without a GPU.

PyTorch's FakeTensorMode runs a program on tensors that have a shape, a type and a device but no contents. A step on a
pretended CUDA device fails there if it mixes devices, or if it asks for a value (.item(), an if on a tensor), which on a
GPU would make Python wait for the device at every step. The backward pass runs in PyTorch's own C++ and needs a device; it
is replaced by gradients of the right shapes.
"""
import contextlib
import copy
import functools
import importlib
import os
import subprocess
import sys
import types

import lpips as lpips_library
import pytest
import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    pytest.skip("PyTorch 2.11 can pretend what this needs, 2.4 cannot", allow_module_level=True)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
except ImportError:                                                          # 2.11 has no name for it yet
    FakeTensorDeviceMismatchError = RuntimeError

import train
from models import vamp_flow
from models.vamp_flow import BiCrossAttnFlow, CrossFlowVampVAE, perturb_

VARIANTS = [(), ("--preset", "best", "--hidden_dims", "16", "32"), ("--prior", "standard", "--flow_length", "0"),
            ("--flow_context", "encoder"), ("--flow_prior", "pushed"), ("--balance", "1", "--mixture_weights", "learned"),
            ("--skip_grad_norm", "10", "--grad_clip", "0"), ("--ema_decay", "0", "--recon_loss", "mse"),
            ("--posterior_std", "0.1"), ("--prior", "mog", "--mixture_covariance", "full"),
            SPATIAL := ("--latent_layout", "spatial", "--latent_dim", "64")]
SMALL = ("--img_size", "16", "--hidden_dims", "16", "32", "--latent_dim", "16", "--flow_seq_len", "4", "--flow_embed_dim", "16",
         "--flow_length", "2", "--flow_layers", "1", "--num_components", "6", "--batch_size", "4")


def flags_of(*flags):
    args, given = train.parse_args([*SMALL, "--lpips_net", "none", "--fid_every", "0", *flags])
    args.in_channels, args.flip = 3, True
    train.check_flags(args, given)
    return args


def random_lpips(place=lambda net: net, net="squeeze", linear=True):
    """LPIPS with random weights, the same ones every time, as build_lpips makes it."""
    torch.manual_seed(0)
    library = lpips_library.LPIPS(net=net, lpips=linear, pretrained=False, pnet_rand=True, verbose=False)
    for layer in library.lins if linear else ():                             # as trained ones: not below zero
        torch.nn.init.uniform_(layer.model[-1].weight, 0, 1)
    return place(train.Perceptual(library, None).eval().requires_grad_(False))


class CopyToCPU(Exception):
    pass


class NoCopiesToCPU(TorchDispatchMode):
    """FakeTensorMode lets .cpu() pass, which waits too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = [{x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)} for tree in (args, out)]
        if "cuda" in devices[0] and "cpu" in devices[1]:
            raise CopyToCPU(function)
        return out


@pytest.fixture
def pretended(monkeypatch):
    """pretended(args, with_lpips): a Trainer whose model lives on a GPU that is not there; inside a FakeTensorMode."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda") + 1
    except (RuntimeError, AssertionError) as e:
        pytest.skip(f"this PyTorch cannot pretend to have CUDA ({e})")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(train, "seeded", lambda *_: None)                    # a generator needs a device

    def on_gpu(module):                                                      # some buffers name the CPU; .to() moves them
        for m in module.modules():
            m._buffers = {k: v.to("cuda") for k, v in m._buffers.items()}
        return module

    def make(args, with_lpips=False):
        def build(_=None):
            return on_gpu(CrossFlowVampVAE(**train.model_args_of(args)))

        monkeypatch.setattr(train, "copy", types.SimpleNamespace(deepcopy=build))     # of a FakeTensor: of another mode
        lpips = random_lpips(on_gpu) if with_lpips else None
        trainer = train.Trainer(args, build(), lpips, 3, args.batch_size, None, "")

        def backward(loss):
            assert loss.requires_grad and loss.device.type == "cuda" and loss.dtype == torch.float32
            for p in trainer.parameters:
                p.grad = torch.empty_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        return trainer

    with FakeTensorMode(), torch.device("cuda"):
        yield make


def batch_of(args):
    return torch.zeros(args.batch_size, 3, args.img_size, args.img_size, dtype=torch.uint8, device="cuda")


def step(trainer, amp):
    """A step of Python's, and one as a CUDA graph records it, which reads from the device what changes from step to step."""
    args = trainer.args
    with NoCopiesToCPU():                                                    # sampling may copy: its draws are the CPU's
        train.train_step(trainer, batch_of(args), amp)
        now = train.Now(*torch.zeros(len(train.Now._fields), device="cuda").unbind())
        for group in trainer.optimizer.param_groups:
            group["capturable"] = True                                       # (PyTorch cannot pretend a lr on the device)
        flipped = torch.zeros(args.batch_size, 1, 1, 1, dtype=torch.bool, device="cuda") if args.flip else None
        train.whole_step(trainer, batch_of(args), flipped, torch.zeros(args.batch_size, args.latent_dim), now, amp)


@pytest.mark.parametrize("flags, amp", [*((flags, True) for flags in VARIANTS), ((), False)])
def test_a_step_stays_on_the_device_and_never_waits_for_it(pretended, flags, amp):
    args = flags_of(*flags)
    trainer = pretended(args)
    seen, images = [], []
    trainer.model.decoder.stages.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    trainer.model.decoder.register_forward_hook(lambda _, __, out: images.append(out.dtype))
    step(trainer, amp)
    assert seen == 2 * [torch.bfloat16 if amp else torch.float32]            # bf16 is really on
    assert images == 2 * [torch.float32]                                     # but for what it would round away
    assert trainer.step == 1 and trainer.unread.device.type == trainer.first_bad.device.type == "cuda"
    for p in trainer.parameters:                                             # the moments too: a fused update is one kernel
        state = trainer.optimizer.state[p]
        assert {v.device.type for v in state.values()} == {"cuda"} and state["exp_avg"].dtype == torch.float32
    assert trainer.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_lpips_stays_on_the_device(pretended, monkeypatch, fused):
    args = flags_of("--img_size", "32")
    args.lpips_net = "squeeze"
    trainer = pretended(args, with_lpips=True)
    if fused:
        monkeypatch.setattr(train, "check_fused_lpips", lambda *_: (0.01, 0.01))             # asks for values
        monkeypatch.setattr(train, "copy", types.SimpleNamespace(deepcopy=lambda lpips: lpips))
        train.fuse_lpips(trainer, batch_of(args))
        assert isinstance(trainer.lpips.library.net.slice1[0], train.ConvReLU)
    step(trainer, True)


@pytest.mark.parametrize("what, error", [("reads a value", DataDependentOutputException),
                                         ("copies to the CPU", CopyToCPU), ("mixes devices", FakeTensorDeviceMismatchError)])
def test_the_pretended_device_notices(pretended, monkeypatch, what, error):
    """What the tests above rest on."""
    original = train.objective

    def spoiled(args, parts, *rest):
        terms = original(args, parts, *rest)
        if what == "reads a value":
            assert terms["loss"] > 0
        elif what == "copies to the CPU":
            terms["loss"].detach().cpu()
        else:
            terms["loss"] = terms["loss"] * torch.ones(2, device="cpu")
        return terms

    monkeypatch.setattr(train, "objective", spoiled)
    with pytest.raises(error):
        step(pretended(flags_of()), True)


def test_sampling_and_reconstructing_stay_on_the_device(pretended):
    for flags in VARIANTS:
        model = pretended(flags_of(*flags)).model
        x = train.to_float(batch_of(flags_of(*flags)))
        with torch.no_grad():
            assert model.sample(5).device.type == model.reconstruct(x).device.type == "cuda"


def test_every_step_starts_without_gradients(monkeypatch, capsys):
    """Those of a blank batch, or of the last one, must not be added to."""
    args = flags_of()
    model = CrossFlowVampVAE(**train.model_args_of(args))
    trainer = train.Trainer(args, model, None, 3, args.batch_size, None, "")
    left = []
    model.register_forward_pre_hook(lambda *_: left.append(sum(p.grad is not None for p in model.parameters())))
    monkeypatch.setattr(torch, "compile", lambda f, **_: functools.partial(f))
    model.train()
    train.compile_step(trainer, torch.zeros(args.batch_size, 3, args.img_size, args.img_size, dtype=torch.uint8), False)
    assert "compiled    in" in capsys.readouterr().out                       # it did not give up
    for _ in range(2):
        train.train_step(trainer, torch.zeros(args.batch_size, 3, args.img_size, args.img_size, dtype=torch.uint8), False)
    assert left == 3 * [0]


@pytest.fixture
def pretended_recording(monkeypatch):
    """StepGraph without a GPU: recording keeps what was called with which tensors, replaying calls it again. As on a GPU, what
    the tensors hold by then counts, and Python's numbers are those of the recording."""
    class Recording:
        def replay(self):
            groups = self.call[0].optimizer.param_groups
            before = [dict(group) for group in groups]
            for group, lr in zip(groups, self.lr):
                group["lr"] = lr
            self.work(*self.call)
            for group, kept in zip(groups, before):
                group.update(kept)

    class Stream:
        wait_stream = staticmethod(lambda _: None)

    @contextlib.contextmanager
    def graph(recording, stream):
        def record(*call):
            recording.call, recording.lr = call, [group["lr"] for group in call[0].optimizer.param_groups]
            assert all(group["capturable"] for group in call[0].optimizer.param_groups)

        recording.work = train.whole_step
        with monkeypatch.context() as patch:
            patch.setattr(train, "whole_step", record)
            yield

    for name, value in (("Stream", lambda _: Stream), ("current_stream", lambda _: Stream), ("CUDAGraph", Recording),
                        ("stream", lambda _: contextlib.nullcontext()), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, value)


RECORDED = [*VARIANTS, ("--flip", "--grad_clip", "0.5"), ("--no-flip", "--warmup_epochs", "1")]


@pytest.mark.parametrize("device", ["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("flags, amp", [*((flags, False) for flags in RECORDED), *((flags, True) for flags in RECORDED[:4])])
def test_a_recorded_step_is_the_step(request, monkeypatch, flags, device, amp):
    """In bf16 with rounded weights against without. The differences of the weights are measured by the way they have gone, of
    which Adam makes a step's length also where a gradient is all rounding."""
    allowed = 0.3 if amp and device == "cuda" else 0.05
    if device == "pretended":
        request.getfixturevalue("pretended_recording")
        device = "cpu"
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    args = flags_of(*flags)
    args.warmup_epochs, args.ema_decay = 1.0, 0.5 * (args.ema_decay > 0)     # beta and the EMA's share change from step to step
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    batches = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)

    initial = []

    def trained(recorded):
        torch.manual_seed(0)
        model = perturb_(CrossFlowVampVAE(**train.model_args_of(args)), 0.05, torch.Generator().manual_seed(0)).to(device)
        trainer = train.Trainer(args, model, None, 3, args.batch_size, None, "")
        # (Detached: a graph that outlives a step keeps it from being recorded.)
        before = [p.detach().clone() for p in model.parameters()]
        initial[:] = before
        if recorded:
            if amp:
                train.round_together(trainer)
            train.record_step(trainer, torch.zeros_like(batches[0]), amp)
            assert trainer.graph is not None                                 # it did not give up
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
        for batch in batches:
            train.train_step(trainer, batch, amp)
        assert trainer.step == 3 and not any(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), before))
        return trainer

    eager, recorded = trained(False), trained(True)
    for name in ("parameters", "averages"):
        for a, b, start in zip(getattr(eager, name), getattr(recorded, name), initial):
            assert (a - b).norm() <= allowed * (a - start).norm()
    torch.testing.assert_close(eager.unread, recorded.unread, rtol=1e-3 if amp else 1e-5, atol=3e-3 if amp else 1e-4)
    assert eager.state()["scheduler"] == recorded.state()["scheduler"]
    assert eager.state()["optimizer"]["param_groups"] == recorded.state()["optimizer"]["param_groups"]


@pytest.mark.parametrize("flags", [VARIANTS[0], VARIANTS[1], VARIANTS[3], SPATIAL], ids=" ".join)
def test_rounded_weights_are_those_of_autocast(flags):
    """The same losses and gradients, bit for bit: what is rounded is rounded to the same, only together."""
    args = flags_of(*flags)
    model = perturb_(CrossFlowVampVAE(**train.model_args_of(args)), 0.05, torch.Generator().manual_seed(0))
    trainer = train.Trainer(args, model, None, 3, args.batch_size, None, "")
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(4, args.latent_dim, generator=generator)
    found = []
    for rounded in (None, train.RoundedWeights(model, model), None):
        trainer.rounded = rounded
        terms = train.backward(trainer, x, eps, rounded is not None or len(found) == 0, 0.1)
        found.append([*(v.detach() for v in terms.values()), *(p.grad.clone() for p in trainer.parameters)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2]))    # which is float32's


# (batch, arguments of the flow): batches that fill the last program of a kernel, and that do not.
KERNEL_CASES = [(4, (16, 2, 2, 32, 2, 1, None, 4, 1.5)), (5, (24, 2, 2, 32, 1, 2, None, 1, 1.5)),
                (3, (32, 2, 8, 64, 2, 2, None, 2, 1.5)), (2, (96, 1, 4, 32, 1, 1, None, 4, 0.5)),
                (1, (32, 1, 16, 16, 1, 2, None, 2, 1.5)), (3, (32, 3, 4, 32, 1, 1, None, 2, 1.5, 0, 4)),
                (3, (32, 1, 4, 32, 1, 1, None, 2, 1.5, 0, 4, True))]


def flow_results(flow, batch, fold_norms):
    """{name: value} of latent, log-scales and every gradient, with the kernels or without."""
    flow, generator = perturb_(copy.deepcopy(flow), 0.2, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    z, grad_z = (torch.randn(batch, flow.dim, generator=generator) for _ in range(2))
    grad_s = torch.randn(len(flow.couplings), batch, flow.dim, generator=generator)
    flow.fold_norms = fold_norms
    zK, s = flow.transform(z.requires_grad_())
    torch.autograd.backward([zK, s], [grad_z, grad_s])
    return {"zK": zK.detach(), "s": s.detach(), "z0": z.grad, **{name: p.grad for name, p in flow.named_parameters()}}


def kernel_results(path):
    """What test_kernels_compute_what_the_layers_do runs in a process of its own."""
    torch.manual_seed(0)
    flows = [(BiCrossAttnFlow(*sizes), batch) for batch, sizes in KERNEL_CASES]
    for flow, _ in flows:
        if flow.whiten:
            flow.set_whitening_(torch.randn(50, flow.dim) @ torch.randn(flow.dim, flow.dim))
    torch.save([(flow_results(flow, batch, None), flow_results(flow, batch, vamp_flow.FoldNorms(torch.float32)))
                for flow, batch in flows], path)


def test_kernels_compute_what_the_layers_do(tmp_path):
    """In float32, by Triton's interpreter, which runs a kernel with NumPy and has to be chosen before Triton is imported."""
    pytest.importorskip("triton")
    work = f"import test_gpu; test_gpu.kernel_results({str(tmp_path / 'results')!r})"
    subprocess.run([sys.executable, "-c", work], check=True,
                   env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    for wanted, found in torch.load(tmp_path / "results"):
        assert not all(torch.equal(found[name], value) for name, value in wanted.items())        # not the layers again
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=name)


def test_which_flows_have_kernels():
    pytest.importorskip("triton")
    for flow, fits in ((BiCrossAttnFlow(128), True), (BiCrossAttnFlow(128, context_dim=8), False),
                       (BiCrossAttnFlow(24, seq_len=3), False), (BiCrossAttnFlow(32, embed_dim=48, heads=2), False),
                       (BiCrossAttnFlow(32, embed_dim=32, heads=4), False)):
        assert (vamp_flow.fused_sizes(flow) is not None) == fits


class NamedGPU:
    """What Triton asks of a GPU's driver before it compiles for it."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability                                               # (kernels are kept by device)

    def get_current_stream(self, _):
        return 0


@pytest.mark.parametrize("capability, shared, batch, sizes", [
    (86, 99, 128, dict(dim=128)), (86, 99, 1024, dict(dim=128)), (86, 99, 1024, dict(dim=128, embed_dim=256)),    # RTX 3090
    (90, 227, 128, dict(dim=128)), (90, 227, 1024, dict(dim=128)), (90, 227, 128, dict(dim=128, embed_dim=256)),  # H100
    (90, 227, 64, dict(dim=16, seq_len=2, embed_dim=32, heads=2, layers=1))], ids=str)                            # the demo's
def test_kernels_compile_for_gpus(capability, shared, sizes, batch, monkeypatch, tmp_path):
    """To machine code, with no GPU, from the arguments that they are called with; they fit into its shared memory (KB)."""
    pytest.importorskip("triton")
    runtime = importlib.import_module("triton.runtime")
    compiled = {}

    class Compiled:
        """In a kernel's place: compiles it, and runs nothing."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **sizes):
                kinds = (a.dtype if isinstance(a, torch.Tensor) else a for a in arguments)
                compiled[self.kernel.__name__] = self.kernel.warmup(*kinds, grid=grid, **sizes)
            return launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("_layer_forward", "_layer_backward"):
        monkeypatch.setattr(vamp_flow, name, Compiled(getattr(vamp_flow, name)))
    flow = BiCrossAttnFlow(**sizes, length=1).train()
    flow.fold_norms = vamp_flow.FoldNorms(torch.bfloat16)
    runtime.driver.set_active(NamedGPU(capability))
    try:
        zK, s = flow.transform(torch.zeros(batch, flow.dim, requires_grad=True))
        (zK.sum() + s.sum()).backward()
    finally:
        runtime.driver.set_active(None)                                      # the real one again, should there be one
    assert set(compiled) == {"_layer_forward", "_layer_backward"}
    for kernel in compiled.values():
        assert kernel.asm["cubin"] and 0 < kernel.metadata.shared <= 1024 * shared


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 37, 128])
@pytest.mark.parametrize("sizes", [{}, dict(dim=16, length=2, seq_len=2, embed_dim=32, heads=2, layers=1),
                                   dict(dim=96, length=2, embed_dim=64, heads=2), dict(length=2, embed_dim=256)], ids=str)
def test_kernels_on_a_gpu(sizes, batch):
    """In bf16 as near to float32 as autocast is, and the same bits every time; training uses them, the rest does not."""
    flow = BiCrossAttnFlow(**{"dim": 128, **sizes}).cuda()
    error, allowed = vamp_flow.check_fused(flow, batch)
    assert 0 < error <= 2 * allowed + 0.01
    train.fuse_flow(flow, batch)
    assert flow.fold_norms is not None
    perturb_(flow.cpu(), 0.05, torch.Generator().manual_seed(0)).cuda()
    z = torch.randn(batch, flow.dim, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    found = []
    for _ in range(2):
        zK, s = flow.transform(z)
        found.append([zK, s, *torch.autograd.grad(zK.square().sum() + s.square().sum(), [z, *flow.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert flow.inverse(flow.eval()(z)[0])[0].sub(z).abs().max() < 1e-4


@pytest.mark.parametrize("compiled, device, wanted", [(True, "cuda", 1), (True, "cpu", 0), (False, "cuda", 0)])
def test_group_norms_take_the_moments_of_channels_where_compiled_for_a_gpu(pretended, monkeypatch, compiled, device, wanted):
    asked = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    monkeypatch.setattr(vamp_flow.GroupNorm, "by_channels", lambda _, x: asked.append(x) or x)
    with torch.device(device):
        vamp_flow.GroupNorm(8)(torch.empty(2, 8, 4, 4))
    assert len(asked) == wanted


def lpips_results(network, x, recon):
    """Distances and their gradients."""
    recon = recon.clone().requires_grad_()
    distance = network(recon, x)
    return distance.detach(), torch.autograd.grad(distance.sum(), recon)[0]


@pytest.mark.parametrize("net, layers, linear",
                         [("vgg", 13, True), ("vgg", 13, False), ("alex", 5, True), ("squeeze", 1, True)])
def test_fused_lpips_is_lpips(net, layers, linear):
    """In float64, to which its layers are brought here, from weights that bf16 does not round; and then in bf16. (In float32
    rounding turns a ReLU over now and then.)"""
    lpips, generator = random_lpips(net=net, linear=linear), torch.Generator().manual_seed(0)
    lpips.bfloat16().float()
    for name, p in lpips.named_parameters():                                 # (PyTorch's biases start at almost nothing)
        if name.endswith("bias"):
            p.copy_((0.1 * torch.randn(p.shape, generator=generator)).bfloat16())
    fused = train.with_fused_layers(lpips)
    assert sum(isinstance(m, train.ConvReLU) for m in fused.modules()) == layers
    assert sum(isinstance(m, train.WeightedSum) for m in fused.modules()) == linear * len(lpips.library.chns)
    assert sum(isinstance(m, train.MaxPool) for m in fused.modules()) == (4 if net == "vgg" else 0)   # others: of 3x3 pixels
    assert not any(isinstance(m, torch.nn.ReLU) for m in fused.modules()) or net == "squeeze"       # of its Fire modules
    new = (train.ConvReLU, train.WeightedSum, train.MaxPool)
    assert not any(isinstance(m, new) for m in lpips.modules())                                     # the copy alone
    shape = (2, 3, 32, 32) if net == "vgg" else (2, 3, 64, 64)
    x, recon = (2 * torch.rand(2, *shape, generator=generator) - 1).unbind()
    found, wanted = (lpips_results(copy.deepcopy(network).double(), x.double(), recon.double()) for network in (fused, lpips))
    for a, b in zip(found, wanted):
        assert (a - b).norm() <= 1e-9 * b.norm() and b.norm() > 0
    error, allowed = train.check_fused_lpips(lpips, fused, shape)
    assert 0 < error <= 1.5 * allowed


@pytest.mark.parametrize("stride, padding", [((1, 1), (1, 1)), ((2, 2), (0, 0)), ((4, 4), (2, 2))])
def test_the_operation_of_fused_lpips_is_a_proper_one(stride, padding):
    """What PyTorch asks of one: schema, gradient, fake tensors, compilation; and its gradient is that of its layers."""
    x, weight, bias = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 5, 5), torch.randn(4)
    torch.library.opcheck(torch.ops.crossvampvae.conv_relu.default, (x, weight, bias, stride, padding))
    found = train.conv_relu(x, weight, bias, stride, padding)
    wanted = torch.nn.functional.conv2d(x, weight, bias, stride, padding).relu()
    assert found.is_contiguous(memory_format=torch.channels_last) and torch.allclose(found, wanted, atol=1e-6)
    grad = torch.randn(found.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, wanted)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_for_the_compiler_is_pooling(layout, monkeypatch):
    """Bit for bit, also where several of four are the largest, as after a ReLU, and where a row and a column are left over."""
    generator = torch.Generator().manual_seed(0)
    works, calls = train.HalvedByMax.apply, []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(train.HalvedByMax, "apply", lambda x: calls.append(x.shape) or works(x))
    for shape in ((3, 8, 6, 10), (2, 5, 7, 9)):
        x = torch.randn(shape, generator=generator).relu().mul(2).round().bfloat16().to(memory_format=layout).requires_grad_()
        found, wanted = train.MaxPool(2)(x), torch.nn.functional.max_pool2d(x, 2)
        grad = torch.randn(wanted.shape, generator=generator).bfloat16()
        assert torch.equal(found, wanted)
        assert torch.equal(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])
    assert calls == [(3, 8, 6, 10)]


def test_fused_lpips_compiled_is_the_same():
    """As the compiler takes it apart, gradients included; each of the four poolings is the one that is made for it."""
    fused, generator, graphs = train.with_fused_layers(random_lpips(net="vgg")), torch.Generator().manual_seed(0), []
    x, recon = (2 * torch.rand(2, 2, 3, 32, 32, generator=generator) - 1).unbind()
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    found = lpips_results(torch.compile(fused, backend=backend, fullgraph=True), x, recon)
    torch._dynamo.reset()
    for a, b in zip(found, lpips_results(fused, x, recon)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max()) and b.norm() > 0
    code = "".join(module.code for module in graphs[0].modules() if isinstance(module, torch.fx.GraphModule))
    assert "max_pool2d" not in code and code.count("torch.maximum(") == 3 * 4 * 2            # of both images


def trainer_with_lpips(device="cpu"):
    args = flags_of("--img_size", "32")
    args.lpips_net = "squeeze"
    model = CrossFlowVampVAE(**train.model_args_of(args)).to(device)
    return train.Trainer(args, model, random_lpips().to(device), 3, args.batch_size, None, "")


def test_training_takes_the_fused_lpips_and_validation_does_not():
    trainer = trainer_with_lpips()
    library = trainer.lpips
    train.fuse_lpips(trainer, torch.zeros(4, 3, 32, 32))
    assert trainer.lpips is not library and trainer.criterion.args[2] is trainer.lpips
    assert not any(isinstance(m, train.ConvReLU) for m in library.modules())


@pytest.mark.parametrize("fault", ["fails", "is wrong", "gives NaN"])
def test_no_fused_lpips_is_a_note(fault, monkeypatch, capsys):
    trainer, forward = trainer_with_lpips(), train.ConvReLU.forward
    lpips, criterion = trainer.lpips, trainer.criterion

    def spoiled(self, x):
        if fault == "fails":
            raise RuntimeError("no such engine")
        return forward(self, -x) if fault == "is wrong" else forward(self, x) * torch.nan

    monkeypatch.setattr(train.ConvReLU, "forward", spoiled)
    train.fuse_lpips(trainer, torch.zeros(4, 3, 32, 32))
    assert trainer.lpips is lpips and trainer.criterion is criterion
    assert capsys.readouterr().out.startswith("note: the fused layers of LPIPS do not work here (")


@pytest.mark.parametrize("device, amp, flags, fits", [
    ("cuda", True, (), True), ("cpu", True, (), False), ("cuda", False, (), False), ("cuda", True, ("--deterministic",), False),
    ("cuda", True, ("--lpips_net", "none"), False), ("cuda", True, ("--fit_prior", "x.pth"), False)])
def test_when_lpips_is_fused(device, amp, flags, fits):
    assert train.can_fuse_lpips(train.parse_args([*flags])[0], torch.device(device), amp) == fits


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_fused_lpips_on_a_gpu(net):
    lpips = random_lpips(net=net).cuda()
    error, allowed = train.check_fused_lpips(lpips, train.with_fused_layers(lpips), (32, 3, 64, 64))
    assert 0 < error <= 2 * allowed + 0.01


def test_no_kernels_is_a_note(capsys):
    flow = BiCrossAttnFlow(16, length=1, seq_len=2, embed_dim=32, heads=2)
    train.fuse_flow(flow, 4)
    assert flow.fold_norms is None and "\nnote: the flow's kernels do not work here (" in capsys.readouterr().out


@pytest.mark.parametrize("fuse, said", [("fuse_flow", "the flow's kernels"), ("fuse_lpips", "the fused layers of LPIPS")])
def test_all_processes_are_fused_or_none(fuse, said, monkeypatch, capsys):
    """It works here, and the other process says that it does not there."""
    trainer = trainer_with_lpips()
    criterion, flow = trainer.criterion, trainer.model.flow
    monkeypatch.setattr(train, "check_fused", lambda *_: (0.01, 0.01))
    monkeypatch.setattr(train, "gather", lambda problem: [problem, "CUDA error"])
    train.fuse_flow(flow, 4) if fuse == "fuse_flow" else train.fuse_lpips(trainer, torch.zeros(4, 3, 32, 32))
    assert f"note: {said} do not work here (CUDA error)" in capsys.readouterr().out
    assert flow.fold_norms is None and trainer.criterion is criterion


def test_no_recording_is_a_note(capsys):
    """On a machine without CUDA recording fails, and the steps go on without."""
    args = flags_of()
    trainer = train.Trainer(args, CrossFlowVampVAE(**train.model_args_of(args)), None, 3, args.batch_size, None, "")
    batch = torch.zeros(args.batch_size, 3, args.img_size, args.img_size, dtype=torch.uint8)
    train.record_step(trainer, batch, False)
    assert trainer.graph is None and capsys.readouterr().out.startswith("note: no CUDA graph can be recorded here (")
    train.train_step(trainer, batch, False)
    assert trainer.step == 1 and trainer.unread.isfinite().all()


# Those of the variants that change the graph most.
@pytest.mark.parametrize("flags", [*(VARIANTS[i] for i in (0, 1, 3, 5)), SPATIAL, ("--img_size", "32", "with LPIPS")],
                         ids=" ".join)
@pytest.mark.parametrize("amp", [False, True])
def test_parts_are_one_graph_each_without_recompiling(flags, amp):
    """The parts of the model and the loss are each captured whole, and once: one graph serves all layers of the flow, and
    neither beta nor the step's number, which change, are part of it; nor do weights rounded together need another."""
    with_lpips = "with LPIPS" in flags
    args = flags_of(*(f for f in flags if f != "with LPIPS"), "--warmup_epochs", "1", "--epochs", "2", "--flow_length", "3")
    model = CrossFlowVampVAE(**train.model_args_of(args))
    perturb_(model, 0.05, torch.Generator().manual_seed(0))
    lpips = random_lpips() if with_lpips else None
    if with_lpips and amp:                                                   # as it is trained with then
        lpips = train.with_fused_layers(lpips)
    trainer = train.Trainer(args, model, lpips, 3, args.batch_size, None, "")
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for part in train.parts_to_compile(model):
        part.compile(backend="eager", fullgraph=True, dynamic=False)
    trainer.criterion = torch.compile(trainer.criterion, backend="eager", fullgraph=True, dynamic=False)
    trainer.rounded = train.RoundedWeights(model, model) if amp else None
    model.train()
    batch = torch.randint(0, 256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8)
    x, eps = train.to_float(batch), torch.randn(args.batch_size, args.latent_dim)
    with torch._dynamo.config.patch(error_on_recompile=True):
        parts, _ = train.forward(trainer, x, eps, amp)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            wanted, _ = train.loss_parts(args, eager, lpips, x, eager(x, eps))
        assert {k: v.item() for k, v in parts.items()} == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-5)
        for _ in range(4):                                                   # into the second epoch
            train.train_step(trainer, batch, amp)
    assert trainer.step == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4       # encoder, decoder, coupling, loss
    torch._dynamo.reset()


@pytest.mark.parametrize("device, told", [("cpu", []), ("cuda", ["encoder", "decoder"])])
def test_what_the_compiler_is_told(monkeypatch, capsys, device, told):
    """For a GPU, options that it knows; others are left out, since one of them makes torch.compile refuse all."""
    config = torch._inductor.config
    for name, default in zip(train.DO_AGAIN, (4, 8, 30)):                    # (of some versions, None is the default)
        assert name in torch._inductor.list_options() and train.DO_AGAIN[name] > (getattr(config, name) or default)
    monkeypatch.setitem(train.DO_AGAIN, "of_another_version", 1)
    wanted = {name: value for name, value in train.DO_AGAIN.items() if name != "of_another_version"}
    args, calls = flags_of(), {}
    model = CrossFlowVampVAE(**train.model_args_of(args))
    trainer = train.Trainer(args, model, None, 3, args.batch_size, None, "")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.update({self: options}))
    monkeypatch.setattr(torch, "compile", lambda work, **_: work)
    trainer.device = torch.device(device)                                    # where there is none, this ends in a note
    train.compile_step(trainer, torch.zeros(4, 3, 16, 16), False)
    assert {part: options.pop("options", None) for part, options in calls.items()} == {
        part: wanted if name.partition(".")[0] in told else None
        for name, part in model.named_modules() if part in train.parts_to_compile(model)}
    assert all(options == {"dynamic": False} for options in calls.values())


@pytest.mark.parametrize("flags", [(), ("--amp", "bf16")], ids=" ".join)
def test_everything_is_compiled_once(monkeypatch, tmp_path, pretended_recording, flags):
    """From the blank batch over the recording to the last step, as main() puts them together; the compiler takes a minute."""
    record, counts = train.record_step, []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    monkeypatch.setattr(train, "compile_step", functools.partial(lambda work, *call: (work(*call), record(*call)),
                                                                 train.compile_step))
    monkeypatch.setattr(train, "self_check", lambda _: counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    monkeypatch.setattr("sys.argv", [
        "train.py", *SMALL, *flags, "--dataset", "digits", "--in_channels", "3", "--lpips_net", "none", "--fid_every", "0",
        "--sample_every", "0", "--no-tensorboard", "--batch_size", "512", "--epochs", "2", "--compile", "--device", "cpu",
        "--save_dir", str(tmp_path), "--check_every", "1"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train.main()
    assert counts == [0, 4, 4]                                               # encoder, decoder, coupling, loss
    torch._dynamo.reset()
