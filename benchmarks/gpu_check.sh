#!/usr/bin/env bash
# Check the package on one GPU in less than 12 minutes, and print a Markdown table with a row for each part.
#
#   bash benchmarks/gpu_check.sh
#   OTDRG_IU_XRAY=~/iu_xray OTDRG_DINOV2=~/dinov2_small OTDRG_LLM=~/smollm2.gguf bash benchmarks/gpu_check.sh
#   bash benchmarks/gpu_check.sh --cpu      # the same parts in tiny sizes, without a GPU
#
# THIS SCRIPT HAS NOT BEEN RUN ON A GPU YET, only with --cpu: a failing part may be the script's fault.
#
# Nothing is downloaded. A part whose inputs or packages are missing is skipped and says why. Every part is a process with a
# time limit of its own, so one that fails or hangs does not stop the others. The limits sum up to 11 minutes. Logs stay in
# the folder OTDRG_CHECK (by default a new one). PYTHON names the interpreter that has the package.
# Exit status: 1 if a part failed.
set -u
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python}
folder=${OTDRG_CHECK:-$(mktemp -d)}
# Seconds for each part. A busy CPU needs more for the imports alone.
parts="versions:20 bf16:40 sdpa:35 flash_attention:40 4bit:45 fsdp2:70 paper_step:70 generation:90 phantoms:110 iu_xray:130"
factor=1
if [ "${1:-}" = --cpu ]; then
    factor=6
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
elif [ $# -gt 0 ]; then
    echo "gpu_check.sh: unknown option $1: expected --cpu or nothing" >&2
    exit 2
else
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$folder"

passed=0 failed=0 skipped=0 started=$SECONDS
for part in $parts; do
    name=${part%:*} limit=$((${part#*:} * factor)) begin=$SECONDS
    timeout --kill-after=5 "$limit" "$python" benchmarks/gpu_check.py "$name" "$folder" ${1:+"$1"} \
        >"$folder/$name.out" 2>"$folder/$name.log"
    status=$?
    [ "$name" = versions ] && [ $status -eq 0 ] && cat "$folder/$name.out" && continue
    case $status in
        0) result=passed passed=$((passed + 1)) note=$(tail -n 1 "$folder/$name.out") ;;
        3) result=skipped skipped=$((skipped + 1)) note=$(tail -n 1 "$folder/$name.out") ;;
        124 | 137) result=FAILED failed=$((failed + 1)) note="longer than $limit s" ;;
        *) result=FAILED failed=$((failed + 1)) note=$(grep -v '^\s*$' "$folder/$name.log" | tail -n 1 | cut -c -200 | tr '|' '/') ;;
    esac
    echo "| $name | $result | $((SECONDS - begin)) | $note |"
done
echo
echo "$passed passed, $failed failed, $skipped skipped in $((SECONDS - started)) seconds; logs in $folder"
[ "$failed" -eq 0 ]
