"""A training run that survives: its whole state in one file, so that a killed run ends in the same bits.

That is the trained weights, the optimizer's own tensors (for AdamW two running means and a step count for each weight)
and the history. The rows, the learning rate and dropout of a step follow from the seed and the step. The file is
safetensors, written whole or not at all, with a checksum and all that the run is (`identity.py`): another run does not
go on from it by accident.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from minitransformer.files import fingerprint, pack, unpack, write_whole
from minitransformer.training.distributed import is_writer, n_processes
from minitransformer.training.history import History
from minitransformer.training.identity import leaves

FORMAT = "minitransformer run 4"
KEY = "run"  # of the record in the file's header
START = "start of the trained tensors"


class RunFile:
    """The file of one run, which these options of `fit` decide. Without a path nothing is restored or saved."""

    def __init__(self, path: str | Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, options: dict):
        self.path, self.model, self.optimizer = path and Path(path), model, optimizer
        self.identity = identity(model, optimizer, options) if path else {}

    def save(self, history: History) -> None:
        """Write the whole state; of several processes only one does. An OSError leaves an older file as it was."""
        if self.path is None or not is_writer():
            return
        state = {"model": moving(self.model), **self.optimizer.state_dict()["state"]}
        flat = {f"{part}.{name}": value for part, entries in state.items() for name, value in entries.items()}
        tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        record = {"format": FORMAT, "identity": self.identity, "history": asdict(history)}
        record["values"] = {name: value for name, value in flat.items() if name not in tensors}
        write_whole(self.path, pack(tensors, record, KEY))

    def restore(self) -> History:
        """Put model and optimizer where the run stood; a fresh run if there is no file yet. Then write the file.

        Raises:
            ValueError: not the file of a run, damaged, or of another run. Nothing has changed then.
            OSError: the file cannot be read, or no file can be written there.
        """
        history = History()
        if self.path is not None and self.path.exists():
            try:
                tensors, record, sound = unpack(self.path.read_bytes(), KEY)
            except ValueError:
                sound = False
            if not sound or record.get("format") != FORMAT:
                raise ValueError(f"{self.path} is damaged, of another version or no run; delete it to start anew")
            state = {}
            for name, value in {**tensors, **record["values"]}.items():
                part, _, rest = name.partition(".")
                state.setdefault(part, {})[rest] = value
            weights = state.pop("model")
            self._refuse_another(record["identity"], fingerprint(weights))
            moments = {int(index): entries for index, entries in state.items()}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})  # its groups stay
            for name, tensor in moving(self.model).items():
                tensor.detach().copy_(weights[name])
            history = History(**record["history"])
        self.save(history)
        return history

    def _refuse_another(self, found: dict[str, str], stood: str) -> None:
        own = dict(self.identity)
        if own[START] == stood:  # the model stands where this run stood
            own[START] = found[START]
        other = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if other:
            names = ", ".join(other[:5]) + (", …" if len(other) > 5 else "")
            raise ValueError(
                f"{self.path} belongs to a run with another {names}; give the settings and the start it had (make the "
                f"model anew), or another checkpoint file"
            )


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained weights, and buffers."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


def identity(model: nn.Module, optimizer: torch.optim.Optimizer, options: dict) -> dict[str, str]:
    """All that decides the result of a run, as texts by name; raise ValueError where something cannot be known."""
    named, kinds = dict(model.named_parameters()), sorted({p.device.type for p in model.parameters()})
    names, state = {id(p): name for name, p in named.items()}, optimizer.state_dict()["state"]
    decides = options | {
        "processes": n_processes(), "devices": kinds,
        "autocast": [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)],
        "list of trained tensors": str({n: [*p.shape] for n, p in named.items() if p.requires_grad}),
        "optimizer": type(optimizer), "start of the optimizer": state,
        "group": [own | {"params": str([names.get(id(p)) for p in own["params"]])} for own in optimizer.param_groups],
        "model": model, "frozen base": fingerprint({name: p for name, p in named.items() if not p.requires_grad}),
    }  # fmt: skip
    seen, found = {id(tensor): (name, tensor) for name, tensor in (named | moving(model)).items()}, {}
    for name, value in decides.items():
        try:
            found |= leaves(name, value, seen)
        except Exception as error:
            raise ValueError(
                f"{name} depends on what no other process can know again ({error}), so a checkpoint could go on as "
                f"another run; give it plain values, tensors and functions of them, or leave checkpoint out"
            ) from error
    return found | {START: fingerprint(moving(model))}
