"""gpt2/train_gpt2.py whose last steps take a second each, so that a test interrupts it in time on any hardware.

The tests start it in place of the script, with the same flags.
"""

import time

from common import cli
from gpt2 import train_gpt2

LINGER_FROM = 220  # of the 240 steps of tests/test_resume.py, which interrupts before


class LingeringTrainer(train_gpt2.Trainer):
    def accumulate_gradients(self, batches):
        time.sleep(self.step >= LINGER_FROM)
        return super().accumulate_gradients(batches)


if __name__ == "__main__":
    train_gpt2.Trainer = LingeringTrainer
    cli(train_gpt2.main)
