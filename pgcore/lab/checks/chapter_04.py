"""Checks of chapter 04, normalization. Oracles: torch's own layers and autograd."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgcore.lab.checks import exercise, require, require_close
from pgcore.normalization import BatchNorm1d, LayerNorm, RMSNorm


def _draw(*shape: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator) + offset


def _random_linear(inputs: int, outputs: int, bias: bool, seed: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        linear.weight.copy_(_draw(outputs, inputs, seed=seed))
        if bias:
            linear.bias.copy_(_draw(outputs, seed=seed + 1, offset=1.0))
    return linear


def _require_untouched(layer: nn.Module, before: dict[str, Tensor], name: str) -> None:
    """Fail if an answer has changed a layer that it was given."""
    same = all(torch.equal(before[key], now) for key, now in layer.state_dict().items())
    require(same, f"your function has changed {name}; build a new layer")


def _random_stack(depth: int, width: int, seed: int):
    """Norms with random weights, and as many small nonlinear functions."""
    norms = [LayerNorm(width) for _ in range(depth)]
    for number, norm in enumerate(norms):
        with torch.no_grad():
            norm.weight.copy_(_draw(width, seed=seed + number, offset=1.0))
            norm.bias.copy_(_draw(width, seed=seed + 50 + number))
    matrices = [_draw(width, width, seed=seed + 90 + k) / 3 for k in range(depth)]
    return norms, [lambda x, m=m: torch.tanh(x @ m) for m in matrices]


@exercise("04.1")
def stack_is_torchs(stack):
    """equals torch's own pre-norm encoder layer, taken apart"""
    width = 16
    oracle = nn.TransformerEncoderLayer(
        width, 2, dim_feedforward=24, dropout=0.0, batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for number, parameter in enumerate(oracle.parameters()):
            parameter.copy_(_draw(*parameter.shape, seed=number, scale=0.4))
    x = _draw(3, 5, width, seed=40, scale=2.0, offset=0.5)
    oracle.requires_grad_(False)

    def attend(tokens: Tensor) -> Tensor:
        return oracle.self_attn(tokens, tokens, tokens, need_weights=False)[0]

    def mlp(tokens: Tensor) -> Tensor:
        return oracle.linear2(F.relu(oracle.linear1(tokens)))

    ours = stack(x.clone(), [oracle.norm1, oracle.norm2], [attend, mlp])
    require_close(ours, oracle(x), "x + function(norm(x)), twice.", atol=1e-4)


@exercise("04.1")
def stack_is_the_identity(stack):
    """returns x to the last bit if every function returns zeros"""
    for depth in (0, 1, 7):
        norms, _ = _random_stack(depth, 8, seed=depth)
        x = _draw(4, 8, seed=1, scale=3.0, offset=2.0)
        kept = x.clone()
        y = stack(x, norms, [torch.zeros_like] * depth)
        require(
            torch.equal(y, kept),
            f"{depth} blocks that find nothing changed x by up to "
            f"{(y - kept).abs().max().item():.2g}",
        )


@exercise("04.1")
def stack_leaves_x_alone(stack):
    """reads through the norms, and does not write into x"""
    norms, functions = _random_stack(3, 8, seed=3)
    x = _draw(4, 8, seed=2)
    kept = x.clone()
    y = stack(x, norms, functions)
    require(torch.equal(x, kept), "your function has changed the x that it was given")
    again = stack(100 * x, norms, functions) - 100 * x
    first = stack(x, norms[:1], functions[:1]) - x
    far = stack(100 * x, norms[:1], functions[:1]) - 100 * x
    require_close(
        far, first, "What is added must not depend on the scale of x.", atol=1e-3
    )
    require(
        (again - (y - x)).abs().max() > 1e-2, "a later block must see the whole stream"
    )


@exercise("04.2")
def norm_is_gemmas(norm):
    """equals the package's layer, in float32 and in bfloat16, to the last bit"""
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (1e-3, 1.0, 300.0):
            x = _draw(6, 4, 96, seed=5, scale=scale).to(dtype)
            oracle = RMSNorm(96, eps=1e-6).to(dtype)
            with torch.no_grad():
                oracle.weight.copy_(_draw(96, seed=6, scale=0.3))
            ours = norm(x, oracle.weight.detach(), 1e-6)
            require(
                isinstance(ours, Tensor) and ours.dtype == dtype,
                f"expected a tensor of {dtype}, got {getattr(ours, 'dtype', ours)}",
            )
            right = oracle(x).detach()
            differ = (ours != right).float().mean().item()
            require(
                ours.shape == right.shape and differ == 0,
                f"in {dtype}, size {scale:g}, {differ:.0%} of the elements differ. "
                "Float32 throughout, `rsqrt` and not a division, first x * rsqrt, "
                "then * (1 + w), one rounding at the end.",
            )


@exercise("04.2")
def norm_has_length(norm):
    """puts every vector on a sphere, when the stored weight is zero"""
    x = _draw(50, 64, seed=7, scale=5.0, offset=3.0)
    y = norm(x, torch.zeros(64), 1e-6)
    require_close(y.norm(dim=-1), torch.full((50,), 8.0), "Its radius is √D.", 1e-4)


@exercise("04.2")
def norm_uses_eps(norm):
    """uses the epsilon that it is given, inside the root"""
    x = _draw(9, 32, seed=8, scale=0.01)
    weight = _draw(32, seed=9, scale=0.2)
    for eps in (1e-2, 1e-5):
        oracle = F.rms_norm(x, (32,), 1 + weight, eps)
        require_close(norm(x, weight, eps), oracle, f"eps = {eps:g}")


@exercise("04.3")
def folded_is_both(fold):
    """one layer gives what the two give, in evaluation"""
    for bias in (True, False):
        for seed in (10, 20, 30):
            linear = _random_linear(7, 5, bias, seed)
            norm = BatchNorm1d(5, eps=0.1)
            with torch.no_grad():
                norm.weight.copy_(_draw(5, seed=seed + 2))
                norm.bias.copy_(_draw(5, seed=seed + 3))
                norm.running_mean.copy_(_draw(5, seed=seed + 4, offset=2.0))
                norm.running_var.copy_(_draw(5, seed=seed + 5).abs() + 0.05)
            linear_before = copy.deepcopy(linear.state_dict())
            norm_before = copy.deepcopy(norm.state_dict())
            folded = fold(linear, norm)
            require(
                isinstance(folded, nn.Linear),
                f"expected a linear layer, got {type(folded).__name__}",
            )
            _require_untouched(linear, linear_before, "the linear layer")
            _require_untouched(norm, norm_before, "the norm")
            x = _draw(40, 7, seed=seed + 6)
            reference = nn.BatchNorm1d(5, eps=0.1).eval()
            reference.load_state_dict(norm_before, strict=False)
            words = "with" if bias else "without"
            require_close(
                folded(x), reference(linear(x)), f"({words} a bias)", 1e-4, 1e-5
            )


@exercise("04.4")
def backward_is_autograds(backward):
    """equals autograd, in float64, for any epsilon"""
    for shape, eps in (((5, 8), 1e-6), ((2, 3, 16), 0.5), ((4, 2), 1e-2)):
        x = _draw(*shape, seed=11, scale=2.0, offset=1.0).double().requires_grad_()
        push = _draw(*shape, seed=12).double()
        y = F.layer_norm(x, shape[-1:], eps=eps)
        (oracle,) = torch.autograd.grad(y, x, push)
        with torch.no_grad():
            ours = backward(x.detach(), push, eps)
        require_close(ours, oracle, f"shape {shape}, eps {eps:g}", 1e-9, 1e-10)


@exercise("04.4")
def backward_is_orthogonal(backward):
    """has no part along the ones, nor along x, and shrinks as x grows"""
    x = _draw(30, 12, seed=13, offset=4.0).double()
    push = _draw(30, 12, seed=14).double()
    slope = backward(x, push, 1e-12)
    centred = x - x.mean(-1, keepdim=True)
    zeros = torch.zeros(30, dtype=torch.float64)
    require_close(slope.sum(-1), zeros, "Its sum must vanish.", atol=1e-8)
    require_close((slope * centred).sum(-1), zeros, "Not along x.", atol=1e-8)
    require_close(10 * backward(10 * x, push, 1e-12), slope, "Ten times x.", atol=1e-8)


@exercise("04.5")
def centred_is_layer_norm(centred):
    """RMSNorm after your layer equals LayerNorm after the old one"""
    for bias in (True, False):
        for seed in (15, 25):
            linear = _random_linear(6, 16, bias, seed)
            before = copy.deepcopy(linear.state_dict())
            result = centred(linear)
            require(
                isinstance(result, nn.Linear),
                f"expected a linear layer, got {type(result).__name__}",
            )
            _require_untouched(linear, before, "the linear layer")
            x = _draw(50, 6, seed=seed + 2, offset=1.0)
            oracle = F.layer_norm(linear(x), (16,), eps=1e-6)
            ours = F.rms_norm(result(x), (16,), eps=1e-6)
            require_close(ours, oracle, f"(bias: {bias})", 1e-4, 1e-4)


@exercise("04.5")
def centred_keeps_sizes(centred):
    """has the sizes of the old layer, and outputs of mean zero"""
    linear = _random_linear(9, 4, True, seed=16)
    result = centred(linear)
    require(
        result.weight.shape == linear.weight.shape,
        f"expected weights {tuple(linear.weight.shape)}, "
        f"got {tuple(result.weight.shape)}",
    )
    x = _draw(20, 9, seed=17, scale=3.0)
    require_close(result(x).mean(-1), torch.zeros(20), atol=1e-5)
    twice = centred(result)
    require_close(twice(x), result(x), "Once is enough.", atol=1e-5)
