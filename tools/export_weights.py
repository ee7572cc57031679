"""Convert an export to safetensors and ONNX: the same as `t2idist convert export`."""

from __future__ import annotations

import sys

from t2idist.convert.cli import export_main as main

if __name__ == "__main__":
    sys.exit(main())
