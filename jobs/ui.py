"""MLflow's page of the runs, on this machine only: python jobs/ui.py [database=demo/mlflow.db] [port=5000]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("ui"))
