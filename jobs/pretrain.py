"""Cells to an encoder: python jobs/pretrain.py cells=... output=... ssl=mocov3 views=a1_gray encoder=vit_s8."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("pretrain"))
