#!/usr/bin/env bash
# Everything that a machine with many cores can tell, in about ten minutes on 16 of them:
#     pip install ".[bench]" && pip install torch==2.13.0      # and other peers, see README.md
#     bench/machine16.sh FOLDER [PEER ...]                      # peers: torch, unless others are named
# FOLDER gets a JSON file and a table for each number of threads, the scaling over threads, what options cost,
# and the thresholds that the machine speaks for. Fewer cores: fewer numbers of threads.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?FOLDER, which is made if it is not there}
shift
peers=("${@:-torch}")
mkdir -p "$folder"
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')

lscpu > "$folder/machine.txt"
python -m batchnorm info >> "$folder/machine.txt"
for threads in 1 2 4 8 16; do
    [ "$threads" -le "$cores" ] || continue
    echo "== ResNet-50's layers, $threads threads"
    python "$here/run.py" --set r50 --threads "$threads" --rounds 2 --peers "${peers[@]}" \
        --json "$folder/r50-$threads.json" | tee "$folder/r50-$threads.txt" | tail -n 20
done
echo "== scaling"
python "$here/scaling.py" threads --json "$folder/scaling.json" | tee "$folder/scaling.txt"
echo "== options"
python "$here/features.py" --set r50 --threads "$cores" --rounds 1 | tee "$folder/features.txt"
echo "== thresholds"
python -m batchnorm tune | tee "$folder/tuning.txt"
