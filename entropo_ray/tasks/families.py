"""The function families of the local pack: what is right, what people get wrong, and how they complain. Data only."""

from __future__ import annotations

from entropo_ray.tasks.forms import Family, Pair, Riddle

# A pack may take the first so many: those that a policy of a million parameters learns last stand last.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="count_above",
        topic="list",
        words="f=count_above|count_over|num_above a=NUMBERS b=limit|bound x=LOOP",
        code='''def $f($a, $b):
    """Count the $a above $b, those equal to it left out."""
    return sum(1 for $x in $a if $x > $b)''',
        same=("$x > $b => $b < $x", "$x > $b => not $x <= $b"),
        bugs=(
            "boundary: $x > $b => $x >= $b",
            "inverted: $x > $b => $x < $b",
            "constant: sum(1 => sum(2",
        ),
        cases="[([1, 5, 9], 5), ([2, 4, 4], 4), ([7, 8], 3), ([], 2), ([1, 2], 8), ([6, 6, 9], 6), ([5, 1, 3], 2)]",
        says=("The count of high $a is off.", "We get the wrong number of $a over the $b."),
    ),
    Family(
        name="count_from",
        topic="list",
        words="f=count_from|at_least_count|num_from a=NUMBERS b=limit|bound x=LOOP",
        code='''def $f($a, $b):
    """Count the $a of $b or more."""
    return sum(1 for $x in $a if $x >= $b)''',
        same=("$x >= $b => $b <= $x", "$x >= $b => not $x < $b"),
        bugs=(
            "boundary: $x >= $b => $x > $b",
            "inverted: $x >= $b => $x <= $b",
            "constant: sum(1 => sum(2",
        ),
        cases="[([1, 5, 9], 5), ([2, 4, 4], 4), ([7, 8], 3), ([], 2), ([1, 2], 8), ([6, 6, 9, 1], 6), ([4, 7, 1], 4)]",
        says=("The number of $a that reach the $b is wrong.", "Our report counts the $a badly."),
    ),
    Family(
        name="clamp",
        topic="number",
        words="f=clamp|limit_to|bounded a=value|number b=low|least c=high|most",
        code='''def $f($a, $b, $c):
    """Keep $a between $b and $c."""
    return max($b, min($a, $c))''',
        same=("max($b, min($a, $c)) => min($c, max($a, $b))", "max($b, min($a, $c)) => max(min($a, $c), $b)"),
        bugs=(
            "extreme: max($b, min($a, $c)) => min($b, max($a, $c))",
            "arguments: max($b, min($a, $c)) => max($c, min($a, $b))",
            "extreme: max($b, min($a, $c)) => max($b, max($a, $c))",
            "call: max($b, min($a, $c)) => min($a, $c)",
        ),
        cases="[(5, 1, 9), (0, 1, 9), (12, 1, 9), (-3, -2, 4), (7, 2, 6), (4, 4, 4), (3, 0, 8)]",
        says=("Some results leave the allowed range.", "The $a comes back outside of its limits."),
    ),
    Family(
        name="sum_to",
        topic="number",
        words="f=sum_to|sum_up_to|add_up a=n|top",
        code='''def $f($a):
    """Sum of the numbers from 1 to $a, with $a itself."""
    return sum(range(1, $a + 1))''',
        same=("range(1, $a + 1) => range($a + 1)", "sum(range(1, $a + 1)) => $a * ($a + 1) // 2"),
        bugs=(
            "range: range(1, $a + 1) => range(1, $a)",
            "range: range(1, $a + 1) => range(2, $a + 1)",
            "range: range(1, $a + 1) => range(1, $a + 2)",
        ),
        cases="[(4,), (1,), (0,), (-1,), (10,), (2,), (6,)]",
        says=("The sum is too small or too large.", "The last number seems to be treated badly."),
    ),
    Family(
        name="product",
        topic="list",
        words="f=product|multiply_all|times_all a=NUMBERS x=total|result y=LOOP",
        code='''def $f($a):
    """Product of the $a, 1 if there are none."""
    $x = 1
    for $y in $a:
        $x *= $y
    return $x''',
        same=("$x *= $y => $x = $x * $y", "$x *= $y => $x = $y * $x"),
        bugs=(
            "start: $x = 1 => $x = 0",
            "operator: $x *= $y => $x += $y",
            "start: $x = 1 => $x = 2",
            "operator: $x *= $y => $x = $y",
        ),
        cases="[([2, 3],), ([],), ([0, 4],), ([5],), ([-1, 1],), ([-1, 2, 0],), ([4, 2, 1],), ([0],), ([1, 7],)]",
        says=("Multiplying our $a goes wrong.", "The product of the $a is not what I get by hand."),
    ),
    Family(
        name="evens",
        topic="list",
        words="f=evens|even_only|keep_even a=NUMBERS x=LOOP",
        code='''def $f($a):
    """Keep the even $a."""
    return [$x for $x in $a if $x % 2 == 0]''',
        same=("$x % 2 == 0 => not $x % 2", "$x % 2 == 0 => $x % 2 != 1"),
        bugs=(
            "inverted: $x % 2 == 0 => $x % 2 != 0",
            "constant: $x % 2 == 0 => $x % 4 == 0",
            "operator: $x % 2 == 0 => $x // 2 == 0",
            "constant: $x % 2 == 0 => $x % 3 == 0",
        ),
        cases="[([1, 2, 4],), ([],), ([6, 3],), ([3, 5],), ([8, 12],), ([0, 1],), ([10, 9, 2],)]",
        says=("Some odd or even $a are lost.", "The wrong $a are kept."),
    ),
    Family(
        name="multiples",
        topic="list",
        words="f=multiples|divisible|keep_multiples a=NUMBERS x=LOOP k=3|5",
        code='''def $f($a):
    """Keep the $a that $k divides."""
    return [$x for $x in $a if $x % $k == 0]''',
        same=("$x % $k == 0 => not $x % $k",),
        bugs=(
            "inverted: $x % $k == 0 => $x % $k != 0",
            "operator: $x % $k == 0 => $x // $k == 0",
            "constant: $x % $k == 0 => $x % $k == 1",
            "plus one: $x % $k == 0 => $x + 1 % $k == 0",
        ),
        cases="[([k, 1],), ([k + 1, 2 * k],), ([],), ([4 * k, k, 2],), ([k - 1, 3 * k],), ([2 * k + 2],), ([0],)]",
        says=("Not the right $a are kept.", "I miss $a that should pass the filter."),
    ),
    Family(
        name="first_n",
        topic="list",
        words="f=first_n|take|head a=ITEMS b=n|count",
        code='''def $f($a, $b):
    """The first $b of the $a."""
    return $a[:$b]''',
        same=("$a[:$b] => $a[0:$b]", "$a[:$b] => list($a[:$b])"),
        bugs=(
            "slice: $a[:$b] => $a[:$b - 1]",
            "slice: $a[:$b] => $a[:$b + 1]",
            "slice: $a[:$b] => $a[$b:]",
            "slice: $a[:$b] => $a[1:$b]",
        ),
        cases="[([1, 2, 3], 2), ([4, 5], 5), ([], 2), ([7, 8, 9], 1), ([6, 2], 2), ([5, 1, 4, 3], 3), ([9, 8], 1)]",
        says=("The wrong part of the $a comes back.", "I do not get the start of the list that I asked for."),
    ),
    Family(
        name="last_n",
        topic="list",
        words="f=last_n|tail|final a=ITEMS b=n|count",
        code='''def $f($a, $b):
    """The last $b of the $a; $b is 1 or more."""
    return $a[-$b:]''',
        same=("$a[-$b:] => $a[max(len($a) - $b, 0):]", "$a[-$b:] => list($a[-$b:])"),
        bugs=(
            "slice: $a[-$b:] => $a[$b:]",
            "slice: $a[-$b:] => $a[:-$b]",
            "slice: $a[-$b:] => $a[-$b - 1:]",
            "slice: $a[-$b:] => $a[-$b:-1]",
        ),
        cases="[([1, 2, 3], 2), ([4, 5], 5), ([], 2), ([7, 8, 9, 5], 2), ([6, 2], 1), ([5, 1, 4, 3], 3), ([8], 1)]",
        says=("The end of the list is cut wrongly.", "I ask for the last $a and get others."),
    ),
    Family(
        name="inner",
        topic="list",
        words="f=inner|middle|without_ends a=ITEMS",
        code='''def $f($a):
    """The $a without the first and the last."""
    return $a[1:-1]''',
        same=("$a[1:-1] => $a[1:len($a) - 1]", "$a[1:-1] => $a[1:][:-1]"),
        bugs=(
            "slice: $a[1:-1] => $a[1:]",
            "slice: $a[1:-1] => $a[:-1]",
            "slice: $a[1:-1] => $a[1:-2]",
            "slice: $a[1:-1] => $a[2:-1]",
        ),
        cases="[([1, 2, 3],), ([4, 5, 6, 7],), ([],), ([8],), ([9, 3],), ([5, 5, 2, 1, 0],)]",
        says=("The ends are not cut as promised.", "One end of the $a is treated badly."),
    ),
    Family(
        name="every_other",
        topic="list",
        words="f=every_other|every_second|skip_one a=ITEMS",
        code='''def $f($a):
    """Every second one of the $a, from the first."""
    return $a[::2]''',
        same=("$a[::2] => $a[0::2]", "$a[::2] => list($a[::2])"),
        bugs=(
            "slice: $a[::2] => $a[1::2]",
            "constant: $a[::2] => $a[::3]",
            "order: $a[::2] => $a[::-2]",
            "slice: $a[::2] => $a[2:]",
        ),
        cases="[([1, 2, 3],), ([4, 5, 6, 7],), ([],), ([8],), ([9, 3],), ([5, 1, 2, 5, 0],), ([7, 7, 7],)]",
        says=("The wrong $a are skipped.", "The $a that I get are not every second one."),
    ),
    Family(
        name="spread",
        topic="list",
        words="f=spread|gap|width_of a=NUMBERS",
        code='''def $f($a):
    """Largest minus smallest of the $a."""
    return max($a) - min($a)''',
        same=("max($a) - min($a) => abs(min($a) - max($a))", "max($a) - min($a) => sorted($a)[-1] - sorted($a)[0]"),
        bugs=(
            "extreme: max($a) - min($a) => min($a) - max($a)",
            "operator: max($a) - min($a) => max($a) + min($a)",
            "key: max($a) - min($a) => $a[-1] - min($a)",
            "key: max($a) - min($a) => max($a) - $a[0]",
        ),
        cases="[([1, 5],), ([0, 4],), ([7],), ([6, 2, 9],), ([3, 3],), ([8, 0, 2],), ([2, 5, 3],)]",
        says=("The spread of the $a comes out wrong.", "The difference does not match our data."),
    ),
    Family(
        name="distance",
        topic="number",
        words="f=distance|apart|difference a=left|start b=right|end",
        code='''def $f($a, $b):
    """How far $a is from $b, never negative."""
    return abs($a - $b)''',
        same=("abs($a - $b) => abs($b - $a)", "abs($a - $b) => max($a - $b, $b - $a)"),
        bugs=(
            "call: abs($a - $b) => $a - $b",
            "operator: abs($a - $b) => abs($a + $b)",
            "arguments: abs($a - $b) => $b - $a",
            "call: abs($a - $b) => max($a - $b, 0)",
        ),
        cases="[(5, 2), (2, 5), (4, 4), (0, 3), (7, 0), (-1, 1), (3, 9)]",
        says=("The distance has a wrong value.", "Some differences are not plausible."),
    ),
    Family(
        name="clean",
        topic="text",
        words="f=clean|normal|tidy a=TEXT",
        code='''def $f($a):
    """The $a in lower case, without outer spaces."""
    return $a.strip().lower()''',
        same=("$a.strip().lower() => $a.lower().strip()",),
        bugs=(
            "call: $a.strip().lower() => $a.strip()",
            "call: $a.strip().lower() => $a.lower()",
            "call: $a.strip().lower() => $a.strip().upper()",
            "call: $a.strip().lower() => $a.lstrip().lower()",
        ),
        cases="[(' Ab ',), ('ab',), ('AB',), (' cd',), ('ef ',), ('',), ('  ',), ('12',)]",
        says=("The text is not cleaned fully.", "Names from the form do not match afterwards."),
    ),
    Family(
        name="initials",
        topic="text",
        words="f=initials|short_name|letters_of a=TEXT x=word|part",
        code='''def $f($a):
    """First letters of the words of $a, in upper case."""
    return "".join($x[0].upper() for $x in $a.split())''',
        same=("$x[0].upper() => $x[:1].upper()", "$x[0].upper() for => $x.upper()[0] for"),
        bugs=(
            "call: $x[0].upper() => $x[0]",
            "key: $x[0].upper() => $x[-1].upper()",
            "call: $x[0].upper() => $x[0].lower()",
            "slice: $x[0].upper() => $x[:2].upper()",
        ),
        cases="[('ann lee',), ('A B',), ('bob',), ('',), ('x',), ('Jo Ann Ray',), ('1 2',), ('a',)]",
        says=("The short form of a name is wrong.", "The letters on the badge are not right."),
    ),
    Family(
        name="palindrome",
        topic="text",
        words="f=palindrome|is_mirror|reads_back a=TEXT x=small|plain",
        code='''def $f($a):
    """True if $a reads the same backwards, whatever its case."""
    $x = $a.lower()
    return $x == $x[::-1]''',
        same=("$x = $a.lower() => $x = $a.upper()", "$x == $x[::-1] => $x[::-1] == $x"),
        bugs=(
            "call: $x = $a.lower() => $x = $a",
            "slice: $x == $x[::-1] => $x == $x[::1]",
            "inverted: $x == $x[::-1] => $x != $x[::-1]",
            "key: $x == $x[::-1] => $x[0] == $x[-1]",
        ),
        cases="[('Anna',), ('anna',), ('abc',), ('x',), ('Aba',), ('xyzx',), ('noon',), ('on',)]",
        says=("The mirror check gives a wrong answer.", "Some words are judged wrongly."),
    ),
    Family(
        name="word_count",
        topic="text",
        words="f=word_count|count_words|num_words a=TEXT",
        code='''def $f($a):
    """Number of words in $a."""
    return len($a.split())''',
        same=("len($a.split()) => len($a.strip().split())", "len($a.split()) => sum(1 for _ in $a.split())"),
        bugs=(
            "call: len($a.split()) => len($a)",
            'default: len($a.split()) => len($a.split(" "))',
            'constant: len($a.split()) => len($a.split(","))',
            "plus one: len($a.split()) => len($a.split()) + 1",
        ),
        cases="[('a b',), ('one',), ('',), ('x  y',), ('to be or',), (' z ',), ('q',), ('a b c d',)]",
        says=("The number of words is off.", "Our word counter is wrong for some texts."),
    ),
    Family(
        name="vowels",
        topic="text",
        words="f=vowels|count_vowels|num_vowels a=TEXT x=letter|char",
        code='''def $f($a):
    """Number of vowels in $a, large or small."""
    return sum(1 for $x in $a.lower() if $x in "aeiou")''',
        same=('$a.lower() if $x in "aeiou" => $a if $x in "aeiouAEIOU"', "in $a.lower() if => in $a.casefold() if"),
        bugs=(
            "call: in $a.lower() if => in $a if",
            "inverted: if $x in => if $x not in",
            'constant: "aeiou" => "aeio"',
            "call: in $a.lower() if => in $a.upper() if",
        ),
        cases="[('Anna',), ('ba',), ('sky',), ('',), ('run',), ('IDEA',), ('bob',), ('Ub',), ('ox',)]",
        says=("Some vowels are not counted.", "The vowel count does not fit the text."),
    ),
    Family(
        name="add_percent",
        topic="number",
        words="f=with_tax|add_tax|gross a=price|net k=5|10 j=6|8",
        code='''def $f($a):
    """The $a with $k percent added."""
    return $a + $a * $k / 100''',
        same=("$a + $a * $k / 100 => $a * $k / 100 + $a", "$a + $a * $k / 100 => $a * (100 + $k) / 100"),
        bugs=(
            "operator: $a + $a * $k / 100 => $a - $a * $k / 100",
            "constant: $a + $a * $k / 100 => $a + $a * $j / 100",
            "constant: $a + $a * $k / 100 => $a + $a * $k / 10",
            "operator: $a + $a * $k / 100 => $a * $k / 100",
        ),
        cases="[(100,), (0,), (200,), (400,), (40,), (1000,)]",
        says=("The price on the bill is wrong.", "The tax is not added properly."),
    ),
    Family(
        name="discount",
        topic="number",
        words="f=discounted|reduced|sale_price a=price|cost b=percent|rate",
        code='''def $f($a, $b):
    """The $a less $b percent."""
    return $a - $a * $b / 100''',
        same=("$a - $a * $b / 100 => $a * (100 - $b) / 100", "$a * $b / 100 => $b * $a / 100"),
        bugs=(
            "operator: $a - $a * $b / 100 => $a + $a * $b / 100",
            "key: $a - $a * $b / 100 => $b - $a * $b / 100",
            "constant: $a - $a * $b / 100 => $a - $a * $b / 10",
            "division: $a - $a * $b / 100 => $a - $a * $b // 100",
        ),
        cases="[(100, 10), (0, 5), (50, 50), (200, 0), (10, 25), (40, 20), (30, 5)]",
        says=("The price after a sale is wrong.", "Our shop shows a wrong price."),
    ),
    Family(
        name="seconds",
        topic="number",
        words="f=to_seconds|seconds|in_seconds a=hours|hrs b=minutes|mins",
        code='''def $f($a, $b):
    """Seconds in $a and $b."""
    return $a * 3600 + $b * 60''',
        same=("$a * 3600 + $b * 60 => 60 * ($a * 60 + $b)", "$a * 3600 + $b * 60 => $b * 60 + $a * 3600"),
        bugs=(
            "constant: $a * 3600 + $b * 60 => $a * 360 + $b * 60",
            "arguments: $a * 3600 + $b * 60 => $b * 3600 + $a * 60",
            "operator: $a * 3600 + $b * 60 => $a * 3600 - $b * 60",
            "constant: $a * 3600 + $b * 60 => $a * 3600 + $b * 600",
        ),
        cases="[(1, 0), (0, 1), (2, 2), (0, 0), (1, 30), (3, 0), (0, 5)]",
        says=("The time in seconds is wrong.", "Our timer stops at the wrong moment."),
    ),
    Family(
        name="fahrenheit",
        topic="number",
        words="f=fahrenheit|to_fahrenheit|heat a=degrees|celsius",
        code='''def $f($a):
    """Fahrenheit for $a in Celsius."""
    return $a * 9 / 5 + 32''',
        same=("$a * 9 / 5 + 32 => 32 + $a * 9 / 5", "$a * 9 / 5 + 32 => 9 * $a / 5 + 32"),
        bugs=(
            "arguments: $a * 9 / 5 + 32 => $a * 5 / 9 + 32",
            "operator: $a * 9 / 5 + 32 => $a * 9 / 5 - 32",
            "constant: $a * 9 / 5 + 32 => $a * 9 / 4 + 32",
            "division: $a * 9 / 5 + 32 => $a * 9 // 5 + 32",
        ),
        cases="[(0,), (100,), (5,), (-5,), (20,), (1,), (10,), (3,)]",
        says=("The temperature is off.", "The heat shown on the page is wrong."),
    ),
    Family(
        name="pages",
        topic="number",
        words="f=pages|page_count|num_pages a=total|entries b=per_page|size",
        code='''def $f($a, $b):
    """Pages for $a with $b on each; a part of a page counts."""
    return ($a + $b - 1) // $b''',
        same=("($a + $b - 1) // $b => -(-$a // $b)", "($a + $b - 1) // $b => ($a - 1) // $b + 1"),
        bugs=(
            "plus one: ($a + $b - 1) // $b => $a // $b",
            "plus one: ($a + $b - 1) // $b => ($a + $b) // $b",
            "division: ($a + $b - 1) // $b => ($a + $b - 1) / $b",
            "operator: ($a + $b - 1) // $b => ($a + $b - 1) % $b",
        ),
        cases="[(10, 5), (11, 5), (0, 3), (7, 2), (1, 4), (9, 3), (4, 1)]",
        says=("The number of pages is wrong.", "The list of pages has a wrong length."),
    ),
    Family(
        name="full_boxes",
        topic="number",
        words="f=full_boxes|whole_packs|full_rows a=total|pieces b=size|each",
        code='''def $f($a, $b):
    """Full boxes of $b that $a will fill."""
    return $a // $b''',
        same=("$a // $b => ($a - $a % $b) // $b", "$a // $b => divmod($a, $b)[0]"),
        bugs=(
            "division: $a // $b => $a / $b",
            "operator: $a // $b => $a % $b",
            "plus one: $a // $b => ($a + $b - 1) // $b",
            "plus one: $a // $b => $a // $b + 1",
        ),
        cases="[(10, 5), (11, 5), (0, 3), (7, 2), (4, 3), (12, 4), (9, 8)]",
        says=("The number of boxes is wrong.", "We order too many or too few boxes."),
    ),
    Family(
        name="position",
        topic="list",
        words="f=position|index_of|where a=ITEMS b=wanted|target",
        code='''def $f($a, $b):
    """Index of $b in the $a, -1 if it is not there."""
    if $b not in $a:
        return -1
    return $a.index($b)''',
        same=("if $b not in $a: => if not $b in $a:", "if $b not in $a: => if $a.count($b) == 0:"),
        bugs=(
            "edge:     if $b not in $a:\n        return -1\n => ",
            "default: return -1 => return 0",
            "plus one: $a.index($b) => $a.index($b) + 1",
            "default: return -1 => return None",
        ),
        cases="[([1, 2], 2), ([3], 5), ([], 1), ([7, 8, 9], 7), ([4, 6, 4], 4), ([5, 2], 9)]",
        says=("Looking for an entry goes wrong.", "The search gives a wrong place."),
    ),
    Family(
        name="lookup",
        topic="table",
        words="f=lookup|value_of|read_value a=TABLE b=key|field k=0|1 j=2|7",
        code='''def $f($a, $b):
    """Value of $b in $a, $k if it is missing."""
    return $a.get($b, $k)''',
        same=("$a.get($b, $k) => $a[$b] if $b in $a else $k", "$a.get($b, $k) => {$b: $k, **$a}[$b]"),
        bugs=(
            "default: $a.get($b, $k) => $a.get($b)",
            "default: $a.get($b, $k) => $a.get($b, $j)",
            "edge: $a.get($b, $k) => $a[$b]",
            "arguments: $a.get($b, $k) => $a.get($k, $b)",
        ),
        cases="[({'a': 3}, 'a'), ({}, 'b'), ({'c': 4}, 'd'), ({'x': 8, 'y': 6}, 'y'), ({'q': 11}, 'z')]",
        says=("A missing entry is handled badly.", "Reading the $a gives a wrong value."),
    ),
    Family(
        name="tally",
        topic="table",
        words="f=tally|frequencies|histogram a=ITEMS x=counts|found y=LOOP",
        code='''def $f($a):
    """How often each of the $a occurs."""
    $x = {}
    for $y in $a:
        $x[$y] = $x.get($y, 0) + 1
    return $x''',
        same=("$x.get($y, 0) + 1 => 1 + $x.get($y, 0)", "$x.get($y, 0) + 1 => $a.count($y)"),
        bugs=(
            "default: $x.get($y, 0) + 1 => $x.get($y, 1) + 1",
            "constant: $x.get($y, 0) + 1 => $x.get($y, 0) + 2",
            "start: $x.get($y, 0) + 1 => 1",
            "slice: for $y in $a: => for $y in $a[1:]:",
        ),
        cases="[(['a', 'b', 'a'],), ([],), (['c'],), (['d', 'd'],), (['x', 'y'],), (['e', 'e', 'e', 'f'],)]",
        says=("The counts are wrong.", "An entry is not counted as often as it occurs."),
    ),
    Family(
        name="descending",
        topic="list",
        words="f=descending|from_top|ranked a=NUMBERS",
        code='''def $f($a):
    """The $a from largest to smallest."""
    return sorted($a, reverse=True)''',
        same=("sorted($a, reverse=True) => sorted($a)[::-1]", "sorted($a, reverse=True) => list(reversed(sorted($a)))"),
        bugs=(
            "order: sorted($a, reverse=True) => sorted($a)",
            "order: sorted($a, reverse=True) => sorted($a, reverse=False)",
            "call: sorted($a, reverse=True) => $a[::-1]",
            "call: sorted($a, reverse=True) => list($a)",
        ),
        cases="[([1, 3, 2],), ([],), ([5],), ([4, 4],), ([9, 1, 7],), ([2, 6, 8],), ([6, 5, 1],)]",
        says=("The order of the $a is wrong.", "The ranking on our page looks strange."),
    ),
    Family(
        name="top_n",
        topic="list",
        words="f=top_n|best|highest a=NUMBERS b=n|count",
        code='''def $f($a, $b):
    """The $b largest of the $a, the largest first."""
    return sorted($a, reverse=True)[:$b]''',
        same=("sorted($a, reverse=True)[:$b] => sorted($a)[::-1][:$b]", "reverse=True)[:$b] => reverse=True)[0:$b]"),
        bugs=(
            "slice: reverse=True)[:$b] => reverse=True)[:$b - 1]",
            "order: sorted($a, reverse=True)[:$b] => sorted($a)[:$b]",
            "slice: reverse=True)[:$b] => reverse=True)[$b:]",
            "call: sorted($a, reverse=True)[:$b] => $a[:$b]",
        ),
        cases="[([1, 3, 2], 2), ([], 1), ([5, 4, 6], 1), ([4, 4], 1), ([9, 1, 7, 8], 3), ([2, 6], 5), ([3, 1], 1)]",
        says=("The list of the best is wrong.", "The winners are not the ones with most points."),
    ),
    Family(
        name="unique",
        topic="list",
        words="f=unique|distinct|no_repeats a=ITEMS x=kept|out y=LOOP",
        code='''def $f($a):
    """The $a without repeats, in the order of first sight."""
    $x = []
    for $y in $a:
        if $y not in $x:
            $x.append($y)
    return $x''',
        same=("if $y not in $x: => if not $y in $x:", "$x.append($y) => $x += [$y]"),
        bugs=(
            "inverted: if $y not in $x: => if $y in $x:",
            "order: $x.append($y) => $x.insert(0, $y)",
            "edge: if $y not in $x: => if $y:",
            "slice: for $y in $a: => for $y in $a[1:]:",
        ),
        cases="[([1, 2, 1],), ([],), ([3],), ([4, 4],), ([2, 5],), ([6, 7, 8, 6],), ([9, 9, 1],)]",
        says=("Repeats are not removed as promised.", "Our list of names has wrong entries."),
    ),
    Family(
        name="flatten",
        topic="list",
        words="f=flatten|join_lists|all_items a=groups|lists x=group|block y=OTHER",
        code='''def $f($a):
    """All entries of the $a in one list, in order."""
    return [$y for $x in $a for $y in $x]''',
        same=("[$y for $x in $a for $y in $x] => sum($a, [])",),
        bugs=(
            "slice: for $y in $x] => for $y in $x[1:]]",
            "slice: for $x in $a for => for $x in $a[1:] for",
            "order: for $y in $x] => for $y in $x[::-1]]",
            "key: [$y for $x => [$x for $x",
        ),
        cases="[([[1, 2], [3]],), ([],), ([[], [4]],), ([[5], [6]],), ([[7, 8]],), ([[], []],), ([[1], [2, 9]],)]",
        says=("Joining the $a loses or moves entries.", "The long list is not complete."),
    ),
    Family(
        name="joined",
        topic="text",
        words="f=joined|as_line|to_row a=WORDS w=-|, v=;|_",
        code='''def $f($a):
    """The $a in one text, with "$w" between."""
    return "$w".join($a)''',
        same=('"$w".join($a) => "$w".join(list($a))', '"$w".join($a) => str.join("$w", $a)'),
        bugs=(
            'constant: "$w".join($a) => "$v".join($a)',
            'order: "$w".join($a) => "$w".join($a[::-1])',
            'slice: "$w".join($a) => "$w".join($a[1:])',
            'call: "$w".join($a) => "$w".join(sorted($a))',
        ),
        cases="[(['a', 'b'],), ([],), (['c'],), (['d', 'a', 'e'],), (['x', 'x'],), (['z', 'y'],)]",
        says=("The text is put together wrongly.", "Our export file cannot be read."),
    ),
    Family(
        name="passed",
        topic="number",
        words="f=passed|is_enough|accepted a=score|points k=50|60 j=55|70",
        code='''def $f($a):
    """True if $a is $k or more."""
    return $a >= $k''',
        same=("$a >= $k => $k <= $a", "$a >= $k => not $a < $k"),
        bugs=(
            "boundary: $a >= $k => $a > $k",
            "inverted: $a >= $k => $a <= $k",
            "constant: $a >= $k => $a >= $j",
            "inverted: $a >= $k => $a < $k",
        ),
        cases="[(k,), (k + 1,), (k - 1,), (0,), (100,), (j,), (2,), (k + 5,)]",
        says=("Some people get the wrong result.", "The decision is wrong near the border."),
    ),
    Family(
        name="within",
        topic="number",
        words="f=within|in_range|is_inside a=value|number b=low|start c=high|end",
        code='''def $f($a, $b, $c):
    """True if $a is from $b to $c, both ends count."""
    return $b <= $a <= $c''',
        same=("$b <= $a <= $c => $a >= $b and $a <= $c", "$b <= $a <= $c => not ($a < $b or $a > $c)"),
        bugs=(
            "boundary: $b <= $a <= $c => $b < $a <= $c",
            "boundary: $b <= $a <= $c => $b <= $a < $c",
            "operator: $b <= $a <= $c => $b <= $a or $a <= $c",
            "arguments: $b <= $a <= $c => $c <= $a <= $b",
        ),
        cases="[(1, 1, 5), (5, 1, 5), (3, 1, 5), (0, 1, 5), (9, 2, 6), (2, 2, 8), (8, 2, 8)]",
        says=("A $a at the edge is judged wrongly.", "The range check is not right."),
    ),
    Family(
        name="field",
        topic="table",
        words="f=field|column|pick_field a=ITEMS x=LOOP w=name|price v=id|kind",
        code='''def $f($a):
    """The "$w" of each of the $a."""
    return [$x["$w"] for $x in $a]''',
        same=('[$x["$w"] for => [$x.get("$w") for', '[$x["$w"] for $x in $a] => list($x["$w"] for $x in $a)'),
        bugs=(
            'key: $x["$w"] => $x["$v"]',
            "slice: in $a] => in $a[1:]]",
            "order: in $a] => in $a[::-1]]",
            'key: [$x["$w"] for => [$x for',
        ),
        cases=(
            "[([{w: 1, v: 2}],), ([],), ([{w: 4, v: 4}],), ([{w: 5, v: 6}, {w: 7, v: 8}],), "
            "([{w: 3, v: 3}, {w: 9, v: 9}],)]"
        ),
        says=("The wrong values are taken from the $a.", "A column of our table is wrong."),
    ),
    Family(
        name="rectangle",
        topic="number",
        words="f=perimeter|fence|border_length a=width|length b=height|depth",
        code='''def $f($a, $b):
    """Length of the border of a $a by $b box."""
    return 2 * ($a + $b)''',
        same=("2 * ($a + $b) => 2 * $a + 2 * $b", "2 * ($a + $b) => ($a + $b) * 2"),
        bugs=(
            "operator: 2 * ($a + $b) => 2 * $a + $b",
            "operator: 2 * ($a + $b) => 2 * ($a * $b)",
            "constant: 2 * ($a + $b) => 4 * ($a + $b)",
            "operator: 2 * ($a + $b) => 2 * ($a - $b)",
        ),
        cases="[(1, 2), (2, 2), (3, 0), (0, 0), (5, 4), (0, 6), (7, 1)]",
        says=("The border has a wrong length.", "We bought the wrong length of fence."),
    ),
    Family(
        name="blank",
        topic="text",
        words="f=blank|is_blank|nothing_in a=TEXT",
        code='''def $f($a):
    """True if $a is empty or holds only spaces."""
    return $a.strip() == ""''',
        same=('$a.strip() == "" => not $a.strip()', '$a.strip() == "" => len($a.strip()) == 0'),
        bugs=(
            'call: $a.strip() == "" => $a == ""',
            'inverted: $a.strip() == "" => $a.strip() != ""',
            'constant: $a.strip() == "" => $a.strip() == " "',
            'constant: $a.strip() == "" => $a == " "',
        ),
        cases="[('',), ('  ',), ('a',), (' b ',), (' ',), ('c d',)]",
        says=("Empty input is not seen as empty.", "The form check for missing text is wrong."),
    ),
    Family(
        name="countdown",
        topic="number",
        words="f=countdown|count_down|backwards_from a=start|top",
        code='''def $f($a):
    """The numbers from $a down to 1."""
    return list(range($a, 0, -1))''',
        same=(
            "list(range($a, 0, -1)) => list(range(1, $a + 1))[::-1]",
            "list(range($a, 0, -1)) => [*range($a, 0, -1)]",
        ),
        bugs=(
            "range: range($a, 0, -1) => range($a, 1, -1)",
            "range: range($a, 0, -1) => range($a - 1, 0, -1)",
            "range: range($a, 0, -1) => range($a, -1, -1)",
            "order: range($a, 0, -1) => range(1, $a + 1)",
        ),
        cases="[(3,), (1,), (0,), (5,), (2,), (-1,), (-2,)]",
        says=("The countdown is not complete.", "The numbers going down are wrong."),
    ),
    Family(
        name="squares",
        topic="number",
        words="f=squares|square_list|all_squares a=n|count x=i|v",
        code='''def $f($a):
    """The squares of 0 to $a - 1, so $a of them."""
    return [$x * $x for $x in range($a)]''',
        same=("$x * $x for => $x ** 2 for", "range($a) => range(0, $a)"),
        bugs=(
            "range: range($a) => range($a + 1)",
            "range: range($a) => range(1, $a)",
            "operator: $x * $x for => $x + $x for",
            "range: range($a) => range($a - 1)",
        ),
        cases="[(3,), (1,), (0,), (4,), (-1,), (6,), (-2,)]",
        says=("The list of squares is wrong.", "There are too many or too few squares."),
    ),
    Family(
        name="ends_well",
        topic="text",
        words="f=is_file|has_ending|right_type a=TEXT w=.txt|.csv v=.md|.py",
        code='''def $f($a):
    """True if $a ends in "$w", whatever its case."""
    return $a.lower().endswith("$w")''',
        same=(
            '$a.lower().endswith("$w") => $a.casefold().endswith("$w")',
            '$a.lower().endswith("$w") => $a.lower()[-4:] == "$w"',
        ),
        bugs=(
            "call: $a.lower().endswith => $a.endswith",
            "operator: $a.lower().endswith => $a.lower().startswith",
            'constant: "$w") => "$v")',
            'operator: $a.lower().endswith("$w") => "$w" in $a.lower()',
        ),
        cases="[('a' + w,), ('B' + w.upper(),), ('c',), (w + 'x',), ('d' + v,), ('',), ('e' + w,)]",
        says=("Some files are not found.", "The check of the file type is wrong."),
    ),
    Family(
        name="average",
        topic="list",
        words="f=average|mean_of|typical a=NUMBERS",
        code='''def $f($a):
    """Mean of the $a, 0 if there are none."""
    if not $a:
        return 0
    return sum($a) / len($a)''',
        same=("if not $a: => if len($a) == 0:", "if not $a: => if $a == []:"),
        bugs=(
            "edge:     if not $a:\n        return 0\n => ",
            "division: sum($a) / len($a) => sum($a) // len($a)",
            "default: return 0 => return 1",
            "plus one: len($a) => (len($a) + 1)",
        ),
        cases="[([2, 4],), ([1, 2],), ([],), ([5],), ([1, 2, 6],), ([0, 0],), ([3, 4, 4, 4],), ([7, 8],)]",
        says=("The mean of our $a is not right.", "Our averages look odd."),
    ),
    Family(
        name="merged",
        topic="table",
        words="f=merged|combine|overlay a=base|old b=extra|new",
        code='''def $f($a, $b):
    """All of $a and $b; where both have a key, $b wins."""
    return {**$a, **$b}''',
        same=("{**$a, **$b} => $a | $b", "{**$a, **$b} => dict($a, **$b)"),
        bugs=(
            "order: {**$a, **$b} => {**$b, **$a}",
            "key: {**$a, **$b} => {**$a}",
            "key: {**$a, **$b} => {**$b}",
            "operator: {**$a, **$b} => {k: $b[k] for k in $a if k in $b}",
        ),
        cases=(
            "[({'a': 1}, {'a': 2}), ({'b': 3}, {}), ({}, {'c': 4}), ({'d': 5}, {'e': 6}), ({}, {}), "
            "({'x': 1}, {'x': 1})]"
        ),
        says=("Settings are joined wrongly.", "A value is lost when two tables are joined."),
    ),
    Family(
        name="padded",
        topic="text",
        words="f=padded|with_zeros|code_text a=number|code k=3|4 j=2|6",
        code='''def $f($a):
    """The $a as text of $k digits, with zeros in front."""
    return str($a).zfill($k)''',
        same=('str($a).zfill($k) => str($a).rjust($k, "0")', 'str($a).zfill($k) => format($a, "0$kd")'),
        bugs=(
            "constant: zfill($k) => zfill($j)",
            "default: zfill($k) => rjust($k)",
            'order: zfill($k) => ljust($k, "0")',
            "call: str($a).zfill($k) => str($a)",
        ),
        cases="[(7,), (42,), (1234567,), (10 ** (k - 1),), (0,), (99,), (8888888,)]",
        says=("The codes have a wrong form.", "Labels do not line up any more."),
    ),
    Family(
        name="percent_of",
        topic="number",
        words="f=percent|share_of|ratio a=part|done b=whole|total",
        code='''def $f($a, $b):
    """Percent that $a is of $b, 0 if $b is 0."""
    if $b == 0:
        return 0
    return 100 * $a / $b''',
        same=("if $b == 0: => if not $b:", "100 * $a / $b => $a * 100 / $b"),
        bugs=(
            "edge:     if $b == 0:\n        return 0\n => ",
            "arguments: 100 * $a / $b => 100 * $b / $a",
            "constant: 100 * $a / $b => 10 * $a / $b",
            "division: 100 * $a / $b => 100 * $a // $b",
            "edge: if $b == 0: => if $a == 0:",
        ),
        cases="[(1, 2), (1, 8), (0, 5), (3, 0), (4, 4), (2, 2), (7, 0), (5, 8)]",
        says=("The progress bar shows nonsense.", "The percent value is wrong."),
    ),
    Family(
        name="steps",
        topic="list",
        words="f=steps|changes|deltas a=NUMBERS x=old|before y=new|after",
        code='''def $f($a):
    """Change from each of the $a to the next one."""
    return [$y - $x for $x, $y in zip($a, $a[1:])]''',
        same=("[$y - $x for => [-$x + $y for", "[$y - $x for => [-($x - $y) for"),
        bugs=(
            "arguments: [$y - $x for => [$x - $y for",
            "slice: $a[1:] => $a[2:]",
            "operator: [$y - $x for => [$y + $x for",
            "call: [$y - $x for => [abs($y - $x) for",
        ),
        cases="[([1, 4],), ([],), ([3],), ([5, 5],), ([9, 2, 3],), ([0, 6],), ([2, 8, 7],), ([3, 3, 3],)]",
        says=("The changes have wrong values.", "Growth in our table is shown wrongly."),
    ),
    Family(
        name="same_text",
        topic="text",
        words="f=same_text|equal_text|matches a=left|first b=right|second",
        code='''def $f($a, $b):
    """True if $a and $b match, whatever their case."""
    return $a.lower() == $b.lower()''',
        same=(
            "$a.lower() == $b.lower() => $a.upper() == $b.upper()",
            "$a.lower() == $b.lower() => $b.lower() == $a.lower()",
            "$a.lower() == $b.lower() => $a.casefold() == $b.casefold()",
        ),
        bugs=(
            "call: $a.lower() == $b.lower() => $a.lower() == $b",
            "call: $a.lower() == $b.lower() => $a == $b.lower()",
            "inverted: $a.lower() == $b.lower() => $a.lower() != $b.lower()",
            "operator: $a.lower() == $b.lower() => $a.lower() in $b.lower()",
        ),
        cases="[('Ab', 'aB'), ('ab', 'AB'), ('AB', 'ab'), ('a', 'a'), ('x', 'y'), ('b', 'abc'), ('', '')]",
        says=("Two texts are compared wrongly.", "Upper case letters confuse the search."),
    ),
    Family(
        name="leap",
        topic="number",
        words="f=leap|is_leap|has_leap_day a=year|yr",
        code='''def $f($a):
    """True if $a is a leap year."""
    return $a % 4 == 0 and ($a % 100 != 0 or $a % 400 == 0)''',
        same=("$a % 4 == 0 and => not $a % 4 and", "$a % 4 == 0 and => $a % 4 < 1 and"),
        bugs=(
            "inverted: $a % 100 != 0 => $a % 100 == 0",
            "operator: 0 and ($a => 0 or ($a",
            "constant: $a % 400 == 0 => $a % 200 == 0",
            "edge: $a % 4 == 0 and ($a % 100 != 0 or $a % 400 == 0) => $a % 4 == 0",
        ),
        cases="[(2024,), (1900,), (2000,), (2023,), (2100,), (2200,), (1996,), (1999,), (2400,)]",
        says=("Our calendar has a wrong day.", "Some years are judged wrongly."),
    ),
    Family(
        name="running",
        topic="list",
        words="f=running|running_sums|so_far a=NUMBERS x=total|current y=sums|out z=LOOP",
        code='''def $f($a):
    """Sums of the $a so far, one for each."""
    $x = 0
    $y = []
    for $z in $a:
        $x += $z
        $y.append($x)
    return $y''',
        same=("$x += $z => $x = $x + $z", "$y.append($x) => $y += [$x]"),
        bugs=(
            "start: $x = 0 => $x = 1",
            "operator: $x += $z => $x -= $z",
            "key: $y.append($x) => $y.append($z)",
            "operator: $x += $z => $x = $z",
        ),
        cases="[([1, 2],), ([],), ([3],), ([0, 0],), ([4, 1, 5],), ([0],), ([7, 0, 2],)]",
        says=("The sums on the way are wrong.", "The balance after each step is off."),
    ),
    Family(
        name="second",
        topic="list",
        words="f=second_best|runner_up|next_largest a=NUMBERS",
        code='''def $f($a):
    """The second largest of the $a."""
    return sorted($a)[-2]''',
        same=("sorted($a)[-2] => sorted($a, reverse=True)[1]", "sorted($a)[-2] => sorted($a)[len($a) - 2]"),
        bugs=(
            "key: sorted($a)[-2] => sorted($a)[-1]",
            "key: sorted($a)[-2] => sorted($a)[1]",
            "call: sorted($a)[-2] => $a[-2]",
            "order: sorted($a)[-2] => sorted($a, reverse=True)[-2]",
        ),
        cases="[([1, 2, 3, 4],), ([5, 5],), ([9, 7],), ([2, 8, 6],), ([4, 4, 4],), ([3, 1, 7, 5],), ([6, 9, 8],)]",
        says=("The second place is wrong.", "The silver medal goes to the wrong one."),
    ),
    Family(
        name="order_total",
        topic="list",
        words="f=order_total|bill|cost_of a=orders|lines x=price|cost y=count|units",
        code='''def $f($a):
    """Sum of $x times $y over the $a."""
    return sum($x * $y for $x, $y in $a)''',
        same=("$x * $y for => $y * $x for", "sum($x * $y for $x, $y in $a) => sum([$x * $y for $x, $y in $a])"),
        bugs=(
            "operator: $x * $y for => $x + $y for",
            "key: $x * $y for => $x * $x for",
            "extreme: sum( => max(",
            "slice: in $a) => in $a[1:])",
        ),
        cases="[([(2, 3), (1, 4)],), ([(2, 2)],), ([(5, 5), (0, 9)],), ([(0, 9), (3, 1)],), ([(10, 2)],), ([(0, 0)],)]",
        says=("The total of an order is wrong.", "Customers see a wrong sum on the bill."),
    ),
    Family(
        name="longest",
        topic="text",
        words="f=longest|longest_of|widest a=WORDS",
        code='''def $f($a):
    """The longest of the $a."""
    return max($a, key=len)''',
        same=("max($a, key=len) => sorted($a, key=len)[-1]", "max($a, key=len) => max($a, key=lambda s: len(s))"),
        bugs=(
            "extreme: max($a, key=len) => min($a, key=len)",
            "call: max($a, key=len) => max($a)",
            "key: max($a, key=len) => $a[-1]",
            "key: max($a, key=len) => sorted($a, key=len)[0]",
        ),
        cases=(
            "[(['a', 'bcd'],), (['zz', 'y'],), (['m'],), (['abc', 'de', 'f'],), (['b', 'aaa', 'cc'],), (['q', 'qq'],)]"
        ),
        says=("The wrong one of the $a is chosen.", "The column gets a wrong width."),
    ),
)

