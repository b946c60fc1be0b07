"""Build steps that pyproject.toml has no words for."""

from pathlib import Path
from shutil import copy, copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info


class BuildWithMim(build_py):
    """Ship configs, tools and their index in ``mmgfp/.mim``, where mim looks."""

    def run(self) -> None:
        """Build the package, then copy them into it."""
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'mmgfp', '.mim')
        for name in ('configs', 'tools'):
            if Path(name).is_dir():
                copytree(
                    name,
                    mim / name,
                    ignore=ignore_patterns('__pycache__'),
                    dirs_exist_ok=True,
                )
        if mim.is_dir():
            copy('model-index.yml', mim)


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
