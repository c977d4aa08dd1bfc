"""`python -m peft …` with runs of three steps, for the test of the command line."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft.experiments import compare
from peft.experiments.cli import main

compare.ENTRIES = {
    name: dataclasses.replace(entry, steps=dict.fromkeys(entry.steps, 3)) for name, entry in compare.ENTRIES.items()
}
main()
