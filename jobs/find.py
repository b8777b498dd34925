"""The nuclei most like a nucleus: python jobs/find.py embeddings=... cell=ID|image=crop.png [k=50] [cells=...]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("find"))
