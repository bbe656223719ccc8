"""The flow: exact inverse, exact log-determinant, triangular couplings, and gradients everywhere.

Weights are perturbed first: at its identity initialisation a broken flow passes every check.
"""
import copy
import math

import pytest
import torch

from models import vamp_flow
from models.vamp_flow import BiCrossAttnFlow, check_flow, perturb_

CASES = [  # length, seq_len, heads, layers, context_dim, positions
    (1, 1, 1, 1, None), (2, 2, 2, 1, None), (4, 4, 1, 2, 5), (8, 8, 4, 2, None), (3, 1, 2, 2, 6), (16, 2, 4, 1, None),
    (3, 4, 2, 1, None, 4), (2, 2, 2, 1, 5, 8), (1, 8, 2, 1, None, 2),
]
PERTURB = 0.05


def make(length=3, seq_len=2, heads=2, layers=1, context_dim=None, positions=1, dim=16, perturb=PERTURB, **kwargs):
    torch.manual_seed(0)
    flow = BiCrossAttnFlow(dim, length, seq_len, 16, heads, layers, context_dim, positions=positions, **kwargs).double()
    return perturb_(flow, perturb, torch.Generator().manual_seed(1))


def whitened(positions, channels, seed=0):
    """A flow and points (N, D) with correlated channels and another mean at each position, from which it has its whitening."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    z = torch.randn(2000, positions, channels, generator=generator, dtype=torch.float64) @ mixing
    z = (z + 5 * torch.randn(positions, channels, generator=generator, dtype=torch.float64)).flatten(1)
    flow = make(positions=positions, dim=positions * channels, whiten=True)
    flow.set_whitening_(z)
    return flow, z


def inputs(flow, n=6):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(n, flow.dim, generator=generator, dtype=torch.float64)
    context = torch.randn(n, 3, flow.context_dim, generator=generator, dtype=torch.float64) if flow.context_dim else None
    return z, context


@pytest.mark.parametrize("case", CASES)
def test_flow_inverse_recovers_input(case):
    flow = make(*case)
    z, context = inputs(flow)
    with torch.no_grad():
        zK, log_det = flow(z, context)
        back, inverse_log_det = flow.inverse(zK, context)
        _, scales = flow.transform(z, context)
    assert scales.std() > 0.01                      # else the flow is still the identity and nothing is tested
    assert not torch.allclose(zK, z, atol=0.1)
    assert ((back - z).abs() / (1 + z.abs())).max() < 1e-9
    assert torch.allclose(log_det, -inverse_log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_log_det_matches_autograd_jacobian(case):
    flow = make(*case)
    z, context = inputs(flow, n=2)
    _, log_det = flow(z, context)
    _, inverse_log_det = flow.inverse(z, context)
    for i in range(len(z)):
        c = None if context is None else context[i:i + 1]
        for function, claimed in ((flow.forward, log_det), (flow.inverse, inverse_log_det)):
            jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None], c)[0][0], z[i])   # noqa: B023
            exact = torch.linalg.slogdet(jacobian).logabsdet
            assert abs(exact) > 0.01
            assert abs(claimed[i] - exact) < 1e-8


def test_conditioner_ignores_transformed_half():
    """Inside one coupling d b' / d b is diagonal and exp(s_b): the coefficients of b cannot depend on b; the same for a."""
    flow = make(length=1, context_dim=4)
    coupling, (z, context) = flow.couplings[0], inputs(flow, n=1)
    half = flow.dim // 2
    a, b = z[:, coupling.perm].chunk(2, dim=1)
    s_b, t_b = coupling.cond_b(a, context)
    b_new = b * s_b.exp() + t_b
    s_a, _ = coupling.cond_a(b_new, context)

    def step(v):                                    # v = (a, b) in the permuted order
        return coupling(v[None][:, coupling.perm.argsort()], context)[0][0]

    jacobian = torch.autograd.functional.jacobian(step, torch.cat([a, b], 1)[0])
    db_db, da_da_given = jacobian[half:, half:], None
    assert torch.allclose(db_db, torch.diag(s_b[0].exp()), atol=1e-12)

    def second(v):                                  # a' as a function of a with b' held: one half-step alone
        s, t = coupling.cond_a(b_new, context)
        return (v[None] * s.exp() + t)[0]

    da_da_given = torch.autograd.functional.jacobian(second, a[0])
    assert torch.allclose(da_da_given, torch.diag(s_a[0].exp()), atol=1e-12)
    assert jacobian[half:, :half].abs().max() > 1e-3            # and b' does depend on a


