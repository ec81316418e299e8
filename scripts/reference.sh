#!/usr/bin/env bash
# One stage of a paper recipe for people who come from the reference's README; called by pretrain.sh (stage 1),
# pretrain_lvlm.sh (2) and finetune_lvlm.sh (3). What is finished is reused. docs/coming-from-the-reference.md
#
#   WORK_DIR              folder with data/ (the reference's layout)   default: where you are
#   MODEL                 row of recipes/paper                         default: llama3.1-8b
#   DATA                  blip558k, sharegpt4v or pixmo                default: blip558k
#   METHOD                vanilla, cal, pmo, cmo or dpa                default: dpa
#   RECIPE                any recipe instead of recipes/paper/$MODEL/$DATA.yaml
#   LLM_VERSION           folder or hub id of the LLM                  default: the recipe's
#   VISION_MODEL_VERSION  folder or hub id of the vision tower         default: the recipe's
#   TEXT_ONLY             stage 1's text, if it lies in its own file   default: the reference's file, if it is there
#   NUM_GPUS              ranks                                        default: the GPUs that nvidia-smi lists, else 1
#   RUN_NAME              folder below runs/                           default: $MODEL-$DATA-$METHOD
#   PYTHON                                                             default: python
# Any further setting: bash scripts/pretrain.sh stages.proxy.micro_batch=8
set -euo pipefail

stage=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${MODEL:-llama3.1-8b} data=${DATA:-blip558k} method=${METHOD:-dpa}
recipe=${RECIPE:-$root/recipes/paper/$model/$data.yaml}
[[ $recipe == /* ]] || recipe=$PWD/$recipe
[[ -z ${LLM_VERSION:-} ]] || model=$(basename "$LLM_VERSION")
name=${RUN_NAME:-$model-$data-$method}
cd "${WORK_DIR:-.}"

trains=yes
for given in "$@"; do
  case $given in
    --dry-run) trains=no ;;
    name=* | output=* | method=* | methods=*)
      echo "$0: set RUN_NAME, WORK_DIR or METHOD instead of $given: the results' names follow them" >&2
      exit 2
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
launch=("$python")
if ((gpus > 1)); then
  launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
fi
"${launch[@]}" -m dpa run "$recipe" --until "$stage" "${settings[@]}" "$@"
[[ $trains == no ]] || "$python" -m dpa reference "runs/$name" --out checkpoints
