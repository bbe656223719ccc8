"""What the compiler makes of a training step for a GPU, without one: how many kernels, and how much memory they move.

    python tests/benchmarks/bench_compiled.py --batch_size 1024
    python tests/benchmarks/bench_compiled.py --batch_size 1024 --own_limits        as the compiler does without train.DO_AGAIN

Encoder, decoder and LPIPS-VGG with its fused layers, forward and backward, are traced on the CPU on tensors without contents,
in bf16 and channels_last, and PyTorch's Inductor generates its code for an H100 that is not there. A JSON line each: the
kernels that it starts, and the gigabytes that they read and write by its own note (kernel_num_gb); the encoder's batch has the
pseudo-inputs, LPIPS the L1 loss beside it. The convolutions and matrix products, which it calls and does not generate, are
counted by themselves (products): each one's arithmetic and its reading and writing in bf16, the time that each would take by
the longer of the two (--tflops, --tb_per_s), and the time of the arithmetic alone; of a whole step, the flow's layers
included. Nothing is timed. Flags of train.py are taken too.

It replaces parts of PyTorch that would ask a driver, and was written for PyTorch 2.14.
"""
import argparse
import collections
import copy
import re
import types

import torch
import torch.nn.functional as F
from bench_train import make_trainer, random_lpips
from report import print_line, rounded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from models import vamp_flow
from utils import run

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20, gcnArchName="")


class NoContext:
    """A context manager that takes any argument and does nothing."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def pretend_h100():
    """Let PyTorch and Triton believe that an H100 is there, and the model that it is compiled for one."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda *_: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0), is_active=lambda: True))
    cuda = torch.cuda
    for name, value in dict(is_available=True, is_initialized=False, device_count=1, current_device=0, _lazy_init=None,
                            get_device_capability=(9, 0), get_device_name=H100.name, get_device_properties=H100,
                            _get_device_properties=H100, is_bf16_supported=True, synchronize=None, _exchange_device=0,
                            _maybe_exchange_device=0, set_rng_state=None).items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.get_rng_state = lambda *_, **__: torch.empty(16, dtype=torch.uint8, device="cpu")
    cuda.device = NoContext
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda *_, **__: H100)
    torch._C._cuda_getDevice = torch._C._cuda_getCurrentRawStream = lambda *_: 0

    def layout(x, weight, _):                                     # cuDNN's
        last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if last else torch.contiguous_format

    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = layout
    torch.compiler.is_compiling = lambda: True
    vamp_flow.GroupNorm.forward = lambda norm, x: norm.by_channels(vamp_flow.full_precision(x))

    def attention(q, k, v, heads):                                # (a small part; the CPU's own kernel has no code for a GPU)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = torch.softmax((q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5, -1).to(q.dtype)
        return (p @ v).transpose(1, 2).flatten(2)

    vamp_flow.attention = attention


class Generated(BaseException):
    """Raised when the code is there. (An Exception would be wrapped.)"""