PAIRS: tuple[Pair, ...] = (
    Pair(
        name="bounds",
        topic="number",
        words=(
            "f=last_row|end_row|final_row g=row_count|rows_in|span h=page_rows|rows_shown|visible_rows "
            "a=start|first b=size|n c=lo|low d=hi|high"
        ),
        code=(
            '''def $f($a, $b):
    """Where a page of $b rows from $a ends."""
    return $a + $b''',
            '''def $g($c, $d):
    """Number of rows from $c to $d."""
    return $d - $c + 1''',
            '''def $h($a, $b):
    """Rows shown on the page of $b rows from $a."""
    return $g($a, $f($a, $b))''',
        ),
        flips=("return $a + $b => return $a + $b - 1", "return $d - $c + 1 => return $d - $c"),
        same=(("return $a + $b => return $b + $a",), ("return $d - $c => return -$c + $d",)),
        wrong=(
            "return $g($a, $f($a, $b)) => return $b",
            "return $g($a, $f($a, $b)) => return $g($a + 1, $f($a, $b))",
            "return $a + $b => return $a - $b",
            "return $d - $c => return $c - $d",
        ),
        cases=(
            "[(0, 5), (3, 4), (10, 2), (1, 1)]",
            "[(2, 5), (0, 3), (4, 4), (1, 9)]",
            "[(0, 5), (2, 3), (7, 1), (4, 6)]",
        ),
        says=("A page shows one row too many or too few.", "The number of rows on a page is off by one."),
    ),
    Pair(
        name="places",
        topic="list",
        words=(
            "f=place_of|number_of|slot g=entry_at|item_at|fetch h=find_entry|find_item|search a=ITEMS "
            "b=wanted|target|key c=n|place|spot"
        ),
        code=(
            '''def $f($a, $b):
    """Place of $b among the $a."""
    return $a.index($b)''',
            '''def $g($a, $c):
    """The one of the $a at place $c."""
    return $a[$c - 1]''',
            '''def $h($a, $b):
    """Look $b up among the $a and return it."""
    return $g($a, $f($a, $b))''',
        ),
        flips=("return $a.index($b) => return $a.index($b) + 1", "return $a[$c - 1] => return $a[$c]"),
        same=(("return $a.index($b) => return list($a).index($b)",), ("return $a[$c] => return list($a)[$c]",)),
        wrong=(
            "return $g($a, $f($a, $b)) => return $b",
            "return $g($a, $f($a, $b)) => return $g($a, $f($a, $b) + 1)",
            "$a.index($b) => $a.count($b)",
            "return $a[$c => return $a[-$c",
        ),
        cases=(
            "[(['a', 'b', 'c'], 'b'), (['d', 'e'], 'd'), (['x', 'y', 'z'], 'z')]",
            "[(['a', 'b', 'c'], 1), (['d', 'e', 'f'], 2), (['x', 'y'], 1)]",
            "[(['a', 'b', 'c'], 'b'), (['d', 'e', 'f'], 'e'), (['k', 'l'], 'k'), (['m', 'n', 'o'], 'n')]",
        ),
        says=("The search returns the neighbour.", "I get another entry than the one I look for."),
    ),
    Pair(
        name="percent",
        topic="number",
        words=(
            "f=tax_rate|fee_rate|rate_for g=apply_rate|charge|part_of h=tax_due|fee_due|amount_due "
            "a=percent|level|points b=amount|price|total c=rate|factor"
        ),
        code=(
            '''def $f($a):
    """Rate that belongs to $a."""
    return $a''',
            '''def $g($b, $c):
    """What $c takes of the $b."""
    return $b * $c''',
            '''def $h($b, $a):
    """Due for the $b at $a percent."""
    return $g($b, $f($a))''',
        ),
        flips=("return $a => return $a / 100", "return $b * $c => return $b * $c / 100"),
        same=((), ("return $b * $c => return $c * $b",)),
        wrong=(
            "return $g($b, $f($a)) => return $g($b, $f($a)) / 10",
            "return $g($b, $f($a)) => return $g($f($a), $b) + 1",
            "$b * $c => $b + $c",
            "return $a => return 1 - $a",
        ),
        cases=(
            "[(50,), (25,), (0,), (75,)]",
            "[(8, 0.5), (200, 0.25), (0, 3), (16, 2)]",
            "[(200, 50), (400, 25), (0, 50), (80, 75)]",
        ),
        says=("The amount due is wrong by a factor of 100.", "The fee is far from what it should be."),
    ),
    Pair(
        name="ranking",
        topic="list",
        words="f=ordered|arranged|in_order g=winner|leader|chosen h=best_of|pick_best|champion a=NUMBERS b=ITEMS",
        code=(
            '''def $f($a):
    """The $a in order."""
    return sorted($a)''',
            '''def $g($b):
    """The one of the ordered $b that wins."""
    return $b[0]''',
            '''def $h($a):
    """The largest of the $a."""
    return $g($f($a))''',
        ),
        flips=("return sorted($a) => return sorted($a)[::-1]", "return $b[0] => return $b[-1]"),
        same=(("return sorted($a)[::-1] => return sorted($a, reverse=True)",), ()),
        wrong=(
            "return $g($f($a)) => return max($a)",
            "return $g($f($a)) => return $f($a)",
            "return $b[ => return $b[2 + ",
            "return sorted($a) => return list($a)",
        ),
        cases=(
            "[([1, 3, 2],), ([5, 4],), ([6],), ([],), ([2, 9, 4],)]",
            "[([1, 2],), ([7, 5, 3],), ([8],)]",
            "[([1, 3, 2],), ([4, 9],), ([7],), ([6, 2, 8],)]",
        ),
        says=("The wrong one wins.", "The best entry is not the one that is returned."),
    ),
    Pair(
        name="trend",
        topic="number",
        words=(
            "f=change|shift|move g=word_for|label_of|name_of h=trend|direction|describe a=old|before "
            "b=new|after c=step|amount"
        ),
        code=(
            '''def $f($a, $b):
    """Difference of $a and $b."""
    return $b - $a''',
            '''def $g($c):
    """Word for a $c."""
    return "up" if $c < 0 else "down"''',
            '''def $h($a, $b):
    """Say whether it goes up or down from $a to $b."""
    return $g($f($a, $b))''',
        ),
        flips=("return $b - $a => return $a - $b", 'return "up" if $c < 0 => return "up" if $c > 0'),
        same=((), ('"up" if $c < 0 => "up" if 0 > $c', '"up" if $c > 0 => "up" if 0 < $c')),
        wrong=(
            "return $g($f($a, $b)) => return $g($f($b, $a))",
            "return $g($f($a, $b)) => return $g($a)",
            'else "down" => else "up"',
            'return "up" if => return "down" if',
        ),
        cases=("[(1, 4), (5, 2), (3, 3)]", "[(2,), (-3,), (6,)]", "[(1, 4), (5, 2), (0, 9), (8, 7)]"),
        says=("Growth is reported the wrong way round.", "The arrow on the chart points the wrong way."),
    ),
    Pair(
        name="separator",
        topic="text",
        words=(
            "f=make_tag|pack|encode g=read_tag|unpack|decode h=copy_tag|round_trip|echo a=name|left "
            "b=code|right c=tag|text w=-|/ v=:|_"
        ),
        code=(
            '''def $f($a, $b):
    """Put $a and $b into one text."""
    return $a + "$w" + $b''',
            '''def $g($c):
    """Both parts of a $c."""
    return $c.split("$v")''',
            '''def $h($a, $b):
    """Pack $a and $b, then take them apart again."""
    return $g($f($a, $b))''',
        ),
        flips=('$a + "$w" + $b => $a + "$v" + $b', '$c.split("$v") => $c.split("$w")'),
        same=((), ()),
        wrong=(
            "return $g($f($a, $b)) => return [$a, $b]",
            'return $a + " => return $b + "',
            "$c.split( => $c.strip(",
            "return $c.split( => return $c.rpartition(",
        ),
        cases=(
            "[('a', 'b'), ('x', '1')]",
            "[('a' + w + 'b',), ('c' + v + 'd',), ('e',)]",
            "[('a', 'b'), ('x', '1'), ('k', 'v')]",
        ),
        says=("Packing and reading do not fit together.", "A text does not come back in two parts."),
    ),
    Pair(
        name="last_day",
        topic="number",
        words=(
            "f=end_day|last_day|stop_day g=days|day_list|all_days h=plan|schedule|booking a=first|start "
            "b=n|count c=low|lo d=high|hi"
        ),
        code=(
            '''def $f($a, $b):
    """Where $b days from $a end."""
    return $a + $b''',
            '''def $g($c, $d):
    """List the days from $c to $d."""
    return list(range($c, $d + 1))''',
            '''def $h($a, $b):
    """The $b days that start with $a."""
    return $g($a, $f($a, $b))''',
        ),
        flips=("return $a + $b => return $a + $b - 1", "range($c, $d + 1) => range($c, $d)"),
        same=(
            ("return $a + $b => return $b + $a",),
            ("list(range($c, $d + 1)) => [*range($c, $d + 1)]", "list(range($c, $d)) => [*range($c, $d)]"),
        ),
        wrong=(
            "return $g($a, $f($a, $b)) => return $g($a, $b)",
            "return $g($a, $f($a, $b)) => return $g($a, $f($a, $b))[:$b]",
            "return $a + $b => return $a - $b",
            "range($c, $d => range($c + 1, $d",
        ),
        cases=("[(1, 3), (5, 2), (0, 4)]", "[(1, 3), (4, 4), (2, 6)]", "[(1, 3), (5, 2), (8, 1), (0, 4)]"),
        says=("A plan has one day too many or too few.", "The booking does not have the number of days I ask for."),
    ),
    Pair(
        name="filter",
        topic="list",
        words=(
            "f=mark_of|flag_for|sign_of g=select|keep|chosen_ones h=total_kept|sum_kept|kept_total "
            "a=value|number b=NUMBERS c=marks|flags x=LOOP y=OTHER k=10|20|50"
        ),
        code=(
            '''def $f($a):
    """Mark of the $a, which $k decides."""
    return $a >= $k''',
            '''def $g($b, $c):
    """Pick from the $b by their $c."""
    return [$x for $x, $y in zip($b, $c) if $y]''',
            '''def $h($b):
    """Sum of the $b below $k."""
    return sum($g($b, [$f($x) for $x in $b]))''',
        ),
        flips=("return $a >= $k => return $a < $k", "if $y] => if not $y]"),
        same=(("$a >= $k => $k <= $a", "$a < $k => $k > $a"), ()),
        wrong=(
            "return sum( => return sum($b) - sum(",
            "return sum($g($b, [$f($x) for $x in $b])) => return sum($x for $x in $b if $x < $k)",
            "return [$x for => return [0 for",
            "return $a => return -$a",
        ),
        cases=(
            "[(k,), (k - 1,), (0,), (k + 5,)]",
            "[([1, 2], [True, False]), ([3, 4, 5], [False, True, True]), ([], [])]",
            "[([1, k],), ([k + 2, 3, 4],), ([],), ([k, k + 1],)]",
        ),
        says=("The wrong $b are summed.", "The sum counts the high $b and not the low ones."),
    ),
    Pair(
        name="entries",
        topic="table",
        words=(
            "f=make_entry|new_entry|entry g=amount_in|value_in|worth h=amount_for|cost_for|price_for "
            "a=name|item|label b=amount|price|cost c=pair|row|line"
        ),
        code=(
            '''def $f($a, $b):
    """Put $a and $b into one entry."""
    return ($a, $b)''',
            '''def $g($c):
    """The number in a $c."""
    return $c[0]''',
            '''def $h($a, $b):
    """Twice the $b of an entry for $a."""
    return 2 * $g($f($a, $b))''',
        ),
        flips=("return ($a, $b) => return ($b, $a)", "return $c[0] => return $c[1]"),
        same=(
            ("return ($a, $b) => return $a, $b", "return ($b, $a) => return $b, $a"),
            ("return $c[1] => return $c[-1]",),
        ),
        wrong=(
            "return 2 * $g => return $g",
            "return 2 * $g($f($a, $b)) => return 2 * $b",
            "return $c[ => return $c[2 - ",
            "return ( => return 2 * (",
        ),
        cases=("[('a', 3), ('b', 7)]", "[(('a', 3),), ((4, 'b'),), ((5, 6),)]", "[('a', 3), ('b', 7), ('c', 10)]"),
        says=("I get text where a number should be.", "The name is taken for the amount."),
    ),
    Pair(
        name="units",
        topic="number",
        words=(
            "f=elapsed|time_spent|duration g=speed_of|pace|rate_of h=speed|run_speed|trip_speed "
            "a=start|begin b=stop|finish c=meters|way|dist d=time|span_of"
        ),
        code=(
            '''def $f($a, $b):
    """Time that lies between $a and $b."""
    return $b - $a''',
            '''def $g($c, $d):
    """How fast $c is done in $d."""
    return $c / $d''',
            '''def $h($c, $a, $b):
    """The $c in one second, between $a and $b milliseconds."""
    return $g($c, $f($a, $b))''',
        ),
        flips=("return $b - $a => return ($b - $a) / 1000", "return $c / $d => return $c / $d * 1000"),
        same=((), ("return $c / $d => return 1 / $d * $c",)),
        wrong=(
            "return $g($c, $f($a, $b)) => return $g($c, $f($b, $a))",
            "return $g($c, $f($a, $b)) => return $c",
            "return $c / $d => return $d / $c",
            "$b - $a => $b + $a",
        ),
        cases=(
            "[(0, 1000), (500, 1000), (0, 4000)]",
            "[(8, 2), (500, 250), (0, 4)]",
            "[(8, 0, 1000), (4, 500, 1000), (16, 0, 2000)]",
        ),
        says=("The speed is wrong by a factor of 1000.", "The number of meters in a second cannot be right."),
    ),
    Pair(
        name="suffix",
        topic="text",
        words=(
            "f=file_name|base_name|name_for g=full_path|path_to|place_for h=report_path|export_path|log_path "
            "a=name|title|label b=folder|root|home c=file|entry w=.txt|.csv|.log"
        ),
        code=(
            '''def $f($a):
    """Name of the file for $a."""
    return $a + "$w"''',
            '''def $g($b, $c):
    """Where $c lies in $b."""
    return $b + "/" + $c + "$w"''',
            '''def $h($b, $a):
    """Path in $b of the "$w" file for $a."""
    return $g($b, $f($a))''',
        ),
        flips=('return $a + "$w" => return $a', 'return $b + "/" + $c + "$w" => return $b + "/" + $c'),
        same=((), ('$b + "/" + $c => "/".join([$b, $c])',)),
        wrong=(
            'return $g($b, $f($a)) => return $b + "/" + $a + "$w"',
            "return $g($b, $f($a)) => return $g($f($a), $b)",
            'return $b + "/" => return $b + "-"',
            "return $a => return $a.upper()",
        ),
        cases=("[('a',), ('plan',)]", "[('x', 'a'), ('tmp', 'b')]", "[('x', 'a'), ('tmp', 'plan'), ('out', 'b')]"),
        says=("The path of a file has a wrong ending.", "The file is not found, its path looks odd."),
    ),
    Pair(
        name="signs",
        topic="number",
        words=(
            "f=spent|outgo|expense g=add_entry|book|post h=balance|left_over|remaining a=amount|cost|price "
            "b=total|funds|cash c=entry|change"
        ),
        code=(
            '''def $f($a):
    """Entry for a paid $a."""
    return $a''',
            '''def $g($b, $c):
    """Enter $c into the $b."""
    return $b + $c''',
            '''def $h($b, $a):
    """What is left of the $b after $a is paid."""
    return $g($b, $f($a))''',
        ),
        flips=("return $a => return -$a", "return $b + $c => return $b - $c"),
        same=((), ("return $b + $c => return $c + $b", "return $b - $c => return -$c + $b")),
        wrong=(
            "return $g($b, $f($a)) => return $g($f($a), $b)",
            "return $g($b, $f($a)) => return $b - $a",
            "return $b => return 2 * $b",
            "return $a => return abs($a) + 1",
        ),
        cases=("[(5,), (0,), (12,)]", "[(10, 4), (3, 0), (0, 6)]", "[(10, 4), (8, 0), (20, 15), (5, 5)]"),
        says=("Paying makes the balance grow.", "The balance after paying has the wrong sign."),
    ),
)

