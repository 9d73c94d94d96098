"""Build the package `langprune` from lib/ and main.py; pyproject.toml has the rest."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithMain(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [*modules, (package, "main", "main.py")] if package == "langprune" else modules


setup(
    packages=[
        "langprune",
        *(f"langprune.{name}" for name in find_packages("lib")),
        "packed_bitmask",
    ],
    package_dir={"langprune": "lib", "packed_bitmask": "lib/packed"},
    cmdclass={"build_py": BuildWithMain},
)
