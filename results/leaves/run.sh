#!/usr/bin/env bash
# The recipe on real leaves from ImageNet weights, on two cores; README.md beside this file says what came of it.
#
#   bash results/leaves/run.sh DATA_DIR WEIGHTS WORK_DIR
#
# Reads   DATA_DIR: train.csv, test.csv, sample_submission.csv, images/; WEIGHTS: what tools.convert_weights has written.
#         Needs `python` with the packages of requirements.txt and timm, and `patch`.
# Writes  WORK_DIR/seed=N/: log directories and CSV files of each seed; WORK_DIR/NAME/: the recipe with an experiment;
#         WORK_DIR/compare_….txt: the trainings compared.
#         Typed again after an interruption it goes on, with the copies of the recipe that it made first.
set -euo pipefail

REPO=$(realpath "$(dirname "$0")/../..") DATA=$(realpath "$1") WEIGHTS=$(realpath "$2") WORK=$(realpath -m "$3")
MORE="--data_dir $DATA --num_workers 1 --cache_dir $WORK/image_cache"
TRAIN="--train_batch_size 32 --backbone timm/tf_efficientnet_lite0 --weights $WEIGHTS --image_size 128 128
       --max_epochs 10 --keep_checkpoints 1 --fold_seed 2020"

recipe() {  # NAME: a copy of the recipe with that experiment
    [ -e "$WORK/$1" ] && return
    rm -rf "$WORK/$1.tmp" && mkdir -p "$WORK/$1.tmp"
    (cd "$REPO" && cp -r ./*.py analysis harness "$WORK/$1.tmp")
    (cd "$WORK/$1.tmp" && patch -p1 --quiet -i "$REPO/experiments/$1.diff")
    mv "$WORK/$1.tmp" "$WORK/$1"  # only when it is whole
}

run() {  # FOLDER RECIPE SCRIPT OPTIONS…: once; what it prints goes to FOLDER/SCRIPT-….txt
    mkdir -p "$WORK/$1" && cd "$WORK/$1"
    local log; log=$3-$(echo "${@:2}" | sha256sum | cut -c1-8).txt
    [ -e "$log" ] && return
    echo "[$(date +%T)] $1: ${*:3}"
    python "$2/$3" "${@:4}" > "$log.part" 2>&1 || { tail -n 3 "$log.part"; exit 1; }
    mv "$log.part" "$log"
    grep -oE "(out-of-fold AUC of|wrote).*" "$log" | tail -n 3 || true
}

round_1() {  # SEED
    run "seed=$1" "$REPO" train.py $TRAIN $MORE --seed "$1"
    run "seed=$1" "$REPO" generate_soft_labels.py $MORE
}

round_2() {  # SEED
    run "seed=$1" "$REPO" train.py $TRAIN $MORE --seed "$1" --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill
    run "seed=$1" "$REPO" generate_distilled_submission.py $MORE
    run "seed=$1" "$REPO" blend.py
}

experiment() {  # NAME LOG_DIR SEED OPTIONS…: a training with it; its submission goes to a folder of the log directory's name
    local folder=seed=$3/${2#logs_}
    recipe "$1"
    run "seed=$3" "../$1" train.py $TRAIN $MORE --seed "$3" --log_dir "$2" "${@:4}"
    run "$folder" "../../$1" generate_distilled_submission.py $MORE --log_dir "../$2"
}

by_row() {  # SEED
    experiment soft_labels_by_row logs_by_row "$1" --soft_labels_filename soft_labels.csv
    run "seed=$1/by_row" "$REPO" blend.py --submissions ../submission.csv submission_distill.csv
}

flip_tta() {  # SEED
    recipe flip_tta
    run "seed=$1/flip_tta" ../../flip_tta generate_distilled_submission.py $MORE --log_dir ../logs_submit_distill
}

tta_out_of_fold() {  # LOG_DIR SEED: without TTA, with that of the recipe, by flips
    recipe flip_tta
    run "seed=$2/tta" "$REPO" generate_soft_labels.py $MORE --log_dir "../$1"
    PYTHONPATH=$REPO run "seed=$2/tta" "$REPO/results/leaves" tta_out_of_fold.py $MORE --log_dir "../$1"
    PYTHONPATH=$WORK/flip_tta run "seed=$2/tta/flips" "$REPO/results/leaves" tta_out_of_fold.py $MORE --log_dir "../../$1"
}

rank_blend() {  # SEED
    recipe rank_blend
    run "seed=$1" ../rank_blend blend.py --output submission_mix_ranks.csv
}

compare() {  # NAME PATHS…
    (cd "$WORK" && python "$REPO/compare.py" "${@:2}" > "compare_$1.txt")
}

all_seeds() {  # LOG_DIR
    echo "seed=2020/$1 seed=1/$1 seed=2/$1"
}

for seed in 2020 1 2; do
    round_1 $seed
    round_2 $seed
    rank_blend $seed
    by_row $seed
done
flip_tta 1
experiment label_smoothing logs_smoothing 2020
experiment stratified_folds logs_stratified 2020
tta_out_of_fold logs_stratified 2020
experiment pseudo_labels logs_pseudo 2020 --soft_labels_filename soft_labels.csv

compare seeds $(all_seeds logs)
compare distillation $(all_seeds logs_submit_distill) --against $(all_seeds logs)
compare by_row $(all_seeds logs_by_row) --against $(all_seeds logs)
compare alignment $(all_seeds logs_by_row) --against $(all_seeds logs_submit_distill)
compare experiments seed=2020/logs seed=2020/logs_smoothing seed=2020/logs_stratified
compare pseudo_labels seed=2020/logs_submit_distill seed=2020/logs_pseudo
