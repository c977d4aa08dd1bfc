"""`python -m peft …` with runs of three steps, for the test of the command line."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft import compare
from peft.__main__ import main

compare.ENTRIES = {
    name: dataclasses.replace(entry, steps=dict.fromkeys(entry.steps, 3)) for name, entry in compare.ENTRIES.items()
}
main()