@pytest.mark.parametrize("case", CASES)
def test_flow_starts_at_the_identity(case):
    """Its permutations too, taken together: a VampPrior at zK has its components where the encoder has the latents, and a flow
    that shuffles these can only unlearn it in part."""
    flow = make(*case, perturb=0)
    z, context = inputs(flow)
    zK, log_det = flow(z, context)
    assert torch.equal(zK, z) and not log_det.any()
    assert torch.equal(flow.inverse(z, context)[0], z)


def test_every_layer_splits_the_latent_in_its_own_way():
    """Which values are transformed together: those of layer i."""
    for length, positions in ((2, 1), (5, 1), (4, 4)):
        flow = make(length, 4, dim=64, positions=positions)
        halves, values = [], torch.arange(64)
        for coupling in flow.couplings:
            values = values[coupling.perm]
            halves.append(frozenset(map(frozenset, values.view(2, 32).tolist())))
        assert len(set(halves)) == length


@pytest.mark.parametrize("positions, channels", [(1, 8), (4, 6), (8, 2)])
def test_whitening_decorrelates_the_channels_of_each_position(positions, channels):
    flow, z = whitened(positions, channels)
    with torch.no_grad():
        w = flow.whitened(z)
        assert (flow.unwhitened(w) - z).abs().max() < 1e-9
        by_position = w.unflatten(1, (positions, channels))
        covariance = torch.cov((by_position - by_position.mean(0)).flatten(0, 1).T, correction=0)
        variance = covariance.diagonal().mean()
        assert (covariance / variance - torch.eye(channels)).abs().max() < 2e-3      # the scales are rounded
        changed = z.clone()
        changed[:, :channels] += 1
        assert torch.equal(flow.whitened(changed)[:, channels:], w[:, channels:])
    assert flow.log_scale.sum() == 0 and flow.log_scale.std() > 0.01
    assert torch.equal(flow.tril, flow.tril.tril(-1)) and flow.tril.abs().max() > 0.01


@pytest.mark.parametrize("positions, channels", [(1, 8), (4, 6)])
def test_whitened_flow_is_invertible_with_the_jacobian_it_says(positions, channels):
    flow, z = whitened(positions, channels)
    plain = copy.deepcopy(flow)
    plain.whiten = False
    with torch.no_grad():
        zK, log_det = flow(z[:5])
        back, inverse_log_det = flow.inverse(zK)
        assert torch.allclose(zK, plain(flow.whitened(z[:5]))[0], rtol=0, atol=1e-12)
    assert ((back - z[:5]).abs() / (1 + z[:5].abs())).max() < 1e-9 and torch.allclose(log_det, -inverse_log_det, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], z[0])
    assert abs(log_det[0] - torch.linalg.slogdet(jacobian).logabsdet) < 1e-8 and abs(log_det[0]) > 0.01
    result = check_flow(flow)
    assert result["inverse_error"] < 1e-9 and result["log_det_error"] < 1e-8


def test_whitening_of_channels_that_do_not_vary_is_finite():
    flow = make(whiten=True, positions=2)
    flow.set_whitening_(torch.ones(10, 16).double())
    assert torch.isfinite(flow.whitened(torch.randn(3, 16).double())).all()
    z = torch.randn(100, 16).double()
    z[:, 3] = z[:, 2]                                                        # one that is another
    flow.set_whitening_(z)
    with torch.no_grad():
        assert (flow.inverse(flow(z)[0])[0] - z).abs().max() < 1e-9


