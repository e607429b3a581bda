#!/usr/bin/env bash
# Audit the locked dependencies before a release: bash launch/audit.sh [FOLDER]
#
# Asks an advisory service about every package of both lock files, and writes their packages with all hashes as
# CycloneDX bills of materials, to be published with the wheel: FOLDER/pretrain.cpu.cdx.json and
# FOLDER/pretrain.cuda.cdx.json (default folder: dist). Exits with 1 where there is a known advisory or a package could
# not be looked up. Needs the package registry and the service, which is https://api.osv.dev unless PRETRAIN_OSV_URL
# names another.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

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
    # PYTHONWARNINGS hides its warning that a lock file has no dependency graph.
    PYTHONWARNINGS=ignore "$scratch/bin/cyclonedx-py" requirements --pyproject "$ROOT/pyproject.toml" --output-reproducible --validate \
        --output-file "$OUTPUT/pretrain.$build.cdx.json" "$lock"
    echo "audit.sh: wrote $OUTPUT/pretrain.$build.cdx.json"
    "$scratch/bin/pip-audit" --strict --progress-spinner off --disable-pip --require-hashes --requirement "$lock" \
        --vulnerability-service osv ${PRETRAIN_OSV_URL:+--osv-url "$PRETRAIN_OSV_URL"} || status=1
done
exit "$status"
