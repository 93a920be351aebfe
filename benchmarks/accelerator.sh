#!/usr/bin/env bash
# Everything that matters on one GPU, most important first, in pieces of at most 9 minutes.
#
#     benchmarks/accelerator.sh DATA.npz [PIECE ...]      e.g. benchmarks/accelerator.sh cifar10.npz 1 2
#     SMALL=1 benchmarks/accelerator.sh DATA.npz          minutes on a CPU, to try the script
#
# DATA.npz holds CIFAR-10: images, labels, test_images, test_labels. Each piece writes its own JSON
# into benchmarks/results, so finished pieces are kept if a later one is stopped. Piece 7 takes longer:
# run it again, and it resumes. Needs only JAX, the packages of setup.cfg (except TFDS), and PyTorch for
# the comparisons.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
data=${1:?usage: benchmarks/accelerator.sh DATA.npz [PIECE ...]}
shift
(($#)) || set -- 1 2 3 4 5 6 7 8
pieces=$*
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [ -n "${SMALL:-}" ]; then
  out=$(mktemp -d)
  work=$out
  cifar=(--width=4 --limit=600 --epochs=3)
  resnet=(--model=resnet18 --width=8 --batch=8 --side=64 --rows=2000)
  step=(--width=8 --batch=32 --rows=2000)
  losses=(--rows 5000 --batch=32 --noise=256)
  knn=(--queries=200 --rows=5000 --k=50)
  parts=(--batch=16 --rows=5000 --queries=200 --side=32)
else
  out=benchmarks/results
  work=runs
  cifar=(--dtype=bfloat16)
  resnet=(--model=resnet50 --batch=256 --side=224 --rows=1281167)
  step=(--batch=512)
  losses=(--rows 50000 1281167 10000000 --batch=256)
  knn=(--queries=50000 --rows=1281167)
  parts=()
fi

piece() {  # NUMBER WHAT COMMAND...
  case " $pieces " in *" $1 "*) ;; *) return ;; esac
  echo "== $1: $2"
  local started=$SECONDS
  if timeout 540 "$python" "${@:3}"; then
    echo "== $1 done in $((SECONDS - started)) s"
  else
    echo "== $1 FAILED after $((SECONDS - started)) s"
    failed=1
  fi
}
failed=0

piece 1 "CIFAR step beside PyTorch" benchmarks/train_step.py "${step[@]}" \
  --output="$out/gpu_step_cifar.json"
piece 2 "CIFAR-10, the full schedule, softmax" benchmarks/cifar10.py --data="arrays:$data" \
  "${cifar[@]}" --output="$out/gpu_cifar10_published.json"
piece 3 "the parts of a step, beside their model" benchmarks/parts.py "${parts[@]}" \
  --output="$out/gpu_parts.json"
piece 3 "losses" benchmarks/loss_step.py "${losses[@]}" --output="$out/gpu_loss_step.json"
piece 3 "losses, bfloat16 bank" benchmarks/loss_step.py "${losses[@]}" --bank=bfloat16 \
  --output="$out/gpu_loss_step_bfloat16.json"
piece 3 "kNN" benchmarks/knn.py "${knn[@]}" --output="$out/gpu_knn.json"
piece 4 "ResNet-50 step beside PyTorch" benchmarks/train_step.py "${resnet[@]}" \
  --output="$out/gpu_step_resnet50.json"
piece 5 "CIFAR-10, the fast recipe" benchmarks/cifar10.py --data="arrays:$data" --recipe=fast \
  "${cifar[@]}" --output="$out/gpu_cifar10_fast.json"
piece 6 "CIFAR-10, the full schedule, NCE" benchmarks/cifar10.py --data="arrays:$data" \
  --recipe=nce "${cifar[@]}" --output="$out/gpu_cifar10_nce.json"
piece 7 "CIFAR-10, the full schedule, two views" benchmarks/cifar10.py --data="arrays:$data" \
  --recipe=plus "${cifar[@]}" --workdir="$work/cifar10_plus" --output="$out/gpu_cifar10_plus.json"
piece 8 "the cost of a second view" benchmarks/two_views.py "${step[@]}" \
  --output="$out/gpu_two_views.json"
ls -l "$out"
exit "$failed"
