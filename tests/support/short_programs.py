"""Short programs in many styles, and short texts on programming, for tests that tell one from the other."""

PROGRAMS = {
    "python_docstring": '''\
def median(values):
    """Return the middle one of the sorted values.

    Where there are two, it is their mean. The values are not changed, and may come in any order.

    >>> median([3, 1, 2])
    2
    """
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
''',
    "python_chinese": """\
# 读取配置文件，并返回其中的用户名
import json


def 用户名(路径):
    # 文件必须是 UTF-8 编码
    with open(路径, encoding="utf-8") as 文件:
        数据 = json.load(文件)
    # 没有名字时返回空字符串
    return 数据.get("name", "")
""",
    "sql": """\
-- Customers who bought nothing since spring.
SELECT c.id, c.name, MAX(o.placed_on) AS last_order
FROM customers AS c
LEFT JOIN orders AS o ON o.customer_id = c.id
WHERE c.is_active = TRUE
GROUP BY c.id, c.name
HAVING MAX(o.placed_on) < '2024-03-01';
""",
    "yaml": """\
version: 2
services:
  web:
    image: "registry.example/web:1.4"
    ports:
      - "8080:80"
    environment:
      LOG_LEVEL: info
    depends_on: [database]
""",
    "makefile": """\
CC = gcc
OBJECTS = main.o reader.o

all: reader

reader: $(OBJECTS)
\t$(CC) -o $@ $^

.PHONY: clean
clean:
\trm -f $(OBJECTS) reader
""",
    "diff": """\
--- a/reader.py
+++ b/reader.py
@@ -10,7 +10,7 @@ def lines(path):
     with open(path) as file:
-        return file.read().split("\\n")
+        return file.read().splitlines()


 def words(line):
""",
    "css": """\
/* The page and its heading. */
body {
  margin: 0 auto;
  max-width: 40em;
  font: 16px/1.5 serif;
}

h1:hover { color: #c33; }
""",
    "html": """\
<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <title>Orders</title>
    <link rel="stylesheet" href="style.css">
  </head>
  <body>
    <ul id="orders"></ul>
    <script src="orders.js"></script>
  </body>
</html>
""",
    "r": """\
# Mean height of the plants in each pot.
plants <- read.csv("plants.csv")
heights <- aggregate(height ~ pot, data = plants, FUN = mean)
plot(heights$pot, heights$height, type = "b")
print(summary(lm(height ~ water, data = plants)))
""",
    "lisp": """\
;;; Flatten a list of lists.
(defun flatten (tree)
  "Return the atoms of TREE in order."
  (cond ((null tree) nil)
        ((atom tree) (list tree))
        (t (append (flatten (car tree))
                   (flatten (cdr tree))))))
""",
    "haskell": """\
module Primes (primes) where

-- | All primes, by trial division.
primes :: [Int]
primes = sieve [2 ..]
  where
    sieve (p : xs) = p : sieve [x | x <- xs, x `mod` p /= 0]
    sieve [] = []
""",
    "shell": """\
#!/bin/sh
# Copy the photos of the day to the archive.
set -eu
today=$(date +%F)
mkdir -p "$HOME/archive/$today"
for photo in /media/card/*.jpg; do
    cp "$photo" "$HOME/archive/$today/"
done
echo "copied to $today"
""",
    "javascript": """\
// Sum the prices of the chosen items.
export function total(items, isChosen) {
  return items
    .filter((item) => isChosen(item.id))
    .reduce((sum, item) => sum + item.price, 0);
}
""",
    "typescript": """\
interface Order {
  id: number;
  items: string[];
  note?: string;
}

const first = (orders: Order[]): Order | undefined => orders[0];
""",
    "c": """\
#include <stdio.h>

/* Print the arguments, one on each line. */
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        puts(argv[i]);
    return 0;
}
""",
    "java": """\
package org.example.shop;

/** An item that can be bought. */
public class Item {
    private final String name;

    public Item(String name) {
        this.name = name;
    }
}
""",
    "go": """\
package main

import "fmt"

// add returns the sum of a and b.
func add(a, b int) int {
\treturn a + b
}

func main() { fmt.Println(add(1, 2)) }
""",
    "rust": """\
/// The largest value, or None if there is none.
pub fn largest(values: &[i32]) -> Option<i32> {
    let mut best = *values.first()?;
    for &value in values {
        if value > best {
            best = value;
        }
    }
    Some(best)
}
""",
    "ruby": """\
# A stack of plates.
class Stack
  def initialize
    @plates = []
  end

  def push(plate)
    @plates << plate
    self
  end
end
""",
    "perl": """\
use strict;
use warnings;

my %seen;
while (my $line = <STDIN>) {
    chomp $line;
    print "$line\\n" unless $seen{$line}++;
}
""",
    "lua": """\
-- Returns the sum of a list.
local function sum(list)
  local total = 0
  for _, value in ipairs(list) do
    total = total + value
  end
  return total
end
""",
    "toml": """\
[project]
name = "reader"
version = "0.3.1"
dependencies = ["numpy>=1.26", "click"]

[tool.ruff]
line-length = 120
""",
    "dockerfile": """\
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "-m", "reader"]
""",
    "json": """\
{
  "name": "reader",
  "private": true,
  "scripts": {"test": "node --test"},
  "dependencies": {"left-pad": "^1.3.0"}
}
""",
}

TEXTS = {
    "manual": """\
The with statement
==================

The statement opens a context and closes it when the block ends, whatever happens within.
A file, for example, is closed even where an exception is raised while it is read:

    with open(path) as file:
        print(file.read())

Without it the programmer has to remember to call close, which is easily forgotten.
""",
    "readme": """\
# reader

A small library that reads files of records. It needs Python 3.10.

```
pip install reader
python -m reader data.csv --output out.json
```

Records are read one at a time, so that memory stays small. See `docs/usage.md` for all options.
""",
    "man_page": """\
NAME
       sort - sort lines of text files

SYNOPSIS
       sort [OPTION]... [FILE]...

DESCRIPTION
       Write sorted concatenation of all FILE(s) to standard output. With no FILE, or when FILE is -, read standard
       input. Mandatory arguments to long options are mandatory for short options too.

       -b, --ignore-leading-blanks
              ignore leading blanks
""",
    "recipe": """\
Pancakes (serves 4)

- 250 g flour
- 3 eggs
- 1/2 l milk
- salt, sugar, butter

1. Mix flour, salt and eggs.
2. Add the milk slowly (no lumps!).
3. Fry in butter: 2 minutes on each side.
""",
    "table": """\
| city | people | since |
|------|--------|-------|
| Bern | 134,000 | 1191 |
| Thun | 43,000 | 1264 |
""",
    "mail": """\
From: Ann <ann@example.org>
To: list@example.org
Subject: Re: [users] crash on start

> It crashes when I run it with -v. Any idea?

Which version is it? In 2.1 (see the notes) a missing file was not handled; 2.2 says what is wrong.
""",
    "verse": """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate;
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
""",
    "chat": "A: hi :) how r u?\nB: fine!! u?\nA: ok... :/ see u @ 8 (maybe)\nB: k ;-)",
    "chinese_manual": "使用 `git commit` 命令可以提交修改。如果没有给出 -m 选项，Git 会打开编辑器（见 core.editor）。"
    "提交之前，请先用 git diff --cached 检查一遍。",
    "references": '[1] A. Vaswani et al., "Attention is all you need", NeurIPS 30 (2017), pp. 5998-6008.\n'
    "[2] D. P. Kingma & J. Ba, arXiv:1412.6980 (2014).\n",
}
