"""Root's commands change a store as the user to whom it belongs, so that the daemon can use what they leave."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from ociregistry.commands.options import CommandFailed


def become_owner(root: Path) -> None:
    """If this process is root's and the store at `root` is another user's, it is that user's from now on.

    Raises `CommandFailed`.
    """
    try:
        status = root.stat()
    except FileNotFoundError:
        return
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    try:
        user = pwd.getpwuid(status.st_uid)
    except KeyError:
        groups, group = [status.st_gid], status.st_gid
    else:
        groups, group = os.getgrouplist(user.pw_name, user.pw_gid), user.pw_gid
    try:
        os.setgroups(groups)
        os.setgid(group)
        os.setuid(status.st_uid)
    except OSError as error:
        raise CommandFailed(f"{root}: cannot become its owner, the user {status.st_uid}: {error.strerror}") from None
