#!/usr/bin/env bash
# Install the package with its development tools into the active Python environment and run every
# test: notebooks, then modules.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet --editable '.[dev]'
export OMP_NUM_THREADS=1  # notebooks run side by side, one process per core
nbdev_test --n_workers "$(python -c 'import os; print(os.cpu_count())')"
pytest --quiet tests
