"""A training run on disk: its state, its figures, and what it says while it goes on.

Written by hand, below chapter 16: it knows of no model and of no loss.
"""

import csv
import io
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pgcore.files import make_folder, one_line, written_whole

STATE = "state.pt"
METRICS = "metrics.csv"


class RunFolder:
    """The folder of a run. Its state and its metrics are whole at any moment.

    state.pt: all that the run needs to go on. metrics.csv: a line a look. Where
    TensorBoard is installed, its events as well.

    Raises:
        ValueError: if a file is in its place.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        make_folder(self.folder)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state in the place of the one before."""
        with written_whole(self.folder / STATE) as path:
            torch.save(dict(state), path)

    def load(self) -> dict[str, Any] | None:
        """The state, in the memory of the CPU, or None if there is none yet.

        Raises:
            ValueError: if the file is not what ``save`` wrote.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict):
                raise ValueError(type(found).__name__)
            return found
        except (OSError, MemoryError):  # nothing that another state would mend
            raise
        except Exception as error:  # of zip files, pickles and tensors
            raise ValueError(
                f"{path}: expected the state of a run, found: {one_line(error)};"
                " if it is broken, delete it to start again"
            ) from None

    def write_metrics(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        """Write all figures so far; the last row goes to TensorBoard, too."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with written_whole(self.folder / METRICS) as path:
            path.write_text(table.getvalue(), encoding="utf8")
        if rows and (board := self._board()) is not None:
            step = int(rows[-1]["step"])
            for name, value in rows[-1].items():
                if name != "step" and math.isfinite(value):
                    board.add_scalar(name, value, step)
            board.close()

    def _board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / "tensorboard"))


def require_same_run(state: Mapping[str, Any], name: str) -> None:
    """Refuse a state whose ``name`` is another run's.

    Raises:
        ValueError: if it is.
    """
    if (found := state.get("name")) != name:
        raise ValueError(
            "state: written by another recipe; use another folder, or the options it"
            f" was started with: {found}"
        )


class Ahead:
    """``batch_at``, made by another process while the model learns from the last one.

    batch_at: the n-th batch, from n alone; a function of a module, or a ``partial`` of
    one, so that the other process finds it. steps: batches of the run. Asked for
    batches out of order, it begins anew from there.
    """

    def __init__(self, batch_at: Callable[[int], Any], steps: int):
        self.batches, self.steps = _Batches(batch_at), steps
        self.next, self.drawn = -1, iter(())

    def __call__(self, step: int) -> Any:
        """The batch of a step.

        Raises:
            ValueError: for a step that the run does not have, and what ``batch_at``
                raises as one.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step}: expected 0 to {self.steps - 1}")
        if step != self.next:
            coming = range(step, self.steps)
            loader = DataLoader(
                self.batches,
                None,
                sampler=coming,
                num_workers=1,
                generator=torch.Generator(),  # torch's own belongs to the loss
            )
            self.drawn = iter(loader)
        self.next = step + 1
        batch = next(self.drawn)
        if isinstance(batch, ValueError):
            raise batch
        return batch


class _Batches(Dataset):
    def __init__(self, batch_at: Callable[[int], Any]):
        self.batch_at = batch_at

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batch_at(step)
        except ValueError as error:
            return error  # raised here, it would come with two tracebacks


class Progress:
    """Says where a run stands, on standard error.

    steps: of the run. start: where this sitting begins; time left is reckoned from
    what it has done so far.
    """

    def __init__(self, steps: int, start: int):
        self.steps, self.start, self.begun = steps, start, time.monotonic()

    def say(self, step: int, figures: Mapping[str, float | int]) -> None:
        """One line: the step, its figures, the time left."""
        spent = time.monotonic() - self.begun
        left = spent / max(1, step - self.start) * (self.steps - step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(
            f"step {step} of {self.steps}  {shown}  {_duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def fit(
    trainer: Any,
    folder: RunFolder,
    *,
    every: int,
    evaluate: Callable[[], Mapping[str, float | int]] = dict,
    samples: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Train to the last step, from where a run in this folder stopped.

    trainer: has model, config.steps, step, rows, and the methods train_step, state and
    restore, as ``pgcore.training.Trainer``. every: updates between looks. At
    each, ``evaluate`` gives figures, ``samples`` lines that are printed, and all is
    written down, the state last: a run that is stopped in between does the last
    updates again.

    Raises:
        ValueError: for ``every`` below 1, for a state of another run, and as
            ``train_step``.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, found {every}")
    if (state := folder.load()) is not None:
        trainer.restore(state)
    steps, recent = trainer.config.steps, []
    progress = Progress(steps, trainer.step)
    while trainer.step < steps:
        trainer.model.train()
        recent.append(trainer.train_step())
        if trainer.step % every and trainer.step != steps:
            continue
        means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
        recent = []
        trainer.model.eval()
        figures = {**means, **evaluate()}
        trainer.rows.append({"step": trainer.step, **figures})
        progress.say(trainer.step, figures)
        for line in samples():
            print(f"  {line}", flush=True)
        folder.write_metrics(trainer.rows)
        folder.save(trainer.state())
