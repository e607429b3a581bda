#!/usr/bin/env bash
# Sets up the environment and runs the tests: bash tests/run.sh [pytest arguments]
#
# Without arguments: the linters, the type checker and every test, quick ones first, which takes half an hour or more (with
# CI=true, all but the long ones). With arguments: pytest alone, with them, such as `tests/unit/config` or `-k resume`. The
# exit code is that of a failing pytest, or 1 where only a linter failed. The environment is made first, if it is missing.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

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
    check lint-imports
fi

status=0
run() {
    echo "== pytest $*"
    python -m pytest "$@" || status=$?
}
if [ $# -gt 0 ]; then
    run "$@"
else # many at a time, but for those that measure speeds
    kept=
    if [ "${CI:-}" = true ]; then
        echo "== CI: without the tests marked long (pytest -m long)"
        kept="and not long"
    fi
    # More workers than cores, since a test that waits leaves a core to others.
    run -n 4 --dist loadfile -m "not (integration or cluster or container) $kept"
    if [ "${CI:-}" != true ]; then # property tests with other examples each time; the printed seed repeats them
        run -n auto --dist loadfile -m hypothesis --hypothesis-profile=explore --hypothesis-seed=$((RANDOM << 15 | RANDOM))
    fi
    # Slurm and sshd wait even more, so the clusters run beside the rest. Their output comes afterwards.
    clusters=$(mktemp)
    python -m pytest -m "cluster $kept" >"$clusters" 2>&1 &
    run -n 3 --dist loadfile --durations=25 -m "(integration or container) and not (cluster or alone) $kept"
    echo "== pytest -m 'cluster $kept'"
    wait $! || status=$?
    cat "$clusters"
    rm -f "$clusters"
    run -m "alone $kept"
fi
if [ "$status" -eq 0 ] && [ "$checks" -ne 0 ]; then
    echo "tests/run.sh: the tests passed, but a check above them failed" >&2
    exit 1
fi
exit "$status"
