#!/usr/bin/env bash
# Stage 2: the connector, through the frozen proxy. Settings: see reference.sh beside this file.
exec bash "$(dirname "${BASH_SOURCE[0]}")/reference.sh" pretrain "$@"
