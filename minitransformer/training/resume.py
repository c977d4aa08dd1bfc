"""A training run that survives: its whole state in one file, so that a killed run ends in the same bits.

What a run needs to go on as if nothing had happened: the trained weights, the optimizer's own tensors (for AdamW two
running means and a step count for each weight), the number of steps done, the state of the random generator that
dropout draws from, the best weights so far, and the history. The order of the data is a function of seed and epoch, and
the learning rate one of the step, so neither has to be kept.

The file is safetensors, written whole or not at all, with a checksum and the settings of the run: a run with other
settings, other data or another frozen base does not go on from it by accident.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint, pack, unpack, write_whole
from minitransformer.tasks.dataset import Dataset
from minitransformer.training.distributed import is_writer
from minitransformer.training.progress import Best, History, RunState

FORMAT = "minitransformer run 2"
KEY = "run"  # of the record in the file's header


@dataclass(frozen=True)
class RunFile:
    """The file of one run: `save` after some steps, `restore` at the start of the next try.

    Args:
        path: of the file.
        settings: everything that decides the result, as JSON values; a file with other settings is refused.
    """

    path: Path
    settings: dict

    def save(self, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the whole state; of several processes only one does.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        if not is_writer():
            return
        values, tensors = _optimizer_state(optimizer)
        tensors |= {f"model.{name}": tensor for name, tensor in _moving(model).items()}
        tensors |= _random_states()
        record = {"format": FORMAT, "settings": self.settings, "history": asdict(run.history), "optimizer": values}
        if run.best is not None:
            record["best"] = {"merit": run.best.merit, "step": run.best.step}
            tensors |= {f"best.{name}": tensor for name, tensor in run.best.weights.items()}
        write_whole(self.path, pack(tensors, record, KEY))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState | None:
        """Put model, optimizer and random generator where the run stood; None if there is no file yet.

        Raises:
            ValueError: not the file of a run, damaged, or of a run with other settings. Nothing has changed then.
        """
        if not self.path.exists():
            return None
        tensors, record = self._read()
        saved = {name: tensors[f"model.{name}"] for name in _moving(model)}
        optimizer.load_state_dict(_loadable(optimizer, record["optimizer"], tensors))
        _set_random_states(tensors)
        with torch.no_grad():
            for name, tensor in _moving(model).items():
                tensor.copy_(saved[name])
        run = RunState(History(**record["history"]))
        if "best" in record:
            weights = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
            run.best = Best(tuple(record["best"]["merit"]), record["best"]["step"], weights)
        return run

    def _read(self) -> tuple[dict[str, Tensor], dict]:
        try:
            tensors, record, sound = unpack(self.path.read_bytes(), KEY)
        except ValueError as error:
            message = f"{self.path} is not the file of a run, or it is damaged; delete it to start anew"
            raise ValueError(message) from error
        if record.get("format") != FORMAT or not sound:
            raise ValueError(f"{self.path} is damaged, or of another version; delete it to start anew")
        wanted, found = json.loads(json.dumps(self.settings)), record["settings"]
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if other:
            raise ValueError(
                f"{self.path} belongs to a run with another {', '.join(other)}; give the settings it had, or another "
                f"checkpoint file"
            )
        return tensors, record


def settings_of(model: nn.Module, train, validation, optimizer: torch.optim.Optimizer, objective, **options) -> dict:
    """What decides the result of a run, as JSON values: its options, and marks by which the rest is known again.

    Tensors are known by their bytes; functions only by their names.
    """
    named = {name: p for name, p in model.named_parameters()}
    hyperparameters = {key for group in optimizer.param_groups for key in group} - {"params"}
    return {
        **{name: _name(value) if callable(value) else value for name, value in options.items()},
        "objective": _name(objective),
        "frozen base": fingerprint({name: p for name, p in named.items() if not p.requires_grad}),
        "list of trained tensors": {name: list(p.shape) for name, p in named.items() if p.requires_grad},
        "training data": _mark(train),
        "validation data": _mark(validation),
        "optimizer": type(optimizer).__name__,
        **{key: [repr(group.get(key)) for group in optimizer.param_groups] for key in sorted(hyperparameters)},
    }


def _mark(data) -> str:
    if not isinstance(data, Dataset):
        return _name(data)
    return fingerprint({"tokens": data.tokens, "real": data.padding_mask, "targets": data.targets})


def _name(function) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


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
