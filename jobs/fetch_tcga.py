"""Slides of TCGA from the GDC: python jobs/fetch_tcga.py organs=[BRCA,LUAD] slides_per_organ=50 output=slides/."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("fetch_tcga"))
