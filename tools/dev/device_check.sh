#!/usr/bin/env bash
# What a GPU has to show, in less than 8 minutes; device_check.py beside this file says what it is:
#
#     bash tools/dev/device_check.sh [FOLDER_OF_A_COMPETITION]
exec "${PYTHON:-python3}" "$(dirname "$0")/device_check.py" "$@"
