#!/usr/bin/env bash
# Create or update the virtual environment of this project: bash launch/setup_env.sh
#
# The environment is .venv beside this folder, or $PRETRAIN_VENV. It gets exactly the packages that
# requirements.cpu.lock or requirements.cuda.lock lists; a file whose sha256 is not listed is not installed. torch is
# the CPU build where there is no NVIDIA GPU, and otherwise the build that fits the driver; PRETRAIN_TORCH=cpu|cuda
# overrides this choice. PRETRAIN_TORCH=existing uses the torch of the active Python (or of PRETRAIN_PYTHON): the
# environment is layered over that Python, which stays unchanged, and holds only the packages that are missing there. An
# environment that is up to date is left alone. `bash launch/setup_env.sh --lock` runs launch/lock.sh, which regenerates
# the lock files.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PRETRAIN_VENV:-$ROOT/.venv}
LOCK=$ROOT/requirements.cpu.lock # main() changes it to requirements.cuda.lock for the CUDA build
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
TORCH_CUDA126_INDEX=https://download.pytorch.org/whl/cu126
LOG=$VENV.log

# Run pip without questions, progress bars and advice. The user's settings must not change what it installs or where.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT PYTHONHOME PYTHONPATH

say() { echo "environment: $*"; }
fail() {
    echo "setup_env.sh: $*" >&2
    exit 1
}

find_python() {
    local candidate
    if [ "$(command -v python3)" = "$VENV/bin/python3" ] && [ -e "$VENV/.existing" ]; then
        cat "$VENV/.existing" # this environment itself is active, so use the Python that it is layered over
        return
    fi
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
        cpu | existing) echo "$PRETRAIN_TORCH" ;;
        cuda) cuda_build ;;
        *) fail "PRETRAIN_TORCH=$PRETRAIN_TORCH is unknown; allowed: cpu, cuda, existing" ;;
        esac
    elif nvidia-smi -L >/dev/null 2>&1; then
        cuda_build
    else
        echo cpu
    fi
}

# Print the build of torch that this machine's GPUs and driver can run. `cuda` is the build for CUDA 13.0 from the
# package registry (driver 580 or newer, compute capability 7.5 or newer). `cuda126` is the build for CUDA 12.6 (driver
# 525 or newer, compute capability 5.0 to 9.0). Without a driver, as when a container image is built, it is `cuda`.
cuda_build() {
    local query=driver_version,compute_cap version capability driver=999 oldest=999 newest=0
    while IFS=', ' read -r version capability; do
        driver=${version%%.*} capability=${capability/./}
        [ "$capability" -ge "$oldest" ] || oldest=$capability
        [ "$capability" -le "$newest" ] || newest=$capability
    done < <(nvidia-smi --query-gpu=$query --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+, [0-9]+[.][0-9]$')
    if [ "$driver" -ge 580 ] && [ "$oldest" -ge 75 ]; then
        echo cuda
    elif [ "$driver" -lt 525 ]; then
        fail "the NVIDIA driver is of version $driver, and torch $(locked torch) needs 525 or newer; update it, or use the CPU: PRETRAIN_TORCH=cpu"
    elif [ "$newest" -le 90 ]; then
        echo cuda126
    else
        fail "no build of torch $(locked torch) fits driver $driver and GPUs of compute capability $(decimal "$oldest") to $(decimal "$newest"): the one for CUDA 13.0 needs driver 580 and 7.5 or newer, the one for CUDA 12.6 ends at 9.0; update the driver, or use the CPU: PRETRAIN_TORCH=cpu"
    fi
}

decimal() { echo "${1%?}.${1: -1}"; }

# pip ARGUMENTS...: run pip with its output in the log, and print a progress line from time to time.
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

# locked NAME: print the version of a package in the lock file, without its build suffix.
locked() { sed -n "s/^$1==\([^ ;+]*\).*/\1/p" "$LOCK"; }

# locked_lines NAME...: print the lines of these packages in the lock file, with their hashes.
locked_lines() { awk -v names=" $* " '/^[^ ]/ { split($0, pin, "=="); keep = index(names, " " pin[1] " ") } keep' "$LOCK"; }

# install_hashed REQUIREMENTS [ARGUMENT...]: install packages, refusing files whose hash is not listed and dependencies
# that are not listed. Three packages exist as source only; they are built with the environment's setuptools, which is
# listed too, and not with the newest one.
install_hashed() {
    pip install --no-compile --no-deps --require-hashes --no-build-isolation --use-pep517 \
        --only-binary :all: --no-binary antlr4-python3-runtime,deepspeed,rouge-score "${@:2}" -r "$1"
}

install_torch() {
    local version built pin
    version=$(locked torch)
    pin=$(mktemp)
    locked_lines torch >"$pin"
    say "torch $version ($1 build)"
    case $1 in
    cuda)
        install_hashed "$pin" || fail "torch $version could not be installed; see $LOG"
        ;;
    cuda126) # its files are only on PyTorch's index and in no lock file, so their hashes are not checked
        pip install --no-compile --index-url "$TORCH_CUDA126_INDEX" "torch==$version+cu126" ||
            fail "torch==$version+cu126, which this machine's driver and GPUs need, could not be installed from $TORCH_CUDA126_INDEX; see $LOG"
        ;;
    cpu)
        install_hashed "$pin" || install_hashed "$pin" --index-url "$TORCH_CPU_INDEX" ||
            fail "torch $version+cpu, with a hash of $LOCK, was found neither at pip's own sources nor at $TORCH_CPU_INDEX; see $LOG"
        ;;
    esac
    rm -f "$pin"
    built=$("$VENV/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")' 2>>"$LOG") ||
        fail "torch was installed and cannot be imported; see the end of $LOG"
    [ "$built" = "${1%126}" ] || fail "a build of torch for $1 was asked for, and pip found one for $built; see $LOG"
}

