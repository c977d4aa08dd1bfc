"""For each exercise, wrong answers that a reader may well give, and a part of what must be said of each."""

WRONG_ANSWERS = {
    # 00 · start here
    "check_linear": [
        ("linear = lambda x, W, b: x @ W.T", "the bias is missing"),
        ("linear = lambda x, W, b: x @ (W.T if W.shape[0] != W.shape[1] else W) + b", "must be transposed"),
        ("linear = lambda x, W, b: x @ W + b", "raised RuntimeError"),
    ],
    "check_share": [
        ("share = lambda trained, frozen: trained / frozen", "a fraction"),
        ("share = lambda trained, frozen: 100 * trained / (trained + frozen)", "not of all"),
    ],
    # 01 · the Transformer
    "check_causal_attention": [
        (
            "causal_attention = lambda q, k, v: (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v",
            "the words after it",
        ),
        (
            "causal_attention = lambda q, k, v: "
            "(q @ k.T).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -1e30).softmax(-1) @ v",
            "not divided by sqrt(d_head)",
        ),
        (
            "causal_attention = lambda q, k, v: (q @ k.T / 8**0.5)"
            ".masked_fill(torch.ones(len(q), len(q)).triu(0).bool(), -1e30).softmax(-1) @ v",
            "a word may look at itself",
        ),
        (
            "causal_attention = lambda q, k, v: (q @ k.T / 8**0.5).softmax(-1).tril() @ v",
            "the mask comes after the softmax",
        ),
    ],
    "check_block_parameters": [
        ("block_parameters = lambda d, f: 4 * d * d + 2 * d * f", "the biases are missing"),
        ("block_parameters = lambda d, f: 4 * d * (d + 1) + f * (d + 1) + d * (f + 1)", "the norms are missing"),
    ],
    "check_cache_numbers": [
        ("cache_numbers = lambda n_layers, d_model, words: n_layers * d_model * words", "keys *and* values"),
        ("cache_numbers = lambda n_layers, d_model, words: 2 * d_model * words", "every layer"),
    ],
    # 02 · full fine-tuning
    "check_answer_loss": [
        (
            "loss_at_the_answer = lambda logits, padding_mask, targets: "
            "torch.nn.functional.cross_entropy(logits[:, -1], targets)",
            "the last column, which is padding",
        ),
        (
            "loss_at_the_answer = lambda logits, padding_mask, targets: torch.nn.functional.cross_entropy("
            "logits[torch.arange(len(logits)), padding_mask.sum(1) - 1], targets)",
            "the count of real words is not the place",
        ),
    ],
    "check_training_bytes": [
        ("training_bytes = lambda total, trained: 4 * (total + 2 * trained)", "one is missing of the three"),
        ("training_bytes = lambda total, trained: 16 * total", "for trained parameters only"),
    ],
    "check_forgetting": [
        ("forgetting = lambda before, after: after / before", "the quotient of the losses"),
        ("forgetting = lambda before, after: after - before", "the difference of the losses"),
    ],
    # 03 · prefix tuning
    "check_prefix_mask": [
        ("prefix_mask = lambda mask, n: torch.cat([mask, torch.ones(len(mask), n).bool()], 1)", "it belongs in front"),
        (
            "prefix_mask = lambda mask, n: torch.ones(len(mask), n + mask.shape[1]).tril().bool()",
            "not see the whole",
        ),
        ("prefix_mask = lambda mask, n: torch.ones(n + 4, n + 4).tril().bool()", "queries of its own"),
        ("prefix_mask = lambda mask, n: torch.ones(4, n + 4).tril(n).bool()", "also hides padding"),
    ],
    "check_prefix_parameters": [
        (
            "prefix_parameters = lambda n, layers, d: dict(kv=layers * n * d, hidden=layers * n * d, prompt=n * d)",
            "keys and values are two tensors",
        ),
        (
            "prefix_parameters = lambda n, layers, d: "
            "dict(kv=2 * layers * n * d, hidden=layers * n * d, prompt=layers * n * d)",
            "at the input only",
        ),
    ],
    "check_mixture": [
        (
            "mixture = lambda q, k, v, pk, pv, mask: "
            "(q @ k.mT / 8**0.5).masked_fill(~mask, -1e30).softmax(-1) @ v + (q @ pk.mT / 8**0.5).softmax(-1) @ pv",
            "the two attentions are added up",
        ),
        (
            "def mixture(q, k, v, pk, pv, mask):\n"
            "    s, p = (q @ k.mT / 8**0.5).masked_fill(~mask, -1e30), q @ pk.mT / 8**0.5\n"
            "    g = torch.sigmoid(s.logsumexp(-1, keepdim=True) - p.logsumexp(-1, keepdim=True))\n"
            "    return (1 - g) * (s.softmax(-1) @ v) + g * (p.softmax(-1) @ pv)",
            "have changed places",
        ),
    ],
    # 04 · LoRA
    "check_lora_forward": [
        ("lora_forward = lambda x, W0, A, B, alpha: x @ W0.T + alpha * x @ A.T @ B.T", "not divided by the rank"),
        ("lora_forward = lambda x, W0, A, B, alpha: alpha / len(A) * x @ A.T @ B.T", "own output is missing"),
        ("lora_forward = lambda x, W0, A, B, alpha: W0 @ x + alpha / len(A) * B @ A @ x", "raised RuntimeError"),
    ],
    "check_start": [
        ("start = lambda train, r, d_in, d_out: (torch.randn(r, d_in), torch.zeros(d_out, r))", "zero and frozen"),
        ("start = lambda train, r, d_in, d_out: (torch.zeros(r, d_in), torch.zeros(d_out, r))", "both are zero"),
        ("start = lambda train, r, d_in, d_out: (torch.randn(r, d_in), torch.randn(d_out, r))", "changes the model"),
        ("start = lambda train, r, d_in, d_out: (torch.ones(r, d_in), torch.zeros(d_out, r))", "are not independent"),
    ],
    "check_sum_of_loras": [
        ("sum_of_loras = lambda A1, B1, A2, B2, w1, w2: (w1 * A1 + w2 * A2, w1 * B1 + w2 * B2)", "cross terms"),
        (
            "sum_of_loras = lambda A1, B1, A2, B2, w1, w2: (w1 * B1 @ A1 + w2 * B2 @ A2, torch.eye(5).double())",
            "the sum stays thin",
        ),
        (
            "sum_of_loras = lambda A1, B1, A2, B2, w1, w2: "
            "(torch.cat([w1 * A1, w2 * A2]), torch.cat([w1 * B1, w2 * B2], 1))",
            "the weights act twice",
        ),
    ],
    "check_break_even_rank": [
        ("break_even_rank = lambda d_in, d_out: min(d_in, d_out)", "not the one that saves"),
        ("break_even_rank = lambda d_in, d_out: d_in * d_out // (d_in + d_out)", "as many parameters as in the weight"),
    ],
    # 05 · adapters
    "check_adapter": [
        ("adapter = lambda h, w, b, u, c: torch.relu(h @ w.T + b) @ u.T + c", "the skip connection is missing"),
        ("adapter = lambda h, w, b, u, c: h + (h @ w.T + b) @ u.T + c", "that is a LoRA"),
    ],
    "check_adapter_parameters": [
        ("adapter_parameters = lambda placement, m, n, d, f: n * (2 * m * d + m + d)", "puts two adapters"),
        (
            "adapter_parameters = lambda placement, m, n, d, f: "
            "n * (1 + (placement == 'houlsby')) * 2 * m * (f if placement == 'inside_ffn' else d)",
            "the biases are missing",
        ),
    ],
    "check_near_identity": [
        (
            "near_identity = lambda m, d: (torch.zeros(m, d), torch.zeros(m), torch.zeros(d, m), torch.zeros(d))",
            "with both weights zero",
        ),
        (
            "near_identity = lambda m, d: (torch.zeros(m, d), torch.zeros(m), torch.randn(d, m), torch.zeros(d))",
            "where it has no slope",
        ),
        (
            "near_identity = lambda m, d: (torch.randn(m, d), torch.zeros(m), torch.randn(d, m), torch.zeros(d))",
            "it changes h by up to",
        ),
    ],
    # 06 · one family
    "check_prefix_share": [
        (
            "prefix_share = lambda p, t: torch.sigmoid(t.logsumexp(-1) - p.logsumexp(-1))",
            "the share of the text",
        ),
        ("prefix_share = lambda p, t: torch.cat([p, t], -1).softmax(-1)[..., : p.shape[-1]]", "lambda is their sum"),
        ("prefix_share = lambda p, t: p.exp().sum(-1) / (p.exp().sum(-1) + t.exp().sum(-1))", "lambda is NaN"),
        ("prefix_share = lambda p, t: torch.sigmoid(p.amax(-1) - t.amax(-1))", "not only with the largest"),
    ],
    "check_adapted": [
        (
            "adapted = lambda f, x, down, up, s, form: f(x) + s * torch.relu(x @ down.T) @ up.T",
            '"sequential": the bottleneck reads h',
        ),
        (
            "adapted = lambda f, x, down, up, s, form: f(x) + s * torch.relu(f(x) @ down.T) @ up.T",
            '"parallel": the bottleneck reads x',
        ),
        (
            "adapted = lambda f, x, down, up, s, form: "
            "f(x) + torch.relu((x if form == 'parallel' else f(x)) @ down.T) @ up.T",
            "the scale s is missing",
        ),
    ],
    "check_same_price": [
        ("same_price = lambda n, d: (n, n // 2)", "m = n is too dear"),
        ("same_price = lambda n, d: ((2 * n * d - d) // (2 * d + 1), n)", "two pairs of A and B"),
        ("same_price = lambda n, d: ((2 * n * d - d) // (2 * d), n // 2)", "m biases inside and d_model at its output"),
    ],
    # 07 · why low rank
    "check_extracted_lora": [
        (
            "def extracted_lora(delta, r, alpha):\n"
            "    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] * S[:r], S[r:].norm()",
            "must divide by it, once",
        ),
        (
            "def extracted_lora(delta, r, alpha):\n"
            "    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)\n"
            "    return Vh[:r] * r / alpha, U[:, :r], S[r:].norm()",
            "the singular values are missing",
        ),
        (
            "def extracted_lora(delta, r, alpha):\n"
            "    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] * S[:r] * r / alpha, S[r:].square().sum()",
            "the square of the norm",
        ),
        (
            "def extracted_lora(delta, r, alpha):\n"
            "    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)\n"
            "    return U[:, :r] * S[:r] * r / alpha, Vh[:r], S[r:].norm()",
            "it should be [r, d_in]",
        ),
        (
            "def extracted_lora(delta, r, alpha):\n"
            "    U, S, V = torch.linalg.svd(delta, full_matrices=False)\n"
            "    return V.T[:r], U[:, :r] * S[:r] * r / alpha, S[r:].norm()",
            "not its columns",
        ),
    ],
    "check_rank_for_share": [
        (
            "def rank_for_share(delta, share):\n"
            "    S = torch.linalg.svdvals(delta)\n"
            "    return int((S.cumsum(0) < share * S.sum()).sum()) + 1",
            "not their squares",
        ),
        (
            "def rank_for_share(delta, share):\n"
            "    squares = torch.linalg.svdvals(delta).square()\n"
            "    return int((squares.cumsum(0) < share * squares.sum()).sum())",
            "one too few",
        ),
    ],
    "check_subspace_similarity": [
        (
            "def subspace_similarity(X, Y, i, j):\n"
            "    U, V = (torch.linalg.svd(M, full_matrices=False).Vh for M in (X, Y))\n"
            "    return (U[:i] @ V[:j].T).square().sum() / max(i, j), max(i, j) / X.shape[1]",
            "a line inside a plane",
        ),
        (
            "def subspace_similarity(X, Y, i, j):\n"
            "    U, V = (torch.linalg.svd(M, full_matrices=False).U for M in (X, Y))\n"
            "    return (U[:, :i].T @ V[:, :j]).square().sum() / min(i, j), max(i, j) / X.shape[1]",
            "left singular vectors",
        ),
        (
            "def subspace_similarity(X, Y, i, j):\n"
            "    U, V = (torch.linalg.svd(M, full_matrices=False)[2] for M in (X, Y))\n"
            "    return (U[:, :i].T @ V[:, :j]).square().sum() / min(i, j), max(i, j) / X.shape[1]",
            "not its columns",
        ),
        (
            "subspace_similarity = lambda X, Y, i, j: "
            "((X[:i] @ Y[:j].T).square().sum() / min(i, j), max(i, j) / X.shape[1])",
            "the rows themselves",
        ),
        (
            "def subspace_similarity(X, Y, i, j):\n"
            "    U, V = (torch.linalg.svd(M, full_matrices=False).Vh for M in (X, Y))\n"
            "    return (U[:i] @ V[:j].T).square().sum() / min(i, j), 0.0",
            "chance is not zero",
        ),
        (
            "def subspace_similarity(X, Y, i, j):\n"
            "    U, V = (torch.linalg.svd(M, full_matrices=False).Vh for M in (X, Y))\n"
            "    return (U[:i] @ V[:j].T).square().sum() / min(i, j), min(i, j) / X.shape[1]",
            "leaves the larger",
        ),
    ],
    "check_gradient_of_z": [
        (
            "def gradient_of_z(g, column, sign, d):\n"
            "    total = torch.zeros(d)\n"
            "    total[column] += sign * g\n"
            "    return total",
            "does not add up where an index occurs twice",
        ),
        ("gradient_of_z = lambda g, column, sign, d: torch.zeros(d).index_add(0, column, g)", "the signs are missing"),
        ("gradient_of_z = lambda g, column, sign, d: sign * g", "one number for each weight"),
        (
            "gradient_of_z = lambda g, column, sign, d: torch.bincount(column, weights=sign * g)",
            "columns that no weight follows are missing",
        ),
        (
            "gradient_of_z = lambda g, column, sign, d: "
            "torch.stack([(sign * g)[column == k].sum() / max(1, (column == k).sum()) for k in range(d)])",
            "the mean of each column",
        ),
    ],
    # 08 · what it costs
    "check_lora_parameters": [
        ("lora_parameters = lambda r, targets, n, d, f: n * len(targets) * r * d", "that is A alone"),
        ("lora_parameters = lambda r, targets, n, d, f: n * len(targets) * 2 * r * d", "d_ff dimensions on one side"),
        ("lora_parameters = lambda r, targets, n, d, f: len(targets) * 2 * r * d", "every layer"),
        ("lora_parameters = lambda r, targets, n, d, f: n * 2 * r * d", "every target"),
    ],
    "check_mixed_precision_bytes": [
        ("mixed_precision_bytes = lambda frozen, trained: 16 * (frozen + trained)", "2 bytes are all"),
        ("mixed_precision_bytes = lambda frozen, trained: 2 * frozen + 12 * trained", "4 bytes are missing"),
        ("mixed_precision_bytes = lambda frozen, trained: 4 * frozen + 16 * trained", "kept in 16 bits"),
        ("mixed_precision_bytes = lambda frozen, trained: 2 * frozen + 14 * trained", "2 bytes are missing"),
    ],
    "check_prefix_cache_bytes": [
        ("prefix_cache_bytes = lambda n, rows, L, H, d, b: rows * L * n * H * d * b", "keys *and* values"),
        ("prefix_cache_bytes = lambda n, rows, L, H, d, b: 2 * L * n * H * d * b", "every row has a copy"),
        ("prefix_cache_bytes = lambda n, rows, L, H, d, b: 2 * rows * L * n * d * b", "every head"),
    ],
    "check_step_operations": [
        (
            "step_operations = lambda frozen, trained, tokens: 6 * tokens * (frozen + trained)",
            "that is full fine-tuning",
        ),
        (
            "step_operations = lambda frozen, trained, tokens: tokens * (2 * frozen + 6 * trained)",
            "travel through the frozen maps",
        ),
        ("step_operations = lambda frozen, trained, tokens: 4 * tokens * (frozen + trained)", "three products"),
        ("step_operations = lambda frozen, trained, tokens: tokens * (2 * frozen + 3 * trained)", "two operations"),
    ],
    # 09 · the comparison
    "check_chosen_rate": [
        (
            "chosen_rate = lambda runs: max(runs, key=lambda run: (run['validation'], -run['loss']))['rate']",
            "a final run",
        ),
        ("chosen_rate = lambda runs: min(runs, key=lambda run: run['loss'])['rate']", "the lowest loss alone"),
        (
            "chosen_rate = lambda runs: max(runs, key=lambda r: (r['test'] or 0, r['validation'], -r['loss']))['rate']",
            "is no test any more",
        ),
    ],
    "check_mean_and_spread": [
        ("mean_and_spread = lambda a: (np.mean(a), np.std(a))", "minus one"),
        ("mean_and_spread = lambda a: (np.mean(a), np.var(a, ddof=1))", "the variance"),
    ],
    "check_one_common_rate": [
        ("lost_points = lambda a, rate: {m: max(o.values()) - o[rate] for m, o in a.items() if rate in o}", "points"),
        (
            "lost_points = lambda a, rate: {m: 100 * (max(o.values()) - o.get(rate, 0)) for m, o in a.items()}",
            "leave it",
        ),
        (
            "lost_points = lambda a, rate: "
            "{m: 100 * (max(max(b.values()) for b in a.values()) - o[rate]) for m, o in a.items() if rate in o}",
            "not with the best of all methods",
        ),
    ],
    # 10 · many tasks
    "check_mixed_lora": [
        ("mixed_lora = lambda x, A, B, scale, k: x @ A[k].mT @ B[k].mT", "the scale of each row's task is missing"),
        ("mixed_lora = lambda x, A, B, scale, k: scale[0] * (x @ A[0].mT @ B[0].mT)", "the first task's tensors"),
        (
            "mixed_lora = lambda x, A, B, scale, k: "
            "torch.stack([scale[i] * x[row] @ A[i].T @ B[i].T for row, i in enumerate(k)])",
            "one number at a time",
        ),
    ],
    "check_one_stack": [
        ("one_stack = lambda parts: torch.stack([part[: min(map(len, parts))] for part in parts])", "the lowest rank"),
        ("one_stack = lambda parts: torch.stack(parts)", "raised RuntimeError"),
    ],
    "check_kept_bytes": [
        (
            "kept_bytes = lambda n_tasks, backbone, per_task: "
            "(4 * n_tasks * backbone, 4 * n_tasks * (backbone + per_task))",
            "kept once, not once for each task",
        ),
        (
            "kept_bytes = lambda n_tasks, backbone, per_task: (n_tasks * backbone, backbone + n_tasks * per_task)",
            "four bytes",
        ),
    ],
    # 11 · the bug museum
    "check_repaired_merge": [
        ("merged_weight = lambda W0, A, B, alpha: W0 + B @ A", "the scale alpha / r is missing"),
        ("merged_weight = lambda W0, A, B, alpha: W0 + alpha * B @ A", "it is not divided by r"),
        ("merged_weight = lambda W0, A, B, alpha: W0 + alpha / A.shape[1] * B @ A", "here it was d_in"),
        ("merged_weight = lambda W0, A, B, alpha: alpha / len(A) * B @ A", "the update alone"),
        ("merged_weight = lambda W0, A, B, alpha: W0.add_(alpha / len(A) * B @ A)", "W0 itself has changed"),
    ],
    "check_repaired_freeze_check": [
        (
            "def moved_although_frozen(model, train, trained):\n"
            "    train(model)\n"
            "    return {name for name, p in model.named_parameters() if p.requires_grad and name not in trained}",
            "is a promise",
        ),
        (
            "def moved_although_frozen(model, train, trained):\n"
            "    old = {name: p.detach() for name, p in model.named_parameters()}\n"
            "    train(model)\n"
            "    return {n for n, p in model.named_parameters() if n not in trained and not torch.equal(p, old[n])}",
            "shares its memory",
        ),
        (
            "def moved_although_frozen(model, train, trained):\n"
            "    old = {name: p.detach().clone() for name, p in model.named_parameters()}\n"
            "    train(model)\n"
            "    return {n for n, p in model.named_parameters() if n not in trained "
            "and not torch.allclose(p, old[n], atol=1e-4)}",
            "not with a tolerance",
        ),
        (
            "def moved_although_frozen(model, train, trained):\n"
            "    old = {name: p.detach().clone() for name, p in model.named_parameters()}\n"
            "    train(model)\n"
            "    return {n for n, p in model.named_parameters() if not torch.equal(p, old[n])}",
            "is no finding",
        ),
        (
            "def moved_although_frozen(model, train, trained):\n"
            "    old = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}\n"
            "    train(model)\n"
            "    return any(not torch.equal(dict(model.named_parameters())[n], p) for n, p in old.items())",
            "a bare yes or no",
        ),
        ("moved_although_frozen = lambda model, train, trained: set()", "called 0 times"),
    ],
    "check_repaired_dropout": [
        (
            "lora_update = lambda x, A, B, scale, p, training: scale * x @ F.dropout(A, p, training).T @ B.T",
            "one mask for the whole batch",
        ),
        ("lora_update = lambda x, A, B, scale, p, training: scale * x @ A.T @ B.T", "never applied"),
        (
            "lora_update = lambda x, A, B, scale, p, training: scale * F.dropout(x, p) @ A.T @ B.T",
            "in evaluation",
        ),
        (
            "lora_update = lambda x, A, B, scale, p, training: scale * F.dropout(x @ A.T, p, training) @ B.T",
            "or what A gives",
        ),
        (
            "lora_update = lambda x, A, B, scale, p, training: F.dropout(scale * x @ A.T @ B.T, p, training)",
            "falls on the output",
        ),
        (
            "lora_update = lambda x, A, B, scale, p, training: "
            "scale * (x * (torch.rand_like(x) > p) if training else x) @ A.T @ B.T",
            "divided by 1 - p",
        ),
    ],
    # 12 · real text
    "check_mean_pool": [
        ("mean_pool = lambda hidden, padding_mask: hidden.mean(dim=1)", "padding is averaged in"),
        ("mean_pool = lambda hidden, padding_mask: (hidden * padding_mask[:, :, None]).mean(dim=1)", "all positions"),
    ],
    "check_held_out": [
        (
            "held_out = lambda films, share: (list(range(round(share * len(films)), len(films))), "
            "list(range(round(share * len(films)))))",
            "are in both",
        ),
        ("held_out = lambda films, share: (list(range(len(films))), list(range(3)))", "in one only"),
    ],
    "check_standard_error": [
        ("standard_error = lambda accuracy, n: accuracy * (1 - accuracy) / n", "the root is missing"),
        ("standard_error = lambda accuracy, n: (accuracy * (1 - accuracy)) ** 0.5", "the spread of one sentence"),
    ],
    # 13 · real questions
    "check_choice_scores": [
        ("choice_scores = lambda q, a, s: s * torch.einsum('bd,bcd->bc', q, a)", "a long answer would win"),
        (
            "choice_scores = lambda q, a, s: "
            "torch.einsum('bd,bcd->bc', F.normalize(q, dim=-1), F.normalize(a, dim=-1))",
            "the scale is missing",
        ),
        (
            "choice_scores = lambda q, a, s: s * torch.einsum('bd,bcd->bc', q, F.normalize(a, dim=-1))",
            "the answers' lengths only",
        ),
    ],
    "check_in_batch_loss": [
        (
            "in_batch_loss = lambda q, a, s: F.cross_entropy(s * a @ q.T, torch.arange(len(q)))",
            "lets answers choose questions",
        ),
        ("in_batch_loss = lambda q, a, s: -(s * (q * a).sum(-1)).mean()", "what about the others"),
        (
            "in_batch_loss = lambda q, a, s: F.cross_entropy(s * q @ a.T, torch.zeros(len(q), dtype=torch.long))",
            "not answer 0",
        ),
    ],
    "check_drawn": [
        ("drawn = lambda answer, pool, random: random.sample(pool, 3)", "in other capitals: two choices"),
        (
            "drawn = lambda answer, pool, random: random.sample([p for p in pool if p.lower() != answer.lower()], 3)",
            "one answer twice",
        ),
        ("drawn = lambda answer, pool, random: ['Eel', 'Ray', 'Tuna']", "use `random`"),
    ],
    # 14 · a method of your own
    "check_forward": [
        ("forward = lambda self, x, *rest: self.base(x, *rest) + self.vector", "although self.enabled is False"),
        (
            "forward = lambda self, x, *rest: self.base(x) + self.vector if self.enabled else self.base(x)",
            "hand it all the other arguments",
        ),
        (
            "forward = lambda self, x, *rest: self.base(x + self.enabled * self.vector, *rest)",
            "to what the block reads",
        ),
        (
            "forward = lambda self, x, *rest: self.base(x, *rest) + self.vector * self.enabled",
            "in half precision it gives float32",
        ),
        ("forward = lambda self, x, *rest: x + self.vector", "own output is missing"),
    ],
    "check_vera_parameters": [
        ("vera_parameters = lambda rank, n_layers, d_model, d_ff: 6 * rank + 5 * d_model + d_ff", "every block"),
        (
            "vera_parameters = lambda rank, n_layers, d_model, d_ff: n_layers * 6 * (rank + d_model)",
            "feedforward.up has d_ff outputs",
        ),
        (
            "vera_parameters = lambda rank, n_layers, d_model, d_ff: "
            "n_layers * rank * (8 * d_model + 2 * (d_model + d_ff))",
            "that is LoRA",
        ),
        (
            "vera_parameters = lambda rank, n_layers, d_model, d_ff: n_layers * 2 * (rank + d_model)",
            "query and value only",
        ),
    ],
    "check_gated_start": [
        (
            "gated_start = lambda d, generator: (torch.full((d,), -6.0), torch.randn(d, generator=generator))",
            "the outputs change by up to",
        ),
        (
            "gated_start = lambda d, generator: (torch.full((d,), -200.0), torch.randn(d, generator=generator))",
            "nor ever",
        ),
        (
            "gated_start = lambda d, generator: (torch.full((d,), -60.0), torch.randn(d, generator=generator))",
            "nor ever",
        ),
        ("gated_start = lambda d, generator: (torch.full((d,), 200.0), torch.zeros(d))", "the gate does not"),
        (
            "gated_start = lambda d, generator: (torch.full((d,), float('-inf')), torch.ones(d))",
            "not finite",
        ),
    ],
    # 15 · a language model
    "check_answer_targets": [
        (
            "def answer_targets(tokens, n_prompt, length):\n"
            "    place = torch.arange(tokens.shape[1])\n"
            "    asked = (place >= n_prompt[:, None]) & (place < length[:, None])\n"
            "    return torch.where(asked, tokens, -100)",
            "its own token, which it sees",
        ),
        (
            "def answer_targets(tokens, n_prompt, length):\n"
            "    place = torch.arange(tokens.shape[1])\n"
            "    asked = (place >= n_prompt[:, None]) & (place < length[:, None]) & (tokens != 2)\n"
            "    return torch.nn.functional.pad(torch.where(asked, tokens, -100)[:, 1:], (0, 1), value=-100)",
            "never learns to stop",
        ),
        (
            "def answer_targets(tokens, n_prompt, length):\n"
            "    asked = torch.arange(tokens.shape[1]) >= n_prompt[:, None]\n"
            "    return torch.nn.functional.pad(torch.where(asked, tokens, -100)[:, 1:], (0, 1), value=-100)",
            "again and again",
        ),
        (
            "def answer_targets(tokens, n_prompt, length):\n"
            "    asked = torch.arange(tokens.shape[1]) < length[:, None]\n"
            "    return torch.nn.functional.pad(torch.where(asked, tokens, -100)[:, 1:], (0, 1), value=-100)",
            "about writing the question",
        ),
    ],
    "check_left_padded": [
        (
            "def left_padded(rows, pad_id):\n"
            "    rows = [torch.tensor(row) for row in rows]\n"
            "    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)\n"
            "    return tokens, tokens != pad_id",
            "would go on behind it",
        ),
        (
            "def left_padded(rows, pad_id):\n"
            "    width = max(map(len, rows))\n"
            "    tokens = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])\n"
            "    return tokens, tokens != pad_id",
            "but it is real",
        ),
        (
            "def left_padded(rows, pad_id):\n"
            "    width = max(map(len, rows))\n"
            "    tokens = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])\n"
            "    return tokens, torch.tensor([[i < width - len(row) for i in range(width)] for row in rows])",
            "upside down",
        ),
    ],
    "check_grouped_parameters": [
        (
            "grouped_parameters = lambda r, n, layers, d, heads, kv: (layers * 4 * r * d, layers * 2 * n * d)",
            "value has fewer outputs",
        ),
        (
            "grouped_parameters = lambda r, n, layers, d, heads, kv: "
            "(layers * r * (3 * d + d * kv // heads), layers * 2 * n * d)",
            "n_kv_heads heads, not n_heads",
        ),
        (
            "grouped_parameters = lambda r, n, layers, d, heads, kv: "
            "(layers * r * (3 * d + d * kv // heads), layers * n * d * kv // heads)",
            "keys *and* values",
        ),
    ],
    "check_rounding_loss": [
        (
            "rounding_loss = lambda W, delta: ((W + delta).bfloat16().float() - W - delta).norm() / (W + delta).norm()",
            "a share of the whole weight",
        ),
        (
            "rounding_loss = lambda W, delta: (delta.bfloat16().float() - delta).norm() / delta.norm()",
            "the rounded *sum*",
        ),
        (
            "rounding_loss = lambda W, delta: ((W + delta).bfloat16().float() - W).norm() / delta.norm()",
            "that arrives",
        ),
    ],
    # 16 · four bits
    "check_rounded": [
        (
            "rounded_by_hand = lambda w, book, block: "
            "w.abs().max() * book[(w[:, None] / w.abs().max() - book).abs().argmin(dim=1)]",
            "each block has its own",
        ),
        (
            "def rounded_by_hand(w, book, block):\n"
            "    c = w.view(-1, block).amax(dim=1).repeat_interleave(block)\n"
            "    return c * book[(w[:, None] / c[:, None] - book).abs().argmin(dim=1)]",
            "the largest *absolute* value",
        ),
        (
            "def rounded_by_hand(w, book, block):\n"
            "    c = w.view(-1, block).abs().amax(dim=1).repeat_interleave(block)\n"
            "    return book[(w[:, None] / c[:, None] - book).abs().argmin(dim=1)]",
            "multiply by it",
        ),
        (
            "def rounded_by_hand(w, book, block):\n"
            "    c = w.view(-1, block).abs().amax(dim=1).repeat_interleave(block)\n"
            "    return c * book[((w / c)[:, None] >= book - 1e-6).sum(dim=1) - 1]",
            "not the next lower one",
        ),
    ],
    "check_qlora_bytes": [
        ("qlora_bytes = lambda linear, other, trained, block: linear / 2 + 2 * other + 16 * trained", "the scales are"),
        (
            "qlora_bytes = lambda linear, other, trained, block: linear * (0.5 + 4 / block) + 2 * other + 16 * trained",
            "a scale has 8 bits",
        ),
        (
            "qlora_bytes = lambda linear, other, trained, block: "
            "linear * (0.5 + 1 / block + 1 / (64 * block)) + 2 * other + 4 * trained",
            "Adam's two means too",
        ),
    ],
    "check_loftq_factors": [
        (
            "def loftq_factors(W, Q, r, s):\n"
            "    U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] * S[:r]",
            "the scale is missing",
        ),
        (
            "def loftq_factors(W, Q, r, s):\n"
            "    U, S, Vh = torch.linalg.svd(W, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] * S[:r] / s",
            "as PiSSA starts",
        ),
        (
            "def loftq_factors(W, Q, r, s):\n"
            "    U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] / s",
            "the singular values are missing",
        ),
        (
            "def loftq_factors(W, Q, r, s):\n"
            "    U, S, Vh = torch.linalg.svd(Q - W, full_matrices=False)\n"
            "    return Vh[:r], U[:, :r] * S[:r] / s",
            "points the wrong way",
        ),
    ],
}
