"""Build steps that pyproject.toml has no words for."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info


class BuildWithMim(build_py):
    """Ship configs and tools in ``mmgfp/.mim``, where OpenMMLab's tools look."""

    def run(self) -> None:
        """Build the package, then copy the two folders into it."""
        super().run()
        if self.editable_mode:
            return
        for name in ('configs', 'tools'):
            if Path(name).is_dir():
                copytree(
                    name,
                    Path(self.build_lib, 'mmgfp', '.mim', name),
                    ignore=ignore_patterns('__pycache__'),
                    dirs_exist_ok=True,
                )


class DistInfoWithMim(dist_info):
    """Let ``mim run mmgfp ...`` find the tools of an editable install.

    It looks below the first name in ``top_level.txt`` if site-packages has no folder of
    the package, and nothing else reads that file. An absolute path leads it here.
    """

    def run(self) -> None:
        """Write the metadata, in which an editable install names this folder."""
        super().run()
        if self.distribution.get_command_obj('editable_wheel', create=False):
            folder = Path(__file__).resolve().parent
            Path(self.dist_info_dir, 'top_level.txt').write_text(f'{folder}\n')


setup(cmdclass={'build_py': BuildWithMim, 'dist_info': DistInfoWithMim})
