"""A training that can be stopped and goes on from its last state: AdamW under a cosine, an average of the weights."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa3_convert.system.files import atomic_path

Report = Callable[[str, int, int, float, float], None]
"""Called with what is trained, the steps done, those in all, the mean loss of late, and the seconds that are left."""
Loss = Callable[[torch.Generator], Tensor]
"""What it may draw from → the loss of half a batch."""

_WARM_UP: Final = 100
_LEAST: Final = 0.02
"""What is left of the rate at the end."""
_KEPT_EVERY: Final = 60.0
_REPORTED_EVERY: Final = 50
_LONGEST_GRADIENT: Final = 1.0


class Training:
    """The weights of some networks, what the optimiser knows of them, and their running average.

    The same seed gives the same batches, stopped in between or not.
    """

    def __init__(
        self, folder: Path, name: str, weights: Mapping[str, Tensor], *, steps: int, rate: float, seed: int
    ) -> None:
        self.name, self.steps, self._rate, self._seed = name, steps, rate, seed
        self._file, self._log = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
        self._weights = dict(weights)
        decayed = [weight for weight in self._weights.values() if weight.ndim > 1]
        plain = [weight for weight in self._weights.values() if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        self._average = {key: weight.detach().clone() for key, weight in self._weights.items()}
        self.keep_every = _KEPT_EVERY
        """Seconds between two states on disk."""
        self._threads = ThreadPoolExecutor(2)
        self.step, self._spent = 0, 0.0
        if self._file.exists():
            self._load()

    def run(self, loss: Loss, report: Report) -> dict[str, Tensor]:
        """Train to the end, and return the average of the weights."""
        kept, begun, recent = time.monotonic(), time.monotonic() - self._spent, 0.0
        first = self.step
        while self.step < self.steps:
            value = self._update(loss)
            recent += (value - recent) / min(self.step - first + 1, _REPORTED_EVERY)
            self.step += 1
            now = time.monotonic()
            self._spent = now - begun
            if self.step % _REPORTED_EVERY == 0 or self.step == self.steps:
                left = self._spent / self.step * (self.steps - self.step)
                report(self.name, self.step, self.steps, recent, left)
                self._note(recent)
            if now - kept > self.keep_every or self.step == self.steps:
                self._keep()
                kept = now
        return self._average

    def _update(self, loss: Loss) -> float:
        """Make a step from a batch in halves, one in each of two threads: their sum has no order."""
        progress = self.step / self.steps
        share = _LEAST + (1 - _LEAST) * (1 + math.cos(math.pi * progress)) / 2
        rate = self._rate * min(1.0, (self.step + 1) / _WARM_UP) * share
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)

        def half(which: int) -> float:
            generator = torch.Generator().manual_seed((self._seed << 40) + 2 * self.step + which)
            value = loss(generator) / 2
            value.backward()  # type: ignore[no-untyped-call]
            return value.item()

        value = sum(self._threads.map(half, range(2)))
        torch.nn.utils.clip_grad_norm_(self._weights.values(), _LONGEST_GRADIENT)
        self._optimizer.step()
        newest = max(1 / (self.step + 1), 1 / max(self.steps * 0.05, 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.values()), [w.detach() for w in self._weights.values()], newest)
        return value

    def _note(self, loss: float) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            now = {"step": self.step, "loss": round(loss, 5), "seconds": round(self._spent, 1)}
            stream.write(json.dumps(now) + "\n")

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        names = {id(weight): key for key, weight in self._weights.items()}
        for weight, state in self._optimizer.state.items():
            for key, value in state.items():
                yield f"{key}/{names[id(weight)]}", value

    def _keep(self) -> None:
        tensors = {f"weight/{key}": weight.detach() for key, weight in self._weights.items()}
        tensors |= {f"average/{key}": weight for key, weight in self._average.items()}
        tensors |= dict(self._moments())
        metadata = {"step": str(self.step), "spent": str(self._spent)}
        with atomic_path(self._file) as partial:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)

    def _load(self) -> None:
        with safe_open(self._file, "pt") as kept, torch.no_grad():
            metadata = kept.metadata()
            self.step, self._spent = int(metadata["step"]), float(metadata["spent"])
            for key, weight in self._weights.items():
                weight.copy_(kept.get_tensor(f"weight/{key}"))
                self._average[key].copy_(kept.get_tensor(f"average/{key}"))
                self._optimizer.state[weight] = {
                    part: kept.get_tensor(f"{part}/{key}") for part in ("step", "exp_avg", "exp_avg_sq")
                }
