"""Cells to an encoder: python jobs/pretrain.py cells=... output=... ssl=mocov3 views=a1_gray encoder=vit_s8."""

import sys

from lemon.pretrain.config import PretrainConfig
from lemon.runtime.job import run_job


def main(config: PretrainConfig) -> int:
    from lemon.pretrain import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("pretrain", PretrainConfig, main))
