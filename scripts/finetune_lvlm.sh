#!/usr/bin/env bash
# Stage 3: the original LLM and the connector, on instructions. Settings: see reference.sh beside this file.
exec bash "$(dirname "${BASH_SOURCE[0]}")/reference.sh" finetune "$@"
