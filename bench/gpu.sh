#!/bin/sh
# Everything that bench/ measures on a CUDA device, in one command. Never run so far: no GPU was at hand.
#
#   bench/gpu.sh                       the packaged checkpoint and stdlib-pairs
#   bench/gpu.sh --data ./mrpc         --model and --data go to all of its commands
#   bench/gpu.sh --print               what it would run, and nothing else
#
# Both sides get TF32 in fp32 (torch's own switch in the environment) and bf16 through autocast; torch's best settings
# are its fused AdamW, ours are rows of similar length on top. Then a step captured as CUDA graphs over a few padded
# lengths, with pinned batches copied ahead, beside the same step run eagerly.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
print=
if [ "${1:-}" = --print ]; then
    print=yes
    shift
fi

plain() { printf %s "$1" | LC_ALL=C tr -c '[:print:]' '?'; }

wanted=
for argument; do
    if [ -n "$wanted" ]; then
        wanted=
        continue
    fi
    case $argument in
        --model | --data) wanted=$argument ;;
        --model=* | --data=*) ;;
        *)
            printf 'gpu.sh: %s: it takes --print first, then --model and --data\n' "$(plain "$argument")" >&2
            exit 2
            ;;
    esac
done
if [ -n "$wanted" ]; then
    echo "gpu.sh: $wanted: a value is missing" >&2
    exit 2
fi

run() {
    echo "+ TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 $(plain "$*")"
    if [ -z "$print" ]; then
        TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 "$@"
    fi
}

if ! gpus=$("$python" -P -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null); then
    echo "gpu.sh: $(plain "$python") cannot import torch; name a python that can: PYTHON=.venv/bin/python bench/gpu.sh" >&2
    exit 2
fi
if [ -z "$print" ] && [ "$gpus" = 0 ]; then
    echo "gpu.sh: torch sees no CUDA device here; run it where there is one, or see its commands with --print" >&2
    exit 2
fi

run "$python" "$here/throughput.py" fp32 bf16 best bestplain batch4 batch8 batch16 batch32 length32 length128 length256 \
    --device cuda --nproc 1 --steps 200 --pairs 9 --record gpu "$@"
if [ "$gpus" -gt 1 ]; then
    run "$python" "$here/throughput.py" "ranks$gpus" --device cuda --nproc "$gpus" --steps 200 --record gpu "$@"
fi
run "$python" "$here/captured.py" --device cuda --precision no "$@"
run "$python" "$here/captured.py" --device cuda --precision bf16 "$@"
