"""Images in files: archives that docker, containerd, skopeo and we ourselves write, and image folders."""
