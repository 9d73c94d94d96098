#!/usr/bin/env bash
# Everything that can be run, by name, from any folder; without a name, the list of it. The same as
# `langprune NAME` after `pip install .`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# -P: a folder from which this is called must not hide this package's modules
exec "${PYTHON:-python3}" -P -m lib.run.console "$@"
