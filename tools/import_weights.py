"""Convert the published weights of a system to exports: the same as `t2idist convert import`."""

from __future__ import annotations

import sys

from t2idist.convert.cli import import_main as main

if __name__ == "__main__":
    sys.exit(main())
