#!/usr/bin/env bash
# The main job on a fresh machine, from nothing: text -> tokenizer -> shards -> training that stops half way and
# resumes -> evaluation -> export -> a generated sample.
#
#   bash launch/quickstart.sh [--corpus PATH...] [--out DIR] [--steps N]
#
#   --corpus PATH...  your text: folders or files (.jsonl, .txt, .parquet, also compressed). Without it, the Python
#                     code and documentation that is installed on this machine.
#   --out DIR         where everything goes; ./quickstart-out. A second run goes on with what is there.
#   --steps N         length of the training run instead of the default, which takes some minutes on two cores
set -Eeuo pipefail
trap 'echo "quickstart: line $LINENO failed: $BASH_COMMAND" >&2' ERR # what no sentence below foresaw

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PRETRAIN_VENV:-$ROOT/.venv}
STOPPED=75 # exit code of a run that was asked to stop and has saved its state

say() { printf '\n== %s\n' "$*"; }
fail() {
    printf '\nquickstart: %s\n' "$*" >&2
    exit 1
}
trap 'trap - ERR; echo "quickstart: interrupted; the same command goes on from here" >&2; exit 130' INT
usage() {
    sed -n '/^#   bash/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit "$1"
}

OUT=quickstart-out
CORPUS=()
STEPS=
while [ $# -gt 0 ]; do
    case $1 in
    --corpus)
        shift
        while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
            [ -e "$1" ] || fail "--corpus $1 does not exist; give folders or files that do"
            CORPUS+=("$(realpath "$1")")
            shift
        done
        [ ${#CORPUS[@]} -gt 0 ] || fail "--corpus needs at least one path"
        ;;
    --out | --steps)
        [ $# -ge 2 ] || fail "$1 needs a value"
        if [ "$1" = --out ]; then OUT=$2; else STEPS=$2; fi
        shift 2
        ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
    esac
done
case $STEPS in *[!0-9]* | 0 | 1) fail "--steps $STEPS is not a whole number from 2 on" ;; esac

mkdir -p "$OUT/logs" || fail "$OUT cannot be made; choose another folder with --out"
OUT=$(realpath "$OUT")
RUN=$OUT/run
LOGS=$OUT/logs
exec 8>"$OUT/.lock"
flock -n 8 || fail "another quickstart is at work in $OUT; wait for it, or choose another folder with --out"

asked="${CORPUS[*]:-python} steps=${STEPS:-default}"
if [ -e "$OUT/asked" ] && [ "$(cat "$OUT/asked")" != "$asked" ]; then
    fail "$OUT holds a quickstart with other arguments ($(cat "$OUT/asked")); repeat those, or choose another --out"
fi
printf '%s\n' "$asked" >"$OUT/asked"

# A value as Hydra reads it, whatever signs a path holds.
quoted() {
    local text=${1//\\/\\\\}
    printf "'%s'" "${text//\'/\\\'}"
}

# stage NAME EXPECTED_CODE COMMAND...: progress on the screen without what is for programs, all of it in the log
stage() {
    local name=$1 expected=$2 log=$LOGS/$1.log started=$SECONDS code=0
    shift 2
    printf '$ %s\n\n' "$*" >"$log"
    # The reading end outlives an interrupt, so that it is over only when every rank has saved and said so.
    "$@" 2>&1 8>&- | tee -ai "$log" | (trap '' INT && grep --line-buffered -vE "$CHATTER" || true) || code=${PIPESTATUS[0]}
    if [ "$code" -ne "$expected" ]; then
        fail "stage $name ended with exit code $code: $(grep -iE '^(error|.*Error):' "$log" | tail -n 1 || true)
The log is $log; the same command again goes on from here."
    fi
    printf '%s\t%s\n' "$name" $((SECONDS - started)) >>"$OUT/stages.tsv"
}
CHATTER='^\[[0-9-]+ [0-9:,]+\] \[(INFO|WARNING|ERROR)\] \[[a-z_]+\.py|^\[W[0-9]{3,}|^\{"run_dir"'

reused() {
    echo "already there: $1"
    printf '%s\t\n' "$2" >>"$OUT/stages.tsv"
}
checkpoint_at() { [ -e "$RUN/checkpoints/$(printf 'step-%08d' "$1")/COMPLETE" ]; }
newest_step() {
    local marker newest=0
    for marker in "$RUN"/checkpoints/step-*/COMPLETE; do
        [ ! -e "$marker" ] || newest=$(basename "$(dirname "$marker")") # the glob is sorted, the last one is the newest
    done
    echo $((10#${newest#step-}))
}

# --- 1. environment ---

say "1 of 6: the environment"
: >"$OUT/stages.tsv"
started=$SECONDS
bash "$ROOT/launch/setup_env.sh" || fail "the environment could not be made; the sentence above says why"
printf 'environment\t%s\n' $((SECONDS - started)) >>"$OUT/stages.tsv"
PATH=$VENV/bin:$PATH
cd "$ROOT"

# Two processes, or one where there is a single GPU.
ranks=2
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
[ "$gpus" -ne 1 ] || ranks=1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TORCH_EXTENSIONS_DIR=$OUT/torch_extensions # not shared: a stale lock file in it hangs every later load
rm -rf "$TORCH_EXTENSIONS_DIR"

# --- 2. corpus ---

say "2 of 6: the corpus"
if [ ${#CORPUS[@]} -gt 0 ]; then
    inputs=$(for path in "${CORPUS[@]}"; do quoted "$path"; printf ,; done)
    options=() # a vocabulary that suits the size of the text
else
    inputs=python
    options=(python_max_bytes="${QUICKSTART_MAX_BYTES:-24000000}" tokenizer.vocab_size=8192)
fi
if [ -e "$OUT/corpus/manifest.json" ]; then
    reused "$OUT/corpus" corpus
else
    stage corpus 0 python -m data_tools.prepare "input=[${inputs%,}]" "output=$(quoted "$OUT/corpus")" "${options[@]}"
fi
[ -e "$OUT/corpus/heldout/manifest.json" ] ||
    fail "the text is a single document, so nothing can be held out to test the model on; give several files, or JSON lines"

# --- 3. training, in two halves ---

settings=(run_dir="$(quoted "$RUN")" data.manifest="$(quoted "$OUT/corpus/manifest.json")"
    evaluation.manifest="$(quoted "$OUT/corpus/heldout/manifest.json")" experiment=quickstart
    ${STEPS:+total_steps="$STEPS" schedule.warmup_steps=1})
steps=$(python launch/train.py "${settings[@]}" --cfg job | sed -n 's/^total_steps: //p') ||
    fail "the configuration of the training run is wrong; the sentence above says how"
half=$((steps / 2))
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
train() {
    local name=$1 expected=$2
    shift 2
    stage "$name" "$expected" deepspeed --num_gpus "$ranks" --master_port "$(free_port)" launch/train.py "${settings[@]}" "$@"
}

say "3 of 6: training on $ranks processes, $steps steps; it is stopped after step $half and resumes"
if checkpoint_at "$steps"; then
    reused "$RUN, finished" train-first-half
    reused "its second half too" train-second-half
else
    done_steps=$(newest_step)
    if [ "$done_steps" -ge "$half" ]; then
        reused "$RUN up to step $done_steps" train-first-half
    else
        train train-first-half "$STOPPED" stop_at_step="$half"
        echo "stopped as asked, with exit code $STOPPED; the same command goes on:"
    fi
    train train-second-half 0
fi

# --- 4 to 6. what the model is worth, in other programs' format, and what it says ---

last=$RUN/checkpoints/$(printf 'step-%08d' "$steps")/COMPLETE
say "4 of 6: the loss on held-out text"
if [ "$OUT/evaluation.json" -nt "$last" ]; then
    reused "$OUT/evaluation.json" evaluate
else
    stage evaluate 0 python launch/eval.py run_dir="$(quoted "$RUN")" \
        input="[$(quoted "$OUT/corpus/heldout/documents.jsonl.gz")]" json=true
    tail -n 1 "$LOGS/evaluate.log" >"$OUT/evaluation.json"
fi

say "5 of 6: the Hugging Face folder"
if [ "$OUT/export/config.json" -nt "$last" ]; then
    reused "$OUT/export" export
else
    rm -rf "$OUT/export"
    stage export 0 python launch/export.py run_dir="$(quoted "$RUN")" output="$(quoted "$OUT/export")"
fi

say "6 of 6: a sample"
prompt=() # of your text: the start of a document
[ ${#CORPUS[@]} -gt 0 ] || prompt=(prompt="def ")
stage generate 0 python launch/generate.py run_dir="$(quoted "$RUN")" "${prompt[@]}" max_new_tokens=64 seed=1

python launch/quickstart_summary.py output="$(quoted "$OUT")" || fail "the summary could not be made from $OUT"
