"""Where models, inputs and outputs live: `FolderPaths` holds the folders of one host, the module functions below it are
ComfyUI's, asked of the current host.

Every name that may come from a user passes `safe_files.checked_path`; a name that would leave its folder raises
UnsafePathError (a ValueError) where ComfyUI returns a path, and is "not found" where ComfyUI returns None.
"""

from __future__ import annotations

import logging
import mimetypes
import os
import shutil
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .context import current_host
from .safe_files import UnsafePathError, checked_path, is_inside

__all__ = [
    "FolderPaths", "UnsafePathError", "checked_path", "is_inside", "supported_pt_extensions", "map_legacy", "recursive_search",
    "filter_files_extensions", "filter_files_content_types", "annotated_filepath", "get_annotated_filepath",
    "exists_annotated_filepath", "add_model_folder_path", "get_folder_paths", "get_full_path", "get_full_path_or_raise",
    "get_filename_list", "get_save_image_path", "get_input_subfolders", "get_directory_by_type", "get_input_directory",
    "get_output_directory", "get_temp_directory", "get_user_directory", "set_input_directory", "set_output_directory",
    "set_temp_directory", "set_user_directory",
]  # fmt: skip

supported_pt_extensions = frozenset({".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"})

_LEGACY_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}
# kind → folders below models/; the first is where a new file belongs
_MODEL_FOLDERS = {
    "checkpoints": ("checkpoints",), "configs": ("configs",), "loras": ("loras",), "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"), "diffusion_models": ("unet", "diffusion_models"), "clip_vision": ("clip_vision",),
    "style_models": ("style_models",), "embeddings": ("embeddings",), "diffusers": ("diffusers",), "vae_approx": ("vae_approx",),
    "controlnet": ("controlnet", "t2i_adapter"), "gligen": ("gligen",), "upscale_models": ("upscale_models",),
    "hypernetworks": ("hypernetworks",), "photomaker": ("photomaker",), "classifiers": ("classifiers",),
    "model_patches": ("model_patches",), "audio_encoders": ("audio_encoders",),
}  # fmt: skip
_OTHER_EXTENSIONS = {"configs": frozenset({".yaml"}), "diffusers": frozenset({"folder"}), "classifiers": frozenset({""})}
_ANNOTATIONS = ("output", "input", "temp")
# what the mimetypes of an older Python or a bare system do not know
_EXTRA_CONTENT_TYPES = {"webp": "image", "fbx": "model"}
_TIME_FIELDS = {"month": "tm_mon", "day": "tm_mday", "hour": "tm_hour", "minute": "tm_min", "second": "tm_sec"}
# Two changes within one tick of the file system's clock leave the same mtime (2 s on FAT), so a younger listing is not trusted.
_MTIME_TICK_NS = 2_000_000_000


class _Listing(NamedTuple):
    files: list[str]
    folders: tuple[str, ...]
    mtimes: dict[str, int]  # every directory below them → mtime in ns when it was read
    read_at: int

    def is_current(self, folders: Iterable[str]) -> bool:
        if self.folders != tuple(folders) or any(folder not in self.mtimes and os.path.isdir(folder) for folder in folders):
            return False
        try:
            return all(
                mtime + _MTIME_TICK_NS < self.read_at and os.stat(directory).st_mtime_ns == mtime
                for directory, mtime in self.mtimes.items()
            )
        except OSError:
            return False


