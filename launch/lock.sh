#!/usr/bin/env bash
# Regenerate the lock files from pyproject.toml: bash launch/lock.sh [arguments of `uv pip compile`, such as --upgrade]
#
# requirements.cuda.lock is what uv resolves for Linux and every tested Python, with the sha256 of every file that the
# package registry has for a release. requirements.cpu.lock is the same without the CUDA libraries and with torch's CPU
# builds. Versions change only where pyproject.toml requires it, or with --upgrade or --upgrade-package NAME. uv is
# installed into a temporary environment.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CUDA=$ROOT/requirements.cuda.lock
CPU=$ROOT/requirements.cpu.lock
UV=uv==0.13.9
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

fail() {
    echo "lock.sh: $*" >&2
    exit 1
}

# block NAME FILE: print the lines of a package in a lock file.
block() { awk -v name="$1" '/^[^ ]/ { keep = ($0 ~ "^" name "==") } keep' "$2"; }

heading() {
    echo "# $1 Every extra but gcs and liger, for Linux and Python 3.11 to 3.13."
    echo "# Written by: bash launch/lock.sh"
}

# torch_for_cpus VERSION: print the pin of torch's CPU builds with their hashes, from PyTorch's index. Where the index
# cannot be reached and the version has not changed, the hashes come from the existing lock file.
torch_for_cpus() {
    local wheel="torch-$1%2Bcpu-cp(311|312|313)-cp(311|312|313)-manylinux[0-9a-z_]*.whl#sha256=[0-9a-f]{64}" hashes
    hashes=$(curl -fsS --max-time 60 "$TORCH_CPU_INDEX/torch/" 2>/dev/null | grep -oE "$wheel" | sed 's/.*#sha256=/    --hash=sha256:/' | sort -u) || true
    if [ -n "$hashes" ]; then
        echo "torch==$1+cpu \\"
        sed '$!s/$/ \\/' <<<"$hashes"
    else
        block torch "$CPU" | grep -q "^torch==$1+cpu " ||
            fail "the hashes of torch $1+cpu could not be read from $TORCH_CPU_INDEX/torch/, and $CPU has another version"
        block torch "$CPU"
    fi
}

main() {
    local scratch version
    scratch=$(mktemp -d)
    trap 'rm -rf "'"$scratch"'"' EXIT
    python3 -m venv "$scratch/venv"
    "$scratch/venv/bin/python" -m pip install -qq --disable-pip-version-check "$UV" || fail "$UV could not be installed"
    cp "$CUDA" "$scratch/lock" 2>/dev/null || true # uv keeps the versions of this file
    # Only the package registry is used, because other indexes of this machine are not available to others.
    (cd "$ROOT" && "$scratch/venv/bin/uv" --quiet pip compile pyproject.toml --extra data --extra cloud --extra eval --extra finetune --extra export --extra serve --extra dev \
        --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --output-file "$scratch/lock" "$@" >/dev/null) ||
        fail "pyproject.toml could not be resolved"
    # Remove the markers that hold for every environment that uv resolves for (tool.uv in pyproject.toml).
    sed -E -i -e "s/ ; python_full_version < '3.14' and / ; /" -e "s/ and sys_platform == 'linux'//g" -e "s/ ; sys_platform == 'linux'//" "$scratch/lock"
    version=$(sed -nE 's/^torch==([^ ]+).*/\1/p' "$scratch/lock")
    torch_for_cpus "$version" >"$scratch/torch"
    {
        heading "The exact set that is tested, with torch for CUDA 13.0."
        cat "$scratch/lock"
    } >"$CUDA"
    {
        heading "The exact set that is tested, with torch for CPUs."
        awk -v torch="$scratch/torch" '
            /^[^ ]/ { keep = ($0 !~ /^(nvidia-|cuda-|triton==|torch==)/) }
            /^torch==/ { while ((getline line <torch) > 0) print line }
            keep' "$scratch/lock"
    } >"$CPU"
    echo "lock.sh: wrote $CUDA and $CPU"
}

main "$@"