def test_tokens_of_a_spatial_latent_are_positions():
    """Seen with values that name their position and channel, which the identity only moves; what goes in as a map comes out
    as one."""
    S, channels = 4, 6
    flow = BiCrossAttnFlow(S * channels, 5, S, 16, 2, 1, positions=S)
    z = 10.0 * torch.arange(S)[:, None] + torch.arange(channels)                # (S, channels)
    seen = {}
    for name, module in flow.named_modules():
        if name.endswith("embed"):
            module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0][0]}))
    zK = flow(z.flatten()[None])[0].unflatten(1, (S, channels))[0]
    assert len(seen) == 10
    for tokens in seen.values():
        assert tokens.shape == (S, channels // 2)
        assert torch.equal(tokens.div(10).floor(), torch.arange(S)[:, None].expand(S, channels // 2).float())
        assert torch.equal(tokens - tokens[:1], 10.0 * torch.arange(S)[:, None].expand(S, channels // 2))   # the same channels
    assert len({tuple(tokens[0].tolist()) for tokens in seen.values()}) > 4                          # other ones by layer
    assert torch.equal(zK, z)
    perturbed = perturb_(flow.double(), PERTURB, torch.Generator().manual_seed(1))
    back = perturbed.inverse(perturbed(z.double().flatten()[None])[0])[0]
    assert torch.allclose(back, z.double().flatten()[None], rtol=0, atol=1e-9)


@pytest.mark.parametrize("context_dim", [None, 5])
@pytest.mark.parametrize("seq_len,layers", [(2, 1), (4, 2)])
def test_every_flow_parameter_has_a_gradient_after_the_second_step(seq_len, layers, context_dim):
    torch.manual_seed(0)
    flow = BiCrossAttnFlow(16, 3, seq_len, 16, 2, layers, context_dim)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    z, context = inputs(flow, n=32)
    z, context = z.float(), None if context is None else context.float()
    for _ in range(2):
        zK, log_det = flow(z, context)
        loss = ((zK - 1) ** 2).sum(1).mean() - log_det.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    norms = {name: p.grad.norm().item() for name, p in flow.named_parameters()}
    assert min(norms.values()) > 1e-6, {n: v for n, v in norms.items() if v <= 1e-6}


def test_flow_scale_moves_after_steps():
    torch.manual_seed(0)
    flow = BiCrossAttnFlow(16, 3, 2, 16, 2, 1)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    z = inputs(flow, n=32)[0].float()
    for _ in range(5):
        zK, log_det = flow(z)
        optimizer.zero_grad()
        (zK.square().sum(1) * 2 - log_det).mean().backward()
        optimizer.step()
    assert all(s.abs().mean() > 1e-3 for s in flow.transform(z)[1])


def test_scale_is_bounded_and_float32_under_autocast():
    flow = make(perturb=3.0, scale_bound=1.5).float()
    z = inputs(flow)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        zK, log_det = flow(z)
        scales = flow.transform(z)[1]
    assert scales.abs().max() <= 1.5 and scales.abs().max() > 1.2
    assert zK.dtype == log_det.dtype == scales.dtype == torch.float32


def test_permutations_are_saved_and_come_from_their_own_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, other = (BiCrossAttnFlow(16, 3, 2, 16, 2, 1, perm_seed=s) for s in (0, 1))
    perms = [c.perm for c in first.couplings]
    assert not torch.equal(perms[0], perms[1]) and not torch.equal(perms[0], other.couplings[0].perm)
    assert all(p.dtype == torch.int64 and torch.equal(p.sort().values, torch.arange(16)) for p in perms)
    torch.manual_seed(99)
    again = BiCrossAttnFlow(16, 3, 2, 16, 2, 1, perm_seed=0)
    assert all(torch.equal(a.perm, b.perm) for a, b in zip(first.couplings, again.couplings))
    # Another flow's weights bring its permutations along, inverse included.
    other.load_state_dict(first.state_dict())
    z = torch.randn(4, 16)
    assert torch.equal(other(z)[0], first(z)[0]) and torch.allclose(other.inverse(other(z)[0])[0], z, atol=1e-5)
    assert not torch.equal(state, torch.get_rng_state())        # (weights do use the global generator)


def test_check_flow_accepts_a_right_flow_and_leaves_everything_alone():
    flow = make(context_dim=4).float()
    before, state = copy.deepcopy(flow.state_dict()), torch.get_rng_state()
    result = check_flow(flow)
    assert result["inverse_error"] < 1e-9 and result["log_det_error"] < 1e-9 and result["scale_std"] > 0.01
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


class Faulty(torch.nn.Module):
    """A coupling with one of the faults that are invisible at the identity."""

    def __init__(self, inner, fault):
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, z, context=None):
        if self.fault != "own_half":
            z, s = self.inner(z, context)
            return z, {"log_det": s[:, :s.shape[1] // 2], "both_log_dets": 1.01 * s}.get(self.fault, s)
        a, b = z[:, self.inner.perm].chunk(2, dim=1)
        s_b, t_b = self.inner.cond_b(a + b, context)                # the conditioner of b sees b
        b = b * s_b.exp() + t_b
        s_a, t_a = self.inner.cond_a(b, context)
        return torch.cat([a * s_a.exp() + t_a, b], 1), torch.cat([s_a, s_b], 1)

    def inverse(self, z, context=None):
        z, s = self.inner.inverse(z, context)
        return z * (1 + 1e-5) if self.fault == "epsilon" else z, 1.01 * s if self.fault == "both_log_dets" else s


@pytest.mark.parametrize("fault", ["own_half", "log_det", "both_log_dets", "epsilon"])
def test_check_flow_catches_a_broken_flow(fault):
    flow = make(length=3, perturb=0.0).float()
    for i in range(3) if fault == "log_det" else [1]:
        flow.couplings[i] = Faulty(flow.couplings[i], fault)
    result = check_flow(flow)
    found, of = ("inverse", 2) if fault in ("own_half", "epsilon") else ("log_det", 0)          # 0: every layer inverts
    assert result[f"{found}_error"] > 1e-6 and result["layer"] == of
    assert fault == "epsilon" or max(check_flow(flow, perturb=0.0)[k] for k in ("inverse_error", "log_det_error")) < 1e-9


@pytest.mark.parametrize("kwargs,name", [
    (dict(dim=18, seq_len=4), "latent_dim 18"), (dict(embed_dim=10, heads=4), "flow_embed_dim 10"),
    (dict(length=0), "length"), (dict(scale_bound=0.0), "scale_bound"), (dict(positions=3), "latent_dim 16 .* 2 \\* 3"),
])
def test_sizes_that_do_not_fit_are_refused_by_name(kwargs, name):
    with pytest.raises(ValueError, match=name):
        BiCrossAttnFlow(**{"dim": 16, "seq_len": 2, "embed_dim": 16, "heads": 2, **kwargs})


def test_check_flow_looks_at_the_weights_as_they_are_too(monkeypatch):
    def heal(probe, std, generator):
        probe.couplings[1].fault = None
        return perturb_(probe, std, generator)

    monkeypatch.setattr(vamp_flow, "perturb_", heal)
    flow = make().float()
    flow.couplings[1] = Faulty(flow.couplings[1], "epsilon")
    assert check_flow(flow)["inverse_error"] > 1e-6 and flow.couplings[1].fault == "epsilon"


def test_check_flow_of_weights_that_are_no_numbers_is_infinitely_wrong():
    flow = make().float()
    with torch.no_grad():
        flow.couplings[1].cond_a.head.bias[0] = math.nan
    assert check_flow(flow)["inverse_error"] == math.inf


def test_check_flow_checks_the_log_determinant_of_the_inverse_by_itself():
    class Inverse(Faulty):
        def inverse(self, z, context=None):
            z, s = self.inner.inverse(z, context)
            return z, 1.01 * s

    flow = make().float()
    flow.couplings[1] = Inverse(flow.couplings[1], None)
    result = check_flow(flow)
    assert result["log_det_error"] > 1e-6 and result["inverse_error"] < 1e-9