install_lock() {
    local parts
    say "$(grep -c '^[^ #]' "$LOCK") packages, the log is $LOG"
    parts=$(mktemp -d)
    locked_lines setuptools packaging >"$parts/builders"
    awk '/^[^ ]/ { keep = !/^torch==/ } keep' "$LOCK" >"$parts/rest"
    { install_hashed "$parts/builders" && install_hashed "$parts/rest"; } ||
        fail "a package could not be installed: $(grep '^ERROR' "$LOG" | tail -n 1); see $LOG"
    rm -rf "$parts"
    install_torch "$1"
    "$VENV/bin/python" -m pip check >>"$LOG" 2>&1 || fail "the packages do not fit together; see the end of $LOG"
}

# ---- over a Python that has torch ------------------------------------------------------------------------------------

# existing_torch PYTHON: print the version of torch that a Python has. Fails where this project does not support it.
existing_torch() {
    "$1" - "$ROOT/pyproject.toml" <<'EOF'
import re, sys

bounds = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', open(sys.argv[1], encoding="utf-8").read())
a, b, c, d = map(int, bounds.groups())


def fail(problem):
    sys.exit(
        f"setup_env.sh: PRETRAIN_TORCH=existing: {sys.executable} has {problem}; activate another environment, name its "
        "Python with PRETRAIN_PYTHON, or leave PRETRAIN_TORCH out, which installs torch too"
    )


try:
    import torch
except ImportError as error:
    fail(f"no torch that can be imported ({error})")
version = torch.__version__
number = tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))
is_early = re.match(r"[\d.]+(a|b|rc|dev)", version) is not None  # 2.10.0a0 comes before 2.10
if not (a, b) <= number < (c, d) or (number == (a, b) and is_early):
    fail(f"torch {version}, and this project works with {a}.{b} or newer and older than {c}.{d}")
print(version)
EOF
}

