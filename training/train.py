"""Train a model on a data set of shards.

python training/train.py --shards DIR --out RUN [--preset quickstart] [--val-queries PHOTOS]
accelerate launch training/train.py --shards DIR --out RUN ...
"""

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

from shards.console import entry
from training.interruption import Interruption
from training.one_voice import ended_at_once, one_voice


def main() -> None:
    """Read the configuration and train."""
    with one_voice(), Interruption() as interruption:
        from training.presets import read_config  # these imports take seconds, in which signals come too
        from training.torch_errors import torch_errors_told
        from training.trainer import Trainer

        config = read_config()
        with torch_errors_told():
            Trainer(config, interruption).run()


if __name__ == "__main__":
    with ended_at_once():
        entry(main)
