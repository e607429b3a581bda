#!/usr/bin/env bash
# Before a release: bash launch/audit.sh [FOLDER]
#
# Asks an advisory service about every package of both lock files, and writes what is in them, with all hashes, as a
# CycloneDX bill of materials: FOLDER/pretrain.cpu.cdx.json and FOLDER/pretrain.cuda.cdx.json (FOLDER is dist where it
# is not given), to be published beside the wheel. Ends with 1 where an advisory is known or a package could not be
# asked for. Needs the package registry and the service: PRETRAIN_OSV_URL names another than https://api.osv.dev.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUTPUT=${1:-$ROOT/dist}
TOOLS=(pip-audit==2.10.1 cyclonedx-bom==7.5.0)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch"
"$scratch/bin/python" -m pip install -qq --disable-pip-version-check "${TOOLS[@]}"
mkdir -p "$OUTPUT"
status=0
for build in cpu cuda; do
    lock=$ROOT/requirements.$build.lock
    # It warns that a lock file has no graph of who needs whom.
    PYTHONWARNINGS=ignore "$scratch/bin/cyclonedx-py" requirements --pyproject "$ROOT/pyproject.toml" --output-reproducible --validate \
        --output-file "$OUTPUT/pretrain.$build.cdx.json" "$lock"
    echo "audit.sh: wrote $OUTPUT/pretrain.$build.cdx.json"
    "$scratch/bin/pip-audit" --strict --progress-spinner off --disable-pip --require-hashes --requirement "$lock" \
        --vulnerability-service osv ${PRETRAIN_OSV_URL:+--osv-url "$PRETRAIN_OSV_URL"} || status=1
done
exit "$status"
