#!/usr/bin/env bash
# Prepares a host, from the repository's root: launch/setup.sh EXTRA [BUCKET]
# Installs hybridjax[EXTRA] into ~/venv and mounts the bucket at /mnt/bucket; harmless to repeat.

set -euo pipefail
extra=$1 bucket=${2:-}

python3 -m pip install --quiet --user uv # images come with Python 3.10; uv brings its own
python3 -m uv venv --quiet --allow-existing --python=3.12 "$HOME/venv"
python3 -m uv pip install --quiet --python="$HOME/venv/bin/python" --editable=".[$extra]"

[[ -n $bucket ]] || exit 0
# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install --yes gcsfuse
fi
sudo mkdir -p /mnt/bucket
mountpoint -q /mnt/bucket || {
  sudo chown "$(id -u)" /mnt/bucket
  # A checkpoint is written by all hosts together: none may see a directory as it was a minute ago.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" /mnt/bucket
}