# make_overlay PYTHON: create an environment that sees all packages of another Python and has its own packages besides.
make_overlay() {
    say "making $VENV over $1, which stays as it is"
    "$1" -m venv --clear --system-site-packages "$VENV"
    pip uninstall -y setuptools # Python 3.11 adds an old setuptools, which would hide that of the other Python
    "$1" - "$VENV" <<'EOF'
import glob, site, sys

if sys.prefix != sys.base_prefix:  # the other Python is itself an environment, which --system-site-packages would skip
    (own,) = glob.glob(f"{sys.argv[1]}/lib/python*/site-packages")
    with open(f"{own}/existing.pth", "w", encoding="utf-8") as file:
        file.writelines(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
EOF
    printf '%s\n' "$1" >"$VENV/.existing"
}

# install_missing VERSION: install what is missing beside this torch. An existing package stays if the packages that
# depend on it accept its version; all others are installed as locked.
install_missing() {
    local folder missing
    folder=$(mktemp -d)
    say "what is missing beside torch $1, the log is $LOG"
    locked_lines setuptools packaging >"$folder/pins"
    install_hashed "$folder/pins" || fail "what builds packages could not be installed; see $LOG"
    # An added package can need a newer version of an existing one, which can need a newer version of another.
    for _ in 1 2 3; do
        missing=$(missing_packages)
        [ -n "$missing" ] || break
        # shellcheck disable=SC2086 # the names are split on purpose
        locked_lines $missing >"$folder/pins"
        install_hashed "$folder/pins" ||
            fail "a package could not be installed beside torch $1: $(grep '^ERROR' "$LOG" | tail -n 1); see $LOG"
    done
    rm -rf "$folder"
    "$VENV/bin/python" -c "import deepspeed, hydra, torch; assert torch.__version__ == '$1'" >>"$LOG" 2>&1 ||
        fail "torch $1 cannot be used from $VENV; see the end of $LOG"
}

# Print the packages of the lock file, except torch, that the environment lacks or has in an unsuitable version. The
# version must suit pyproject.toml with all extras but two, and the packages that were added.
missing_packages() {
    "$VENV/bin/python" - "$LOCK" "$ROOT/pyproject.toml" <<'EOF'
import sys, tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

lock, project = sys.argv[1:]
lines = [line.rstrip("\\\n") for line in open(lock, encoding="utf-8") if "==" in line]
pins = [pin for pin in map(Requirement, lines) if pin.name != "torch" and (pin.marker is None or pin.marker.evaluate())]
locked = {pin.name for pin in pins}
there, needs = {}, []
for found in metadata.distributions():  # the environment's own packages come first
    name = canonicalize_name(found.metadata["Name"])
    if name not in there:
        there[name] = found.version
        needs += (found.requires or []) if str(found.locate_file("")).startswith(sys.prefix) else []
settings = tomllib.load(open(project, "rb"))["project"]
extras = settings["optional-dependencies"]
del extras["gcs"]  # about 20 packages for a single kind of URL
del extras["liger"]  # it needs triton, which the CPU build of torch does not include
missing = locked - set(there)
for need in map(Requirement, settings["dependencies"] + sum(extras.values(), []) + needs):
    name = canonicalize_name(need.name)
    if name in there and (need.marker is None or need.marker.evaluate({"extra": ""})):
        if not need.specifier.contains(there[name], prereleases=True):
            missing |= {name} & locked
print(*sorted(missing))
EOF
}

# ----------------------------------------------------------------------------------------------------------------------

# Compile all packages in parallel, which pip does not do. Without this, the first `import deepspeed` takes 12 s longer.
compile_packages() {
    say "compiling to byte code"
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" "$ROOT"/{pretrain,data_tools,launch} >>"$LOG" 2>&1 ||
        true # some files are templates that do not compile, and the checkout may be read-only
}

# make_environment PYTHON: create the environment, or keep an existing one of the same Python version.
make_environment() {
    local version
    version=$("$1" -c 'import sys; print(sys.version_info[:2])')
    if [ -e "$VENV/.existing" ] || [ "$("$VENV/bin/python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
        say "making $VENV with $("$1" --version)"
        "$1" -m venv --clear "$VENV"
    fi
}

main() {
    local python flavor wanted torch=""
    [ "${1:-}" != --lock ] || exec bash "$ROOT/launch/lock.sh"
    [ $# -eq 0 ] || fail "unknown argument $1; allowed: --lock"
    python=$(find_python)
    check_machine "$python"
    flavor=$(torch_flavor)
    [ "$flavor" != cuda ] || LOCK=$ROOT/requirements.cuda.lock
    wanted="$(sha256sum <"$LOCK" | cut -d' ' -f1) $flavor $("$python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"
    if [ "$flavor" = existing ]; then
        case $python in
        "$VENV"/*) fail "PRETRAIN_TORCH=existing: $VENV is active, which is this project's own environment; activate the one whose torch is meant" ;;
        esac
        torch=$(existing_torch "$python")
        wanted+="$python $torch"
    fi

    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock" # of two commands that run at the same time, only one creates the environment
    flock -n 9 || { say "another command is making it; waiting" && flock 9; }
    if [ "$(cat "$VENV/.pretrain" 2>/dev/null)" = "$wanted" ]; then
        say "$VENV is up to date"
        return
    fi
    : >"$LOG"
    rm -f "$VENV/.pretrain"
    if [ "$flavor" = existing ]; then
        make_overlay "$python"
        install_missing "$torch"
    else
        make_environment "$python"
        install_lock "$flavor"
    fi
    compile_packages
    printf '%s\n' "$wanted" >"$VENV/.pretrain"
    say "ready after $SECONDS s"
}

main "$@"
