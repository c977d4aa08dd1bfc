"""Checkers of notebook 10."""

import torch

from exercises.verdict import called, checker, given, require, same


class _Whole(torch.Tensor):
    """Numbers to index with, all at once; a loop over them is refused."""

    def _one_by_one(self, *_):
        raise TypeError("k is asked for one number at a time; A[k] picks the tensors of all rows at once: no loop")

    __iter__ = tolist = item = __int__ = __index__ = _one_by_one


@checker
def check_mixed_lora(mixed_lora) -> str:
    """mixed_lora(x [N, T, d_in], A [K, r, d_in], B [K, d_out, r], scale [K], k [N]) -> [N, T, d_out]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4, 6), (3, 2, 6), (3, 7, 2))
    x, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    scale, k = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), torch.tensor([2, 0, 1, 1, 0])
    rows = [scale[i] * x[row] @ A[i].T @ B[i].T for row, i in enumerate(k.tolist())]
    first = [scale[0] * x[row] @ A[0].T @ B[0].T for row in range(5)]
    unscaled = [x[row] @ A[i].T @ B[i].T for row, i in enumerate(k.tolist())]
    hints = {
        "every row got the first task's tensors": torch.stack(first),
        "the scale of each row's task is missing": torch.stack(unscaled),
        "all tasks are added up in every row": sum(scale[i] * x @ A[i].T @ B[i].T for i in range(3)),
    }
    same(called(mixed_lora, x, A, B, scale, k.as_subclass(_Whole)), torch.stack(rows), hints, "the update")
    return "each row under its own task, in two batched products."


@checker
def check_one_stack(one_stack) -> str:
    """one_stack([A_0 [r_0, d], A_1 [r_1, d], …]) -> [K, max r, d], shorter ones filled up with zeros."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(r, 5, generator=generator) for r in (2, 4, 1)]
    expected = torch.zeros(3, 4, 5)
    at_the_end = torch.zeros(3, 4, 5)
    for number, part in enumerate(parts):
        expected[number, : len(part)] = part
        at_the_end[number, 4 - len(part) :] = part
    result = called(one_stack, parts)
    require(isinstance(result, torch.Tensor), f"the result should be one tensor, it is {type(result).__name__}")
    hints = {
        "the zeros stand in front; put each A at the beginning": at_the_end,
        "they are cut to the lowest rank: nothing may be lost": torch.stack([part[:1] for part in parts]),
        "repeated rows are no zeros: they would change the update": torch.stack(
            [torch.cat([part, part[-1:].expand(4 - len(part), -1)]) for part in parts]
        ),
    }
    same(result, expected, hints, "the stack")
    return "a zero row reads nothing, and the column of B that goes with it writes nothing."


@checker
def check_kept_bytes(kept_bytes) -> str:
    """kept_bytes(n_tasks, backbone, per_task): parameters of the backbone and of one task's file -> bytes, two ways."""
    for tasks, backbone, own in ((10, 827_776, 8_192), (1, 1_000, 10)):
        result = called(kept_bytes, tasks, backbone, own)
        require(isinstance(result, tuple) and len(result) == 2, "return two numbers: with full copies, with a bank")
        copies, bank = (given(part) for part in result)
        hints = {"a float32 number takes four bytes": tasks * backbone}
        same(copies, 4 * tasks * backbone, hints, f"the bytes of {tasks} fully fine-tuned copies")
        hints = {
            "a float32 number takes four bytes": backbone + tasks * own,
            "the backbone is missing: it is kept once": 4 * tasks * own,
            "the backbone is kept once, not once for each task": 4 * tasks * (backbone + own),
        }
        same(bank, 4 * (backbone + tasks * own), hints, f"the bytes of a bank of {tasks}")
    return "the backbone once, and a little for each task."
