#!/usr/bin/env bash
# Export and clean with nbdev 3, in an environment of its own: the tree must stay as nbdev 2 left it.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/environment"
"$place/environment/bin/pip" install --quiet 'nbdev>=3.3,<4'
git clone --quiet . "$place/tree"
cd "$place/tree"
PATH="$place/environment/bin:$PATH" nbdev-export
PATH="$place/environment/bin:$PATH" nbdev-clean
if [ -n "$(git status --porcelain)" ]; then
    echo "nbdev 3 exports or cleans something else than nbdev 2:" >&2
    git --no-pager diff --stat >&2
    exit 1
fi
echo "nbdev 2 and nbdev 3 write the same files"
