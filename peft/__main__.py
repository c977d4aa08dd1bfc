"""`python -m peft compare | report | doctor | convert | describe`: see `peft/experiments/cli.py`."""

from peft.experiments.cli import main

if __name__ == "__main__":
    main()
