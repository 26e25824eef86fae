#!/usr/bin/env bash
# loraweld together with the real packages: diffusers, PEFT, LyCORIS, and ComfyUI and sd-scripts where checkouts are named.
# It installs the packages in target/interop-venv (several GB), so it is no part of the tests. Options go to table.py:
#   COMFYUI=~/ComfyUI SD_SCRIPTS=~/sd-scripts scripts/interop.sh --families flux1,sdxl --skip lycoris --verbose
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/interop-venv
loraweld=${LORAWELD:-target/release/loraweld}
if ! command -v "$loraweld" >/dev/null; then
  echo "$loraweld is no program; build it with \`cargo build --release\`, or name it by LORAWELD" >&2
  exit 2
fi

packages=(torch 'diffusers>=0.42' 'peft>=0.21' lycoris-lora transformers accelerate safetensors)
# What the two programs import when their models are made and LoRAs are loaded; they have no packages of their own.
if [ -n "${COMFYUI:-}" ]; then
  packages+=(torchsde torchvision einops scipy psutil pyyaml Pillow sentencepiece requests)
  while read -r line; do packages+=("$line"); done < <(grep -E '^comfy-(kitchen|aimdo)' "$COMFYUI/requirements.txt")
fi
if [ -n "${SD_SCRIPTS:-}" ]; then packages+=(torchvision einops opencv-python-headless); fi

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
if [ "$(cat "$venv/packages" 2>/dev/null)" != "${packages[*]}" ]; then
  echo "installing ${packages[*]} in $venv" >&2
  "$venv/bin/python" -m pip install --quiet "${packages[@]}"
  echo "${packages[*]}" >"$venv/packages"
fi

export COMFYUI=${COMFYUI:-} SD_SCRIPTS=${SD_SCRIPTS:-}
exec "$venv/bin/python" examples/python/interop/table.py --loraweld "$loraweld" "$@"
