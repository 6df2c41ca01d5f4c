"""The patch of a work tree, read by a git that obeys nothing the agent wrote.

It runs inside the sandbox's walls, on the agent's tree read-only, with a git directory made for the occasion over the
objects of the image: no configuration, hook, filter or monitor of the agent, and no conversion of bytes. The agent's
.gitignore does hold; what it hides is `dropped`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from entropo_ray.sandbox import ExecResult, Patch, SandboxError

FILE_MB, PATCH_MB = 4, 8  # larger changes are dropped
_LISTED = 200  # names in Patch.dropped
_BASE_BROKEN, _TREE_BROKEN = 90, 91

# script, standard input, bytes of output to keep -> result
Run = Callable[[str, bytes, int], Awaitable[ExecResult]]

# Attributes given here outrank the tree's own. Those of stdin follow: files whose bytes are not UTF-8.
_SCRIPT = f"""
exec 2>"$SCRATCH/errors"
export GIT_DIR="$SCRATCH/git" GIT_WORK_TREE="$TREE" GIT_INDEX_FILE="$SCRATCH/git/index" GIT_OPTIONAL_LOCKS=0
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null LC_ALL=C
mkdir -p "$GIT_DIR/objects/info" "$GIT_DIR/refs" "$GIT_DIR/info" && cd "$GIT_DIR" || exit {_BASE_BROKEN}
echo "ref: refs/heads/none" > HEAD
echo "$IMAGE/.git/objects" > objects/info/alternates
echo '* -text -ident !filter !working-tree-encoding !diff' > info/attributes
cat >> info/attributes
base=$(git --git-dir="$IMAGE/.git" -c safe.directory='*' rev-parse --verify 'HEAD^{{tree}}') || exit {_BASE_BROKEN}
git read-tree "$base" || exit {_BASE_BROKEN}
cd "$TREE" || exit {_TREE_BROKEN}

new() {{ [ ! -e "$IMAGE/$1" ] && [ ! -L "$IMAGE/$1" ] || [ "$1" -nt "$IMAGE/$1" ]; }}
left() {{ new "$1" && printf '%s\\0' "$1" >> "$SCRATCH/left"; }}
: > "$SCRATCH/left"
printf '%s\\0' . ':(exclude,glob)**/__pycache__/**' ':(exclude,glob)**/*.pyc' ':(exclude,glob)**/.pytest_cache/**' \\
    > "$SCRATCH/paths"
find . -path ./.git -prune -o -mindepth 2 -name .git -printf '%h\\0' -prune -o -type f -size +{FILE_MB << 10}k \\
    -printf '%p\\0' > "$SCRATCH/apart"
while IFS= read -r -d '' path; do
    path=${{path#./}}
    printf ':(exclude,literal)%s\\0' "$path" >> "$SCRATCH/paths"
    left "$path"
done < "$SCRATCH/apart"
git -c core.protectNTFS=false -c core.protectHFS=false add -A --ignore-errors \\
    --pathspec-from-file="$SCRATCH/paths" --pathspec-file-nul
[ $? -gt 1 ] && exit {_TREE_BROKEN}
while IFS= read -r -d '' path; do left "${{path%/}}"; done < <(git ls-files --others -z)

compare() {{ git diff --cached --no-ext-diff --no-textconv --no-color --no-renames "$@" "$base"; }}
compare --raw -z --no-abbrev > "$SCRATCH/raw" || exit {_TREE_BROKEN}
compare --binary --full-index --src-prefix=a/ --dst-prefix=b/ > "$SCRATCH/patch" || exit {_TREE_BROKEN}
cd "$SCRATCH" || exit {_TREE_BROKEN}
[ "$(stat -c %s patch)" -le {3 * PATCH_MB << 20} ] || : > patch
stat -c %s raw left patch && cat raw left patch
"""
_JUNK = re.compile(rb"(^|/)(__pycache__|\.pytest_cache)(/|$)|\.pyc$")
_UNREADABLE = Patch(text="", files=(), dropped=(".",), lossy=True)


@dataclass(frozen=True)
class _Change:
    path: bytes
    link: bool  # to another repository, whose content git does not hold
    hunks: bytes  # none where the whole is far too large


async def extract(run: Run) -> Patch:
    """Raises SandboxError if the image's own repository cannot be read; an unreadable tree is a lossy, empty patch."""
    found = await _changes(run, b"")
    if found is None:
        return _UNREADABLE
    if odd := [change.path for change in found[0] if not _is_utf8(change.hunks)]:
        found = await _changes(run, b"".join(_as_binary(path) for path in odd))
        if found is None:
            return _UNREADABLE
    changes, left = found
    out = {change.path for change in changes if change.link or not 0 < len(change.hunks) <= FILE_MB << 20}
    kept = [change for change in changes if change.path not in out]
    if sum(len(change.hunks) for change in kept) > PATCH_MB << 20:
        out |= {change.path for change in kept}
        kept = []
    dropped = sorted({*left, *out})
    return Patch(
        text=b"".join(change.hunks for change in kept).decode("utf-8"),
        files=tuple(_name(change.path) for change in kept),
        dropped=tuple(_name(path) for path in dropped[:_LISTED]),
        lossy=any(not _JUNK.search(path) for path in dropped),
    )


async def _changes(run: Run, attributes: bytes) -> tuple[list[_Change], list[bytes]] | None:
    """Changed files with their hunks, and the names of what git was not given; None if the tree cannot be read."""
    result = await run(_SCRIPT, attributes, 4 * PATCH_MB << 20)
    if result.exit_code == _BASE_BROKEN:
        raise SandboxError("the image's own git repository cannot be read")
    if result.exit_code != 0 or result.truncated:
        return None
    sizes, start = [], 0
    for _ in range(3):
        end = result.output.index(b"\n", start)
        sizes.append(int(result.output[start:end]))
        start = end + 1
    raw, left, patch = (result.output[start + sum(sizes[:n]) : start + sum(sizes[: n + 1])] for n in range(3))
    return _split(raw, patch), left.split(b"\0")[:-1]


def _split(raw: bytes, patch: bytes) -> list[_Change]:
    """Join `diff --raw` with its patch: same order, two pieces where the type of a file changed, else one."""
    # every line of content begins with one of " +-\\" and no line of base85 holds a space
    pieces = re.split(rb"^(?=diff --git )", patch, flags=re.MULTILINE)[1:]
    fields = raw.split(b"\0")[:-1]
    changes = []
    for head, path in zip(fields[::2], fields[1::2], strict=True):
        before, after, _, _, status = head[1:].split(b" ")
        count = 2 if status == b"T" else 1
        changes.append(_Change(path, b"160000" in (before, after), b"".join(pieces[:count])))
        del pieces[:count]
    whole = not pieces and (not patch or all(change.hunks for change in changes))
    assert whole, "git's two listings of one difference disagree"
    return changes


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _as_binary(path: bytes) -> bytes:
    """Line of gitattributes that shows exactly this file as binary."""
    glob = re.sub(rb"([\\*?\[\]])", rb"\\\1", path)
    quoted = b"".join(b"\\%03o" % byte if byte < 32 or byte > 126 or byte in b'"\\' else bytes([byte]) for byte in glob)
    return b'"/%s" -diff\n' % quoted


def _name(path: bytes) -> str:
    return path.decode("utf-8", errors="backslashreplace")
