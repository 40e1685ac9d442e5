#!/bin/sh
# SPDX-License-Identifier: MIT
# The main job of the README in fp32 and in bf16: both losses in one picture, final BPB in a table.
#
#     experiments/bf16/bf16.sh                        # 130 steps: about 9 minutes on 2 idle cores
#     experiments/bf16/bf16.sh --num-iterations 40    # further flags go to both runs
#
# Expected: the curves lie on each other, within 1 % at every step. Leaves runs/bf16/: both runs, loss.png, table.txt.
# POE_OUT names another folder. Safe to rerun: both runs start anew.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${POE_OUT:-$root/runs/bf16}
mkdir -p "$out"

for dtype in fp32 bf16; do
    rm -rf "$out/$dtype"
    "$root/build/poe-pipe" --stages 16,6,5,5 "$@" --dtype $dtype --out "$out/$dtype" >"$out/$dtype.log"
    grep '^dtype' "$out/$dtype.log" || echo "dtype     fp32"
    sed -nE 's/.*"step":([0-9]+),"loss":([0-9.]+),.*/\1 \2/p' "$out/$dtype/metrics.jsonl" >"$out/$dtype.loss"
done
paste -d ' ' "$out/fp32.loss" "$out/bf16.loss" >"$out/both.loss"

bpb() { # dtype: of all stages together, after the last step
    sed -nE 's/.*"bpb":.*"aggregate":([0-9.]+)\},"accuracy".*/\1/p' "$out/$1/metrics.jsonl" | tail -n 1
}
awk -v fp32="$(bpb fp32)" -v bf16="$(bpb bf16)" '
    { off = ($4 - $2) / $2 * 100; if (off < 0) off = -off; if (off > most) { most = off; at = $1 } a = $2; b = $4 }
    END {
        printf "dtype  last loss  final BPB\nfp32   %9.4f  %9.4f\nbf16   %9.4f  %9.4f\n", a, fp32, b, bf16
        printf "largest difference of a loss %.3f %% (step %d), of the final BPB %+.3f %%\n", most, at, (bf16 / fp32 - 1) * 100
    }' "$out/both.loss" | tee "$out/table.txt"

cd "$out" && gnuplot <<'PLOT'
set terminal pngcairo size 1200,675 font "Sans,12" noenhanced
set output "loss.png"
set multiplot title "The main job in fp32 and in bf16"
set lmargin 10
set rmargin 3
set grid
set size 1, 0.66
set origin 0, 0.3
set ylabel "loss (nats, mean of the stages)"
plot "both.loss" using 1:2 with lines linewidth 7 linecolor "#9ecae1" title "fp32", \
     "both.loss" using 1:4 with lines linewidth 1.5 linecolor "#d6301d" title "bf16"
set size 1, 0.31
set origin 0, 0
set xlabel "step"
set ylabel "bf16 - fp32 (%)"
unset key
plot "both.loss" using 1:(($4 - $2) / $2 * 100) with lines linewidth 1.5 linecolor "#d6301d", \
     0 with lines linecolor "#9ecae1"
unset multiplot
PLOT
echo "picture   $out/loss.png"
