"""Train a model on a data set of shards.

python training/train.py --shards DIR --out RUN [--preset quickstart] [--val-queries DIR]
accelerate launch training/train.py --shards DIR --out RUN ...
"""

from shards.console import entry
from training.presets import read_config
from training.trainer import Trainer


def main() -> None:
    """Read the configuration and train."""
    config = read_config()
    Trainer(config).run()


if __name__ == "__main__":
    entry(main)