RIDDLES: tuple[Riddle, ...] = (
    Riddle(
        name="whole",
        topic="number",
        words="f=per_box|per_team|per_day a=total|amount b=boxes|teams",
        code='''def $f($a, $b):
    """Share of $a for each of the $b."""
    return $a / $b''',
        types=(
            "$a / $b => $a // $b",
            "$a / $b => -(-$a // $b)",
            "$a / $b => round($a / $b)",
            "$a / $b => max(1, $a // $b)",
        ),
        wrong=("$a / $b => $a % $b", "$a / $b => $b // $a", "$a / $b => $a * $b"),
        cases="[(10, 5), (7, 2), (11, 4), (9, 4), (1, 3), (5, 3), (2, 9), (12, 4), (6, 1)]",
        says=(
            "`$f` in `$p` gives fractions: `$q` is $r. Please return a whole number, nobody can use a part of one.",
            "I need whole numbers from `$f`. At the moment `$q` in `$p` returns $r, which makes no sense for us.",
        ),
    ),
    Riddle(
        name="empty",
        topic="list",
        words="f=mean_score|mean_size|mean_cost|mean_time|mean_age|mean_pay a=NUMBERS",
        code='''def $f($a):
    """Mean of the $a."""
    return sum($a) / len($a)''',
        types=(
            "sum($a) / len($a) => sum($a) / len($a) if $a else 0",
            "sum($a) / len($a) => sum($a) / len($a) if $a else None",
            "sum($a) / len($a) => sum($a) / len($a) if $a else -1",
            "sum($a) / len($a) => sum($a) / len($a) if $a else 1",
        ),
        wrong=(
            "sum($a) / len($a) => sum($a) / (len($a) + 1)",
            "sum($a) / len($a) => sum($a) // len($a)",
            "sum($a) / len($a) => max($a) / len($a)",
        ),
        cases="[([2, 4],), ([1, 2],), ([],), ([5],), ([8, 1, 3],)]",
        says=(
            "`$f` in `$p` crashes for an empty list: `$q` $r. It should return a sensible value instead of an error.",
            "The page breaks when there is no data, because `$q` $r. Please make `$f` in `$p` cope with it.",
        ),
    ),
    Riddle(
        name="ends",
        topic="number",
        words="f=in_window|is_open|on_shift a=hour|day b=start|begin c=end|stop",
        code='''def $f($a, $b, $c):
    """True if $a is between $b and $c."""
    return $a > $b - 1''',
        types=(
            "$a > $b - 1 => $b <= $a < $c",
            "$a > $b - 1 => $b <= $a <= $c",
            "$a > $b - 1 => $b < $a < $c",
            "$a > $b - 1 => $b < $a <= $c",
        ),
        wrong=("$a > $b - 1 => $a < $c", "$a > $b - 1 => $c < $a < $b", "$a > $b - 1 => $a == $b"),
        cases="[(5, 1, 9), (1, 1, 9), (9, 1, 9), (12, 1, 9), (0, 2, 6), (2, 2, 6), (6, 2, 6), (4, 2, 6), (8, 2, 6)]",
        says=(
            "`$f` in `$p` never looks at the end: `$q` is $r. It must be True only between both of them.",
            "After the end `$f` still says True, e.g. `$q` in `$p` is $r. Only what lies between should count.",
        ),
    ),
    Riddle(
        name="missing",
        topic="table",
        words="f=price_of|stock_of|size_of a=TABLE b=name|item",
        code='''def $f($a, $b):
    """Entry for $b in the $a."""
    return $a[$b]''',
        types=(
            "$a[$b] => $a.get($b)",
            "$a[$b] => $a.get($b, 0)",
            '$a[$b] => $a.get($b, "")',
            "$a[$b] => $a.get($b, -1)",
            "$a[$b] => $a.get($b, $b)",
        ),
        wrong=("$a[$b] => $a.get($b, 1)", "$a[$b] => $a.get(0, $b)", "$a[$b] => list($a)[0]"),
        cases="[({'a': 3}, 'a'), ({}, 'b'), ({'c': 4}, 'd'), ({'x': 8, 'y': 6}, 'y'), ({'q': 9}, 'q')]",
        says=(
            "`$f` in `$p` fails for an unknown name: `$q` $r. It should not raise, give back a neutral value.",
            "Unknown names stop the program, `$q` $r. Could `$f` in `$p` return a harmless default?",
        ),
    ),
    Riddle(
        name="letters",
        topic="text",
        words="f=label|caption|heading|legend|banner a=name|word",
        code='''def $f($a):
    """The $a as it is shown."""
    return $a''',
        types=(
            "return $a => return $a.title()",
            "return $a => return $a.capitalize()",
            "return $a => return $a.upper()",
            "return $a => return $a.lower()",
        ),
        wrong=("return $a => return $a.swapcase()", "return $a => return $a.strip()", "return $a => return $a[::-1]"),
        cases="[('red BOX',), ('',), ('Big dog',), ('A b',), ('12',), ('one TWO x',)]",
        says=(
            "Labels look untidy: `$q` from `$p` gives $r. Please let `$f` use one style of letters.",
            "`$f` in `$p` leaves the letters as typed, so `$q` is $r. We want a uniform look.",
        ),
    ),
    Riddle(
        name="shorten",
        topic="text",
        words="f=shorten|preview|teaser|abstract a=TEXT k=5|6",
        code='''def $f($a):
    """The $a for a column of $k letters."""
    return $a''',
        types=(
            "return $a => return $a[:$k]",
            'return $a => return $a if len($a) <= $k else $a[:$k] + "..."',
            'return $a => return $a if len($a) <= $k else $a[:$k - 3] + "..."',
            "return $a => return $a[-$k:]",
            'return $a => return $a if len($a) <= $k else $a[:$k - 1] + "."',
        ),
        wrong=("return $a => return $a[$k:]", "return $a => return $a[:1]", "return $a => return $a[:-$k]"),
        cases="[('abcdefghij',), ('ab',), ('',), ('lanternfish',), ('abcdefghijklmn',), ('xyz',)]",
        says=(
            "Long texts break the table: `$q` from `$p` gives $r. `$f` should make them fit.",
            "`$f` in `$p` does not shorten long text, e.g. `$q` is $r. Please cut it so that it fits.",
        ),
    ),
    Riddle(
        name="glue",
        topic="text",
        words="f=one_line|as_text|listing|summary|word_row a=WORDS",
        code='''def $f($a):
    """The $a in one line."""
    return "".join($a)''',
        types=(
            '"".join($a) => ", ".join($a)',
            '"".join($a) => " ".join($a)',
            '"".join($a) => ",".join($a)',
            '"".join($a) => "-".join($a)',
            '"".join($a) => "; ".join($a)',
            '"".join($a) => "/".join($a)',
        ),
        wrong=(
            '"".join($a) => "".join(sorted($a))',
            '"".join($a) => "".join($a[::-1])',
            '"".join($a) => "".join($a[1:])',
        ),
        cases="[(['a', 'b'],), ([],), (['c'],), (['d', 'a', 'e'],), (['z', 'y'],)]",
        says=(
            "`$f` in `$p` runs the words together: `$q` is $r. There should be something between them.",
            "I cannot read the output of `$f`. `$q` in `$p` returns $r, please separate the words.",
        ),
    ),
    Riddle(
        name="ties",
        topic="text",
        words="f=main_word|key_word|top_word|big_word|lead_word a=WORDS",
        code='''def $f($a):
    """The longest of the $a."""
    return $a[0]''',
        types=(
            "$a[0] => max($a, key=len)",
            "$a[0] => max($a[::-1], key=len)",
            "$a[0] => min($a, key=lambda s: (-len(s), s))",
            "$a[0] => max($a, key=lambda s: (len(s), s))",
        ),
        wrong=("$a[0] => min($a, key=len)", "$a[0] => $a[-1]", "$a[0] => min($a)"),
        cases=(
            "[(['a', 'bcd'],), (['zz', 'y'],), (['m'],), (['q', 'dd', 'bb', 'cc'],), "
            "(['u', 'ab', 'xy', 'aa', 'st'],), (['abc', 'd'],)]"
        ),
        says=(
            "`$f` in `$p` just takes the first word: `$q` is $r. It must be the longest one.",
            "The longest word is wanted, but `$q` in `$p` returns $r. Please correct `$f`.",
        ),
    ),
)

# How often each hidden type is the wanted one, cut to the number of types and scaled to 1.
TYPE_SHARES = (0.40, 0.25, 0.15, 0.10, 0.06, 0.04)
