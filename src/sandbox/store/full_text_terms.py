"""The terms by which the full-text index finds tasks.

A search is a conjunction of terms: the beginnings of words, labels, names of a repository, the task that is
continued or run again, and the state. The full-text index maps each term to the tasks that have it. Only the term for
the state ever changes.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from hashlib import blake2b

import msgspec

from sandbox.interfaces.store import TaskQuery
from sandbox.model.fixed_limits import SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.repository_urls import repository_location, repository_names
from sandbox.model.task import Task

_WORD_CHARACTERS_MAX = 16
"""Number of characters of a word that are compared."""

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
"""Chinese and Japanese are written without spaces, so each of their characters is a word."""

_LABEL_MARK, _REPOSITORY_MARK, _STATE_MARK, _PARENT_MARK, _RERUN_OF_MARK = "\ue000\ue001\ue002\ue003\ue004"
"""First characters of terms that are not words. None is a letter or a digit, so no word contains them."""


def split_words(text: str) -> set[str]:
    """Return the distinct words: runs of letters and digits, ignoring case and accents."""
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKD", text).casefold()
        text = "".join(letter for letter in text if not unicodedata.combining(letter))
    return {word[:_WORD_CHARACTERS_MAX] for word in _WORD.findall(text)}


def task_terms(task: Task) -> str:
    """Return the terms of a task, separated by spaces, without its state.

    The terms are all beginnings of each word, the labels, the names of the repository, and the task that this task
    continues or runs again.
    """
    manifest = task.manifest
    url, prompt = manifest.repository.url, manifest.agent.prompt[:SEARCHED_PROMPT_CHARACTERS_MAX]
    words = split_words("\n".join((manifest.metadata.name, task.id, repository_location(url), prompt)))
    beginnings = {word[:length] for word in words for length in range(1, len(word) + 1)}
    repositories = {_exact_term(_REPOSITORY_MARK, name) for name in repository_names(url)}
    parents = [_exact_term(_PARENT_MARK, task.parent.task_id)] if task.parent is not None else []
    originals = [_exact_term(_RERUN_OF_MARK, task.rerun_of)] if task.rerun_of is not None else []
    return " ".join((*beginnings, *repositories, *parents, *originals, *_label_terms(manifest.metadata.labels)))


def state_term(state: str) -> str:
    """Return the term of a state. The term contains no `_`, because the full-text index splits terms at `_`."""
    return _STATE_MARK + state.replace("_", "")


def content_digest(task: Task) -> bytes:
    """Return a digest of everything that determines a task's terms."""
    manifest = task.manifest
    texts = (manifest.metadata.name, manifest.metadata.labels, task.id, manifest.repository.url, manifest.agent.prompt)
    parents = (task.parent.task_id,) if task.parent is not None else ()
    originals = ({"rerun_of": task.rerun_of},) if task.rerun_of is not None else ()
    return blake2b(msgspec.json.encode((*texts, *parents, *originals)), digest_size=8).digest()


def query_terms(query: TaskQuery) -> str:
    """Return the full-text query for all terms that a task must have; empty if only its state is restricted.

    User input cannot contain query syntax of the full-text index, because each term is a quoted word or a digest.
    """
    words = split_words(query.search)
    terms = [word for word in words if not any(other != word and other.startswith(word) for other in words)]
    if query.repository:
        terms.append(_exact_term(_REPOSITORY_MARK, repository_location(query.repository)))
    if query.parent:
        terms.append(_exact_term(_PARENT_MARK, query.parent))
    if query.rerun_of:
        terms.append(_exact_term(_RERUN_OF_MARK, query.rerun_of))
    quoted = [f'"{term}"' for term in (*terms, *_label_terms(query.labels))]
    if quoted and query.states:
        states = " OR ".join(f'"{state_term(state)}"' for state in sorted(query.states))
        quoted.append(f"({states})")
    return " AND ".join(quoted)


def _label_terms(labels: Mapping[str, str]) -> Iterator[str]:
    return (_exact_term(_LABEL_MARK, f"{key}\0{value}") for key, value in labels.items())


def _exact_term(mark: str, text: str) -> str:
    return mark + blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
