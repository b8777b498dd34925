"""A few labels to a class for every nucleus: python jobs/classify.py labels=labels.csv embeddings=... [next=20]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("classify"))
