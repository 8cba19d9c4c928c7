#!/bin/sh
# Import archives of images into a node's containerd, before anything can be pulled: the cluster's own images and that
# of ociregistry. For containerd as kubeadm uses it, and that of k3s and RKE2. Run it as root, on every node.
set -eu

usage="usage: $0 ARCHIVE...
ARCHIVE: an OCI layout as a tar, also compressed, such as make image, ociregistry export and docker save write"

fail() {
    echo "$0: $*" >&2
    exit 1
}

case ${1-} in
-h | --help) echo "$usage" && exit ;;
"" | -*) echo "$usage" >&2 && exit 2 ;;
esac

for archive in "$@"; do
    [ -r "$archive" ] || fail "$archive: cannot be read"
    tar -xOf "$archive" index.json >/dev/null 2>&1 ||
        fail "$archive: not an OCI layout, as it has no index.json: ociregistry load and export make one of it"
done

# k3s and RKE2 have a containerd of their own, and a folder from which they import at every start.
folder= socket=
for distribution in k3s rke2; do
    if [ -d "/var/lib/rancher/$distribution" ]; then
        folder=/var/lib/rancher/$distribution/agent/images
        socket=/run/k3s/containerd/containerd.sock
        PATH=/var/lib/rancher/$distribution/bin:/var/lib/rancher/$distribution/data/current/bin:$PATH
    fi
done

node_ctr() {
    ctr ${socket:+--address "$socket"} --namespace k8s.io "$@"
}

if [ -n "$folder" ]; then
    mkdir -p "$folder"
    for archive in "$@"; do
        # Renamed into place, as the folder may be watched.
        cp "$archive" "$folder/.copied"
        mv "$folder/.copied" "$folder/$(basename "$archive")"
        echo "copied to $folder: $(basename "$archive")"
    done
    if [ ! -S "$socket" ]; then
        echo "k3s or RKE2 imports them when it starts"
        exit
    fi
fi

node_ctr version >/dev/null || fail "containerd does not answer"
for archive in "$@"; do
    index=$(tar -xOf "$archive" index.json)
    node_ctr images import "$archive" >/dev/null || fail "$archive: not imported"
    # The names sha256:… are containerd's own, for the same images.
    node_ctr images ls | grep -v ^sha256: | while read -r name _ digest _; do
        case $index in
        *"\"$digest\""*)
            # Else the kubelet removes what no pod uses when the disk fills up, and nothing could bring it back.
            node_ctr images label "$name" io.cri-containerd.pinned=pinned >/dev/null
            echo "imported: $name"
            ;;
        esac
    done
done

# The image without which no pod starts, and which no manifest names.
config=${folder:+${folder%/images}/etc/containerd/config.toml}
sandbox=$(containerd ${config:+--config "$config"} config dump 2>/dev/null |
    sed -n "s/^ *sandbox\(_image\)\{0,1\} = ['\"]\(.*\)['\"]\$/\2/p")
if [ -n "$sandbox" ] && ! node_ctr images ls -q | grep -Fqx "$sandbox"; then
    fail "no pod can start yet: import $sandbox too, which ${config:-/etc/containerd/config.toml} names"
fi
