#!/usr/bin/env bash
# On the machine with the device: tests, contraction beside cuBLAS and PyTorch, sanitizers.
# SPDX-License-Identifier: Apache-2.0
folder=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/device/steps.sh
source "$folder/steps.sh" "$(dirname "$folder")" 110
rm -f "$OUT"/results.{json,md}

step info 10 bash -c \
  'nvidia-smi; lscpu | grep "Model name"; ldd bench_cuda_contraction | grep cublas; ! ldd * | grep "not found"'

step tests_contraction 45 ./test_cuda_program_device --durations yes &
step tests_cifar 45 ./test_cifar_cuda_device_tape_device --durations yes &
wait

# A step for each network, so that a cut one leaves the others.
measured=(--benchmark_min_time=0.05 --benchmark_format=json)
networks=$(timeout 20 ./bench_cuda_contraction --benchmark_list_tests 2>/dev/null |
  sed -E 's,(_with_gradient)?/.*,,' | uniq)
for network in $networks; do
  step "contraction-$network" 15 \
    ./bench_cuda_contraction --benchmark_filter="^$network(_with_gradient)?/" "${measured[@]}"
done
[[ -n $networks ]] || step contraction 15 ./bench_cuda_contraction "${measured[@]}"
with_torch contraction_torch_graph 20 python3 "$work/src/contract_torch_graph.py" --json

# Side by side: none is timed.
sanitize() { # NAME TOOL PROGRAM TESTS [OPTION...]
  local name=$1 tool=$2 program=$3 tests=$4
  [[ -n $("./$program" --list-test-names-only "$tests") ]] ||
    { record "$name" "failed: $program has no tests '$tests'" 0; return; }
  needs "$name" compute-sanitizer command -v compute-sanitizer || return
  step "$name" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --print-limit 20 "${@:5}" "./$program" "$tests"
}
contraction=test_cuda_program_device
sanitize memcheck memcheck $contraction 'groups that fill tiles*,the paper*,each part*' --leak-check full &
sanitize racecheck racecheck $contraction 'the paper*' &
sanitize synccheck synccheck $contraction 'the paper*,each part*' &
training=test_cifar_cuda_device_tape_device
sanitize memcheck_cifar memcheck $training 'a training goes on*,layers\, blocks*,trainings side*' &
sanitize racecheck_cifar racecheck $training 'layers\, blocks*' &
wait

with_torch contraction_torch 30 python3 "$work/src/contract_torch_cuda.py" --rounds 1 --json
finish call1
