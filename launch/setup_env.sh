#!/usr/bin/env bash
# Makes or updates the virtual environment of this project: bash launch/setup_env.sh
#
# It holds exactly what requirements.lock lists, in .venv beside this folder or in $PRETRAIN_VENV. torch is the
# CPU build where there is no NVIDIA GPU; PRETRAIN_TORCH=cpu|cuda says otherwise. An environment that is up to
# date is left alone. `bash launch/setup_env.sh --lock` writes requirements.lock anew from pyproject.toml.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PRETRAIN_VENV:-$ROOT/.venv}
LOCK=$ROOT/requirements.lock
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
LOG=$VENV.log

# pip without questions, bars and advice, and without a user's configuration changing what is installed where
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
unset PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME PYTHONPATH

say() { echo "environment: $*"; }
fail() {
    echo "setup_env.sh: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PRETRAIN_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer was not found (looked at: ${PRETRAIN_PYTHON:-python3 and python3.11 to 3.13}); install it, or name it: PRETRAIN_PYTHON=/path/to/python3"
}

check_machine() {
    local compiler
    for compiler in "${CXX:-c++}" g++ clang++; do
        command -v "$compiler" >/dev/null && break
    done
    command -v "$compiler" >/dev/null ||
        fail "a C++ compiler was not found (torch and DeepSpeed compile kernels with it); on Debian or Ubuntu: apt-get install g++"
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$1 lacks the venv module; on Debian or Ubuntu: apt-get install python3-venv"
}

torch_flavor() {
    if [ -n "${PRETRAIN_TORCH:-}" ]; then
        case $PRETRAIN_TORCH in
        cpu | cuda) echo "$PRETRAIN_TORCH" ;;
        *) fail "PRETRAIN_TORCH=$PRETRAIN_TORCH is unknown; allowed: cpu, cuda" ;;
        esac
    elif nvidia-smi -L >/dev/null 2>&1; then
        echo cuda
    else
        echo cpu
    fi
}

# pip ARGUMENTS...: everything goes to the log; now and then a line says how far it is.
pip() {
    local seen=0 line started=$SECONDS
    "$VENV/bin/python" -m pip "$@" 2>&1 | tee -a "$LOG" | while IFS= read -r line; do
        case $line in
        Collecting* | Processing*)
            seen=$((seen + 1))
            [ $((seen % 20)) -ne 0 ] || say "$seen packages fetched, $((SECONDS - started)) s"
            ;;
        Installing\ collected*) say "installing them, $((SECONDS - started)) s" ;;
        esac
    done
}

# The version that the lock file has of a package.
locked() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$LOCK"; }

install_torch() {
    local version
    version=$(locked torch)
    say "torch $version ($1 build)"
    if [ "$1" = cuda ]; then
        # The CUDA libraries come along as torch's own exactly pinned dependencies.
        pip install --no-compile "torch==$version" || fail "torch==$version could not be installed; see $LOG"
    else
        pip install --no-compile --no-deps "torch==$version+cpu" ||
            pip install --no-compile --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$version+cpu" ||
            fail "torch==$version+cpu was found neither at pip's own sources nor at $TORCH_CPU_INDEX; see $LOG"
    fi
}

install_lock() {
    local rest
    say "$(grep -c == "$LOCK") packages, the log is $LOG"
    rest=$(mktemp)
    grep -v '^torch==' "$LOCK" >"$rest"
    # Two packages come as source (antlr4-python3-runtime, deepspeed): what is locked builds them, not what is newest.
    { pip install "setuptools==$(locked setuptools)" "packaging==$(locked packaging)" &&
        pip install --no-compile --no-deps --no-build-isolation --use-pep517 -r "$rest"; } ||
        fail "a package could not be installed: $(grep '^ERROR' "$LOG" | tail -n 1); see $LOG"
    rm -f "$rest"
    install_torch "$1"
    "$VENV/bin/python" -m pip check >>"$LOG" 2>&1 || fail "the packages do not fit together; see the end of $LOG"
}

# In parallel, which pip does not do; without it the first `import deepspeed` takes 12 s longer.
compile_packages() {
    say "compiling to byte code"
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" "$ROOT"/{pretrain,data_tools,launch} >>"$LOG" 2>&1 ||
        true # some files are templates, and the checkout may be read-only
}

# Resolves pyproject.toml in a new environment and writes what came out of it.
write_lock() {
    local scratch
    scratch=$(mktemp -d)
    "$1" -m venv "$scratch"
    say "resolving pyproject.toml with all extras but gcs and liger"
    "$1" - "$ROOT/pyproject.toml" >"$scratch/wanted" <<'EOF'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
del extras["gcs"]  # some 20 packages for one kind of URL
del extras["liger"]  # needs triton, which a torch for CPUs does not bring
print(*project["dependencies"], *sum(extras.values(), []), sep="\n")
EOF
    "$scratch/bin/python" -m pip install -qq --no-compile -r "$scratch/wanted" ||
        fail "pyproject.toml could not be resolved"
    {
        echo "# The exact set that is tested: every extra but gcs and liger. Written by: bash launch/setup_env.sh --lock"
        echo "# No hashes: torch is another file on a machine with a GPU than on one without, and pip checks either"
        echo "# all packages or none."
        "$scratch/bin/python" -m pip freeze --all | sed -E -e '/^pip==/d' -e 's/^(torch==[^+]*)\+.*/\1/'
        echo
    } >"$LOCK.new"
    sed -i '${/^$/d}' "$LOCK.new"
    mv "$LOCK.new" "$LOCK"
    rm -rf "$scratch"
    say "wrote $LOCK"
}

main() {
    local python flavor wanted
    python=$(find_python)
    check_machine "$python"
    if [ "${1:-}" = --lock ]; then
        write_lock "$python"
        return
    fi
    [ $# -eq 0 ] || fail "unknown argument $1; allowed: --lock"
    flavor=$(torch_flavor)
    wanted="$(sha256sum <"$LOCK" | cut -d' ' -f1) $flavor $("$python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"

    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock" # two commands started at once make one environment
    flock -n 9 || { say "another command is making it; waiting" && flock 9; }
    if [ "$(cat "$VENV/.pretrain" 2>/dev/null)" = "$wanted" ]; then
        say "$VENV is up to date"
        return
    fi
    : >"$LOG"
    rm -f "$VENV/.pretrain"
    if ! "$VENV/bin/python" -c "import sys; sys.exit(sys.version_info[:2] != $("$python" -c 'import sys; print(tuple(sys.version_info[:2]))'))" 2>/dev/null; then
        say "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV"
    fi
    install_lock "$flavor"
    compile_packages
    printf '%s\n' "$wanted" >"$VENV/.pretrain"
    say "ready after $SECONDS s"
}

main "$@"
