"""What every stage stands on: stores, outputs and their leases, users' tables, the Ray cluster, MLflow."""
