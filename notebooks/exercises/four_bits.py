"""Checkers of notebook 16."""

import torch

from exercises.verdict import called, checker, given, require, same
from minitransformer.code_book import BOOKS


@checker
def check_rounded(rounded) -> str:
    """rounded(w [N], book [16], block) -> w [N] as it comes back from a code for each and a scale for each block."""
    generator = torch.Generator().manual_seed(0)
    for book, block in ((BOOKS["nf4"], 8), (torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.0]), 4)):
        w = torch.randn(24, generator=generator) * torch.tensor([1.0, 5.0, 0.1]).repeat_interleave(8)
        w[::8] = -w.view(3, 8).abs().amax(dim=1) - 0.1  # the largest of each block of 8 is negative

        def twin(w, size, scale=lambda blocks: blocks.abs().amax(dim=1, keepdim=True), down=False, book=book):
            blocks = w.view(-1, size)
            c = scale(blocks)
            gaps = blocks[..., None] / c[..., None] - book
            gaps = gaps.masked_fill(gaps < -1e-6, torch.inf) if down else gaps.abs()
            return (c * book[gaps.argmin(dim=-1)]).flatten()

        hints = {
            "that is one scale for all weights; each block has its own": twin(w, len(w)),
            "the scale is the largest *absolute* value: here the largest of a block is negative": twin(
                w, block, lambda blocks: blocks.amax(dim=1, keepdim=True)
            ),
            "a weight gets the nearest value of the book, not the next lower one": twin(w, block, down=True),
            "the values are still divided by the scale of their block; multiply by it": twin(w, block)
            / w.view(-1, block).abs().amax(dim=1).repeat_interleave(block),
            "the scale is the largest absolute value, not the standard deviation": twin(
                w, block, lambda blocks: blocks.std(dim=1, keepdim=True)
            ),
        }
        what = f"what comes back with {len(book)} values and blocks of {block}"
        same(called(rounded, w.clone(), book, block), twin(w, block), hints, what)
    return "a scale for each block, the nearest value of the book for each weight."


@checker
def check_qlora_bytes(qlora_bytes) -> str:
    """qlora_bytes(linear, other, trained, block): all bytes that weights, gradients and Adam's means take."""
    for linear, other, trained, block in ((6_476_005_376, 262_410_240, 159_907_840, 64), (98_304, 4_096, 2_048, 32)):
        scales = 1 / block + 4 / (256 * block)  # bytes for each weight
        rest = 2 * other + 16 * trained
        expected = linear * (0.5 + scales) + rest
        hints = {
            "the scales are missing: 8 bits for each block, and 32 for each 256 blocks": linear / 2 + rest,
            "that is one 32-bit scale for each block; doubly quantised, a scale has 8 bits": linear * (0.5 + 4 / block)
            + rest,
            "the scales have scales: 32 bits for each 256 of them": linear * (0.5 + 1 / block) + rest,
            "a weight of 4 bits takes half a byte": linear * (4 + scales) + rest,
            "those are bits; eight are a byte": 8 * expected,
            "what is not quantised has 16 bits, two bytes": expected + 2 * other,
            "what is not quantised is missing": expected - 2 * other,
            "a trained parameter has a gradient and Adam's two means too: 16 bytes": expected - 12 * trained,
            "that is 12 bytes for a trained parameter; weight, gradient and two means of 4 bytes are 16": expected
            - 4 * trained,
        }
        what = f"the bytes for {linear:,} weights in linear layers, {other:,} others, {trained:,} trained"
        same(called(qlora_bytes, linear, other, trained, block), expected, hints, what)
    return "half a byte and a little for most weights, two for the others, sixteen for those that learn."


@checker
def check_loftq_factors(loftq_factors) -> str:
    """loftq_factors(W [d_out, d_in], Q, r, s) -> A [r, d_in], B [d_out, r], with Q + s B A as near to W as can be."""
    generator = torch.Generator().manual_seed(0)
    for shape, r, s in (((6, 10), 2, 2.0), ((12, 7), 3, 0.5)):
        W = torch.randn(shape, generator=generator)
        Q = (2 * W).round() / 2
        result = called(loftq_factors, W.clone(), Q.clone(), r, s)
        require(isinstance(result, tuple) and len(result) == 2, "return two matrices, A and B")
        A, B = (given(part) for part in result)
        shapes = [list(part.shape) for part in (A, B)]
        right = [[r, shape[1]], [shape[0], r]]
        require(shapes == right, f"A and B have the shapes {shapes}, they should have {right}")

        def nearest(M, r=r):
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            return U[:, :r] * S[:r] @ Vh[:r], U[:, :r] @ Vh[:r], U[:, :r] * S[:r].sqrt() @ Vh[:r]

        best, without, root = nearest(W - Q)
        mistakes = {
            "that is the nearest to W, as PiSSA starts; LoftQ's corrects the error W - Q": nearest(W)[0],
            "it points the wrong way: Q is there already, and W - Q is missing": -best,
            "the singular values are missing": without,
            "only one factor has the root of the singular values, and what is missing is their root": root,
        }
        hints = {"the scale is missing: B A is multiplied by s": s * best, **mistakes}
        hints |= {f"{hint}; and the scale is missing": s * value for hint, value in mistakes.items()}
        same(s * B @ A, best, hints, "s B A")
    return "the largest singular values of the error, shared by A and B: no other pair of rank r comes nearer."
