"""A training run that survives: its whole state in one file, so that a killed run ends in the same bits.

What a run needs to go on as if nothing had happened: the trained weights, the optimizer's own tensors (for AdamW two
running means and a step count for each weight), the best weights so far, and the history. The rows, the learning rate
and dropout of a step are functions of the seed and the step, so none of them has to be kept.

The file is safetensors, written whole or not at all, with a checksum and all that the run is (`identity.py`): another
run does not go on from it by accident.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint, pack, unpack, write_whole
from minitransformer.training.distributed import is_writer, n_processes
from minitransformer.training.identity import mark, modules_of
from minitransformer.training.progress import History, RunState

FORMAT = "minitransformer run 3"
KEY = "run"  # of the record in the file's header
START = "start of the trained tensors"


@dataclass(frozen=True)
class RunFile:
    """The file of one run: `restore` at the start of each try, `save` after some steps. Without a path both do nothing.

    Args:
        path: of the file.
        identity: all that decides the result, as texts by name; a file of another run is refused.
    """

    path: Path | None
    identity: dict[str, str]

    def save(self, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the whole state; of several processes only one does.

        Raises:
            OSError: the file cannot be written; an older one is as it was.
        """
        if self.path is None or not is_writer():
            return
        state = {f"model.{name}": tensor for name, tensor in moving(model).items()}
        state |= {f"best.{name}": tensor for name, tensor in run.best.items()}
        for index, entries in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in state.items() if name not in tensors}
        record = {"format": FORMAT, "identity": self.identity, "history": asdict(run.history), "values": values}
        write_whole(self.path, pack(tensors, record, KEY))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Put model and optimizer where the run stood; a fresh run if there is no file yet. Then write the file.

        Raises:
            ValueError: not the file of a run, damaged, or of another run. Nothing has changed then.
            OSError: the file cannot be read, or no file can be written there.
        """
        run = RunState()
        if self.path is not None and self.path.exists():
            try:
                tensors, record, sound = unpack(self.path.read_bytes(), KEY)
            except ValueError:
                sound = False
            if not sound or record.get("format") != FORMAT:
                raise ValueError(f"{self.path} is damaged, of another version or no run; delete it to start anew")
            parts = {"model": {}, "best": {}, "optimizer": {}}
            for name, value in {**tensors, **record["values"]}.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = value
            self._refuse_another(record["identity"], parts["model"], parts["best"])
            state = {}
            for name, value in parts["optimizer"].items():
                index, _, entry = name.partition(".")
                state.setdefault(int(index), {})[entry] = value
            groups = optimizer.state_dict()["param_groups"]  # stay, since the schedule sets their rates
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            for name, tensor in moving(model).items():
                tensor.detach().copy_(parts["model"][name])
            run = RunState(History(**record["history"]), parts["best"])
        self.save(run, model, optimizer)
        return run

    def _refuse_another(self, found: dict[str, str], saved: dict[str, Tensor], best: dict[str, Tensor]) -> None:
        own = dict(self.identity)
        if own[START] in (fingerprint(saved), fingerprint(saved | best)):  # the model stands where this run stood
            own[START] = found[START]
        other = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if other:
            raise ValueError(
                f"{self.path} belongs to a run with another {', '.join(other[:4])}{', …' if len(other) > 4 else ''}; "
                f"give the settings and the start it had (make the model anew), or another checkpoint file"
            )


def run_file(path: str | Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, options: dict) -> RunFile:
    """The file of the run that these decide.

    Raises:
        ValueError: an option is, or holds, what no other process can know again.
    """
    if path is None:
        return RunFile(None, {})
    devices = sorted({p.device.type for p in model.parameters()})
    found = {"processes": str(n_processes()), "devices": str(devices)}
    found["autocast"] = str([torch.get_autocast_dtype(kind) for kind in devices if torch.is_autocast_enabled(kind)])
    for name, value in options.items():
        try:
            found[name] = mark(value)
        except TypeError as error:
            raise ValueError(
                f"{name} depends on {error}, so a checkpoint could go on as another run; give it plain values, "
                f"tensors and functions of them, or leave checkpoint out"
            ) from error
    named = dict(model.named_parameters())
    found["list of trained tensors"] = mark({name: list(p.shape) for name, p in named.items() if p.requires_grad})
    found["optimizer"] = type(optimizer).__name__
    names = {id(p): name for name, p in named.items()}
    for number, group in enumerate(optimizer.param_groups):
        held = {"params": [names.get(id(p)) for p in group["params"]]}
        found |= {f"{key} of group {number}" if number else key: mark(own) for key, own in {**group, **held}.items()}
    found["start of the optimizer"] = mark(optimizer.state_dict()["state"])
    found |= modules_of(model)
    found["frozen base"] = fingerprint({name: p for name, p in named.items() if not p.requires_grad})
    return RunFile(Path(path), found | {START: fingerprint(moving(model))})


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained weights, and buffers."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
