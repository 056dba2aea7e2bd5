#!/bin/sh
# The tests marked gpu and the command of every table in docs/gpu-figures.md, one after the other; what each prints goes to FOLDER.
#
#     benchmarks/on_a_gpu.sh FOLDER        some ten minutes on an H200 with 16 cores (all but the last three steps: 543 s)
#
# PYTHON names the interpreter, WORKERS the test processes. Goes on when one fails, and ends with 1 then.
set -u
[ $# -eq 1 ] || { sed -n 2,6p "$0"; exit 2; }
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
layer=$(mktemp -d) && trap 'rm -rf "$layer"' EXIT
failed=0

step() {
    name=$1
    shift
    began=$(date +%s)
    "$@" > "$out/$name.log" 2>&1 && state=done || { state=FAILED; failed=1; }
    echo "$name: $state, $(($(date +%s) - began)) s"
}

step tests "$python" -m pytest -m gpu -q -n "${WORKERS:-12}" --dist worksteal
step lightning "$python" benchmarks/lightning.py --json "$out/lightning.json"
step silu "$python" -m benchmarks.silu
step moe "$python" benchmarks/moe.py --json "$out/moe.json"
step one_layer_tp8 "$python" -W ignore benchmarks/one_layer.py --tp 8 --profile --json "$out/one_layer_tp8.json"
step one_layer_tp1 "$python" -W ignore benchmarks/one_layer.py --tp 1 --json "$out/one_layer_tp1.json"
step quantize "$python" -m benchmarks.quantize_gpu --json "$out/quantize.json"
step make_layer "$python" benchmarks/make_layer.py "$layer/model" --experts 4
step runs "$python" -m benchmarks.quantize_gpu --only runs --checkpoint "$layer/model" --json "$out/runs.json"
step decode "$python" -m mxconv bench decode --shape m1-tp8 --scheme w4afp8 --device cuda
step tensor_parallel "$python" benchmarks/tensor_parallel.py --parts layer --json "$out/tensor_parallel.json"
step load "$python" benchmarks/tensor_parallel.py --parts load --schemes none w4afp8 --model "$layer/model" --json "$out/load.json"
step verify "$python" benchmarks/tensor_parallel.py --parts verify --schemes w4afp8 --json "$out/verify.json"
exit $failed
