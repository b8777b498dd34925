"""What every stage stands on: stores, outputs and their leases, users' tables, the Ray cluster, MLflow.

Ray and MLflow call home by default. Here they do not: jobs, the doctor, trials and workers import this room before
either of the two, whose variables say whether to. Whoever sets ``RAY_USAGE_STATS_ENABLED=1`` or
``MLFLOW_DISABLE_TELEMETRY=false`` has it so.
"""

import os

for _name, _value in (("RAY_USAGE_STATS_ENABLED", "0"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
    os.environ.setdefault(_name, _value)
