"""`load`: brings images into the store, from archives or, for image lists, from upstreams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from twisted.internet.threads import deferToThreadPool
from twisted.python import usage

from ociregistry.archives.importing import Importer
from ociregistry.archives.members import Archive, ArchiveFailure, GivenName
from ociregistry.commands.fetching import daemon_runs, open_fetcher, opened_store
from ociregistry.commands.imagefiles import ANY_IMAGE_FIELD, open_images, path_of
from ociregistry.commands.options import Command, CommandFailed, print_lines
from ociregistry.commands.progress import shown
from ociregistry.commands.running import become_owner, run_on_reactor
from ociregistry.concurrency import DaemonThreadPool
from ociregistry.config.values import count_text
from ociregistry.errors import RegistryError
from ociregistry.imagelists.reading import parse_image
from ociregistry.names import ImageReference
from ociregistry.platforms import ALL, Platform
from ociregistry.process import print_error
from ociregistry.pullthrough.loader import (
    Loader,
    LoadResult,
    LoadStatus,
    Progress,
    summary,
)
from ociregistry.settings import Settings
from ociregistry.store.store import Store


class Load(Command):
    """The options of `load`."""

    synopsis = "[options] FILE|IMAGE..."
    optParameters = [
        ["name", None, None, "Name for the image of an archive without one, such as nginx:1.25."],
    ]
    optFlags = [ANY_IMAGE_FIELD]
    examples = ("load imagelist --concurrent 8", "load nginx:1.25 images.tar")
    longdesc = (
        "Loads images into the store. A FILE is a list of images, one reference per line (`#` begins a comment), "
        "Kubernetes objects as YAML or JSON, such as what helm template or kubectl get -o json prints, "
        "or an archive of docker save, ctr images export, skopeo, oras or export, an OCI layout, or an image folder; "
        "`-` is the standard input. An IMAGE, which has a tag, a digest or a registry, such as nginx:1.25, is loaded "
        "itself; where a file has that name, it is the file."
    )

    def parseArgs(self, *words: str) -> None:
        """Keep the files and images.

        Raises:
            usage.UsageError: none is given, or an empty word.
        """
        if not words or "" in words:
            raise usage.UsageError("load needs a FILE, which is a list of images or an archive, or an IMAGE")
        self.words = words

    def postOptions(self) -> None:
        """Parse the values of the options.

        Raises:
            usage.UsageError: --name is invalid, or options that mean nothing together are given.
        """
        if self.is_given("platform") and self.is_given("os", "arch"):
            raise usage.UsageError("--platform has the system and the architecture: give it without --os and --arch")
        self.name = self.value("name", GivenName.parse)
        if self.name is not None and len(self.words) > 1:
            raise usage.UsageError("--name is the name of one image: give one FILE with it")

    def run(self, settings: Settings) -> int:
        """Load all files; the exit status is 1 if an image or an archive failed.

        Raises:
            CommandFailed: a file cannot be read, an image list has invalid lines, or the command was interrupted.
            OSError: the store cannot be used.
        """
        self.refused: list[str] = []
        outcomes: list[LoadResult] = []
        with ExitStack() as opened:
            archives, images = self._read(opened)
            if archives or images:
                become_owner(settings.image_path)
                # An archive is loaded whole, unless this command line names platforms.
                platforms = settings.platform if self.is_given("platform", "os", "arch", "os-version") else ALL
                work = partial(_load, archives, images, platforms, self.refused, settings)
                outcomes = run_on_reactor(work, settings)
        for refused in self.refused:
            print_error(refused)
        if outcomes:
            print_lines([summary(outcomes)])
        failed = sum(outcome.ended is LoadStatus.FAILED for outcome in outcomes)
        if failed:
            print_error(f"{failed} of {count_text(len(outcomes), 'image')} could not be loaded")
        return 1 if failed or self.refused else 0

    def _read(self, opened: ExitStack) -> tuple[list[Archive], list[ImageReference]]:
        """Open the archives and read the image lists.

        Raises:
            CommandFailed: a file cannot be read, or an image list is invalid or does not go with the options, or a
                word is neither a file nor an image.
        """
        archives: list[Archive] = []
        images: dict[ImageReference, None] = {}
        errors: list[str] = []
        for word in self.words:
            file = path_of(word)
            if word != "-" and not word.startswith(_PATHS) and not os.path.lexists(file):
                self._take_image(word, images, errors)
                continue
            try:
                found = open_images(file, self.name, any_image_field=bool(self["any-image-field"]))
            except ArchiveFailure as error:
                self.refused.append(str(error))
                continue
            if isinstance(found, Archive):
                archives.append(opened.enter_context(found))
            elif self.name is not None:
                errors.append(f"{file}: is an image list, which has the names: --name is for an archive")
            else:
                images |= dict.fromkeys(found.images)
                errors += found.errors
        if archives and not images and self.is_given("with-signatures"):
            errors.append("--with-signatures is for image lists: an archive brings the signatures that are in it")
        if errors:
            *others, last = errors
            for other in others:
                print_error(other)
            raise CommandFailed(last, 2)
        return archives, list(images)

    def _take_image(self, word: str, images: dict[ImageReference, None], errors: list[str]) -> None:
        """Add the image that a word which names no file means, or an error."""
        if not _is_named_like_an_image(word):
            self.refused.append(
                f"{word}: there is no such file, and as an image it needs a tag, a digest or a registry: {word}:TAG"
            )
            return
        try:
            images[parse_image(word)] = None
        except RegistryError as error:
            errors.append(f"{word}: there is no such file, and it is not an image: {error.message}")
        if self.name is not None:
            errors.append(f"{word}: is an image, which has its name: --name is for an archive")


_PATHS = ("/", "./", "../", "~")
"""Beginnings of words that name a file, whether there is one or not."""


def _is_named_like_an_image(word: str) -> bool:
    """Tell whether a word that names no file has a tag, a digest or a registry, and so is meant as an image."""
    first, slash, _ = word.partition("/")
    return ":" in word or (bool(slash) and ("." in first or first == "localhost"))


async def _load(
    archives: Sequence[Archive],
    images: Sequence[ImageReference],
    platforms: Sequence[Platform],
    refused: list[str],
    settings: Settings,
    reactor: Any,
) -> list[LoadResult]:
    """Load archives for `platforms`, then images, and return the outcome of each image.

    Errors of archives that cannot be used at all are appended to `refused`.
    """
    outcomes: list[LoadResult] = []
    threads = DaemonThreadPool(1, "archives")
    in_thread = partial(deferToThreadPool, reactor, threads)
    with shown() as progress, ExitStack() as stopped:
        if archives:
            threads.start()
            stopped.callback(threads.stop)
        async with opened_store(settings, reactor, adopts=not daemon_runs(settings)) as store:
            for archive in archives:
                try:
                    outcomes += await Importer(store, in_thread, progress, platforms).bring(archive)
                except ArchiveFailure as error:
                    refused.append(str(error))
            if images:
                outcomes += await _pull(images, store, settings, progress, reactor)
    return outcomes


async def _pull(
    images: Sequence[ImageReference], store: Store, settings: Settings, progress: Progress, reactor: Any
) -> list[LoadResult]:
    async with open_fetcher(store, settings, reactor) as fetcher:
        loader = Loader(
            store,
            fetcher,
            settings.platform,
            signatures=settings.with_signatures,
            concurrent=settings.concurrent,
            connections=settings.max_connections,
            progress=progress,
            clock=reactor,
        )
        outcomes = await loader.load(images)
        if settings.complete_metadata:
            for failed in await loader.load_metadata():
                print_error(f"warning: manifests of other platforms are missing for now: {failed}")
        return outcomes