class FolderPaths:
    """The folders of one host.

    Args:
        base_path: folder that holds models/, custom_nodes/, input/, output/, temp/ and user/; nothing is created.
        input_directory, output_directory, temp_directory, user_directory, models_directory: used instead of the ones below `base_path`.

    `folder_names_and_paths` maps a kind to (folders, extensions); an empty extension set takes every file. It may be
    changed in place, as ComfyUI's packs do.
    """

    def __init__(
        self,
        base_path: str | os.PathLike,
        *,
        input_directory: str | os.PathLike | None = None,
        output_directory: str | os.PathLike | None = None,
        temp_directory: str | os.PathLike | None = None,
        user_directory: str | os.PathLike | None = None,
        models_directory: str | os.PathLike | None = None,
    ):
        self.base_path = os.path.abspath(base_path)
        self.models_dir = os.path.abspath(models_directory or os.path.join(self.base_path, "models"))
        self.folder_names_and_paths: dict[str, tuple[list[str], Collection[str]]] = {
            kind: ([os.path.join(self.models_dir, name) for name in names], set(_OTHER_EXTENSIONS.get(kind, supported_pt_extensions)))
            for kind, names in _MODEL_FOLDERS.items()
        }
        self.folder_names_and_paths["custom_nodes"] = ([os.path.join(self.base_path, "custom_nodes")], set())
        self.input_directory = os.path.abspath(input_directory or os.path.join(self.base_path, "input"))
        self.output_directory = os.path.abspath(output_directory or os.path.join(self.base_path, "output"))
        self.temp_directory = os.path.abspath(temp_directory or os.path.join(self.base_path, "temp"))
        self.user_directory = os.path.abspath(user_directory or os.path.join(self.base_path, "user"))
        self._listings: dict[str, _Listing] = {}

    def get_directory_by_type(self, type_name: str) -> str | None:
        """The folder that `type` names in a file locator: "input", "output" or "temp"; None for anything else."""
        return getattr(self, f"{type_name}_directory") if type_name in _ANNOTATIONS else None

    def empty_temp_directory(self) -> None:
        """Delete the whole temp folder; a host does so when it starts and when it stops."""
        shutil.rmtree(self.temp_directory, ignore_errors=True)

    # --- model folders

    def add_model_folder_path(self, folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
        """Add a folder to a kind (a new kind takes every extension); `is_default` puts it, or moves it, to the front."""
        folders, _ = self.folder_names_and_paths.setdefault(map_legacy(folder_name), ([], set()))
        if full_folder_path in folders:
            if not is_default:
                return
            folders.remove(full_folder_path)
        folders.insert(0 if is_default else len(folders), full_folder_path)

    def get_folder_paths(self, folder_name: str) -> list[str]:
        return list(self._kind(folder_name)[0])

    def get_full_path(self, folder_name: str, filename: str) -> str | None:
        """The first existing file of that name among a kind's folders; None if there is none or the name leaves them."""
        folders, _ = self.folder_names_and_paths.get(map_legacy(folder_name), ((), ()))
        for folder in folders:
            try:
                path = checked_path(folder, filename, follow_links=True)
            except UnsafePathError:
                return None
            if os.path.isfile(path):
                return path
            if os.path.islink(path):
                logging.warning("%s is a link to a file that does not exist", path)
        return None

    def get_full_path_or_raise(self, folder_name: str, filename: str) -> str:
        path = self.get_full_path(folder_name, filename)
        if path is None:
            raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")
        return path

    def get_filename_list(self, folder_name: str) -> list[str]:
        """Names, relative to their folder, of a kind's files, sorted; read again when a directory below changed."""
        kind = map_legacy(folder_name)
        folders, extensions = self._kind(kind)
        listing = self._listings.get(kind)
        if listing is None or not listing.is_current(folders):
            names: set[str] = set()
            mtimes: dict[str, int] = {}
            read_at = time.time_ns()
            for folder in folders:
                found, seen = _walk(folder)
                names.update(found)
                mtimes.update(seen)
            listing = self._listings[kind] = _Listing(sorted(names), tuple(folders), mtimes, read_at)
        return filter_files_extensions(listing.files, extensions)

    def _kind(self, folder_name: str) -> tuple[list[str], Collection[str]]:
        try:
            return self.folder_names_and_paths[map_legacy(folder_name)]
        except KeyError:
            known = ", ".join(sorted(self.folder_names_and_paths))
            raise KeyError(f"no model folder of the kind '{folder_name}'; there are: {known}") from None

    # --- input, output and temp

    def annotated_filepath(self, name: str) -> tuple[str, str | None]:
        """("cat.png", output folder) for "cat.png [output]"; (name, None) without such an ending."""
        for annotation in _ANNOTATIONS:
            ending = f"[{annotation}]"
            if name.endswith(ending):
                return name[: -len(ending) - 1], self.get_directory_by_type(annotation)
        return name, None

    def get_annotated_filepath(self, name: str, default_dir: str | None = None) -> str:
        """The path that a name such as "cat.png" or "a/cat.png [output]" means; UnsafePathError if it leaves its folder."""
        name, folder = self.annotated_filepath(name)
        return checked_path(folder or default_dir or self.input_directory, name)

    def exists_annotated_filepath(self, name: str) -> bool:
        try:
            return os.path.exists(self.get_annotated_filepath(name))
        except UnsafePathError:
            return False

    def get_save_image_path(
        self, filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
    ) -> tuple[str, str, int, str, str]:
        """Where the next file of a prefix goes; the folder is created.

        `%width% %height% %year% %month% %day% %hour% %minute% %second%` in the prefix are filled in.

        Returns:
            (folder, file name without counter, next counter, folder relative to `output_dir`, filled-in prefix). Files are
            named `<name>_<counter>_…`; the counter is one more than the highest there.
        """
        filename_prefix = _fill_in(filename_prefix, image_width, image_height)
        checked_path(output_dir, filename_prefix, for_writing=True)
        normal = os.path.normpath(filename_prefix.replace("\\", "/"))
        subfolder, filename = os.path.split(normal)
        folder = os.path.join(output_dir, subfolder)
        os.makedirs(folder, exist_ok=True)
        if not is_inside(output_dir, folder):
            raise UnsafePathError("a link in the name leads out of its folder")
        return folder, filename, _highest_counter(folder, filename) + 1, subfolder, filename_prefix


def _fill_in(prefix: str, width: int, height: int) -> str:
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    values |= {name: f"{getattr(now, field):02d}" for name, field in _TIME_FIELDS.items()}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    return prefix


def _highest_counter(folder: str, filename: str) -> int:
    """Highest number in names `<filename>_<number>_…`, 0 if there is none."""
    start = os.path.normcase(f"{filename}_")
    numbers = (name[len(start) :].split("_")[0] for name in os.listdir(folder) if os.path.normcase(name).startswith(start))
    return max((int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) < 19), default=0)


