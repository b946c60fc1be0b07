"""Build steps that pyproject.toml has no words for."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


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


setup(cmdclass={'build_py': BuildWithMim})
