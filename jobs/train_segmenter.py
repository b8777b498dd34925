"""Labelled images to weights of the segmenter: python jobs/train_segmenter.py data=[...] output=..."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("train_segmenter"))
