#!/usr/bin/env bash
# Stage 1: the proxy LLM, LoRA on the captions' text. Settings: see reference.sh beside this file.
exec bash "$(dirname "${BASH_SOURCE[0]}")/reference.sh" proxy "$@"
