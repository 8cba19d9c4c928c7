"""Images in files: archives that docker, containerd, skopeo and this program write, and image folders."""
