#!/usr/bin/env bash
# On the machine with the device: tests, sanitizers, contraction beside cuBLAS and PyTorch.
# SPDX-License-Identifier: Apache-2.0
folder=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/device/steps.sh
source "$folder/steps.sh" "$(dirname "$folder")" 110
rm -f "$OUT"/results.{json,md}

step info 10 bash -c \
  'nvidia-smi; lscpu | grep "Model name"; ldd bench_cuda_contraction | grep cublas; ! ldd * | grep "not found"'

# Tests beside the sanitizers: neither is timed. Sanitized kernels take more registers, so that fewer
# blocks run at a time than were asked for; three always do.
step tests_contraction 80 ./test_cuda_program_device --durations yes &
step tests_cifar 80 ./test_cifar_cuda_network_device --durations yes &
sanitize() { # NAME TOOL PROGRAM TESTS [OPTION...]
  local name=$1 tool=$2 program=$3 tests=$4
  [[ -n $("./$program" --list-test-names-only "$tests") ]] ||
    { record "$name" "failed: $program has no tests '$tests'" 0; return; }
  needs "$name" compute-sanitizer command -v compute-sanitizer || return
  step "$name" 75 env CONCERTINA_MOST_BLOCKS=3 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "${@:5}" "./$program" "$tests"
}
contraction=test_cuda_program_device
sanitize memcheck memcheck $contraction 'groups that fill tiles*,the paper*' --leak-check full &
sanitize racecheck racecheck $contraction 'the paper*' &
sanitize synccheck synccheck $contraction 'the paper*' &
sanitize memcheck_cifar memcheck test_cifar_cuda_network_device 'a training goes on*' &
wait

step contraction 70 ./bench_cuda_contraction --benchmark_min_time=0.05 --benchmark_format=json
with_torch() {
  needs "$1" PyTorch python3 -c 'import torch' || return
  step "$@"
}
with_torch contraction_torch_graph 30 python3 "$work/src/contract_torch_graph.py" --json
with_torch contraction_torch 45 python3 "$work/src/contract_torch_cuda.py" ./bench_cuda_contraction --rounds 1
finish call1
