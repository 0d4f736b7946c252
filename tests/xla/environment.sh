#!/usr/bin/env bash
# Make the environment that the XLA tests want, and run them in it.
#
#     bash tests/xla/environment.sh [FOLDER] [pytest's arguments]
#
# FOLDER (build/xla) becomes a virtual environment of 7 GB, since the torch of that time brings CUDA's libraries along; it
# is used again where it exists. torch_xla 2.9.0 is the last one, and loads with torch 2.9 only. That is older than what
# the package asks for, so that the package is not installed there: the tests put the repository on PYTHONPATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder=${1:-build/xla}
shift $(($# > 0))
python=$folder/bin/python

if ! [ -x "$python" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
fi
if ! "$python" -c "import pytest, torch_xla, transformers" 2>/dev/null; then
    "$python" -m pip install --quiet torch==2.9.1 torch-xla==2.9.0 transformers==5.23.0 numpy pytest
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD"
exec "$python" -m pytest tests/xla -p no:cacheprovider "$@"
