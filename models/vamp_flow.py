"""CrossFlowVampVAE: a VAE with a VampPrior and a bi-directional cross-attention flow on its latent.

    x -> encoder -> q(z0|x) = N(mu(x), diag sigma^2(x)) -> z0 -> BiCrossAttnFlow f -> zK -> decoder -> x'
    prior: p(zK) = sum_k w_k N(zK; mu(u_k), diag sigma^2(u_k)), the u_k being learned pseudo-inputs, w_k = 1/K

    log q(zK|x) = log N(z0; mu, sigma^2) - log|det dzK/dz0|
    KL          = E_q[ log q(zK|x) - log p(zK) ]                                     (one sample, in nats)

Papers: VAE, Kingma & Welling 2014 (arXiv 1312.6114); VampPrior, Tomczak & Welling 2018 (1705.07120); flows on the
posterior, Rezende & Mohamed 2015 (1505.05770); affine coupling, Dinh et al. 2017 (1605.08803); attention, Vaswani et
al. 2017 (1706.03762).

Shapes: B batch; C, H, W image; D latent; K components; T tokens of one latent half, d = D / 2T values in each;
E embedding; S, F tokens and channels of the encoder's feature map. Images are in [-1, 1], densities in nats.
"""
import contextlib
import copy
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["log_normal", "component_log_probs", "log_mixture", "BiCrossAttnFlow", "check_flow", "Encoder", "Decoder",
           "VAEOutput", "CrossFlowVampVAE"]

PRIORS = ("vamp", "mog", "standard")
FLOW_PRIORS = ("unflowed", "pushed")
FLOW_CONTEXTS = ("none", "encoder")
MIXTURE_WEIGHTS = ("uniform", "learned")
DECODE_FROM = ("zK", "z0")

# Far above what any machine trains, far below what fills its memory or hours before a user can read why: a mistyped
# flag, or a checkpoint from somewhere, is refused by name instead. Largest value of each constructor argument.
LIMITS = dict(img_size=8192, latent_dim=2 ** 16, hidden_dims=2 ** 14, blocks_per_stage=64, num_components=2 ** 20,
              flow_length=256, flow_seq_len=2 ** 15, flow_embed_dim=2 ** 14, flow_heads=2 ** 10, flow_layers=16,
              flow_mlp_ratio=64, scale_bound=80.0)
MOST_STAGES = 13                    # halvings of the largest image
LARGEST_TENSOR = 2 ** 31            # numbers in one tensor of weights: 8 GiB
LARGEST_MAP = 256                   # pixels a side at the lowest resolution, where attention sees every pair of them


