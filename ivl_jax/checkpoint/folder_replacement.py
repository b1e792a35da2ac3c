"""A folder that takes the place of an older one once it is complete.

In: the final folder, whose successor is built in a folder beside it. Out: the successor under the
final name. On an object store, where a folder is only a prefix of names, the files are renamed one
by one: whoever reads them at that moment finds a manifest whose files are missing, or none.
"""

from etils import epath

from ivl_jax.paths import is_local


def building_folder(folder: epath.Path) -> epath.Path:
    """Where a folder is written before it has its final name.

    Args:
        folder: the final folder.

    Returns:
        The folder beside it.
    """
    return folder.parent / f"{folder.name}.unfinished"


def is_half_replaced(folder: epath.Path) -> bool:
    """Whether a folder may be a part of itself, since a process was killed while replacing it.

    Args:
        folder: the final folder.

    Returns:
        False for a local folder, which is replaced by renaming.
    """
    return not is_local(folder) and building_folder(folder).exists()


def finish_replacement(folder: epath.Path) -> None:
    """Give the complete successor of a folder its final name; the old folder is removed.

    Args:
        folder: the final folder, which need not exist.
    """
    building, replaced = building_folder(folder), folder.parent / f"{folder.name}.replaced"
    if folder.exists() and not is_local(folder):
        folder.rmtree()
    elif folder.exists():
        if replaced.exists():
            replaced.rmtree()
        folder.rename(replaced)
    building.rename(folder)
    if is_local(folder) and replaced.exists():
        replaced.rmtree()
