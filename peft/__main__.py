"""`python -m peft compare | report | doctor`: see `peft/experiments/cli.py`."""

from peft.experiments.cli import main

if __name__ == "__main__":
    main()
