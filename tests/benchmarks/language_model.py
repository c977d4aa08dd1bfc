"""SmolLM2 in our Transformer beside transformers and Hugging Face's peft, and beside its matrix products alone.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
    python tests/benchmarks/language_model.py --theirs elsewhere/bin/python

    a training step        LoRA r=8 on queries and values, 16 rows of 65 tokens, the last three of each asked for
    a token of generation  greedy, 32 new ones behind 40, for one row and for 16

"limit" is what any implementation must pay: each product of the pass with a weight, in float32 or bfloat16, and nothing
else (of a training step forward and backward to the inputs, none with what LoRA adds). A token of generation is what 32
new words take more than the first alone, which reads the beginning, divided by 31.

As in `against_huggingface.py`: each round starts all sides anew, each job has a fresh process of each side, and they
take turns. Not part of the tests: it takes some twenty minutes of a quiet machine, and 6 GB of memory. `--rows` takes
some of the rows.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jobs import Job, plain_loop, serve, trained
from torch import Tensor, nn

SIZES = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # q k v o gate up down
ROWS, LENGTH, ASKED = 16, 65, 3
RANK, ALPHA, RATE = 8, 16, 1e-4
BEGINNING, NEW = 40, 32
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = ["step, float32, all positions meet the LM head", "step, float32, asked positions", "step, bfloat16 autocast"]
STEPS += ["step, bfloat16 weights"]
TOKENS = [f"token, {dtype}, {rows} row{'s' * (rows > 1)}" for dtype in TYPES for rows in (1, 16)]
FIRST = "first "  # of a row of `TOKENS`: the job that reads the beginning and gives one word


def words(rows: int, length: int) -> Tensor:
    """Random words, the same on all sides."""
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


def asked_batch():
    """`ROWS` rows of `LENGTH` words, the last `ASKED` of each asked for, as our `answer_only` reads them."""
    from minitransformer.tasks import Dataset

    tokens = words(ROWS, LENGTH)
    targets = torch.full_like(tokens, -100)
    targets[:, -ASKED - 1 : -1] = tokens[:, -ASKED:]
    return Dataset(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)


def both_lengths(build: Callable[[torch.dtype, int, int], Job]) -> dict[str, Callable[[], Job]]:
    """The jobs of generation: `build(dtype, rows, new words)` for all rows of the table."""
    jobs = {}
    for dtype in TYPES:
        for rows in (1, 16):
            name = f"token, {dtype}, {rows} row{'s' * (rows > 1)}"
            jobs[name] = lambda dtype=dtype, rows=rows: build(TYPES[dtype], rows, NEW)
            jobs[FIRST + name] = lambda dtype=dtype, rows=rows: build(TYPES[dtype], rows, 1)
    return jobs


def lora_step(model: nn.Module, autocast: bool = False) -> Job:
    """A step of our LoRA on this model of ours."""
    import peft
    from minitransformer.training import training_step
    from minitransformer.training.objectives import answer_only, autocasting

    batch, trainable = asked_batch(), trained(peft.attach(model, peft.LoRA(rank=RANK, alpha=ALPHA)))
    objective = autocasting(answer_only, torch.bfloat16) if autocast else answer_only
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)

    def run() -> None:
        model.train()
        training_step(model, batch, objective, optimizer, trainable, 1.0, 0)

    return run


def our_jobs(_: str) -> dict[str, Callable[[], Job]]:
    """This repository."""
    from minitransformer.pretrained import smollm2

    def generation(dtype: torch.dtype, rows: int, new: int) -> Job:
        model, beginning = smollm2(dtype), words(rows, BEGINNING)
        return lambda: model.generate(beginning, new)

    ours = {name: lambda: lora_step(smollm2()) for name in STEPS[:2]}
    ours |= {STEPS[2]: lambda: lora_step(smollm2(), autocast=True)}
    ours |= {STEPS[3]: lambda: lora_step(smollm2(torch.bfloat16))}
    return ours | both_lengths(generation)


def their_jobs(weights: str) -> dict[str, Callable[[], Job]]:
    """transformers and Hugging Face's peft."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft import LoraConfig, get_peft_model

    def base(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, rope_theta=1e5, rms_norm_eps=1e-5))
        model.load_state_dict(load_file(weights), strict=False)  # the head is the embedding
        return model.to(dtype).eval()

    def step(asked: bool, autocast: bool = False, dtype: torch.dtype = torch.float32) -> Job:
        method = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
        model, tokens = get_peft_model(base(dtype), method).train(), words(ROWS, LENGTH)
        labels = torch.full_like(tokens, -100)
        labels[:, -ASKED:] = tokens[:, -ASKED:]
        here = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if not asked:
                    return model(**here, labels=labels).loss
                logits = model(**here, logits_to_keep=ASKED + 1).logits[:, :-1]
                return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, -ASKED:].flatten())

        return plain_loop(model, loss)

    def generation(dtype: torch.dtype, rows: int, new: int) -> Job:
        model, tokens = base(dtype), words(rows, BEGINNING)
        here = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return lambda: model.generate(**here, **options)

    theirs = {name: lambda asked=bool(i): step(asked) for i, name in enumerate(STEPS[:2])}
    theirs |= {STEPS[2]: lambda: step(True, True), STEPS[3]: lambda: step(True, dtype=torch.bfloat16)}
    return theirs | both_lengths(generation)


