"""Adds pages from outside docs/ and the notebooks to the site, and rewrites links that lead outside docs/.

Pages are written for two readers: a browser of the repository, where a link is a path to a file, and the site, which
has only pages. So the results, the changelog and the like become pages of the site, links between pages become links
within the site, and a link to a file that is no page becomes the repository's own address of it, or, if mkdocs.yml
sets no `repo_url`, plain text.
"""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
# Pages and pictures outside docs/, by their path in the repository.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "prompt_tuning_jax/bases/nano/README.md": "nano.md",
}
RESULTS = "experiments/results"
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(?ms)^( *```.*?^ *```$)")


def outside_pages() -> dict[str, str]:
    """Returns where the site has files that lie outside docs/, by their path in the repository."""
    results = [path for path in sorted((ROOT / RESULTS).iterdir()) if path.suffix in (".md", ".png")]
    return OUTSIDE | {f"{RESULTS}/{path.name}": f"results/{path.name}" for path in results}


def on_config(config):
    """Adds the notebooks to the navigation, behind the guides: docs/notebook_pages.py makes a page of each text."""
    texts = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
    if texts:
        config.nav.insert(2, {"Notebooks": [f"notebooks/{path.stem}.md" for path in texts]})
    return config


def on_files(files, config):
    """Adds the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    for source, target in outside_pages().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns paths in the repository into links within the site, outside of code blocks."""
    sources = {target: source for source, target in outside_pages().items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = CODE.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else relink(part, source, config.repo_url) for part in parts)


def relink(text: str, source: str, repo_url: str | None) -> str:
    """Returns a page's text with the links of the site.

    Args:
      source: the page's own path in the repository.
      repo_url: where the repository is to be seen; None if that is not known.
    """
    pages = outside_pages()
    own = pages.get(source, source.removeprefix("docs/"))

    def site_link(found: re.Match) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        target = os.path.normpath(PurePosixPath(source).parent / path)
        page = target.removeprefix("docs/") if target.startswith("docs/") else pages.get(target)
        if page is not None:
            return f"{found['text']}({os.path.relpath(page, PurePosixPath(own).parent)}{anchor})"
        if not (ROOT / target).exists():
            return found[0]  # MkDocs says that it leads nowhere
        return f"{found['text']}({repo_url}/blob/main/{target})" if repo_url else found["text"][1:-1]

    return LINK.sub(site_link, text)