def _is_directory(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _walk(directory: str, excluded: Collection[str] = (".git",)) -> tuple[list[str], dict[str, int]]:
    """Files below `directory`, relative to it, and the mtime of every directory read. Links are followed, except in a circle."""
    files: list[str] = []
    mtimes: dict[str, int] = {}

    def visit(path: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> None:
        try:
            status = os.stat(path)
            entries = list(os.scandir(path))
        except OSError as error:
            if prefix:
                logging.warning("skipping %s: %s", path, error.strerror)
            return
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        mtimes[path] = status.st_mtime_ns
        for entry in entries:
            if not _is_directory(entry):
                files.append(prefix + entry.name)
            elif entry.name not in excluded:
                visit(entry.path, prefix + entry.name + os.sep, (*ancestors, identity))

    visit(directory, "", ())
    return files, mtimes


# --- ComfyUI's functions, over the current host's folders


def map_legacy(folder_name: str) -> str:
    return _LEGACY_KINDS.get(folder_name, folder_name)


def recursive_search(directory: str, excluded_dir_names: list[str] | None = None) -> tuple[list[str], dict[str, float]]:
    files, mtimes = _walk(directory, excluded_dir_names or ())
    return files, {path: mtime / 1e9 for path, mtime in mtimes.items()}


def filter_files_extensions(files: Collection[str], extensions: Collection[str]) -> list[str]:
    return sorted(name for name in files if not extensions or os.path.splitext(name)[-1].lower() in extensions)


def filter_files_content_types(files: Iterable[str], content_types: Collection[str]) -> list[str]:
    """The files whose extension stands for one of "image", "video", "audio", "model" (3-D models)."""

    def content_type(name: str) -> str:
        extra = _EXTRA_CONTENT_TYPES.get(name.rsplit(".", 1)[-1])
        return extra or (mimetypes.guess_type(name, strict=False)[0] or "").split("/")[0]

    return [name for name in files if content_type(name) in content_types]


def annotated_filepath(name: str) -> tuple[str, str | None]:
    return current_host().paths.annotated_filepath(name)


def get_annotated_filepath(name: str, default_dir: str | None = None) -> str:
    return current_host().paths.get_annotated_filepath(name, default_dir)


def exists_annotated_filepath(name: str) -> bool:
    return current_host().paths.exists_annotated_filepath(name)


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    current_host().paths.add_model_folder_path(folder_name, full_folder_path, is_default)


def get_folder_paths(folder_name: str) -> list[str]:
    return current_host().paths.get_folder_paths(folder_name)


def get_full_path(folder_name: str, filename: str) -> str | None:
    return current_host().paths.get_full_path(folder_name, filename)


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    return current_host().paths.get_full_path_or_raise(folder_name, filename)


def get_filename_list(folder_name: str) -> list[str]:
    return current_host().paths.get_filename_list(folder_name)


def get_save_image_path(
    filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
) -> tuple[str, str, int, str, str]:
    return current_host().paths.get_save_image_path(filename_prefix, output_dir, image_width, image_height)


def get_input_subfolders() -> list[str]:
    """Folders below the input folder, relative to it with forward slashes, sorted."""
    root = get_input_directory()
    _, mtimes = _walk(root, ())
    return sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in mtimes if path != root)


def get_directory_by_type(type_name: str) -> str | None:
    return current_host().paths.get_directory_by_type(type_name)


def get_input_directory() -> str:
    return current_host().paths.input_directory


def get_output_directory() -> str:
    return current_host().paths.output_directory


def get_temp_directory() -> str:
    return current_host().paths.temp_directory


def get_user_directory() -> str:
    return current_host().paths.user_directory


def set_input_directory(input_dir: str) -> None:
    current_host().paths.input_directory = os.path.abspath(input_dir)


def set_output_directory(output_dir: str) -> None:
    current_host().paths.output_directory = os.path.abspath(output_dir)


def set_temp_directory(temp_dir: str) -> None:
    current_host().paths.temp_directory = os.path.abspath(temp_dir)


def set_user_directory(user_dir: str) -> None:
    current_host().paths.user_directory = os.path.abspath(user_dir)


def __getattr__(name: str):
    """ComfyUI's module variables (`models_dir`, `folder_names_and_paths`, `output_directory` …) are the current host's."""
    directories = [f"{kind}_directory" for kind in (*_ANNOTATIONS, "user")]
    if name in ("base_path", "models_dir", "folder_names_and_paths", *directories):
        return getattr(current_host().paths, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
