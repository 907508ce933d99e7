"""Install query_detr; name, version and requirements are those of settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=settings["author"],
    author_email=settings["author_email"],
    keywords=settings["keywords"],
    packages=find_packages(include=["query_detr", "query_detr.*"]),
    package_data={"query_detr": ["py.typed"]},
    entry_points={"console_scripts": ["query-detr=query_detr.cli:main"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "export", "widgets")
    },
)
