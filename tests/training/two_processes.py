"""What each of two processes does in `test_two_processes.py`: `torchrun --nproc-per-node 2 two_processes.py FOLDER`.

The first process leaves what came out of each case in FOLDER/found.pt; run alone, it leaves what one process gives.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference.method_cases import SETS  # noqa: E402

import peft  # noqa: E402
from minitransformer import Transformer, TransformerConfig  # noqa: E402
from minitransformer.tasks.dataset import Dataset  # noqa: E402
from minitransformer.training import answer_loss, evaluate, fit, loop, next_token_loss  # noqa: E402
from minitransformer.training.distributed import is_writer, n_processes, rank, share, total  # noqa: E402
from peft.experiments.processes import launched_together  # noqa: E402

CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)
OBJECTIVES = {"answer": answer_loss, "next word": next_token_loss}


def data(n_rows: int, seed: int) -> Dataset:
    """Rows of very different lengths, so that the shares of a batch ask for different numbers of words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(23, (n_rows, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(2, 10, (n_rows, 1), generator=generator)
    return Dataset(tokens, mask, torch.randint(23, (n_rows,), generator=generator))


def trained(name: str, objective: str, batch_size: int = 6) -> dict:
    """A short run in float64: the trained tensors, the history, and the scores of another data set."""
    model = Transformer(CONFIG, seed=0).double()
    for number, recipe in enumerate(SETS.get(name, ())):
        peft.attach(model, recipe, seed=number)
    asked = OBJECTIVES[objective]
    history = fit(
        model, data(26, 0), data(11, 1), steps=12, learning_rate=1e-2, batch_size=batch_size, objective=asked,
        validate_every=4, progress=False,
    )  # fmt: skip
    scores = evaluate(model, data(13, 2), asked, batch_size=3)
    tensors = {key: p.detach().clone() for key, p in peft.trainable_parameters(model).items()}
    return {"tensors": tensors, "history": vars(history), "scores": scores}


def shares() -> dict:
    """Which rows each process takes of a batch of seven, and a sum over all."""
    own = share(data(7, 0))
    (rows,) = total(len(own))
    return {"rows": rows, "first": own.tokens[0], "processes": n_processes(), "sum": total(rank() + 1, 2.5)}


def few_and_silent() -> dict:
    """Losses and weights where a share has no row, and where one asks nothing."""
    found = {}
    rows = data(6, 0)
    half = Dataset(rows.tokens, rows.padding_mask, torch.where(torch.arange(6) % 2 == 1, -100, rows.targets))
    for name, batch in (("one row", rows.rows(slice(0, 1))), ("every second label", half)):
        model = peft.attach(Transformer(CONFIG, seed=0).double(), peft.LoRA(rank=2), seed=1)
        history = fit(model, batch, batch, steps=3, progress=False, validate_every=1)
        tensors = {key: p.detach().clone() for key, p in peft.trainable_parameters(model).items()}
        found[name] = {"loss": history.loss, "validation": history.validation_loss, "tensors": tensors}
    return found


def checkpointed(folder: Path) -> dict:
    """A run with dropout that is stopped in the middle and goes on, beside one that was not."""
    tensors, step = {}, loop.training_step
    for name, stops in (("whole", [8]), ("in two", [5, 8])):
        for stop in stops:
            model = peft.attach(Transformer(CONFIG, seed=0), peft.LoRA(rank=2, dropout=0.5), seed=1)

            def stopped(*arguments, stop=stop):
                if arguments[6] == stop:
                    raise KeyboardInterrupt
                return step(*arguments)

            loop.training_step = stopped
            try:
                options = {"steps": 8, "batch_size": 6, "progress": False, "every": 1}
                fit(model, data(26, 0), checkpoint=folder / f"{name}.run", **options)
            except KeyboardInterrupt:
                torch.distributed.barrier()
        tensors[name] = {key: p.detach().clone() for key, p in peft.trainable_parameters(model).items()}
    loop.training_step = step
    return {"tensors": tensors}


def sharded(name: str) -> dict:
    """Steps with the model's tensors cut into shards by FSDP2, frozen ones and the method's alike; alone: uncut."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, seed=0)
    for number, recipe in enumerate(SETS[name]):
        peft.attach(model, recipe, seed=number)
    whole = sum(p.numel() for p in model.parameters())
    if n_processes() > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(4):
        batch = data(6, step)
        own = Dataset(*(part[rank() :: n_processes()] for part in (batch.tokens, batch.padding_mask, batch.targets)))
        logits = model(own.tokens, own.padding_mask)  # through the module itself, whose hooks gather the shards
        loss = torch.nn.functional.cross_entropy(logits[:, -1], own.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total(loss.item())[0] / n_processes())
    tensors = {key: p.detach() for key, p in peft.trainable_parameters(model).items()}
    tensors = {key: p.full_tensor() if isinstance(p, DTensor) else p.clone() for key, p in tensors.items()}
    return {"losses": losses, "tensors": tensors, "kept": kept, "whole": whole}


def moved_bytes(name: str) -> dict:
    """The bytes of gradients that one step hands to the all-reduce."""
    model, seen = Transformer(CONFIG, seed=0), []
    for number, recipe in enumerate(SETS.get(name, ())):
        peft.attach(model, recipe, seed=number)

    def count(_, bucket):
        seen.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, count)
    parallel(data(4, 0).tokens).square().mean().backward()
    trained = sum(p.numel() for p in peft.trainable_parameters(model).values())
    return {"moved": sum(seen), "trained": trained}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with launched_together():
        found = {"shares": shares(), "few": few_and_silent()}
        for name, objective in (
            ("lora", "next word"),
            ("prefix kv", "answer"),
            ("houlsby", "next word"),
            ("full", "answer"),
        ):
            found[f"trained, {name}"] = trained(name, objective)
        for name in ("lora all", "prefix kv", "houlsby"):
            found[f"sharded, {name}"] = sharded(name)
        if n_processes() > 1:
            found["checkpoint"] = checkpointed(folder)
            for name in ("full", "lora", "prefix kv", "houlsby"):
                found[f"bytes, {name}"] = moved_bytes(name)
        if is_writer():
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
    # DTensor's caches keep the process group, and with it gloo's threads, beyond `destroy_process_group`. One that is
    # slow to let go of its last tensor asks for an interpreter that is ending, and takes the process down with
    # "terminate called without an active exception" (pytorch/pytorch#190489). So this process ends without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
