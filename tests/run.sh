#!/usr/bin/env bash
# Sets up the environment and runs the tests: bash tests/run.sh [pytest arguments]
#
# Without arguments: the linters, the type checker and every test, quick ones first (with CI=true: but the long ones).
# With arguments: pytest alone, with them. The exit code is pytest's last failing one, or 1 where only a linter failed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
bash launch/setup_env.sh
PATH="${PRETRAIN_VENV:-$ROOT/.venv}/bin:$PATH"
export PATH

checks=0
check() {
    echo "== $*"
    "$@" || checks=1
}

if [ $# -eq 0 ]; then
    check ruff check .
    check ruff format --check .
    check mypy pretrain/
fi

status=0
run() {
    echo "== pytest $*"
    python -m pytest "$@" || status=$?
}
if [ $# -gt 0 ]; then
    run "$@"
else # quick tests on all cores, most of which wait; those with real processes one after another
    slow="integration or cluster or container"
    run -n auto --dist loadfile -m "not ($slow)"
    if [ "${CI:-}" = true ]; then
        echo "== CI: without the tests marked long (pytest -m long)"
        run --durations=25 -m "($slow) and not long"
    else
        run -m "$slow"
    fi
fi
if [ "$status" -eq 0 ] && [ "$checks" -ne 0 ]; then
    echo "tests/run.sh: the tests passed, but a check above them failed" >&2
    exit 1
fi
exit "$status"
