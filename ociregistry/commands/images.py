"""`images`: prints the images that lists and Kubernetes objects name, as `load` would take them."""

from __future__ import annotations

from twisted.python import usage

from ociregistry.archives.members import Archive, ArchiveFailure
from ociregistry.commands.imagefiles import ANY_IMAGE_FIELD, open_images, path_of
from ociregistry.commands.options import Command, print_lines
from ociregistry.names import ImageReference
from ociregistry.process import print_error
from ociregistry.settings import Settings


class Images(Command):
    """The options of `images`."""

    synopsis = "[options] FILE..."
    optFlags = [ANY_IMAGE_FIELD]
    examples = ("images manifests.yaml > imagelist", "images --any-image-field pods.json custom-resources.yaml")
    longdesc = (
        "Prints the images that files name, one image per line, each once, in the order in which they appear: what "
        "load would take. A FILE is what load takes, but no archive: a list of images, one reference per line, or "
        "Kubernetes objects as YAML or JSON; `-` is the standard input. Errors are printed beside them; the exit "
        "status is then not 0."
    )

    def parseArgs(self, *words: str) -> None:
        """Keep the files.

        Raises:
            usage.UsageError: none is given, or an empty word.
        """
        if not words or "" in words:
            raise usage.UsageError("images needs a FILE, which is a list of images or Kubernetes objects")
        self.words = words

    def run(self, settings: Settings) -> int:
        """Print the images, and the errors; the exit status is 2 for invalid lists, 1 for other files.

        Raises:
            CommandFailed: a file cannot be read.
        """
        images: dict[ImageReference, None] = {}
        errors: list[str] = []
        refused: list[str] = []
        for path in map(path_of, self.words):
            try:
                found = open_images(path, any_image_field=bool(self["any-image-field"]))
            except ArchiveFailure as error:
                refused.append(str(error))
                continue
            if isinstance(found, Archive):
                found.close()
                refused.append(f"{path}: is no image list, but an archive or a folder")
                continue
            images |= dict.fromkeys(found.images)
            errors += found.errors
        print_lines(map(str, images))
        for line in (*errors, *refused):
            print_error(line)
        return 2 if errors else 1 if refused else 0
