"""A training run of two towers that survives being stopped."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgcore.attention import Attention
from pgcore.runs import require_same_run
from pgcore.siglip import SigLIP
from pgcore.sigmoid import siglip_loss

Batch = tuple[Float[Tensor, "B C R R"], Int[Tensor, "B T"]]


class Run:
    """A model, its optimizer, the steps done and what was logged.

    model: trained in place, where it is.
    batch_at: what step n sees, from n alone: pictures in [-1, 1] and ids of captions.
    learning_rate_at: the learning rate of step n.
    weight_decay: of matrices; norms, biases and the loss's scalars have none.
    name: of the recipe; a saved state belongs to one.
    """

    def __init__(
        self,
        model: SigLIP,
        *,
        batch_at: Callable[[int], Batch],
        learning_rate_at: Callable[[int], float],
        weight_decay: float,
        name: str,
    ):
        self.model, self.name, self.step = model, name, 0
        self.batch_at, self.learning_rate_at = batch_at, learning_rate_at
        self.device = model.bias.device
        if self.device.type == "cpu":
            # In bfloat16 the backward pass of the fused kernel is slow on a CPU.
            for module in model.modules():
                if isinstance(module, Attention):
                    module.attend = _attend_by_matmul
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.log: dict[str, list] = {"steps": [], "film": [], "seconds": [0, 0]}

    def train_one_step(self) -> float:
        """Take one step and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.step)
        pictures, ids = (part.to(self.device) for part in self.batch_at(self.step))
        with torch.autocast(self.device.type, torch.bfloat16):
            images = self.model.encode_images(pictures)
            texts = self.model.encode_texts(ids)
        scalars = self.model.log_scale, self.model.bias
        loss = siglip_loss(images.float(), texts.float(), *scalars)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that it needs to go on; write it down before the next step."""
        return {
            "name": self.name,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave.

        Raises:
            ValueError: if it belongs to another recipe.
        """
        require_same_run(state, self.name)
        self.step, self.log = state["step"], state["log"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Clock:
    """Seconds of a run, over all its sittings: on the wall, and of all processors."""

    def __init__(self, wall: int, processors: int):
        self._wall = time.monotonic() - wall
        self._processors = time.process_time() - processors

    def seconds(self) -> list[int]:
        """[wall, processors], rounded."""
        now = time.monotonic() - self._wall, time.process_time() - self._processors
        return [round(value) for value in now]


def _attend_by_matmul(
    q: Tensor, k: Tensor, v: Tensor, mask: None, scale: None
) -> Tensor:
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v