def check_sizes(args):
    """Raise ValueError if an entry of a dict of constructor arguments is no number, or above LIMITS."""
    if len(args["hidden_dims"]) > MOST_STAGES:
        raise ValueError(f"hidden_dims has {len(args['hidden_dims'])} entries, more than any image can be halved")
    for name, most in LIMITS.items():
        for value in args[name] if name == "hidden_dims" else [args[name]]:
            kind = "a number" if isinstance(most, float) else "an integer"
            if not isinstance(value, int if kind == "an integer" else (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be {kind}, not {value!r:.40}")
            if not value <= most:
                raise ValueError(f"{name} {value} is absurdly large; at most {most} is allowed")


# ---------------------------------------------------------------------------------------------------------------------
# Densities: always float32 or float64, whatever autocast does around them

def full_precision(x):
    """x in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


# Asked here, once: torch.compile cuts its graph in two where it meets the question (seen with torch 2.4 and 2.11).
HAVE_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def no_autocast(device_type):
    """Context in which autocast is off, on devices that have none too."""
    return torch.autocast(device_type, enabled=False) if device_type in HAVE_AUTOCAST else contextlib.nullcontext()


def log_normal(z, mu, logvar):
    """log N(z; mu, diag exp(logvar)), summed over the last axis: (..., D) three times -> (...), in nats."""
    z, mu, logvar = full_precision(z), full_precision(mu), full_precision(logvar)
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def component_log_probs(z, mu_k, logvar_k):
    """log N(z; mu_k, diag exp(logvar_k)) for every pair: (B, D), (K, D), (K, D) -> (B, K), in nats.

    By direct differences: the expanded quadratic z.z - 2 z.mu + mu.mu is a faster matrix product, and off by whole
    nats where sigma is small.
    """
    return log_normal(z[:, None], mu_k[None], logvar_k[None])


def log_mixture(z, mu_k, logvar_k, log_w=None):
    """log sum_k w_k N(z; mu_k, diag exp(logvar_k)): (B, D), (K, D), (K, D), (K,) -> (B,), in nats; without log_w, w = 1/K."""
    log_w = -math.log(len(mu_k)) if log_w is None else log_w
    return torch.logsumexp(component_log_probs(z, mu_k, logvar_k) + log_w, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks

def group_norm(channels):
    """GroupNorm with as many groups as divide the channels, at most 32, each of four channels or more."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))
    return nn.GroupNorm(groups, channels)


def attention(q, k, v, heads):
    """softmax(q k^T / sqrt(E / heads)) v on every head: (B, Tq, E), (B, Tk, E), (B, Tk, E) -> (B, Tq, E)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))                # (B, heads, T, E / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)                  # (B, Tq, E)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), 3x3 convolutions: (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SelfAttention2d(nn.Module):
    """x + attention among the positions of norm(x): (B, C, H, W) -> the same."""

    def __init__(self, channels, head_dim=64):
        super().__init__()
        self.heads = max(1, channels // head_dim) if channels % head_dim == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                        # (B, HW, C)
        h = self.out(attention(*self.qkv(tokens).chunk(3, dim=-1), self.heads))                 # (B, HW, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])                                  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Flow

class CrossAttnBlock(nn.Module):
    """h + attention(h -> tokens), then h + MLP(h), both on normalised inputs: (B, T, E), (B, S, E) -> (B, T, E)."""

    def __init__(self, embed_dim, heads, mlp_ratio):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.q = nn.Linear(embed_dim, embed_dim)
        # No biases: softmax is blind to one on the keys, and the one on the values is the output projection's.
        self.kv = nn.Linear(embed_dim, 2 * embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, mlp_ratio * embed_dim), nn.SiLU(),
                                 nn.Linear(mlp_ratio * embed_dim, embed_dim))

    def forward(self, h, tokens):
        k, v = self.kv(self.norm_kv(tokens)).chunk(2, dim=-1)                                   # (B, S, E) each
        h = h + self.out(attention(self.q(self.norm_q(h)), k, v, self.heads))
        return h + self.mlp(self.norm_mlp(h))


class CrossAttnConditioner(nn.Module):
    """The affine coefficients of one latent half, from the other half alone (and the context, if there is one).

        h = queries;  h = block(h -> tokens(other half), tokens(context)), `layers` times
        raw, t = head(h);  s = c tanh(raw / c)

    The queries are learned, one per target token: nothing of the target half enters, so the coupling stays invertible
    and its Jacobian triangular. The head alone starts at zero, which makes the flow the identity; whatever feeds it
    does not, so everything has a gradient from the second step on.
    """

    def __init__(self, half_dim, seq_len, embed_dim, heads, layers, mlp_ratio, scale_bound, context_dim):
        super().__init__()
        token_dim = half_dim // seq_len
        self.seq_len, self.scale_bound = seq_len, scale_bound
        self.embed = nn.Linear(token_dim, embed_dim)
        self.position = nn.Parameter(0.5 * torch.randn(seq_len, embed_dim))
        self.embed_context = nn.Linear(context_dim, embed_dim) if context_dim else None
        self.queries = nn.Parameter(0.5 * torch.randn(seq_len, embed_dim))
        self.blocks = nn.ModuleList(CrossAttnBlock(embed_dim, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 2 * token_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, half, context=None):
        """half (B, D/2), context (B, S, F) or None -> s, t, each (B, D/2), |s| < scale_bound."""
        tokens = self.embed(half.unflatten(1, (self.seq_len, -1))) + self.position              # (B, T, E)
        if self.embed_context is not None:
            tokens = torch.cat([tokens, self.embed_context(context)], dim=1)                    # (B, T + S, E)
        h = self.queries.expand(len(half), -1, -1)                                              # (B, T, E)
        for block in self.blocks:
            h = block(h, tokens)
        raw, t = full_precision(self.head(self.norm(h))).chunk(2, dim=-1)                       # (B, T, d) each
        return self.scale_bound * torch.tanh(raw.flatten(1) / self.scale_bound), t.flatten(1)   # (B, D/2) each


class BiCrossAttnCoupling(nn.Module):
    """One layer: a fixed permutation, then each half is transformed given the other.

        (a, b) = split(z[perm]);  b' = b exp(s_b(a)) + t_b(a);  a' = a exp(s_a(b')) + t_a(b')
        log|det| = sum s_b + sum s_a
    """

    def __init__(self, dim, perm, **conditioner):
        super().__init__()
        self.register_buffer("perm", perm)                                                      # (D,) int64
        self.cond_b = CrossAttnConditioner(dim // 2, **conditioner)
        self.cond_a = CrossAttnConditioner(dim // 2, **conditioner)

    def forward(self, z, context=None):
        a, b = z[:, self.perm].chunk(2, dim=1)                                                  # (B, D/2) each
        s_b, t_b = self.cond_b(a, context)
        b = b * torch.exp(s_b) + t_b
        s_a, t_a = self.cond_a(b, context)
        a = a * torch.exp(s_a) + t_a
        return torch.cat([a, b], dim=1), torch.cat([s_a, s_b], dim=1)                           # z', s: (B, D) each

    def inverse(self, z, context=None):
        a, b = z.chunk(2, dim=1)
        s_a, t_a = self.cond_a(b, context)
        a = (a - t_a) * torch.exp(-s_a)
        s_b, t_b = self.cond_b(a, context)
        b = (b - t_b) * torch.exp(-s_b)
        return torch.cat([a, b], dim=1)[:, self.perm.argsort()], torch.cat([s_a, s_b], dim=1)


class BiCrossAttnFlow(nn.Module):
    """zK = f(z0), a stack of bi-directional cross-attention couplings; log|det dzK/dz0| = sum of all s.

    The inverse is exact and costs the same as the forward pass. Raises ValueError on sizes that do not fit.
    """

    def __init__(self,
                 dim,                   # D, divisible by 2 * seq_len
                 length=8,              # coupling layers, 1 or more
                 seq_len=8,             # T, tokens per half
                 embed_dim=128,         # E, divisible by heads
                 heads=4,
                 layers=2,              # attention blocks per conditioner
                 context_dim=None,      # F of the amortised flow's context tokens, None = no context
                 mlp_ratio=4,           # hidden width of the blocks' MLP over E
                 scale_bound=2.0,       # c: |s| < c
                 perm_seed=0):          # the permutations' own generator
        super().__init__()
        if length < 1 or layers < 1 or mlp_ratio < 1:
            raise ValueError(f"flow length, layers and mlp_ratio must be at least 1, not {length}, {layers}, {mlp_ratio}")
        if seq_len < 1 or dim % (2 * seq_len):
            raise ValueError(f"latent_dim {dim} is not divisible by 2 * flow_seq_len = {2 * seq_len}")
        if heads < 1 or embed_dim % heads:
            raise ValueError(f"flow_embed_dim {embed_dim} is not divisible by flow_heads {heads}")
        if not scale_bound > 0:
            raise ValueError(f"scale_bound must be positive, not {scale_bound}")
        self.dim, self.scale_bound, self.context_dim = dim, scale_bound, context_dim
        generator = torch.Generator().manual_seed(perm_seed)
        self.couplings = nn.ModuleList(
            # (The device is named since utils builds models on the meta device, to learn their sizes.)
            BiCrossAttnCoupling(dim, torch.randperm(dim, generator=generator, device="cpu"), seq_len=seq_len,
                                embed_dim=embed_dim, heads=heads, layers=layers, mlp_ratio=mlp_ratio,
                                scale_bound=scale_bound, context_dim=context_dim)
            for _ in range(length))

    def forward(self, z0, context=None):
        """z0 (B, D), context (B, S, F) or None -> zK (B, D), log|det dzK/dz0| (B,)."""
        z, scales = self.transform(z0, context)
        return z, scales.sum((0, 2))

    def inverse(self, zK, context=None):
        """zK (B, D), context (B, S, F) or None -> z0 (B, D), log|det dz0/dzK| (B,)."""
        z, log_det = full_precision(zK), 0.0
        for coupling in reversed(self.couplings):
            z, s = coupling.inverse(z, context)
            log_det = log_det - s.sum(1)
        return z, log_det

    def transform(self, z0, context=None):
        """As forward, with every layer's log-scales: zK (B, D), s (length, B, D)."""
        z, scales = full_precision(z0), []
        for coupling in self.couplings:
            z, s = coupling(z, context)
            scales.append(s)
        return z, torch.stack(scales)


@torch.no_grad()
def perturb_(module, std, generator):
    """Add N(0, std^2) to every parameter, in place: at its identity initialisation any flow passes any check."""
    for p in module.parameters():
        p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def check_flow(flow, batch=2, context_tokens=4, perturb=0.05, seed=0):
    """Is the flow invertible, and is its log-determinant the Jacobian's? Checked on a float64 copy on the CPU.

    Round trips and the inverse's log-determinant with the weights as they are and once more perturbed by N(0, perturb^2),
    with which autograd's Jacobian of one sample is compared too: it takes most of the time, and the perturbed weights
    show more. The copy has a generator of its own, so nothing outside is disturbed. Returns a dict of the worst values:
    `inverse_error` and `log_det_error` (relative to 1 + |z| and 1 + |log det|), `layer` (1-based, the layer with the
    largest round-trip error of its own; 0 if the whole flow's is below 1e-9) and `scale_std` (the spread of s with
    perturbed weights, which must not be 0 for the check to mean anything).
    """
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(flow).cpu().double().eval().requires_grad_(False)
    B, D = batch, flow.dim

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def relative(x, y):
        error = (x - y).abs() / (1 + y.abs())
        return float("inf") if not torch.isfinite(error).all() else error.max().item()

    worst = {"inverse_error": 0.0, "log_det_error": 0.0, "layer": 0, "scale_std": 0.0}
    layer_error = -1.0
    for std in (0.0, perturb):
        if std:
            perturb_(probe, std, generator)
        z0 = randn(B, D)
        context = randn(B, context_tokens, flow.context_dim) if flow.context_dim else None
        zK, scales = probe.transform(z0, context)
        log_det = scales.sum((0, 2))
        back, inverse_log_det = probe.inverse(zK, context)
        inverse_error = relative(back, z0)
        worst["inverse_error"] = max(worst["inverse_error"], inverse_error)
        worst["log_det_error"] = max(worst["log_det_error"], relative(-inverse_log_det, log_det))
        worst["scale_std"] = scales.std().item()
        z = z0
        for i, coupling in enumerate(probe.couplings if inverse_error >= 1e-9 else []):
            z_next, _ = coupling(z, context)
            error = relative(coupling.inverse(z_next, context)[0], z)
            if error > layer_error:
                worst["layer"], layer_error = i + 1, error
            z = z_next
    # The first sample's Jacobian in one backward pass: row i of D copies is differentiated for output i.
    with torch.enable_grad():
        copies = z0[0].expand(D, D).clone().requires_grad_(True)
        out, _ = probe(copies, None if context is None else context[0].expand(D, -1, -1))
    jacobian = torch.autograd.grad(out, copies, torch.eye(D, dtype=torch.float64))[0]
    worst["log_det_error"] = max(worst["log_det_error"], relative(log_det[0], torch.linalg.slogdet(jacobian).logabsdet))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and decoder

class Encoder(nn.Module):
    """ResNet encoder: at each stage a stride-2 3x3 convolution, GroupNorm, SiLU and ResBlocks, then self-attention."""

    def __init__(self, in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage):
        super().__init__()
        layers, c_in = [], in_channels
        for c in hidden_dims:
            layers += [nn.Conv2d(c_in, c, 3, stride=2, padding=1), group_norm(c), nn.SiLU()]
            layers += [ResBlock(c) for _ in range(blocks_per_stage)]
            c_in = c
        self.stages = nn.Sequential(*layers, SelfAttention2d(c_in), group_norm(c_in), nn.SiLU())
        side = img_size // 2 ** len(hidden_dims)
        self.head = nn.Linear(c_in * side * side, 2 * latent_dim)

    def forward(self, x):
        """x (B, C, H, W) -> mu, logvar (B, D) in full precision, feature map (B, F, h, w)."""
        h = self.stages(x)
        with no_autocast(x.device.type):                        # mu in bf16 would be rounded by more than a small sigma
            mu, logvar = self.head(full_precision(h.flatten(1))).chunk(2, dim=1)
        return mu, logvar, h


class Decoder(nn.Module):
    """The encoder mirrored: nearest-neighbour doubling and a 3x3 convolution at each stage, tanh at the end.

    Self-attention after the first stage; no ResBlock at full resolution, where one costs as much as four below it.
    """

    def __init__(self, out_channels, img_size, latent_dim, hidden_dims, blocks_per_stage):
        super().__init__()
        side = img_size // 2 ** len(hidden_dims)
        c_in = hidden_dims[-1]
        self.stem = nn.Sequential(nn.Linear(latent_dim, c_in * side * side), nn.Unflatten(1, (c_in, side, side)))
        layers = [] if len(hidden_dims) > 1 else [SelfAttention2d(c_in)]
        widths = [*reversed(hidden_dims[:-1]), hidden_dims[0]]
        for i, c in enumerate(widths):
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c_in, c, 3, padding=1)]
            layers += [group_norm(c), nn.SiLU()]
            if i < len(widths) - 1:
                layers += [ResBlock(c) for _ in range(blocks_per_stage)]
                layers += [SelfAttention2d(c)] if i == 0 else []
            c_in = c
        self.stages = nn.Sequential(*layers, nn.Conv2d(c_in, out_channels, 3, padding=1))

    def forward(self, z):
        """z (B, D) -> image (B, C, H, W) in [-1, 1]."""
        h = self.stages(self.stem(z))
        return torch.tanh(full_precision(h))                    # in bf16 it is 1 from 3.5 on, and without a gradient


# ---------------------------------------------------------------------------------------------------------------------
# The model

class VAEOutput(NamedTuple):
    recon: torch.Tensor | None  # (B, C, H, W) in [-1, 1], None where nothing is decoded
    mu: torch.Tensor            # (B, D) of q(z0|x)
    logvar: torch.Tensor        # (B, D) of q(z0|x)
    z0: torch.Tensor            # (B, D) sample of q(z0|x)
    zK: torch.Tensor            # (B, D) = f(z0)
    log_det: torch.Tensor       # (B,) log|det dzK/dz0|
    mu_k: torch.Tensor          # (K, D) of the prior's components
    logvar_k: torch.Tensor      # (K, D)


class KLTerms(NamedTuple):
    """One-sample KL of each image, in nats: kl = log_q0 - log_det - log_p, each (B,)."""
    kl: torch.Tensor
    log_q0: torch.Tensor        # log N(z0; mu, sigma^2)
    log_det: torch.Tensor       # log|det dzK/dz0|
    log_p: torch.Tensor         # log p(zK)


class CrossFlowVampVAE(nn.Module):
    """The whole model; see the module's docstring for the equations. Raises ValueError on sizes that do not fit.

    flow_prior  unflowed: the mixture lives at zK, the flow carries the aggregated posterior to it.
                pushed:   the mixture lives at z0 and is carried along: log p(zK) = log p0(z0) - log|det|, so that the
                          log-determinants cancel and the KL is that of the model with no flow.
    flow_context  encoder: the flow also attends to the encoder's feature map (amortised flow).
    decode_from  zK: the decoder sees what the flow makes. z0: it sees z0, and the flow is part of the prior alone,
                 p(z0) = p(f(z0)) |det df/dz0|, which sampling inverts. The KL is the same expression in both.
    """

    def __init__(self,
                 in_channels=3,                     # 1 or 3
                 img_size=32,                       # H = W, divisible by 2^(number of stages)
                 latent_dim=128,                    # D
                 hidden_dims=(64, 128, 256, 512),   # channels of each encoder stage
                 blocks_per_stage=1,                # ResBlocks
                 num_components=100,                # K, for the vamp and mog priors
                 prior="vamp",                      # vamp | mog | standard
                 flow_length=8,                     # coupling layers, 0 = no flow
                 flow_seq_len=8,                    # tokens per latent half
                 flow_embed_dim=128,
                 flow_heads=4,
                 flow_layers=2,                     # attention blocks per conditioner
                 flow_mlp_ratio=4,
                 flow_prior="unflowed",             # unflowed | pushed
                 flow_context="none",               # none | encoder
                 decode_from="zK",                  # zK | z0
                 mixture_weights="uniform",         # uniform | learned, of the vamp and mog priors
                 posterior_std=0.0,                 # sigma of q(z0|x) and so of vamp's components, 0 = the encoder's
                 scale_bound=2.0,                   # bound of the flow's log-scales
                 logvar_clamp=(-10.0, 10.0),        # of q(z0|x) and so of the prior's components
                 perm_seed=0):                      # of the flow's fixed permutations
        super().__init__()
        hidden_dims = tuple(hidden_dims)
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, not {in_channels}")
        check_sizes(dict(img_size=img_size, latent_dim=latent_dim, hidden_dims=hidden_dims, blocks_per_stage=blocks_per_stage,
                         num_components=num_components, flow_length=flow_length, flow_seq_len=flow_seq_len,
                         flow_embed_dim=flow_embed_dim, flow_heads=flow_heads, flow_layers=flow_layers,
                         flow_mlp_ratio=flow_mlp_ratio, scale_bound=scale_bound))
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError("hidden_dims needs at least one positive width")
        if img_size < 1 or img_size % 2 ** len(hidden_dims):
            raise ValueError(f"img_size {img_size} is not divisible by 2^{len(hidden_dims)} = {2 ** len(hidden_dims)} "
                             f"(one halving per entry of hidden_dims)")
        if latent_dim < 1 or blocks_per_stage < 0 or flow_length < 0:
            raise ValueError(f"latent_dim must be 1 or more, blocks_per_stage and flow_length 0 or more, not "
                             f"{latent_dim}, {blocks_per_stage}, {flow_length}")
        for name, value, choices in (("prior", prior, PRIORS), ("flow_prior", flow_prior, FLOW_PRIORS),
                                     ("flow_context", flow_context, FLOW_CONTEXTS), ("decode_from", decode_from, DECODE_FROM),
                                     ("mixture_weights", mixture_weights, MIXTURE_WEIGHTS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if prior != "standard" and num_components < 1:
            raise ValueError(f"num_components must be at least 1, not {num_components}")
        if flow_prior == "pushed" and flow_context == "encoder":
            raise ValueError("flow_prior 'pushed' needs one flow for all images, flow_context 'encoder' gives each its own")
        if decode_from == "z0" and (flow_prior == "pushed" or flow_context == "encoder"):
            raise ValueError("decode_from 'z0' needs a flow that is the prior's own: no flow_prior 'pushed', which would leave "
                             "it idle, and no flow_context 'encoder', without which a sample could not be inverted")
        if not 0 <= posterior_std < math.inf:
            raise ValueError(f"posterior_std must be 0 (learned) or positive, not {posterior_std}")
        if len(logvar_clamp) != 2 or not logvar_clamp[0] < logvar_clamp[1]:
            raise ValueError(f"logvar_clamp must be two ascending numbers, not {logvar_clamp}")

        side = img_size // 2 ** len(hidden_dims)
        if side > LARGEST_MAP:
            raise ValueError(f"img_size {img_size} leaves {side} pixels a side after {len(hidden_dims)} halvings, more than "
                             f"{LARGEST_MAP}; give hidden_dims more entries")
        largest = max(2 * latent_dim * hidden_dims[-1] * side ** 2, 9 * max(hidden_dims) ** 2,
                      flow_mlp_ratio * flow_embed_dim ** 2, num_components * in_channels * img_size ** 2 * (prior == "vamp"))
        if largest > LARGEST_TENSOR:
            raise ValueError(f"a single tensor of this model would hold {largest:,} numbers, more than {LARGEST_TENSOR:,}")

        self.in_channels, self.img_size, self.latent_dim = in_channels, img_size, latent_dim
        self.num_components = 1 if prior == "standard" else num_components
        self.prior, self.flow_prior, self.flow_context = prior, flow_prior, flow_context
        self.decode_from, self.posterior_std = decode_from, posterior_std
        self.logvar_clamp = tuple(logvar_clamp)
        self.encoder = Encoder(in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage)
        self.flow, self.context_position = None, None
        if flow_length:
            context_dim = hidden_dims[-1] if flow_context == "encoder" else None
            self.flow = BiCrossAttnFlow(latent_dim, flow_length, flow_seq_len, flow_embed_dim, flow_heads, flow_layers,
                                        context_dim, flow_mlp_ratio, scale_bound, perm_seed)
            if context_dim:
                self.context_position = nn.Parameter(0.5 * torch.randn(side * side, context_dim))
        self.decoder = Decoder(in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage)
        if prior == "vamp":
            self.pseudo_raw = nn.Parameter((0.5 * torch.randn(num_components, in_channels, img_size, img_size)).clamp(-1, 1))
        elif prior == "mog":
            self.prior_mu = nn.Parameter(torch.randn(num_components, latent_dim))
            self.prior_logvar = nn.Parameter(torch.zeros(num_components, latent_dim))
        learned = mixture_weights == "learned" and prior != "standard"
        self.prior_logits = nn.Parameter(torch.zeros(num_components)) if learned else None

    # -- prior ------------------------------------------------------------------------------------------------------

    @property
    def pseudo_inputs(self) -> torch.Tensor | None:
        """The VampPrior's learned inputs (K, C, H, W), clamped to [-1, 1]; None for the other priors.

        The clamp's gradient is the identity: an entry at the border can still move back.
        """
        if self.prior != "vamp":
            return None
        return self.pseudo_raw.detach().clamp(-1, 1) + (self.pseudo_raw - self.pseudo_raw.detach())

    @torch.no_grad()
    def project_(self):
        """Bring the pseudo-inputs back into [-1, 1]; called after each optimiser step (projected gradient)."""
        if self.prior == "vamp":
            self.pseudo_raw.clamp_(-1, 1)

    @torch.no_grad()
    def init_prior(self, images):
        """Start the K components at these images (K, C, H, W): as pseudo-inputs, or (mog) at their posteriors' means, each
        as wide as all of them together, since of narrow ones the widest would take all responsibility."""
        if self.prior == "vamp":
            self.pseudo_raw.copy_(images.clamp(-1, 1))
        elif self.prior == "mog":
            mu, logvar = self.encode(images)
            self.prior_mu.copy_(mu)
            self.prior_logvar.copy_((logvar.exp().mean(0) + mu.var(0, unbiased=False)).log())

    def prior_params(self):
        """mu_k, logvar_k of the prior's components, (K, D) each; (1, D) of zeros for the standard prior."""
        if self.prior == "vamp":
            return self.encode(self.pseudo_inputs)
        return self._free_prior_params()

    def _free_prior_params(self):
        """The components that need no encoder: mog, standard."""
        if self.prior == "mog":
            return self.prior_mu, self.prior_logvar.clamp(*self.logvar_clamp)
        zeros = self.encoder.head.weight.new_zeros(1, self.latent_dim)
        return zeros, zeros

    def log_weights(self):
        """log w_k of the prior's components, (K,)."""
        if self.prior_logits is None:
            return self.encoder.head.weight.new_full((self.num_components,), -math.log(self.num_components))
        return torch.log_softmax(full_precision(self.prior_logits), 0)

    def log_prior(self, zK):
        """log p(zK) in nats: (B, D) -> (B,)."""
        mu_k, logvar_k = self.prior_params()
        if self.flow is not None and self.flow_prior == "pushed":
            z0, inverse_log_det = self.flow.inverse(zK)
            return log_mixture(z0, mu_k, logvar_k, self.log_weights()) + inverse_log_det
        return log_mixture(zK, mu_k, logvar_k, self.log_weights())

    # -- posterior --------------------------------------------------------------------------------------------------

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> mu, logvar of q(z0|x), (B, D) each."""
        mu, logvar, _ = self.encoder(x)
        return mu, self.bound(logvar)

    def bound(self, logvar):
        """The encoder's log-variance as it is used everywhere: clamped, or replaced by posterior_std."""
        if self.posterior_std:
            return torch.full_like(logvar, 2 * math.log(self.posterior_std))
        return logvar.clamp(*self.logvar_clamp)

    def context(self, features):
        """The amortised flow's context tokens (B, S, F) of an encoder feature map (B, F, h, w); None if not amortised."""
        if self.context_position is None:
            return None
        return features.flatten(2).transpose(1, 2) + self.context_position

    def apply_flow(self, z0, context=None):
        """zK (B, D) and log|det dzK/dz0| (B,); z0 itself and zeros where there is no flow."""
        return (z0, z0.new_zeros(len(z0))) if self.flow is None else self.flow(z0, context)

    def posterior(self, x):
        """x (B, C, H, W) -> mu, logvar of q(z0|x), (B, D) each, and the flow's context or None."""
        mu, logvar, features = self.encoder(x)
        return mu, self.bound(logvar), self.context(features)

    def decode(self, z):
        """The decoder's latent (B, D), zK unless decode_from is z0, -> image (B, C, H, W) in [-1, 1]."""
        return self.decoder(z)

    def seen_by_decoder(self, z0, zK):
        """The one of the two, (B, D) each, that the decoder takes."""
        return zK if self.decode_from == "zK" else z0

    def decoder_latent(self, zK):
        """What the decoder takes of zK (B, D): itself, or z0 = f^-1(zK) (B, D)."""
        return zK if self.flow is None or self.decode_from == "zK" else self.flow.inverse(zK)[0]

    def from_mixture(self, z):
        """What the decoder takes of a draw of the mixture (B, D), wherever the mixture lives: (B, D)."""
        return self.apply_flow(z)[0] if self.flow_prior == "pushed" else self.decoder_latent(z)

    @torch.no_grad()
    def reconstruct(self, x, eps=None):
        """x (B, C, H, W) in [-1, 1] -> its reconstruction, at the posterior's mean, or at mu + sigma eps for eps (B, D)."""
        mu, logvar, context = self.posterior(x)
        z0 = mu if eps is None else mu + torch.exp(0.5 * logvar) * eps
        return self.decode(self.seen_by_decoder(z0, self.apply_flow(z0, context)[0]))

    def forward(self, x, eps=None, prior=None):
        """x (B, C, H, W) in [-1, 1] -> VAEOutput.

        eps (B, D) is the standard normal noise of z0 = mu + sigma eps, drawn here if not given. prior, (mu_k, logvar_k)
        from prior_params(), spares encoding the pseudo-inputs again; without it they go through the encoder in one
        batch with x.
        """
        B = len(x)
        if prior is None and self.prior == "vamp":
            mu, logvar, features = self.encoder(torch.cat([x, self.pseudo_inputs]))              # (B + K, ...)
            logvar = self.bound(logvar)
            (mu, mu_k), (logvar, logvar_k) = mu.split([B, len(mu) - B]), logvar.split([B, len(mu) - B])
            context = self.context(features[:B])
        else:
            mu, logvar, context = self.posterior(x)
            mu_k, logvar_k = self._free_prior_params() if prior is None else prior
        out = self.carry(mu, logvar, torch.randn_like(mu) if eps is None else eps, (mu_k, logvar_k), context)
        # (Not out._replace: torch.compile fails at it in torch 2.11.)
        return VAEOutput(self.decode(self.seen_by_decoder(out.z0, out.zK)), *out[1:])

    def carry(self, mu, logvar, eps, prior=None, context=None):
        """Posteriors (B, D), (B, D) and noise (B, D) -> VAEOutput without recon: all that the KL and the prior need."""
        z0 = mu + torch.exp(0.5 * logvar) * eps                                                  # (B, D)
        zK, log_det = self.apply_flow(z0, context)
        return VAEOutput(None, mu, logvar, z0, zK, log_det, *(self.prior_params() if prior is None else prior))

    def mixture_latent(self, out):
        """The latent at which the mixture lives: zK, or z0 where the prior is pushed through the flow. (B, D)"""
        return out.z0 if self.flow_prior == "pushed" else out.zK

    def kl_terms(self, out):
        """The one-sample KL of a VAEOutput and its parts, in nats per image: KLTerms of (B,)."""
        log_q0 = log_normal(out.z0, out.mu, out.logvar)
        log_p = log_mixture(self.mixture_latent(out), out.mu_k, out.logvar_k, self.log_weights())
        if self.flow_prior == "pushed":
            log_p = log_p - out.log_det
        return KLTerms(log_q0 - out.log_det - log_p, log_q0, out.log_det, log_p)

    def responsibilities(self, out):
        """p(k | z) of the prior's components for a VAEOutput: (B, K)."""
        log_joint = component_log_probs(self.mixture_latent(out), out.mu_k, out.logvar_k) + self.log_weights()
        return torch.softmax(log_joint, 1)

    # -- generation -------------------------------------------------------------------------------------------------

    def sample_latents(self, n, temperature=1.0, generator=None, prior=None):
        """n draws from the prior, k by its weights, N(mu_k, (temperature sigma_k)^2), as what the decoder takes -> (n, D).

        Drawn on the generator's device (the CPU without one), so that a seed gives the same latents on any device.
        prior, (mu_k, logvar_k) from prior_params(), spares encoding the pseudo-inputs again.
        """
        mu_k, logvar_k = self.prior_params() if prior is None else prior
        device = generator.device if generator is not None else "cpu"
        if self.prior_logits is None:
            k = torch.randint(len(mu_k), (n,), generator=generator, device=device).to(mu_k.device)
        else:
            weights = self.log_weights().exp().to(device)
            k = torch.multinomial(weights, n, replacement=True, generator=generator).to(mu_k.device)
        eps = torch.randn(n, self.latent_dim, generator=generator, device=device).to(mu_k)
        z = mu_k[k] + temperature * torch.exp(0.5 * logvar_k[k]) * eps
        return self.from_mixture(z)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, generator=None):
        """n images of the prior, (n, C, H, W) in [-1, 1]."""
        return self.decode(self.sample_latents(n, temperature, generator))
