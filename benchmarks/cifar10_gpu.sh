#!/usr/bin/env bash
# CIFAR-10 on one GPU: the MS-ResNet-18 teacher, the W4U4 baseline and the W4U4 MD-SNN student at T = 4, then their
# integers in the C engine, and a table.
#
#   benchmarks/cifar10_gpu.sh --data_path data                       the python archive, downloaded if it is not there
#   benchmarks/cifar10_gpu.sh --data imagefolder --data_path images  images/train/CLASS/*, images/test/CLASS/*
#
#   --save_path DIR      runs and results (runs/cifar10)
#   --max-minutes N      stop after N minutes and keep everything; the same command goes on where it stopped
#   --epochs A,B         of the teacher, and of each student (24,12)
#   --device cpu         without a GPU: float32, for a look only
#   --shortened          an epoch each of a small network at T = 2: does everything run?
#   --compile            torch.compile; pays off where epochs are many
#   --                   what follows goes to every `mdsnn train`
#
# Needs torch >= 2.11 and Python 3.11 or 3.12. Both students start from the teacher's weights and take equally many
# epochs, so that the table shows what the distillation adds. Results: DIR/table.json and DIR/table.md.
set -euo pipefail

data=CIFAR10 data_path=data save=runs/cifar10 minutes= epochs=24,12 device=cuda shortened= compile=
while (($#)); do
    case ${1//_/-} in
        --data) data=$2; shift 2 ;;
        --data-path) data_path=$2; shift 2 ;;
        --save-path) save=$2; shift 2 ;;
        --max-minutes) minutes=$2; shift 2 ;;
        --epochs) epochs=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --shortened) shortened=1; shift ;;
        --compile) compile=--compile; shift ;;
        --) shift; break ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) echo "cifar10_gpu.sh: unknown option $1 (--help lists them)" >&2; exit 2 ;;
    esac
done

mdsnn() { "${PYTHON:-python}" -m mdsnn "$@"; }
source=(--data "$data" --data-path "$data_path")
# 256 samples an update; SGD at 0.1 for the teacher, 0.02 for students that start from it
common=("${source[@]}" --device "$device" --seed 1234 --set label_smoothing=0.1 --set flip=true --set cutout=8)
network=(--model-depth 18 --time-window 4 --batch-size 256)
[[ $device == cpu ]] || common+=(--precision bf16)
if [[ $shortened ]]; then
    network=(--blocks 1,1 --widths 8,16 --time-window 2 --batch-size 64) epochs=1,1
fi
common+=(${compile:+"$compile"} "$@")
started=$SECONDS

# train NAME OPTION...: the run in $save/NAME, finished or taken up where it was; leaves the script where time is up
train() {
    local name=$1 left=()
    shift
    [[ -e $save/$name/model.ckpt ]] && return
    if [[ $minutes ]]; then
        left=(--max-minutes "$(awk -v n="$minutes" -v s=$((SECONDS - started)) 'BEGIN { n -= s / 60; print (n > 0.01 ? n : 0.01) }')")
    fi
    echo "== $name" >&2
    mdsnn train "${common[@]}" "$@" "${left[@]}" --save-path "$save/$name" --resume
    if [[ ! -e $save/$name/model.ckpt ]]; then
        echo "cifar10_gpu.sh: $minutes minutes are over; the same command goes on" >&2
        exit 0
    fi
}

guided=(--teacher-path "$save/teacher/model.ckpt" --bits 4 --lr 0.02 --warmup-epochs 1 --epochs "${epochs#*,}")
train teacher --paper-setting original "${network[@]}" --lr 0.1 --warmup-epochs 2 --epochs "${epochs%,*}"
train baseline --paper-setting student "${network[@]}" "${guided[@]}"
train mdsnn --paper-setting qamd --loss CLK "${network[@]}" "${guided[@]}"

for student in baseline mdsnn; do
    mdsnn export "$save/$student/model.ckpt" -o "$save/$student.mdsnn" --force >/dev/null
done
# the C engine against the frozen torch network: every integer of a thousand test images
mdsnn verify "$save/mdsnn.mdsnn" "${source[@]}" --checkpoint "$save/mdsnn/model.ckpt" --executors native,torch \
    --limit "$([[ $shortened ]] && echo 50 || echo 1000)" --save-dir "$save" --json "$save/verify.json" --force
"${PYTHON:-python}" "$(dirname "$0")/runs_table.py" "$save"
