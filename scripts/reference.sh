#!/usr/bin/env bash
# One stage of a paper recipe for people who come from the reference's README; called by pretrain.sh (stage 1),
# pretrain_lvlm.sh (2) and finetune_lvlm.sh (3). What is finished is reused. docs/coming-from-the-reference.md
#
#   WORK_DIR              folder with data/ (the reference's layout)   default: where you are
#   MODEL                 row of recipes/paper                         default: llama3.1-8b
#   DATA                  blip558k, sharegpt4v or pixmo                default: blip558k
#   METHOD                vanilla, cal, pmo, cmo, dpa or dpa-prior     default: dpa
#   RECIPE                any recipe instead of recipes/paper/$MODEL/$DATA.yaml
#   LLM_VERSION           folder or hub id of the LLM                  default: the recipe's
#   VISION_MODEL_VERSION  folder or hub id of the vision tower         default: the recipe's
#   TEXT_ONLY             stage 1's text, if it lies in its own file   default: the reference's file, if it is there
#   NUM_GPUS              ranks                                        default: the GPUs that nvidia-smi lists, else 1
#   RUN_NAME              folder below runs/                           default: $MODEL-$DATA-$METHOD
#   PYTHON                                                             default: python
# Any further setting: bash scripts/pretrain.sh stages.proxy.micro_batch=8
# Exit code: that of the command that failed, which is named with its stage. 2: settings or data are wrong.
set -euo pipefail

stage=$1
shift

failed() { # COMMAND CODE
  echo "$0: stage $stage: $1 ended with exit code $2; what is wrong is said above" >&2
  exit "$2"
}

refuse() { # MESSAGE
  echo "$0: stage $stage: $1" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${MODEL:-llama3.1-8b} data=${DATA:-blip558k} method=${METHOD:-dpa}
recipe=${RECIPE:-$root/recipes/paper/$model/$data.yaml}
[[ $recipe == /* ]] || recipe=$PWD/$recipe
[[ -z ${LLM_VERSION:-} ]] || model=$(basename "$LLM_VERSION")
name=${RUN_NAME:-$model-$data-$method}
[[ -d ${WORK_DIR:-.} ]] || refuse "WORK_DIR $WORK_DIR is not a folder"
cd "${WORK_DIR:-.}"

trains=yes
for given in "$@"; do
  case $given in
    --dry-run) trains=no ;;
    name=* | output=* | method=* | methods=*)
      refuse "set RUN_NAME, WORK_DIR or METHOD instead of $given: the results' names follow them"
      ;;
  esac
done

text=${TEXT_ONLY:-}
if [[ -z $text && $data == blip558k && -z ${RECIPE:-} ]]; then
  text=data/LLaVA-Pretrain/blip_laion_cc_sbu_558k_text_only.json
  [[ -f $text ]] || text=
fi

settings=(name="$name" output=runs method="$method")
[[ -z ${LLM_VERSION:-} ]] || settings+=(model.llm="$LLM_VERSION")
[[ -z ${VISION_MODEL_VERSION:-} ]] || settings+=(model.vision_tower="$VISION_MODEL_VERSION")
[[ -z $text ]] || settings+=(data.proxy_captions.path="$text")

python=${PYTHON:-python}
gpus=${NUM_GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)}
[[ $gpus =~ ^[0-9]+$ ]] || refuse "NUM_GPUS is $gpus: give a number"
run=(-m dpa run "$recipe" --until "$stage" "${settings[@]}" "$@")
if [[ $trains == no ]]; then
  "$python" "${run[@]}" || failed "dpa run --dry-run" $?
  exit
fi
launch=("$python")
if ((gpus > 1)); then
  # torchrun makes 1 of every exit code: what is wrong with settings and data is found before, in one process, and what
  # that has counted is not counted again
  "$python" "${run[@]}" --dry-run >/dev/null || failed "dpa run --dry-run" $?
  launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
fi
"${launch[@]}" "${run[@]}" || failed "dpa run" $?
"$python" -m dpa reference "runs/$name" --out checkpoints || failed "dpa reference" $?
