"""Cells to an encoder: python jobs/pretrain.py cells=... output=... ssl=mocov3 views=a1_gray encoder=vit_s8."""

import sys

from lemon.config import run_job
from lemon.pretrain.config import PretrainConfig


def main(config: PretrainConfig) -> int:
    from lemon.pretrain import launch  # imports torch

    return launch.main(config)


if __name__ == "__main__":
    sys.exit(run_job("pretrain", PretrainConfig, main))
