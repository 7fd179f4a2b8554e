#!/usr/bin/env bash
# The rounds on real leaves, on one GPU; README.md beside this file says what came of them.
#
#   bash results/leaves/run.sh DATA_DIR WORK_DIR
#
# Reads   DATA_DIR: train.csv, test.csv, sample_submission.csv, images/. Needs the packages of requirements.txt in the
#         `python` of the PATH, `patch`, and memory of the GPU for 20 trainings at once (each about 2 GB).
# Writes  WORK_DIR/seed=N/: log directories and CSV files of each seed; by_row/: the edited recipe; image_cache/.
#         Typed again after an interruption it goes on.
# Expect  the five steps, the same with soft labels by row number, and both again with two other seeds on the same folds.
#         The folds of a round, and several rounds, train at once on the one GPU, each in a process of its own.
set -euo pipefail

REPO=$(realpath "$(dirname "$0")/../..") DATA=$(realpath "$1") WORK=$(realpath -m "$2")
DEVICE=${DEVICE:---gpus 0}
SETTINGS="--image_size 96 96 --max_epochs 10 --weights none --fold_seed 2020"
export OMP_NUM_THREADS=2

say() { echo "[$(date +%T)] $*"; }

all() {  # PROCESSES…: waits for every one; fails if one has failed
    local failed=0 pid
    for pid in "$@"; do wait "$pid" || failed=1; done
    return $failed
}

train() (  # FOLDER_OF_TRAIN.PY SEED LOG_DIR OPTIONS…
    cd "$WORK/seed=$2"
    pids=()
    for fold in 0 1 2 3 4; do
        python "$1/train.py" --train_batch_size 32 $SETTINGS --seed "$2" --log_dir "$3" --folds $fold "${@:4}" \
            --data_dir "$DATA" --cache_dir "$WORK/image_cache" $DEVICE --num_workers 1 --keep_checkpoints 1 \
            > "$3-fold=$fold.txt" 2>&1 &
        pids+=($!)
    done
    all "${pids[@]}" || { tail -n 3 "$3"-fold=*.txt; exit 1; }
    say "seed $2, $3: $(tail -qn 1 "$3"-fold=*.txt | grep 'out-of-fold AUC of' | tail -n 1)"
)

predict() (  # FOLDER SCRIPT OPTIONS…
    cd "$WORK/$1"
    python "$REPO/$2" "${@:3}" --cache_dir "$WORK/image_cache" $DEVICE --num_workers 4 --val_batch_size 64 \
        > "$2.txt" 2>&1 || { tail -n 3 "$2.txt"; exit 1; }
    say "$1: $2"
)

step_1_and_2() {  # SEED
    mkdir -p "$WORK/seed=$1"
    train "$REPO" "$1" logs
    predict "seed=$1" generate_soft_labels.py
}

step_3() {  # SEED
    train "$REPO" "$1" logs_submit_distill --soft_labels_filename soft_labels.csv
}

by_row() {  # SEED: step 3 as the original's code has it
    train "$WORK/by_row" "$1" logs_by_row --soft_labels_filename soft_labels.csv
}

step_4_and_5() {
    predict seed=2020 generate_distilled_submission.py
    (cd "$WORK/seed=2020" && python "$REPO/blend.py")
}

step_4_and_5_by_row() {
    mkdir -p "$WORK/seed=2020/by_row"
    predict seed=2020/by_row generate_distilled_submission.py --log_dir ../logs_by_row
    (cd "$WORK/seed=2020/by_row" && python "$REPO/blend.py" --submissions ../submission.csv submission_distill.csv)
}

main() {
    if [ ! -e "$WORK/by_row" ]; then
        rm -rf "$WORK/by_row.tmp"
        mkdir -p "$WORK/by_row.tmp"
        (cd "$REPO" && cp -r ./*.py analysis harness "$WORK/by_row.tmp")
        (cd "$WORK/by_row.tmp" && patch -p1 --quiet < "$REPO/experiments/soft_labels_by_row.diff")
        mv "$WORK/by_row.tmp" "$WORK/by_row"  # only when it is whole
    fi
    say "hard labels, three seeds"
    pids=()
    for seed in 2020 1 2; do
        step_1_and_2 $seed &
        pids+=($!)
    done
    all "${pids[@]}"
    say "soft labels, aligned and by row number"
    (step_3 2020 && step_4_and_5) &
    pids=($!)
    (by_row 2020 && step_4_and_5_by_row) &
    pids+=($!)
    predict seed=2020 error_analysis.py --worst 30 &
    all "${pids[@]}" $!
    say "the same of the other seeds"
    pids=()
    for seed in 1 2; do
        step_3 $seed &
        pids+=($!)
        by_row $seed &
        pids+=($!)
    done
    all "${pids[@]}"
    say "done"
}

main
