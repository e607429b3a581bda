#!/usr/bin/env bash
# The quickstart, for a fresh machine: text -> tokenizer -> shards -> training that stops halfway and resumes ->
# evaluation -> export -> a generated sample. It takes at most ten minutes on two ordinary cores.
#
#   bash launch/quickstart.sh [--corpus PATH...] [--out DIR] [--minutes M | --steps N]
#
# `--help` describes the options. This script only finds a Python; launch/quickstart_job.py does the work.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for python in ${PRETRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" "$ROOT/launch/quickstart_job.py" "$@"
    fi
done
echo "quickstart: Python 3.11 or newer was not found (looked at: ${PRETRAIN_PYTHON:-python3 and python3.11 to 3.13}); install it, or name it: PRETRAIN_PYTHON=/path/to/python3" >&2
exit 1
