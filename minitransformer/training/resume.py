"""A training run that survives: its whole state in one file, so that a killed run ends in the same bits.

What a run needs to go on as if nothing had happened: the trained weights, the optimizer's own tensors (for AdamW two
running means and a step count for each weight), the number of steps done, the state of the random generator that
dropout draws from, the best weights so far, and the history. The order of the data is a function of seed and epoch, and
the learning rate one of the step, so neither has to be kept.

The file is safetensors, written whole or not at all, with a checksum and the settings of the run: a run with other
settings, other data or another frozen base does not go on from it by accident.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor, nn

from minitransformer.files import fingerprint, write_whole

FORMAT = "minitransformer run 1"
KEY = "run"
Best = tuple[tuple[float, float], int, dict[str, Tensor]]  # rank, steps done, trained weights


@dataclass
class RunState:
    """Where a run stands after `step` optimizer steps."""

    step: int
    history: dict
    best: Best | None = None


@dataclass(frozen=True)
class RunFile:
    """The file of one run: `save` after some steps, `restore` at the start of the next try.

    Args:
        path: of the file.
        every: steps between two saves.
        settings: everything that decides the result, as JSON values; a file with other settings is refused.
    """

    path: Path
    every: int
    settings: dict

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save after `step` of `steps`: at the interval, and at the end."""
        return step % self.every == 0 or step == steps

    def save(self, state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the whole state.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        values, tensors = _optimizer_state(optimizer)
        tensors |= {f"model.{name}": tensor for name, tensor in _moving(model).items()}
        tensors |= _random_states()
        record = {"step": state.step, "history": state.history, "optimizer": values, "settings": self.settings}
        if state.best is not None:
            (accuracy, negative_loss), step, weights = state.best
            record["best"] = {"rank": [accuracy, negative_loss], "step": step}
            tensors |= {f"best.{name}": tensor for name, tensor in weights.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record |= {"format": FORMAT, "checksum": _checksum(tensors, record)}
        write_whole(self.path, serialize(tensors, metadata={KEY: json.dumps(record)}))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState | None:
        """Put model, optimizer and random generator where the run stood; None if there is no file yet.

        Raises:
            ValueError: not the file of a run, damaged, or of a run with other settings. Nothing has changed then.
        """
        if not self.path.exists():
            return None
        tensors, record = self._read()
        best = record.get("best")
        saved = {name: tensors[f"model.{name}"] for name in _moving(model)}
        optimizer.load_state_dict(_loadable(optimizer, record["optimizer"], tensors))
        _set_random_states(tensors)
        with torch.no_grad():
            for name, tensor in _moving(model).items():
                tensor.copy_(saved[name])
        if best is not None:
            weights = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
            best = (tuple(best["rank"]), best["step"], weights)
        return RunState(record["step"], record["history"], best)

    def _read(self) -> tuple[dict[str, Tensor], dict]:
        try:
            data = self.path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
            tensors = parse(data)
            checksum = record.pop("checksum")
            form = record.pop("format")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
            message = f"{self.path} is not the file of a run, or it is damaged; delete it to start anew"
            raise ValueError(message) from error
        if form != FORMAT or checksum != _checksum(tensors, record):
            raise ValueError(f"{self.path} is damaged, or of another version; delete it to start anew")
        wanted, found = json.loads(json.dumps(self.settings)), record["settings"]
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if other:
            raise ValueError(
                f"{self.path} belongs to a run with another {', '.join(other)}; give the settings it had, or another "
                f"checkpoint file"
            )
        return tensors, record


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained weights, and buffers."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


def _random_states() -> dict[str, Tensor]:
    """Where the generators stand that dropout draws from: the CPU's, and one for each CUDA device."""
    devices = {f"random.cuda.{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"random.cpu": torch.get_rng_state()} | devices


def _set_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    for device in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(tensors[f"random.cuda.{device}"], device)


def _checksum(tensors: dict[str, Tensor], record: dict) -> str:
    return hashlib.sha256(f"{fingerprint(tensors)} {json.dumps(record, sort_keys=True)}".encode()).hexdigest()


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict, dict[str, Tensor]]:
    """The optimizer's state in two parts: plain values by parameter and name, and tensors by joined names."""
    values, tensors = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        values[str(index)] = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
        tensors |= {f"optimizer.{index}.{name}": t for name, t in entries.items() if isinstance(t, Tensor)}
    return values, tensors


def _loadable(optimizer: torch.optim.Optimizer, values: dict, tensors: dict[str, Tensor]) -> dict:
    """What `load_state_dict` of the optimizer takes; its groups stay, since the schedule sets their rates."""
    state = {int(index): dict(entries) for index, entries in values.items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            state[int(index)][entry] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
