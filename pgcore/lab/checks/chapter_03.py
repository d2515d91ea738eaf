"""Checks of chapter 03, sigmoid loss. Oracles: torch's binary cross-entropy."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pgcore.lab.checks import exercise, require, require_close


def random_logits(n: int, seed: int) -> Tensor:
    """Logits as in training: about -10, matches higher."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n, generator=generator) - 8
    return logits + 8 * torch.eye(n)


def loss_by_torch(logits: Tensor) -> Tensor:
    """The oracle: torch's binary cross-entropy, summed, a picture."""
    labels = torch.eye(len(logits))
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return total / len(logits)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that autograd saves for the backward pass, each storage once."""

    def __init__(self):
        self.storages: dict[int, int] = {}
        self.kept: list[Tensor] = []  # alive, so that no address is used twice
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        self.kept.append(tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())


class LargestProduct(TorchDispatchMode):
    """Remember how many entries the largest product of two matrices has."""

    pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            self.pairs = max(self.pairs, result.numel())
        return result


def require_loss(loss, names: str) -> None:
    """Compare a loss of logits with the oracle, on batches of several sizes."""
    for n in (1, 2, 7, 40):
        logits = random_logits(n, seed=n)
        require_close(loss(logits), loss_by_torch(logits), f"{names} (B = {n})")


@exercise("03.1")
def formula_is_bce(loss):
    """equals torch's binary cross-entropy, summed and divided by B"""
    require_loss(loss, "Sum over all pairs, then divide by the number of pictures.")


@exercise("03.1")
def formula_is_safe(loss):
    """stays finite for a sure mistake"""
    logits = torch.full((3, 3), -120.0)
    require_close(loss(logits), torch.tensor(120.0), "Log and sigmoid in one step.")


@exercise("03.1")
def formula_ignores_order(loss):
    """does not change when the pairs are reordered"""
    logits = random_logits(9, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    shuffled = logits[order][:, order]
    require_close(loss(shuffled), loss(logits))


@exercise("03.2")
def entropy_is_torchs(entropy):
    """equals torch's, entry by entry, for labels between 0 and 1"""
    generator = torch.Generator().manual_seed(3)
    logits = random_logits(12, seed=3)
    for labels in (torch.eye(12), torch.rand(12, 12, generator=generator)):
        oracle = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        require_close(entropy(logits, labels), oracle)


@exercise("03.2")
def entropy_is_safe(entropy):
    """is exact up to logits of 10000"""
    logits = torch.tensor([[1e4, -1e4], [120.0, -120.0]])
    half = torch.full((2, 2), 0.5)
    require_close(entropy(logits, torch.eye(2)), torch.tensor([[0.0, 0.0], [120, 120]]))
    require_close(entropy(logits, half), logits.abs() / 2)


@exercise("03.2")
def entropy_has_slope(entropy):
    """has the slope: answer minus label"""
    logits = random_logits(6, seed=4).requires_grad_()
    labels = torch.rand(6, 6, generator=torch.Generator().manual_seed(5))
    (slope,) = torch.autograd.grad(entropy(logits, labels).sum(), logits)
    require_close(slope, (logits.sigmoid() - labels).detach())


@exercise("03.3")
def without_labels_is_bce(loss):
    """equals torch's binary cross-entropy, summed and divided by B"""
    require_loss(loss, "Charge every pair as a mismatch, then correct the matches.")


@exercise("03.3")
def without_labels_is_safe(loss):
    """stays finite for a sure mistake"""
    for logit, cost in ((-120.0, 120.0), (120.0, 240.0)):
        require_close(loss(torch.full((3, 3), logit)), torch.tensor(cost))


@exercise("03.3")
def without_labels_saves_one_matrix(loss):
    """saves one matrix for the backward pass, not two"""
    logits = random_logits(128, seed=6).requires_grad_()
    matrix = logits.untyped_storage().nbytes()
    with SavedBytes() as saved:
        loss(logits * 1.0)
    require(
        saved.total < 1.2 * matrix,
        f"autograd saved {saved.total / matrix:.2f} matrices; every new matrix counts: "
        "signs, labels, masks, a negated copy",
    )


@exercise("03.4")
def bias_of_zero_logits(best_bias):
    """is -log(B - 1) if all logits are zero"""
    for n in (2, 64, 512):
        found = torch.tensor(float(best_bias(torch.zeros(n, n))))
        require_close(found, torch.tensor(-math.log(n - 1)), rtol=0, atol=2e-4)


@exercise("03.4")
def bias_has_no_slope(best_bias):
    """leaves no slope, on random batches"""
    for seed, scale in ((7, 1.0), (8, 3.0), (9, 10.0)):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(50, 50, generator=generator)
        bias = torch.tensor(float(best_bias(logits)), requires_grad=True)
        (slope,) = torch.autograd.grad(loss_by_torch(logits + bias), bias)
        require(
            abs(slope) < 1e-3,
            f"with logits of spread {scale:g} your bias {bias.item():.4f} leaves the "
            f"slope {slope.item():+.4f}",
        )


def strangers(n: int, m: int, seed: int) -> list[Tensor]:
    """Pictures and captions that do not belong together, a scale and a bias."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(n, 16, generator=generator),
        torch.randn(m, 16, generator=generator),
        torch.tensor(math.log(10.0)),
        torch.tensor(-3.0),
    ]
    return [tensor.requires_grad_() for tensor in inputs]


def cost_by_torch(images, texts, log_scale, bias):
    """The oracle for a block without matches."""
    unit_images, unit_texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    logits = log_scale.exp() * unit_images @ unit_texts.T + bias
    none_match = torch.zeros_like(logits)
    return F.binary_cross_entropy_with_logits(logits, none_match, reduction="sum")


@exercise("03.5")
def strangers_cost(cost):
    """equals the whole matrix: value and four gradients, any chunk size"""
    for n, m, chunk_size in ((5, 5, 5), (7, 3, 2), (4, 9, 4), (6, 8, 100)):
        inputs = strangers(n, m, seed=n)
        ours, oracle = cost(*inputs, chunk_size), cost_by_torch(*inputs)
        where = f"({n} pictures, {m} captions, chunk_size {chunk_size})"
        require_close(ours, oracle, where)
        names = ("images", "texts", "log_scale", "bias")
        slopes = (torch.autograd.grad(value, inputs) for value in (ours, oracle))
        for name, slope, expected in zip(names, *slopes, strict=True):
            require_close(slope, expected, f"Gradient of {name} {where}", atol=1e-5)


@exercise("03.5")
def strangers_are_forgotten(cost):
    """keeps no block: what is saved does not grow with the matrix"""
    saved = []
    for n in (128, 256):
        inputs = strangers(n, n, seed=1)
        with SavedBytes() as counter:
            cost(*inputs, 32)
        saved.append(counter.total)
    matrix = 256 * 256 * 4
    require(
        saved[1] < matrix / 2 and saved[1] < 2.2 * saved[0] + 1024,
        f"for 128 and 256 pairs autograd saved {saved[0]} and {saved[1]} bytes; the "
        f"matrix of 256 has {matrix}. Wrap each block in checkpoint",
    )


@exercise("03.5")
def strangers_come_in_blocks(cost):
    """multiplies at most chunk_size by chunk_size pairs at a time"""
    with torch.no_grad(), LargestProduct() as largest:
        cost(*strangers(96, 80, seed=2), 32)
    require(
        largest.pairs <= 32 * 32,
        f"a product of {largest.pairs} pairs; a block of 32 by 32 has 1024",
    )
