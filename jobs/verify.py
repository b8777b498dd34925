"""Whether all that LEMON wrote in an output is still as it was written: python jobs/verify.py output=..."""

import sys

from lemon.runtime.job import run_job
from lemon.runtime.verify import VerifyConfig


def main(config: VerifyConfig) -> int:
    from lemon.runtime import verify

    return verify.main(config)


if __name__ == "__main__":
    sys.exit(run_job("verify", VerifyConfig, main))