def limit_jobs(_: str) -> dict[str, Callable[[], Job]]:
    """The products with every weight alone, each weight where a model has its own."""

    def drawn(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        shapes = LAYER * SIZES["num_hidden_layers"]
        return [torch.randn(shape).to(dtype) for shape in shapes], torch.randn(SIZES["vocab_size"], 576).to(dtype)

    def inputs(n: int, dtype: torch.dtype) -> dict[int, Tensor]:
        return {width: torch.randn(n, width).to(dtype) for width in (192, 576, 1536)}

    def step(dtype: torch.dtype, asked: int) -> Job:
        (layers, head), x, last = drawn(dtype), inputs(ROWS * LENGTH, dtype), torch.randn(asked, 576).to(dtype)

        def run() -> None:
            for weight in layers:
                F.linear(x[weight.shape[1]], weight)
                x[weight.shape[0]] @ weight  # the gradient of the input
            F.linear(last, head) @ head

        return run

    def generation(dtype: torch.dtype, rows: int, new: int) -> Job:
        (layers, head), beginning, newest = drawn(dtype), inputs(rows * BEGINNING, dtype), inputs(rows, dtype)

        @torch.inference_mode()
        def run() -> None:
            for x in [beginning] + [newest] * (new - 1):
                for weight in layers:
                    F.linear(x[weight.shape[1]], weight)
                F.linear(newest[576], head)

        return run

    asked = [ROWS * LENGTH, ROWS * ASKED, ROWS * ASKED, ROWS * ASKED]
    types = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    steps = {name: lambda own=own: step(*own) for name, *own in zip(STEPS, types, asked, strict=True)}
    return steps | both_lengths(generation)


SIDES = {"ours": our_jobs, "theirs": their_jobs, "limit": limit_jobs}


def write_weights(path: Path) -> None:
    """SmolLM2's weights under Hugging Face's names."""
    from safetensors.torch import save_file

    from minitransformer.pretrained import smollm2
    from minitransformer.pretrained.llama import BLOCK, OUTSIDE

    def their_name(name: str) -> str:
        if not name.startswith("blocks."):
            module, kind = name.rsplit(".", 1)
            return f"model.{OUTSIDE[module]}.{kind}"
        _, layer, rest = name.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        return f"model.layers.{layer}.{BLOCK[module]}.{kind}"

    save_file({their_name(name): weight for name, weight in smollm2().state_dict().items()}, path)


def table(seconds: dict[str, dict], memory: dict[str, dict], sides: list[str]) -> str:
    """The rows of the measured jobs, in milliseconds: medians, each ratio that of the medians, peak memory in MiB."""
    time = {job: {side: 1000 * statistics.median(own[side]) for side in own} for job, own in seconds.items()}
    lines = [f"{'ms':48}" + "".join(f"{c:>10}" for c in (*sides, "to theirs", "to limit", "MiB", "of theirs"))]
    for job in [job for job in time if not job.startswith(FIRST)]:
        own = time[job]
        if FIRST + job in time:
            own = {side: (own[side] - time[FIRST + job][side]) / (NEW - 1) for side in own}
        peak = {side: memory[job][side]["peak"] for side in own}
        shown = [f"{own[side]:10.1f}" if side in own else f"{'-':>10}" for side in sides]
        shown += [f"{own['ours'] / own[side]:10.3f}" if side in own else f"{'-':>10}" for side in ("theirs", "limit")]
        shown += [f"{peak['ours']:10.0f}", f"{peak['ours'] / peak['theirs']:10.3f}" if "theirs" in peak else ""]
        lines.append(f"{job:48}" + "".join(shown))
    if STEPS[0] in time and "theirs" in time[STEPS[0]]:
        everywhere = time[STEPS[0]]["theirs"]
        shares = [
            f"{job.removeprefix('step, ')} {time[job]['ours'] / everywhere:.3f}" for job in STEPS[1:] if job in time
        ]
        lines.append(f"ours, to theirs where all positions meet the LM head: {', '.join(shares)}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    from against_huggingface import ALLOCATOR, REPOSITORY, Worker, measured

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--theirs", help="the Python of an environment with torch, transformers, peft")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each row and side")
    parser.add_argument("--turns", type=int, default=3, help="times in each of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by ;")
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "theirs": options.theirs and os.path.abspath(options.theirs)}
    pythons["limit"] = sys.executable
    sides = [side for side, python in pythons.items() if python]
    chosen = [row for row in STEPS + TOKENS if any(part in row for part in options.rows.split(";"))]
    jobs = [job for row in chosen for job in ((FIRST + row, row) if row in TOKENS else (row,))]
    with tempfile.TemporaryDirectory() as folder:
        weights = {side: Path(folder, side) for side in sides}  # a worker's second argument: its role, and the weights
        write_weights(weights[sides[0]])
        for side in sides[1:]:
            weights[side].hardlink_to(weights[sides[0]])

        def start() -> dict[str, Worker]:
            checkout = {side: "" if side == "theirs" else REPOSITORY for side in sides}
            own = ("language_model.py", options.threads)
            return {side: Worker(pythons[side], own[0], checkout[side], own[1], weights[side]) for side in sides}

        record = measured(start, jobs, options.rounds, options.turns)
    print(f"\n{table(record['seconds'], record['memory'], sides)}\n")
    print({"rounds": options.rounds, "turns": options.turns, "threads": options.threads, "allocator": ALLOCATOR})
    print(record["versions"])


def be_a_worker(threads: str, weights: str) -> None:
    """Answer requests in the role that the file of weights is named after."""
    serve(SIDES[Path(weights).name](weights), int(threads), Path(weights).name)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        be_a_worker(*sys.argv[1:])
    else:
        main()