def generated(fake, work, inputs):
    """The code for work(*inputs), and for the gradients of those of the inputs that have one."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    codes = []

    def stop(lowering):
        code = lowering.codegen()[0]
        codes.append(getattr(code, "value", code))
        raise Generated

    def on_gpu(graph, inputs):
        graph = copy.deepcopy(graph)
        for node in graph.graph.nodes:
            node.meta.pop("val", None)
            if node.target is torch.ops.aten.view.default:        # strides differ there
                node.target = torch.ops.aten.reshape.default
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        graph.recompile()
        with fake:
            inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                      if isinstance(x, torch.Tensor) else x for x in inputs]
            FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
        return graph, inputs

    def compiler(backward):
        def compile_(graph, inputs):
            try:
                compile_fx_inner(*on_gpu(graph, inputs), is_backward=backward)
            except Generated:
                pass
            return make_boxed_func(graph.forward)
        return compile_

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = stop
    compiled = aot_function(work, fw_compiler=compiler(False), bw_compiler=compiler(True),
                            decompositions=select_decomp_table(), partition_fn=lambda *graph, **options:
                            min_cut_rematerialization_partition(*graph, compiler="inductor", **options))
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(*inputs)
    torch.autograd.grad(sum(x.float().sum() for x in (out if isinstance(out, (tuple, list)) else (out,))),
                        [x for x in inputs if x.requires_grad], allow_unused=True)
    return codes


def traffic(code):
    """(kernels started, gigabytes) of generated code."""
    kernel = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.M | re.S)
    moved = {name: float(re.search(r"'kernel_num_gb': ([\d.e-]+)", text)[1]) for name, text in kernel.findall(code)}
    # (Without their texts, most of which hold a call too, for a benchmark.)
    calls = collections.Counter(re.findall(r"^\s+(triton_\w+)\.run\(", kernel.sub("", code), re.M))
    assert moved and calls.keys() == moved.keys(), "another form of code than this was written for"
    return calls.total(), sum(calls[name] * gb for name, gb in moved.items())


class Products(TorchDispatchMode):
    """Of each convolution and matrix product: (operations, bytes read and written in bf16)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            flop = flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
            numbers = sum(t.numel() for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
            if function is torch.ops.aten.convolution_backward.default:
                grad, x, weight, of_x, of_weight = *args[:3], *args[-1][:2]
                # Each of its two products reads the gradient, and the other of input and weight.
                numbers += grad.numel() * (of_x + of_weight - 1) - x.numel() * (not of_weight) - weight.numel() * (not of_x)
            self.found.append((flop, 2 * numbers))
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--own_limits", action="store_true", help="of the compiler, instead of train.DO_AGAIN")
    parser.add_argument("--tflops", type=float, default=740, help="the GPU's rate of bf16 matrix products")
    parser.add_argument("--tb_per_s", type=float, default=3.35, help="what its memory moves")
    args, rest = parser.parse_known_args()
    flags, _ = train.parse_args(rest)
    flags.in_channels, flags.flip, cpu = 3, True, torch.device("cpu")
    size, about = (args.batch_size, 3, flags.img_size, flags.img_size), {"batch_size": args.batch_size}
    trainer = make_trainer(args, flags, torch.zeros(2 * args.batch_size, *size[1:]), random_lpips(), cpu, True)
    eps = torch.zeros(args.batch_size, flags.latent_dim)
    with FakeTensorMode(allow_non_fake_inputs=True), Products() as products:
        train.backward(trainer, torch.zeros(size), eps, False, 0.1)
    flop, moved = (sum(x) for x in zip(*products.found))
    print_line({"case": "products", "gflop": rounded(flop / 1e9), "gigabytes": rounded(moved / 1e9),
                "by_arithmetic_ms": rounded(flop / args.tflops / 1e9),
                "at_least_ms": rounded(sum(max(f / args.tflops / 1e9, b / args.tb_per_s / 1e9) for f, b in products.found)),
                **about}, cpu)
    model, lpips = trainer.model, train.with_fused_layers(trainer.lpips).to(memory_format=torch.channels_last)
    in_bf16 = train.RoundedWeights(model, model).copies
    pretend_h100()
    import torch._inductor.config as config
    config.force_disable_caches, config.compile_threads, config.benchmark_kernel = True, 1, True
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    pseudo = flags.num_components if flags.prior == "vamp" else 0
    with fake:
        x = torch.empty(size).to(memory_format=torch.channels_last)
        encoded = torch.empty(size[0] + pseudo, *size[1:]).to(memory_format=torch.channels_last)
        parts = {"encoder": (model.encoder, (encoded,)), "decoder": (model.decoder, (eps.clone().requires_grad_(),)),
                 "LPIPS": (lpips, (x.clone().requires_grad_(), x))}
    total = collections.Counter()
    for name, (network, inputs) in parts.items():
        given = {key: in_bf16.get(f"{name}.{key}", value).detach() for key, value in network.named_parameters()}
        given.update(network.named_buffers())
        trained, n = name != "LPIPS", len(inputs)

        def work(*values, network=network, keys=tuple(given), trained=trained, n=n):
            out = torch.func.functional_call(network, dict(zip(keys, values[n:])), values[:n])
            return out if trained else out.float().mean() + F.l1_loss(*values[:n], reduction="sum")

        with fake, config.patch(train.DO_AGAIN if trained and not args.own_limits else {}):
            weights = [fake.from_tensor(value) for value in given.values()]
            weights = [value.requires_grad_(trained and value.is_floating_point()) for value in weights]
            codes = generated(fake, work, [*inputs, *weights])
        for way, code in zip(("forward", "backward"), codes, strict=True):
            kernels, gigabytes = traffic(code)
            total.update(kernels=kernels, gigabytes=gigabytes)
            print_line({"case": f"{name}, {way}", "kernels": kernels, "gigabytes": rounded(gigabytes), **about}, cpu)
    print_line({"case": "all", "kernels": total["kernels"], "gigabytes": rounded(total["gigabytes"]),
                "by_memory_ms": rounded(total["gigabytes"] / args.tb_per_s), "own_limits": args.own_limits, **about}, cpu)


if __name__ == "__main__":
    run(main)
